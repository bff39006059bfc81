//! What the tests share: compiling a kernel through cudarc's NVRTC bindings, and running it.

#![allow(dead_code)] // each test file is a program of its own and uses a part

use std::ffi::{CStr, CString};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{Ptx, result, sys};

/// The seam of the project's kernels, whose host half is under test.
const DEVICE_HEADER: &str = include_str!("../../../../kernels/device.cuh");

/// Compiles as the library does: source and options to NVRTC, the cubin back. The error is NVRTC's code and log.
pub fn compile(source: &str, options: &[&str]) -> Result<Vec<u8>, (sys::nvrtcResult, String)> {
    let source = CString::new(source).unwrap();
    let program = result::create_program(&source, Some(c"test.cu")).unwrap();
    // SAFETY: the program is live until the end of this function.
    let compiled = unsafe { result::compile_program(program, options) };
    let outcome = match compiled {
        // SAFETY: as above; NVRTC writes as many bytes as it said.
        Ok(()) => unsafe {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size).result().unwrap();
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result().unwrap();
            Ok(cubin)
        },
        // SAFETY: as above; the log ends with a zero.
        Err(error) => unsafe {
            let log = result::get_program_log(program).unwrap();
            Err((error.0, CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned()))
        },
    };
    // SAFETY: nobody uses the program after this.
    unsafe { result::destroy_program(program) }.unwrap();
    outcome
}

/// The source of test kernels behind the seam, numbered from line 1 of its own.
pub fn with_seam(kernels: &str) -> String {
    format!("{DEVICE_HEADER}\n#line 1 \"test.cu\"\n{kernels}")
}

/// Compiles test kernels for the device of this ordinal.
pub fn cubin(ordinal: usize, kernels: &str) -> Vec<u8> {
    let (major, minor) = emulator::PROFILES[ordinal].compute_capability;
    let architecture = format!("--gpu-architecture=sm_{major}{minor}");
    let options = [architecture.as_str(), "--fmad=false", "-std=c++17", "-default-device"];
    compile(&with_seam(kernels), &options).unwrap_or_else(|(code, log)| panic!("{code:?}\n{log}"))
}

/// A context of its own on the device of this name, with a stream of its own.
pub fn device(name: &str) -> (Arc<CudaContext>, Arc<CudaStream>) {
    emulator::install();
    let ordinal = emulator::ordinal(name);
    let raw = emulator::create_context(ordinal);
    // SAFETY: the context is live, of this device, and owned by nobody else.
    let context = unsafe { CudaContext::from_raw_context(ordinal, ordinal as i32, raw.cast()) }.unwrap();
    let stream = context.new_stream().unwrap();
    (context, stream)
}

/// Compiles, loads and finds a kernel.
pub fn kernel(context: &Arc<CudaContext>, kernels: &str, name: &str) -> CudaFunction {
    let image = cubin(context.ordinal(), kernels);
    context
        .load_module(Ptx::from_binary(image))
        .unwrap()
        .load_function(name)
        .unwrap()
}

/// The shape of a launch in one dimension.
pub fn shape(grid: u32, block: u32, shared_bytes: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (grid, 1, 1),
        block_dim: (block, 1, 1),
        shared_mem_bytes: shared_bytes,
    }
}

/// Up to four device addresses or numbers: the argument of every test kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Arguments {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub n: u64,
}

// SAFETY: four integers without padding.
unsafe impl DeviceRepr for Arguments {}

/// `Arguments` for the kernels' side, with every pointer to float.
pub const ARGUMENTS: &str = "struct Arguments { float* a; float* b; u32* c; u64 n; };\n";

/// Launches a test kernel.
pub fn launch(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    shape: LaunchConfig,
    arguments: Arguments,
) -> Result<(), DriverError> {
    // SAFETY: the kernel takes `Arguments`; what it does with them is what the stand-in checks.
    unsafe { stream.launch_builder(function).arg(&arguments).launch(shape) }.map(|_| ())
}

/// The device address of a slice.
pub fn address<T>(slice: &impl cudarc::driver::DevicePtr<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}
