//! Is there a driver, a device, NVRTC? Answers, and never panics.
//!
//! `cudarc` loads the driver's library at the first call and panics where it finds none, so it is looked for here first.
//! Once found it stays loaded, and `cudarc` gets the same one.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::OnceLock;

use libloading::Library;

use super::nvrtc::Nvrtc;
use crate::error::{OLDEST_ARCHITECTURE, Unavailable};

/// The driver's library, as `cudarc` looks for it.
#[cfg(windows)]
const DRIVER: &[&str] = &["nvcuda.dll"];
#[cfg(not(windows))]
const DRIVER: &[&str] = &["libcuda.so", "libcuda.so.1"];

/// Whether [`Cuda`](crate::Cuda) can be used here: a driver, a device that is new enough, and an NVRTC that fits.
///
/// ```
/// match batchnorm_cuda::cuda::is_available() {
///     Ok(()) => println!("CUDA can be used"),
///     Err(reason) => println!("not here: {reason}"),
/// }
/// ```
///
/// # Errors
/// What is missing.
pub fn is_available() -> Result<(), Unavailable> {
    let driver = Driver::load()?;
    let verdicts: Vec<_> = (0..driver.device_count()?)
        .map(|ordinal| driver.check_age(ordinal))
        .collect();
    if !verdicts.iter().any(Result::is_ok) {
        return verdicts.into_iter().next().unwrap_or(Err(Unavailable::NoDevice));
    }
    Nvrtc::find(Some(driver.version()?)).map(|_| ())
}

/// Whether the device with this ordinal is there, and everything it needs.
pub(super) fn check_device(ordinal: usize) -> Result<(), Unavailable> {
    let driver = Driver::load()?;
    match driver.device_count()? {
        0 => Err(Unavailable::NoDevice),
        count if ordinal >= count => Err(Unavailable::NoSuchDevice { ordinal, count }),
        _ => {
            driver.check_age(ordinal)?;
            Nvrtc::find(Some(driver.version()?)).map(|_| ())
        }
    }
}

/// The NVRTC for this machine's driver.
pub(super) fn nvrtc() -> Result<&'static Nvrtc, Unavailable> {
    Nvrtc::find(Some(Driver::load()?.version()?))
}

/// The few functions of the driver that tell whether it can be used.
struct Driver {
    library: &'static Library,
}

impl Driver {
    fn load() -> Result<Self, Unavailable> {
        static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
        let library = LIBRARY
            .get_or_init(|| load_first(DRIVER))
            .as_ref()
            .ok_or_else(|| Unavailable::NoDriver {
                tried: owned_names(DRIVER),
            })?;
        let driver = Driver { library };
        const NO_DEVICE: u32 = 100;
        // SAFETY: cuInit takes one unsigned int, which must be 0.
        match driver.call("cuInit", |function: unsafe extern "C" fn(c_uint) -> c_uint| unsafe {
            function(0)
        }) {
            Err(Unavailable::DriverFailed { code: NO_DEVICE, .. }) => Err(Unavailable::NoDevice),
            other => other.map(|()| driver),
        }
    }

    fn device_count(&self) -> Result<usize, Unavailable> {
        self.number("cuDeviceGetCount").map(|count| count as usize)
    }

    /// Refuses a device that the kernels are not compiled for.
    fn check_age(&self, ordinal: usize) -> Result<(), Unavailable> {
        const MAJOR: c_int = 75;
        const MINOR: c_int = 76;
        type DeviceGet = unsafe extern "C" fn(*mut c_int, c_int) -> c_uint;
        type DeviceGetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_uint;
        type DeviceGetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_uint;
        let mut device: c_int = 0;
        self.call("cuDeviceGet", |get: DeviceGet| {
            // SAFETY: the pointer is valid for a write.
            unsafe { get(&mut device, ordinal as c_int) }
        })?;
        let attribute = |attribute| {
            let mut value: c_int = 0;
            self.call("cuDeviceGetAttribute", |get: DeviceGetAttribute| {
                // SAFETY: the pointer is valid for a write; the driver has just named the device.
                unsafe { get(&mut value, attribute, device) }
            })?;
            Ok(value as u32)
        };
        let architecture = attribute(MAJOR)? * 10 + attribute(MINOR)?;
        if architecture >= OLDEST_ARCHITECTURE {
            return Ok(());
        }
        let mut name: [c_char; 256] = [0; 256];
        self.call("cuDeviceGetName", |get: DeviceGetName| {
            // SAFETY: the buffer has the length that is passed; the last byte stays zero.
            unsafe { get(name.as_mut_ptr(), name.len() as c_int - 1, device) }
        })?;
        // SAFETY: the buffer ends with a zero byte at the latest.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Err(Unavailable::DeviceTooOld { name, architecture })
    }

    /// The CUDA version the driver supports.
    fn version(&self) -> Result<(u32, u32), Unavailable> {
        self.number("cuDriverGetVersion")
            .map(|version| (version / 1000, version % 1000 / 10))
    }

    /// Calls a function that gives one number.
    fn number(&self, name: &'static str) -> Result<u32, Unavailable> {
        let mut number: c_int = 0;
        // SAFETY: the functions asked for take one pointer to an int, which is valid for a write.
        self.call(name, |function: unsafe extern "C" fn(*mut c_int) -> c_uint| unsafe {
            function(&mut number)
        })?;
        Ok(number as u32)
    }

    fn call<F>(&self, name: &'static str, run: impl FnOnce(F) -> c_uint) -> Result<(), Unavailable>
    where
        F: Copy,
    {
        const NOT_FOUND: u32 = 500;
        // SAFETY: the callers name functions of the driver API with their documented signatures.
        let code = match unsafe { self.library.get::<F>(name.as_bytes()) } {
            Ok(function) => run(*function),
            Err(_) => NOT_FOUND,
        };
        match code {
            0 => Ok(()),
            code => Err(Unavailable::DriverFailed { call: name, code }),
        }
    }
}

fn load_first(names: &[&str]) -> Option<Library> {
    // SAFETY: these are NVIDIA's libraries, whose initialisers have no preconditions; `cudarc` would load the same.
    names.iter().find_map(|&name| unsafe { Library::new(name) }.ok())
}

fn owned_names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}
