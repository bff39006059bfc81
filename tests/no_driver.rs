//! Without a driver, or without NVRTC, the crate says so and how to get it. It does not panic.
//!
//! This process never loads the stand-in: what it finds is what the machine has. Where a library must be missing whatever
//! the machine has, the test runs itself again with an environment in which it is.

#![cfg(target_os = "linux")]

use std::ffi::{c_char, c_int};
use std::fs;
use std::process::Command;

use batchnorm_cuda::cuda::{Unavailable, is_available};
use batchnorm_cuda::{Cuda, Error};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

const VERDICT: &str = "CUDA on this machine:";

/// Where this file is among the libraries, the stand-in's driver that is found there gets a device.
const ONE_DEVICE: &str = "one-device";

/// Attributes of that device, by the numbers of `CUdevice_attribute`: 9.0.
const COMPUTE_CAPABILITY: [[c_int; 2]; 2] = [[75, 9], [76, 0]];

/// Gives the stand-in's driver a device, if a test asks for that.
fn add_device_if_asked() {
    type AddDevice = unsafe extern "C" fn(*const c_char, usize, *const [c_int; 2], usize);
    let Some(folder) = std::env::var_os("LD_LIBRARY_PATH") else {
        return;
    };
    let Ok(path) = fs::canonicalize(std::path::Path::new(&folder).join(ONE_DEVICE)) else {
        return;
    };
    // SAFETY: the file is the stand-in's driver, whose function copies the name and as many attributes as it is told of. The
    // library stays loaded.
    unsafe {
        let driver = Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL).expect("the stand-in's driver");
        let add_device = driver.get::<AddDevice>(b"stand_in_add_device").expect("its function");
        add_device(
            c"a device".as_ptr(),
            1 << 20,
            COMPUTE_CAPABILITY.as_ptr(),
            COMPUTE_CAPABILITY.len(),
        );
        std::mem::forget(driver);
    }
}

#[test]
fn the_machine_is_told_as_it_is() {
    add_device_if_asked();
    let verdict = is_available();
    match &verdict {
        Ok(()) => {
            Cuda::new(0).expect("a machine that has everything");
            println!("{VERDICT} available");
        }
        Err(reason) => {
            match Cuda::new(0) {
                Err(Error::Unavailable(same)) => assert_eq!(&same, reason),
                other => panic!("not refused: {other:?}"),
            }
            println!("{VERDICT} {reason}");
        }
    }
    // Asked again it says the same.
    assert_eq!(is_available(), verdict);
}

/// What this machine would say with these files (name, and what they link to; none: not a library) found first.
fn verdict_with(files: &[(&str, Option<&str>)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    for (name, target) in files {
        let path = folder.path().join(name);
        match target {
            Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
            None => fs::write(path, "not a library").unwrap(),
        }
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["the_machine_is_told_as_it_is", "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text.lines()
        .find_map(|line| line.split_once(VERDICT))
        .unwrap_or_else(|| panic!("no verdict: {text}"))
        .1
        .trim()
        .to_owned()
}

#[test]
fn a_missing_driver_is_named_with_the_way_to_get_it() {
    let verdict = verdict_with(&[("libcuda.so", None), ("libcuda.so.1", None)]);
    let expected = Unavailable::NoDriver {
        tried: vec!["libcuda.so".into(), "libcuda.so.1".into()],
    };
    assert_eq!(verdict, expected.to_string());
    assert!(verdict.contains("install NVIDIA's driver"), "{verdict}");
}

#[test]
fn a_driver_that_sees_no_device_is_told_apart() {
    let driver = format!("{}/libcuda.so", emulator::LIBRARIES);
    let verdict = verdict_with(&[("libcuda.so", Some(&driver))]);
    assert_eq!(verdict, Unavailable::NoDevice.to_string());
}

#[test]
fn a_missing_nvrtc_is_named_with_the_way_to_get_it() {
    let driver = format!("{}/libcuda.so", emulator::LIBRARIES);
    let verdict = verdict_with(&[
        ("libcuda.so", Some(&driver)),
        (ONE_DEVICE, Some(&driver)),
        ("libnvrtc.so", None),
        ("libnvrtc.so.13", None),
        ("libnvrtc.so.12", None),
    ]);
    let expected = Unavailable::NoNvrtc {
        tried: vec!["libnvrtc.so".into(), "libnvrtc.so.13".into(), "libnvrtc.so.12".into()],
    };
    assert_eq!(verdict, expected.to_string());
    assert!(verdict.contains("pip install nvidia-cuda-nvrtc"), "{verdict}");
}
