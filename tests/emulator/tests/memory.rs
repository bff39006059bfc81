//! Device memory: limits, counts, copies, and sizes no host has.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::sys::{self, CUresult};
use support::*;

#[test]
fn what_is_allocated_is_counted() {
    let (context, stream) = device("h200");
    let live = || emulator::live_memory(context.cu_ctx());
    assert_eq!(
        live(),
        emulator::LiveMemory {
            allocations: 0,
            bytes: 0
        }
    );
    let a = stream.alloc_zeros::<f32>(100).unwrap();
    let b = stream.alloc_zeros::<u8>(3 << 20).unwrap();
    assert_eq!(
        live(),
        emulator::LiveMemory {
            allocations: 2,
            bytes: 400 + (3 << 20)
        }
    );
    for slice in [address(&a, &stream), address(&b, &stream)] {
        assert_eq!(slice % 256, 0, "aligned as cuMemAlloc promises");
    }
    drop(a);
    assert_eq!(
        live(),
        emulator::LiveMemory {
            allocations: 1,
            bytes: 3 << 20
        }
    );
    drop(b);
    assert_eq!(
        live(),
        emulator::LiveMemory {
            allocations: 0,
            bytes: 0
        }
    );
}

#[test]
fn memory_ends() {
    let (context, stream) = device("t4");
    let (free, total) = context.mem_get_info().unwrap();
    assert_eq!((free, total), (15_843_721_216, 15_843_721_216));
    // SAFETY: nothing is read.
    let too_much = unsafe { stream.alloc::<u8>(total + 1) }.unwrap_err();
    assert_eq!(too_much.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);

    emulator::set_memory_limit(context.cu_ctx(), 1000);
    let first = stream.alloc_zeros::<u8>(600).unwrap();
    let second = stream.alloc_zeros::<u8>(600).unwrap_err();
    assert_eq!(second.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    assert_eq!(context.mem_get_info().unwrap(), (400, total));
    drop(first);
    stream.alloc_zeros::<u8>(600).unwrap();
}

#[test]
fn a_tensor_larger_than_the_host_can_be_allocated() {
    let (context, stream) = device("h200");
    let elements = (1usize << 32) + 8;
    // SAFETY: what is read below was written, or is poison, whose bits are a float.
    let large = unsafe { stream.alloc::<f32>(elements * 4) }.unwrap();
    let source = format!("{ARGUMENTS}KERNEL(ends, Arguments, 1) {{ arguments.a[arguments.n] = 7.0f; }}");
    let ends = kernel(&context, &source, "ends");
    let last = elements * 4 - 1;
    let arguments = Arguments {
        a: address(&large, &stream),
        n: last as u64,
        ..Default::default()
    };
    launch(&stream, &ends, shape(1, 1, 0), arguments).unwrap();
    let tail = stream.clone_dtoh(&large.slice(last - 2..)).unwrap();
    assert!(tail[0].is_nan() && tail[1].is_nan());
    assert_eq!(tail[2], 7.0);
    let beyond = launch(
        &stream,
        &ends,
        shape(1, 1, 0),
        Arguments {
            n: last as u64 + 1,
            ..arguments
        },
    )
    .unwrap_err();
    assert_eq!(beyond.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn copies_stay_inside_allocations() {
    let (_context, stream) = device("h200");
    let a = stream.clone_htod(&[1u32, 2, 3, 4]).unwrap();
    let mut b = stream.alloc_zeros::<u32>(4).unwrap();
    stream.memcpy_dtod(&a, &mut b).unwrap();
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [1, 2, 3, 4]);
    stream.memset_zeros(&mut b.slice_mut(1..3)).unwrap();
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [1, 0, 0, 4]);
    let (from, to) = (address(&a, &stream), address(&b, &stream));
    let mut host = [0u32; 8];
    // SAFETY: too long, which the driver must notice; the host's side is large enough.
    unsafe {
        let raw = stream.cu_stream();
        assert_eq!(
            sys::cuMemcpyDtoDAsync_v2(to, from, 17, raw),
            CUresult::CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(
            sys::cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), from, 32, raw),
            CUresult::CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(
            sys::cuMemcpyHtoDAsync_v2(to + 4, host.as_ptr().cast(), 16, raw),
            CUresult::CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(
            sys::cuMemsetD8Async(to - 1, 0, 4, raw),
            CUresult::CUDA_ERROR_INVALID_VALUE
        );
        assert_eq!(sys::cuMemFreeAsync(to + 4, raw), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(sys::cuMemsetD32Async(to, 9, 2, raw), CUresult::CUDA_SUCCESS);
    }
    assert_eq!(stream.clone_dtoh(&b).unwrap(), [9, 9, 0, 4]);
    assert_eq!(
        stream.alloc_zeros::<u32>(0).unwrap_err().0,
        CUresult::CUDA_ERROR_INVALID_VALUE,
        "as a GPU's driver has it"
    );
}

#[test]
fn calls_are_counted_by_stream_context_and_thread() {
    let (context, stream) = device("h200");
    let other = context.new_stream().unwrap();
    let before = emulator::thread_calls();
    let a = stream.clone_htod(&[1f32; 8]).unwrap();
    let mut b = stream.alloc_zeros::<f32>(8).unwrap();
    stream.memcpy_dtod(&a, &mut b).unwrap();
    stream.clone_dtoh(&b).unwrap();
    stream.synchronize().unwrap();
    let here = emulator::thread_calls() - before;
    let calls = emulator::stream_calls(stream.cu_stream());
    let same = |calls: emulator::Calls| {
        assert_eq!(
            (calls.allocations, calls.host_copies, calls.device_copies, calls.memsets),
            (2, 2, 1, 1)
        );
        assert!(calls.synchronizations >= 1);
        assert_eq!((calls.frees, calls.launches), (0, 0));
    };
    same(here);
    same(calls);
    same(emulator::context_calls(context.cu_ctx()));
    assert_eq!(emulator::stream_calls(other.cu_stream()).allocations, 0);
    drop((a, b));
    assert_eq!(emulator::stream_calls(stream.cu_stream()).frees, 2);
    let elsewhere = std::thread::spawn(emulator::thread_calls).join().unwrap();
    assert_eq!(elsewhere, emulator::Calls::default());
}
