//! What is missing is said precisely, and nothing panics for want of it. The stand-in's driver is made to lack things, so
//! one test at a time may use it.

#![cfg(target_os = "linux")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use batchnorm_cuda::cuda::{DiskCache, Unavailable, is_available};
use batchnorm_cuda::cudarc::driver::CudaContext;
use batchnorm_cuda::{Backend, BatchNorm2d, BatchNorm2dConfig, Cuda, Error, Shape};

/// The stand-in, whole, to this test alone.
fn stand_in() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install();
    emulator::set_no_device(false);
    emulator::set_driver_version(13_000);
    emulator::set_nvrtc_version(13, 0);
    guard
}

fn unavailable(ordinal: usize) -> Unavailable {
    match Cuda::new(ordinal) {
        Err(Error::Unavailable(reason)) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn everything_is_there() {
    let _guard = stand_in();
    assert_eq!(is_available(), Ok(()));
    let cuda = Cuda::new(emulator::ordinal("h200")).unwrap();
    assert_eq!((cuda.limits().architecture, cuda.limits().multiprocessors), (90, 132));
}

#[test]
fn a_driver_without_a_device() {
    let _guard = stand_in();
    emulator::set_no_device(true);
    assert_eq!(is_available(), Err(Unavailable::NoDevice));
    assert_eq!(unavailable(0), Unavailable::NoDevice);
    assert!(Unavailable::NoDevice.to_string().contains("CUDA_VISIBLE_DEVICES"));
}

#[test]
fn a_device_that_is_not_there() {
    let _guard = stand_in();
    let count = emulator::PROFILES.len();
    assert_eq!(unavailable(count), Unavailable::NoSuchDevice { ordinal: count, count });
}

#[test]
fn a_device_that_is_too_old() {
    let _guard = stand_in();
    match unavailable(emulator::ordinal("too-old")) {
        Unavailable::DeviceTooOld { architecture, .. } => assert_eq!(architecture, 61),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_nvrtc_newer_than_the_driver() {
    let _guard = stand_in();
    emulator::set_driver_version(12_080);
    let expected = Unavailable::NvrtcTooNew {
        nvrtc: (13, 0),
        driver: (12, 8),
    };
    assert_eq!(is_available(), Err(expected.clone()));
    assert_eq!(unavailable(0), expected);
    assert_eq!(
        expected.to_string(),
        "NVRTC 13.0 is newer than the CUDA 12.8 of the driver: install NVRTC 12 or a newer driver"
    );
    // Of the same major version, a newer one is fine: its machine code is understood.
    emulator::set_nvrtc_version(12, 9);
    assert_eq!(is_available(), Ok(()));
}

#[test]
fn out_of_memory_says_how_much_was_asked_for() {
    let _guard = stand_in();
    let handle = emulator::create_context(emulator::ordinal("h200"));
    let ordinal = emulator::ordinal("h200");
    // SAFETY: the handle is a context of this device that nobody else uses.
    let context = unsafe { CudaContext::from_raw_context(ordinal, ordinal as i32, handle.cast()) }.unwrap();
    let cuda = Cuda::with_cache(context.default_stream(), DiskCache::Off).unwrap();
    let bn: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(64)).unwrap();
    emulator::set_memory_limit(handle, 64 << 10);
    let shape = Shape::nchw(8, 64, 16, 16);
    let x = cuda.zeros::<f32>(0).unwrap();
    match bn.forward_eval_alloc(shape, &x) {
        Err(Error::OutOfMemory { bytes }) => assert_eq!(bytes, shape.len().unwrap() * 4),
        other => panic!("{other:?}"),
    }
    // Enough for something smaller, and nothing is broken.
    assert!(bn.prepare::<f32>(Shape::nchw(2, 64, 4, 4)).is_ok());
}
