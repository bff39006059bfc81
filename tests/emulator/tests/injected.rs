//! Calls that fail on demand: the one that was named, with the code that was named, in this thread alone, and before it
//! does anything.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::sys::CUresult;
use cudarc::nvrtc::{result, sys};
use support::*;

const FILL: &str = "KERNEL(fill, Arguments, 1) { arguments.c[0] = 7; }";

/// A fault at each call of a copy there and back, in its turn.
#[test]
fn each_call_can_fail_and_only_that_one() {
    let (context, stream) = device("h200");
    let copy = || -> Result<Vec<u32>, cudarc::driver::DriverError> {
        let there = stream.clone_htod(&[1u32, 2])?;
        let back = stream.clone_dtoh(&there)?;
        stream.synchronize()?;
        Ok(back)
    };
    let watched = emulator::watch_calls();
    copy().unwrap();
    let calls = watched.finish();
    for wanted in [
        "cuMemAllocAsync",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuStreamSynchronize",
    ] {
        let number = calls.iter().position(|call| call == wanted).expect(wanted);
        let before = emulator::thread_calls();
        let watched = emulator::inject_fault(number as u64, CUresult::CUDA_ERROR_OPERATING_SYSTEM as u32);
        assert_eq!(copy().unwrap_err().0, CUresult::CUDA_ERROR_OPERATING_SYSTEM, "{wanted}");
        // Nothing was done.
        let done = emulator::thread_calls() - before;
        let of_its_kind = match wanted {
            "cuMemAllocAsync" => done.allocations,
            "cuStreamSynchronize" => done.synchronizations,
            _ => done.host_copies - u64::from(wanted.contains("DtoH")),
        };
        assert_eq!(of_its_kind, 0, "{wanted}");
        assert_eq!(copy(), Ok(vec![1, 2]), "after {wanted}");
        assert_eq!(watched.finish()[number], wanted);
    }
    assert_eq!(emulator::live_memory(context.cu_ctx()).allocations, 0);
}

#[test]
fn a_launch_that_fails_runs_nothing() {
    let (context, stream) = device("h200");
    let fill = kernel(&context, &format!("{ARGUMENTS}{FILL}"), "fill");
    let c = stream.alloc_zeros::<u32>(1).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    let run = || launch(&stream, &fill, shape(1, 1, 0), arguments);
    let watched = emulator::watch_calls();
    run().unwrap();
    let calls = watched.finish();
    let number = calls.iter().position(|call| call == "cuLaunchKernel").unwrap();
    let c_before = stream.clone_dtoh(&c).unwrap();
    assert_eq!(c_before, [7]);
    let mut c = c;
    stream.memset_zeros(&mut c).unwrap();
    let watched = emulator::inject_fault(number as u64, CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES as u32);
    assert_eq!(run().unwrap_err().0, CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    drop(watched);
    assert_eq!(stream.clone_dtoh(&c).unwrap(), [0]);
}

/// NVRTC's calls are in the same row.
#[test]
fn nvrtc_can_fail() {
    emulator::install();
    let watched = emulator::inject_fault(0, sys::nvrtcResult::NVRTC_ERROR_OUT_OF_MEMORY as u32);
    let failed = result::create_program(c"", None).unwrap_err();
    assert_eq!(failed.0, sys::nvrtcResult::NVRTC_ERROR_OUT_OF_MEMORY);
    let program = result::create_program(c"", None).unwrap();
    // SAFETY: nobody uses the program after this.
    unsafe { result::destroy_program(program) }.unwrap();
    assert_eq!(
        watched.finish(),
        ["nvrtcCreateProgram", "nvrtcCreateProgram", "nvrtcDestroyProgram"]
    );
}

#[test]
fn other_threads_notice_nothing() {
    let (_context, stream) = device("h200");
    let _watched = emulator::inject_fault(0, CUresult::CUDA_ERROR_OPERATING_SYSTEM as u32);
    std::thread::scope(|scope| {
        scope.spawn(|| stream.synchronize().unwrap());
    });
    assert!(stream.synchronize().is_err());
    stream.synchronize().unwrap();
}
