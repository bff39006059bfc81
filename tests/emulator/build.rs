//! Builds the stand-in libraries and tells the crate where they lie. On anything but Linux there is nothing to build:
//! how a library that is already loaded answers for another name is glibc's way.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The names that a program may ask the dynamic loader for. The first is the library; the others are empty libraries that
/// depend on it, for a library has one name only.
const DRIVER_NAMES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
const NVRTC_NAMES: [&str; 3] = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];

const DRIVER_SOURCES: [&str; 13] = [
    "access.cpp",
    "barriers.cpp",
    "capture.cpp",
    "control.cpp",
    "driver.cpp",
    "faults.cpp",
    "fiber.cpp",
    "launch.cpp",
    "memory.cpp",
    "module.cpp",
    "races.cpp",
    "shadow.cpp",
    "simt.cpp",
];
const NVRTC_SOURCES: [&str; 1] = ["nvrtc.cpp"];
const NCCL_NAMES: [&str; 1] = ["libnccl.so"];
const NCCL_SOURCES: [&str; 1] = ["nccl.cpp"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=driver");
    println!("cargo:rerun-if-changed=include");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        build(&out, &DRIVER_NAMES, &DRIVER_SOURCES);
        build(&out, &NVRTC_NAMES, &NVRTC_SOURCES);
        build(&out, &NCCL_NAMES, &NCCL_SOURCES);
    }
    println!("cargo:rustc-env=EMULATOR_LIBRARIES={}", out.display());
    println!("cargo:rustc-env=EMULATOR_INCLUDE={}/include", root().display());
    println!("cargo:rustc-env=EMULATOR_CACHE={}", cache(&out).display());
    println!("cargo:rustc-env=EMULATOR_FINGERPRINT={:016x}", fingerprint());
}

fn root() -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"))
}

/// Compiled kernels are kept beside the `build` directory that holds OUT_DIR, so that a rebuild of this crate keeps them.
fn cache(out: &Path) -> PathBuf {
    let profile = out
        .ancestors()
        .find(|folder| folder.ends_with("build"))
        .and_then(Path::parent);
    profile.unwrap_or(out).join("stand-in-kernels")
}

/// Changes with everything that a compiled kernel depends on beside its own source.
fn fingerprint() -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in [
        "include/stand_in_abi.h",
        "include/stand_in_device.h",
        "driver/image.h",
        "driver/nvrtc.cpp",
    ] {
        let content = std::fs::read(root().join(file)).unwrap_or_else(|error| panic!("cannot read {file}: {error}"));
        content.hash(&mut hasher);
    }
    hasher.finish()
}

fn build(out: &Path, names: &[&str], sources: &[&str]) {
    let library = out.join(names[0]);
    let mut command = compiler();
    command.args(["-fPIC", "-O2", "-g", "-Wall", "-Wextra", "-pthread"]);
    command.arg(format!("-I{}/include", root().display()));
    command.args(sources.iter().map(|source| root().join("driver").join(source)));
    link(command, &library, names[0]);
    for name in &names[1..] {
        let mut command = compiler();
        command
            .args(["-fPIC", "-x", "c++", "/dev/null", "-x", "none", "-Wl,--no-as-needed"])
            .arg(&library);
        link(command, &out.join(name), name);
    }
}

fn compiler() -> Command {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .get_compiler()
        .to_command()
}

fn link(mut command: Command, library: &Path, name: &str) {
    command
        .args(["-shared", &format!("-Wl,-soname,{name}"), "-o"])
        .arg(library);
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(status.success(), "{command:?} failed");
}
