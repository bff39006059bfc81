//! NVRTC, as far as this crate needs it, by its C interface.
//!
//! `cudarc` has bindings too, but they take the first library that any of their names gives and panic where there is none.
//! Here several NVRTCs may lie side by side, and the one is taken that the driver understands.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result, Unavailable};

/// Names of the library, preferred first.
#[cfg(windows)]
const NAMES: &[&str] = &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
#[cfg(not(windows))]
const NAMES: &[&str] = &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];

const SUCCESS: c_int = 0;
const COMPILATION_FAILED: c_int = 6;

type ProgramHandle = *mut c_void;
type Status = c_int;

/// One NVRTC library. The signatures are those of `nvrtc.h`.
pub(super) struct Nvrtc {
    get_version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    get_error_string: unsafe extern "C" fn(Status) -> *const c_char,
    get_number_of_architectures: unsafe extern "C" fn(*mut c_int) -> Status,
    get_architectures: unsafe extern "C" fn(*mut c_int) -> Status,
    create_program: unsafe extern "C" fn(
        *mut ProgramHandle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    destroy_program: unsafe extern "C" fn(*mut ProgramHandle) -> Status,
    compile_program: unsafe extern "C" fn(ProgramHandle, c_int, *const *const c_char) -> Status,
    cubin: Output,
    ptx: Output,
    log: Output,
}

/// A pair of functions that give the size of something and the thing.
struct Output {
    size_name: &'static str,
    name: &'static str,
    size: unsafe extern "C" fn(ProgramHandle, *mut usize) -> Status,
    get: unsafe extern "C" fn(ProgramHandle, *mut c_char) -> Status,
}

/// What [`Nvrtc::compile`] gives.
pub(super) enum Code {
    /// Machine code.
    Cubin,
    /// Intermediate code.
    Ptx,
}

/// Why a program did not compile.
pub(super) enum Failure {
    /// The source is wrong: the compiler's log.
    Source(String),
    /// NVRTC failed otherwise.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Other(error)
    }
}

