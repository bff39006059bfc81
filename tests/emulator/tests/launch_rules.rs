//! A launch that a GPU's driver refuses is refused with the same error.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute, CUresult};
use cudarc::driver::{CudaContext, LaunchConfig};
use support::*;

const NOTHING: &str = "KERNEL(nothing, Arguments, 1024) {} KERNEL(narrow, Arguments, 128) {}";

fn refused(device_name: &str, kernel_name: &str, shape: LaunchConfig) -> Option<CUresult> {
    let (context, stream) = device(device_name);
    let function = kernel(&context, &format!("{ARGUMENTS}{NOTHING}"), kernel_name);
    launch(&stream, &function, shape, Arguments::default())
        .err()
        .map(|error| error.0)
}

fn three(grid: (u32, u32, u32), block: (u32, u32, u32)) -> LaunchConfig {
    LaunchConfig {
        grid_dim: grid,
        block_dim: block,
        shared_mem_bytes: 0,
    }
}

const INVALID: Option<CUresult> = Some(CUresult::CUDA_ERROR_INVALID_VALUE);

#[test]
fn grids_and_blocks_have_limits() {
    let one = (1, 1, 1);
    assert_eq!(refused("h200", "nothing", three((1, 65535, 1), one)), None);
    assert_eq!(refused("h200", "nothing", three((1, 65536, 1), one)), INVALID);
    assert_eq!(refused("h200", "nothing", three((1, 1, 65535), one)), None);
    assert_eq!(refused("h200", "nothing", three((1, 1, 65536), one)), INVALID);
    assert_eq!(refused("h200", "nothing", three((1 << 31, 1, 1), one)), INVALID);
    assert_eq!(refused("h200", "nothing", three((100_000, 1, 1), one)), None);
    for nothing in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
        assert_eq!(refused("h200", "nothing", three(nothing, one)), INVALID);
        assert_eq!(refused("h200", "nothing", three(one, nothing)), INVALID);
    }
    assert_eq!(refused("h200", "nothing", three(one, (1024, 1, 1))), None);
    assert_eq!(refused("h200", "nothing", three(one, (1025, 1, 1))), INVALID);
    assert_eq!(refused("h200", "nothing", three(one, (32, 32, 1))), None);
    assert_eq!(refused("h200", "nothing", three(one, (32, 33, 1))), INVALID);
    assert_eq!(refused("h200", "nothing", three(one, (1, 1, 65))), INVALID);
}

#[test]
fn a_block_is_no_larger_than_the_kernel_was_compiled_for() {
    assert_eq!(refused("h200", "narrow", three((1, 1, 1), (128, 1, 1))), None);
    assert_eq!(refused("h200", "narrow", three((1, 1, 1), (129, 1, 1))), INVALID);
}

#[test]
fn much_shared_memory_needs_the_attribute() {
    for (name, without, with) in [
        ("h200", 49152, 232_448),
        ("t4", 49152, 65536),
        ("rtx4090", 49152, 101_376),
        ("small-75", 8192, 8192),
    ] {
        let (context, stream) = device(name);
        let function = kernel(&context, &format!("{ARGUMENTS}{NOTHING}"), "nothing");
        let launch_with = |bytes| {
            launch(&stream, &function, shape(1, 32, bytes), Arguments::default())
                .err()
                .map(|error| error.0)
        };
        assert_eq!(launch_with(without), None, "{name}");
        assert_eq!(launch_with(without + 1), INVALID, "{name}");
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let too_much = function.set_attribute(attribute, with + 1).unwrap_err();
        assert_eq!(too_much.0, CUresult::CUDA_ERROR_INVALID_VALUE, "{name}");
        function.set_attribute(attribute, with).unwrap();
        assert_eq!(launch_with(with as u32), None, "{name}");
        assert_eq!(launch_with(with as u32 + 1), INVALID, "{name}");
    }
}

