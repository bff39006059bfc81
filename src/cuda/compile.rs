//! From a kernel's source to code for a device, through NVRTC.
//!
//! The result is a cubin for the device's own architecture. PTX would be refused by a driver older than NVRTC; a cubin is
//! taken by every driver of the same major version. PTX is the last resort, for a device that this NVRTC does not know.

use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys;

use super::disk_cache::{DiskCache, Key};
use super::kernel::Instantiation;
use super::probe;
use crate::error::{Error, Result};

/// Options that every kernel is compiled with: IEEE arithmetic, contracted only where the source says so.
pub const OPTIONS: [&str; 5] = [
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
];

/// What the driver gets: code for this architecture, or PTX to translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code.
    Cubin(u32),
    /// Intermediate code, which newer devices can run.
    Ptx(u32),
}

impl Target {
    /// The best that an NVRTC which knows the `supported` architectures can do for a device.
    ///
    /// Machine code runs on devices of the same major version and the same or a newer minor version.
    pub(super) fn choose(architecture: u32, supported: &[u32]) -> Option<Self> {
        let older = supported.iter().copied().filter(|&known| known <= architecture);
        let same_major = older.clone().filter(|known| known / 10 == architecture / 10).max();
        same_major.map(Target::Cubin).or_else(|| older.max().map(Target::Ptx))
    }

    fn option(self) -> String {
        match self {
            Target::Cubin(architecture) => format!("--gpu-architecture=sm_{architecture}"),
            Target::Ptx(architecture) => format!("--gpu-architecture=compute_{architecture}"),
        }
    }
}

/// A compiled kernel.
pub(super) struct Compiled {
    /// A cubin, or PTX with its closing zero byte.
    pub(super) image: Vec<u8>,
    /// Whether the disk cache had it.
    pub(super) from_disk: bool,
}

/// Compiles a kernel to machine code, for a device that need not be there: this takes NVRTC, but no driver.
///
/// What it compiles goes to `cache`, so that an image of a program can be shipped with its kernels compiled.
///
/// # Errors
/// [`Unavailable::NoNvrtc`](super::Unavailable::NoNvrtc); [`Error::Compile`] with NVRTC's log, also where this NVRTC does not
/// know the architecture.
pub fn compile_ahead(instantiation: &Instantiation, architecture: u32, cache: &DiskCache) -> Result<Vec<u8>> {
    compile(instantiation, architecture, cache).map(|compiled| compiled.image)
}

/// Compiles a kernel, or finds it in the cache.
pub(super) fn compile(instantiation: &Instantiation, architecture: u32, cache: &DiskCache) -> Result<Compiled> {
    let (major, minor) = probe::nvrtc_library_version()?;
    let target = Target::choose(architecture, &supported_architectures()?).ok_or_else(|| Error::Compile {
        kernel: instantiation.to_string(),
        architecture,
        log: format!("NVRTC {major}.{minor} knows no architecture up to sm_{architecture}"),
    })?;
    let options: Vec<String> = std::iter::once(target.option())
        .chain(OPTIONS.iter().map(|&option| option.to_owned()))
        .chain(instantiation.definitions())
        .collect();
    let source = instantiation.kernel.source();
    let version = format!("NVRTC {major}.{minor}");
    let key = Key::of(
        [source.hash, &version]
            .into_iter()
            .chain(options.iter().map(String::as_str)),
    );
    if let Some(image) = cache.read(&key) {
        return Ok(Compiled { image, from_disk: true });
    }
    let image = Program::new(source.text)?.compile(instantiation, architecture, target, &options)?;
    cache.write(&key, &image);
    Ok(Compiled {
        image,
        from_disk: false,
    })
}

/// Compute capabilities, times ten, that this NVRTC can compile for.
fn supported_architectures() -> Result<Vec<u32>> {
    let mut count = 0;
    // SAFETY: the pointer is valid for a write; NVRTC is there, or its version could not have been asked.
    let counted = unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) };
    check("nvrtcGetNumSupportedArchs", counted.result())?;
    let mut architectures = vec![0; count as usize];
    // SAFETY: NVRTC writes as many numbers as it said there are.
    let listed = unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()) };
    check("nvrtcGetSupportedArchs", listed.result())?;
    Ok(architectures
        .into_iter()
        .map(|architecture| architecture as u32)
        .collect())
}

fn check<T>(call: &'static str, result: std::result::Result<T, nvrtc::NvrtcError>) -> Result<T> {
    result.map_err(|error| Error::Nvrtc {
        call,
        message: format!("{:?}", error.0),
    })
}

/// An NVRTC program, destroyed with its owner.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: &str) -> Result<Self> {
        let source = std::ffi::CString::new(source).expect("kernel sources hold no zero byte");
        check("nvrtcCreateProgram", nvrtc::create_program(&source, None)).map(Program)
    }

    fn compile(
        &self,
        instantiation: &Instantiation,
        architecture: u32,
        target: Target,
        options: &[String],
    ) -> Result<Vec<u8>> {
        // SAFETY: the program is alive until `self` is dropped.
        match unsafe { nvrtc::compile_program(self.0, options) } {
            Err(nvrtc::NvrtcError(sys::nvrtcResult::NVRTC_ERROR_COMPILATION)) => {
                return Err(Error::Compile {
                    kernel: instantiation.to_string(),
                    architecture,
                    log: self.log(),
                });
            }
            other => check("nvrtcCompileProgram", other)?,
        }
        match target {
            Target::Cubin(_) => self.image("nvrtcGetCUBIN", sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
            Target::Ptx(_) => self.image("nvrtcGetPTX", sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
        }
    }

    fn image(
        &self,
        call: &'static str,
        size_of: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut std::ffi::c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program is alive and compiled; the pointer is valid for a write.
        check(call, unsafe { size_of(self.0, &mut size) }.result())?;
        let mut image = vec![0; size];
        // SAFETY: the buffer has the size that NVRTC asked for.
        check(call, unsafe { get(self.0, image.as_mut_ptr().cast()) }.result())?;
        Ok(image)
    }

    fn log(&self) -> String {
        // SAFETY: the program is alive.
        match unsafe { nvrtc::get_program_log(self.0) } {
            Ok(bytes) => bytes
                .iter()
                .map(|&byte| byte as u8)
                .take_while(|&byte| byte != 0)
                .map(char::from)
                .collect(),
            Err(error) => format!("(no log: {:?})", error.0),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is alive and nobody else has it. There is nothing to do about a failure.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}