impl Nvrtc {
    /// The first NVRTC that is not newer than a driver of this CUDA version, if there is a driver.
    pub(super) fn find(driver: Option<(u32, u32)>) -> std::result::Result<&'static Self, Unavailable> {
        static ALL: OnceLock<Vec<Nvrtc>> = OnceLock::new();
        let all = ALL.get_or_init(|| NAMES.iter().filter_map(|&name| Nvrtc::load(name)).collect());
        let Some(first) = all.first() else {
            return Err(Unavailable::NoNvrtc {
                tried: NAMES.iter().map(|&name| name.to_owned()).collect(),
            });
        };
        match driver {
            None => Ok(first),
            // A cubin runs on every driver of the same major version, and newer ones.
            Some(driver) => {
                all.iter()
                    .find(|nvrtc| nvrtc.version().0 <= driver.0)
                    .ok_or_else(|| Unavailable::NvrtcTooNew {
                        nvrtc: first.version(),
                        driver,
                    })
            }
        }
    }

    /// The library of this name, if it is there and whole. It stays loaded.
    fn load(name: &str) -> Option<Self> {
        // SAFETY: this is NVIDIA's library, whose initialiser has no preconditions.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(name) }.ok()?));
        // SAFETY: each function is asked for by its name in `nvrtc.h` with its signature there.
        unsafe {
            let output = |name, size_name| {
                Some(Output {
                    size_name,
                    name,
                    size: symbol(library, size_name)?,
                    get: symbol(library, name)?,
                })
            };
            Some(Self {
                get_version: symbol(library, "nvrtcVersion")?,
                get_error_string: symbol(library, "nvrtcGetErrorString")?,
                get_number_of_architectures: symbol(library, "nvrtcGetNumSupportedArchs")?,
                get_architectures: symbol(library, "nvrtcGetSupportedArchs")?,
                create_program: symbol(library, "nvrtcCreateProgram")?,
                destroy_program: symbol(library, "nvrtcDestroyProgram")?,
                compile_program: symbol(library, "nvrtcCompileProgram")?,
                cubin: output("nvrtcGetCUBIN", "nvrtcGetCUBINSize")?,
                ptx: output("nvrtcGetPTX", "nvrtcGetPTXSize")?,
                log: output("nvrtcGetProgramLog", "nvrtcGetProgramLogSize")?,
            })
        }
    }

    /// Major and minor version.
    pub(super) fn version(&self) -> (u32, u32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are valid for a write. The call fails for no other reason.
        unsafe { (self.get_version)(&mut major, &mut minor) };
        (major as u32, minor as u32)
    }

    /// Compute capabilities, times ten, that it can compile for.
    pub(super) fn architectures(&self) -> Result<Vec<u32>> {
        let mut count = 0;
        // SAFETY: the pointer is valid for a write.
        let status = unsafe { (self.get_number_of_architectures)(&mut count) };
        self.check("nvrtcGetNumSupportedArchs", status)?;
        let mut architectures = vec![0; count as usize];
        // SAFETY: NVRTC writes as many numbers as it said there are.
        let status = unsafe { (self.get_architectures)(architectures.as_mut_ptr()) };
        self.check("nvrtcGetSupportedArchs", status)?;
        Ok(architectures
            .into_iter()
            .map(|architecture| architecture as u32)
            .collect())
    }

    /// Compiles a source with these options.
    pub(super) fn compile(
        &self,
        source: &str,
        options: &[String],
        code: Code,
    ) -> std::result::Result<Vec<u8>, Failure> {
        let program = Program::new(self, source)?;
        let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive; there are as many options as is said, each a C string that lives during the call.
        match unsafe { (self.compile_program)(program.handle, pointers.len() as c_int, pointers.as_ptr()) } {
            COMPILATION_FAILED => {
                let log = program.output(&self.log)?;
                let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
                return Err(Failure::Source(String::from_utf8_lossy(text).into_owned()));
            }
            status => self.check("nvrtcCompileProgram", status)?,
        }
        Ok(program.output(match code {
            Code::Cubin => &self.cubin,
            Code::Ptx => &self.ptx,
        })?)
    }

    fn check(&self, call: &'static str, status: Status) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: NVRTC gives a C string that is never freed, whatever the number.
        let message = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        Err(Error::Nvrtc {
            call,
            message: message.to_string_lossy().into_owned(),
        })
    }
}

/// # Safety
/// `F` is the type of the function that the library exports under this name.
unsafe fn symbol<F: Copy>(library: &'static Library, name: &str) -> Option<F> {
    // SAFETY: the caller's promise. The library is never unloaded.
    unsafe { library.get::<F>(name.as_bytes()) }
        .ok()
        .map(|function| *function)
}

/// Sources and options are this crate's own.
fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no zero byte")
}

/// An NVRTC program, destroyed with its owner.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: ProgramHandle,
}

impl<'a> Program<'a> {
    fn new(nvrtc: &'a Nvrtc, source: &str) -> Result<Self> {
        let source = c_string(source);
        let mut handle = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the source is a C string that lives during the call, which copies it; name and headers are optional.
        let status = unsafe { (nvrtc.create_program)(&mut handle, source.as_ptr(), none, 0, none.cast(), none.cast()) };
        nvrtc.check("nvrtcCreateProgram", status)?;
        Ok(Self { nvrtc, handle })
    }

    fn output(&self, output: &Output) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program is alive; the pointer is valid for a write.
        let status = unsafe { (output.size)(self.handle, &mut size) };
        self.nvrtc.check(output.size_name, status)?;
        let mut bytes = vec![0; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        let status = unsafe { (output.get)(self.handle, bytes.as_mut_ptr().cast()) };
        self.nvrtc.check(output.name, status)?;
        Ok(bytes)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is alive and nobody else has it. There is nothing to do about a failure.
        unsafe { (self.nvrtc.destroy_program)(&mut self.handle) };
    }
}