#[test]
fn occupancy_follows_from_threads_and_shared_memory() {
    let (context, _stream) = device("h200");
    let function = kernel(&context, &format!("{ARGUMENTS}{NOTHING}"), "nothing");
    let blocks = |threads, bytes| {
        function
            .occupancy_max_active_blocks_per_multiprocessor(threads, bytes, None)
            .unwrap()
    };
    assert_eq!(blocks(1024, 0), 2);
    assert_eq!(blocks(256, 0), 8);
    assert_eq!(blocks(33, 0), 32, "two warps; no more than 32 blocks");
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(attribute, 227 << 10).unwrap();
    assert_eq!(
        blocks(256, 110 << 10),
        2,
        "two blocks of 110 KB share a multiprocessor with 228 KB"
    );
    assert_eq!(blocks(256, 114 << 10), 1);
    assert_eq!(
        function
            .get_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
            .unwrap(),
        1024
    );
    assert_eq!(function.get_attribute(attribute).unwrap(), 227 << 10);
}

#[test]
fn wrong_handles_are_errors() {
    let (context, stream) = device("h200");
    let function = kernel(&context, &format!("{ARGUMENTS}{NOTHING}"), "nothing");
    let (other, _) = device("h200");
    let foreign = kernel(&other, &format!("{ARGUMENTS}{NOTHING}"), "nothing");
    let error = launch(&stream, &foreign, shape(1, 32, 0), Arguments::default()).unwrap_err();
    assert_eq!(
        error.0,
        CUresult::CUDA_ERROR_INVALID_HANDLE,
        "a function of another context"
    );

    let invented = 0x1234_5678_usize;
    // SAFETY: the handles are wrong, which is what the driver must notice without following them.
    unsafe {
        let launch = |function, stream| {
            let mut arguments = Arguments::default();
            let mut list = [(&raw mut arguments).cast()];
            sys::cuLaunchKernel(
                function,
                1,
                1,
                1,
                1,
                1,
                1,
                0,
                stream,
                list.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        assert_eq!(
            launch(function.cu_function(), stream.cu_stream()),
            CUresult::CUDA_SUCCESS
        );
        assert_eq!(
            launch(invented as sys::CUfunction, stream.cu_stream()),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            launch(function.cu_function(), invented as sys::CUstream),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            launch(stream.cu_stream().cast(), stream.cu_stream()),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            sys::cuStreamDestroy_v2(invented as sys::CUstream),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            sys::cuEventDestroy_v2(invented as sys::CUevent),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            sys::cuModuleUnload(invented as sys::CUmodule),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(
            sys::cuCtxSetCurrent(invented as sys::CUcontext),
            CUresult::CUDA_ERROR_INVALID_CONTEXT
        );
        let mut found = std::ptr::null_mut();
        assert_eq!(
            sys::cuModuleGetFunction(&mut found, invented as sys::CUmodule, c"nothing".as_ptr()),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );

        let mut event = std::ptr::null_mut();
        sys::cuEventCreate(&mut event, 0).result().unwrap();
        assert_eq!(sys::cuEventDestroy_v2(event), CUresult::CUDA_SUCCESS);
        assert_eq!(
            sys::cuEventDestroy_v2(event),
            CUresult::CUDA_ERROR_INVALID_HANDLE,
            "a handle ends once"
        );
        let mut successor = std::ptr::null_mut();
        sys::cuEventCreate(&mut successor, 0).result().unwrap();
        assert_ne!(event, successor, "a handle that ended is no other's");
        assert_eq!(
            sys::cuEventRecord(event, stream.cu_stream()),
            CUresult::CUDA_ERROR_INVALID_HANDLE
        );
        assert_eq!(sys::cuEventDestroy_v2(successor), CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn there_are_as_many_devices_as_profiles() {
    emulator::install();
    let count = CudaContext::device_count().unwrap();
    assert_eq!(count as usize, emulator::PROFILES.len());
    let beyond = CudaContext::new(emulator::PROFILES.len()).unwrap_err();
    assert_eq!(beyond.0, CUresult::CUDA_ERROR_INVALID_DEVICE);
}
