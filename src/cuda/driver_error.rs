//! The driver's errors in this crate's words.

use cudarc::driver::DriverError;

use crate::error::Error;

/// Codes after which a context can do nothing more (CUDA driver API, `CUresult`).
const LOST: [u32; 12] = [
    201, // invalid context: destroyed under us
    214, // uncorrectable memory error
    700, // illegal address
    702, // launch timeout
    709, // context is destroyed
    710, // assert
    714, // hardware stack error
    715, // illegal instruction
    716, // misaligned address
    717, // invalid address space
    718, // invalid program counter
    719, // launch failure
];

/// Out of memory.
const OUT_OF_MEMORY: u32 = 2;

/// Names the call that failed. The driver's library is loaded, or there would be no error of it.
pub(super) fn driver_error(call: &'static str, error: DriverError) -> Error {
    let code = error.0 as u32;
    let text = |part: Result<&std::ffi::CStr, DriverError>| {
        part.map_or_else(
            |_| "unknown error".to_owned(),
            |text| text.to_string_lossy().into_owned(),
        )
    };
    let message = format!("{}: {}", text(error.error_name()), text(error.error_string()));
    if LOST.contains(&code) {
        Error::DeviceLost { call, code, message }
    } else {
        Error::Driver { call, code, message }
    }
}

/// As [`driver_error`], for an allocation of so many bytes.
pub(super) fn allocation_error(bytes: usize, error: DriverError) -> Error {
    if error.0 as u32 == OUT_OF_MEMORY {
        Error::OutOfMemory { bytes }
    } else {
        driver_error("allocation", error)
    }
}

/// As [`driver_error`], where `cudarc` panicked because it could not make an event.
pub(super) fn event_error(panic: &(dyn std::any::Any + Send)) -> Error {
    /// `CUDA_ERROR_UNKNOWN`: the panic tells the code in words only.
    const UNKNOWN: u32 = 999;
    let text = panic.downcast_ref::<String>().map_or("unknown error", String::as_str);
    Error::Driver {
        call: "making an event",
        code: UNKNOWN,
        message: text.to_owned(),
    }
}
