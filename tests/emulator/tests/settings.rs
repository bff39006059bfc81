//! What holds for the whole process: versions, and a machine without a device. One test, for nothing else may run
//! beside.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{self, CUresult};

#[test]
fn a_machine_can_be_another_one() {
    emulator::install();
    assert_eq!(emulator::driver_version(), 13000);
    assert_eq!(emulator::nvrtc_version(), (13, 0));
    emulator::set_driver_version(12040);
    emulator::set_nvrtc_version(12, 8);
    let (mut driver, mut major, mut minor) = (0, 0, 0);
    // SAFETY: the versions go to variables that outlive the calls.
    unsafe {
        sys::cuDriverGetVersion(&mut driver).result().unwrap();
        cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor)
            .result()
            .unwrap();
    }
    assert_eq!((driver, major, minor), (12040, 12, 8));
    assert_eq!(
        (emulator::driver_version(), emulator::nvrtc_version()),
        (12040, (12, 8))
    );

    emulator::set_no_device(true);
    assert_eq!(CudaContext::new(0).unwrap_err().0, CUresult::CUDA_ERROR_NO_DEVICE);
    emulator::set_no_device(false);
    CudaContext::new(0).unwrap();
}
