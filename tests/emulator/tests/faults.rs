//! What a kernel does wrong to memory makes its launch fail, and the message says where and what.

#![cfg(target_os = "linux")]

mod support;

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaStream};
use support::*;

/// Launches one kernel in one block of 64 threads with 256 bytes of shared memory, `a` being 100 floats; gives the
/// error and the message.
fn fault_of(body: &str) -> (CUresult, String) {
    let (context, stream) = device("h200");
    fault_in(&context, &stream, body)
}

fn fault_in(context: &Arc<CudaContext>, stream: &Arc<CudaStream>, body: &str) -> (CUresult, String) {
    let source = format!("{ARGUMENTS}KERNEL(wrong, Arguments, 64) {{\n{body}\n}}");
    let wrong = kernel(context, &source, "wrong");
    let a = stream.alloc_zeros::<f32>(100).unwrap();
    let arguments = Arguments {
        a: address(&a, stream),
        ..Default::default()
    };
    assert_eq!(emulator::last_fault(), None);
    let error = launch(stream, &wrong, shape(2, 64, 256), arguments).unwrap_err();
    assert!(
        emulator::launches(stream.cu_stream()).is_empty(),
        "a failed launch is no launch"
    );
    (error.0, emulator::last_fault().expect("a message"))
}

/// The message of a fault whose source line is 3: the line of `body`.
fn message(body: &str, code: CUresult) -> String {
    let (error, message) = fault_of(body);
    assert_eq!(error, code, "{message}");
    assert!(message.starts_with("kernel wrong at "), "{message}");
    assert!(
        message.contains("test.cu:3: block (") && message.contains("), thread ("),
        "{message}"
    );
    message
}

fn illegal_address(body: &str) -> String {
    message(body, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS)
}

#[test]
fn a_load_past_the_end_is_found() {
    let text = illegal_address("if (blockIdx.x == 1 && threadIdx.x == 36) load<1>(arguments.a + 100);");
    assert!(text.contains("block (1,0,0), thread (36,0,0)"), "{text}");
    assert!(
        text.contains("load of 4 bytes of global memory: out of bounds: bytes 400..404 of an allocation of 400 bytes"),
        "{text}"
    );
}

#[test]
fn a_vector_that_reaches_over_the_end_is_found() {
    let text = illegal_address("load<4>((const u32*)arguments.a + 96); load<4>((const u16*)arguments.a + 200);");
    assert!(text.contains("bytes 400..408"), "{text}");
}

#[test]
fn a_store_before_the_beginning_is_found() {
    let text = illegal_address("store_streaming<1>(arguments.a - 1, Vector<float, 1>{});");
    assert!(
        text.contains("store of 4 bytes of global memory: out of bounds: 4 bytes before an allocation of 400 bytes"),
        "{text}"
    );
}

#[test]
fn plain_pointers_are_checked_too() {
    let text = illegal_address("arguments.a[threadIdx.x + 37] = 1.0f;");
    assert!(
        text.contains("thread (63,0,0)") && text.contains("store of 4 bytes"),
        "{text}"
    );
    let text = illegal_address("if (arguments.a[-1 - (int)threadIdx.x] == 3.0f) arguments.a[0] = 1.0f;");
    assert!(
        text.contains("load of 4 bytes") && text.contains("4 bytes before"),
        "{text}"
    );
}

#[test]
fn a_wild_address_is_found() {
    let text = illegal_address("load<1>((const float*)0x10000);");
    assert!(text.contains("wild address 0x10000"), "{text}");
    let text = illegal_address("load<1>(arguments.b);");
    assert!(text.contains("wild address 0x0"), "{text}");
}

#[test]
fn memory_that_was_freed_is_known() {
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(late, Arguments, 1) {{ load<1>(arguments.a + 2); }}");
    let late = kernel(&context, &source, "late");
    let a = stream.alloc_zeros::<f32>(100).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        ..Default::default()
    };
    launch(&stream, &late, shape(1, 1, 0), arguments).unwrap();
    drop(a);
    let error = launch(&stream, &late, shape(1, 1, 0), arguments).unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    let text = emulator::last_fault().unwrap();
    assert!(
        text.contains("use after free: bytes 8..12 of an allocation of 400 bytes"),
        "{text}"
    );
}

#[test]
fn memory_of_another_context_is_out_of_reach() {
    let (_other, other_stream) = device("h200");
    let foreign = other_stream.alloc_zeros::<f32>(4).unwrap();
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(reach, Arguments, 1) {{ load<1>(arguments.a); }}");
    let reach = kernel(&context, &source, "reach");
    let arguments = Arguments {
        a: address(&foreign, &other_stream),
        ..Default::default()
    };
    let error = launch(&stream, &reach, shape(1, 1, 0), arguments).unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
}

#[test]
fn a_misaligned_vector_is_found() {
    let text = message("load<4>(arguments.a + 1);", CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    assert!(
        text.contains("misaligned load of 16 bytes: 4 bytes past a multiple"),
        "{text}"
    );
    let text = message(
        "*(u32*)(shared_memory() + 2 + threadIdx.x) = 1;",
        CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    );
    assert!(text.contains("misaligned store of 4 bytes"), "{text}");
}

#[test]
fn shared_memory_is_aligned_to_what_is_promised_and_no_more() {
    let (context, stream) = device("h200");
    let source =
        format!("{ARGUMENTS}KERNEL(where, Arguments, 1) {{ arguments.c[blockIdx.x] = (u64)shared_memory() % 32; }}");
    let where_it_is = kernel(&context, &source, "where");
    let c = stream.alloc_zeros::<u32>(2).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    launch(&stream, &where_it_is, shape(2, 1, 100), arguments).unwrap();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), [16, 16]);
}

#[test]
fn shared_memory_ends_where_the_launch_said() {
    let text = illegal_address("((float*)shared_memory())[threadIdx.x + 1] = 1.0f;");
    assert!(
        text.contains("store of 4 bytes of shared memory out of bounds: bytes 256..260 of 256"),
        "{text}"
    );
    assert!(text.contains("thread (63,0,0)"), "{text}");
}

#[test]
fn the_stack_of_another_thread_is_out_of_reach() {
    let body = "float mine = 1; if (threadIdx.x == 0) *(float**)shared_memory() = &mine; block_barrier(); \
                arguments.a[0] = **(float**)shared_memory();";
    let text = illegal_address(body);
    assert!(
        text.contains("load of 4 bytes of global memory: wild address"),
        "{text}"
    );
}

#[test]
fn a_fault_leaves_the_context_usable() {
    let (context, stream) = device("h200");
    fault_in(&context, &stream, "load<1>(arguments.a + 100);");
    let source =
        format!("{ARGUMENTS}KERNEL(right, Arguments, 64) {{ store<1>(arguments.a, Vector<float, 1>{{{{1.0f}}}}); }}");
    let right = kernel(&context, &source, "right");
    let a = stream.alloc_zeros::<f32>(1).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        ..Default::default()
    };
    launch(&stream, &right, shape(1, 1, 0), arguments).unwrap();
    assert_eq!(stream.clone_dtoh(&a).unwrap(), [1.0]);
    assert_eq!(emulator::last_fault(), None);
}

#[test]
fn constants_of_the_module_may_be_read() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}static const float TABLE[4] = {{1, 2, 4, 8}};\n\
         KERNEL(look_up, Arguments, 4) {{ arguments.a[threadIdx.x] = TABLE[(threadIdx.x + arguments.n) % 4]; }}"
    );
    let look_up = kernel(&context, &source, "look_up");
    let a = stream.alloc_zeros::<f32>(4).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        n: 1,
        ..Default::default()
    };
    launch(&stream, &look_up, shape(1, 4, 0), arguments).unwrap();
    assert_eq!(stream.clone_dtoh(&a).unwrap(), [2.0, 4.0, 8.0, 1.0]);
}

#[test]
fn new_memory_is_poisoned() {
    let (_context, stream) = device("h200");
    // One from the heap, one that is mapped.
    for length in [1000, 1 << 20] {
        // SAFETY: reading what nobody wrote is what this is about; any bits are a float.
        let fresh = unsafe { stream.alloc::<f32>(length) }.unwrap();
        assert!(
            stream
                .clone_dtoh(&fresh)
                .unwrap()
                .iter()
                .all(|x| x.to_bits() == u32::MAX)
        );
    }
}

#[test]
fn a_stack_that_is_too_small_is_reported() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}static __attribute__((noinline)) float deep(float* a, u64 n) {{\n\
         volatile float part[5000]; part[n] = 1; if (n == 0) return 0;\n\
         a[0] = 1; return deep(a, n - 1) + part[n]; }}\n\
         KERNEL(recursive, Arguments, 1) {{ arguments.a[1] = deep(arguments.a, arguments.n); }}"
    );
    let recursive = kernel(&context, &source, "recursive");
    let a = stream.alloc_zeros::<f32>(2).unwrap();
    let mut arguments = Arguments {
        a: address(&a, &stream),
        n: 2,
        ..Default::default()
    };
    launch(&stream, &recursive, shape(1, 1, 0), arguments).unwrap();
    arguments.n = 5;
    let error = launch(&stream, &recursive, shape(1, 1, 0), arguments).unwrap_err();
    assert_eq!(error.0, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    let text = emulator::last_fault().unwrap();
    assert!(
        text.contains("the thread needs more than the stand-in's 65536 bytes of stack"),
        "{text}"
    );
}

#[test]
fn arrays_that_no_stack_holds_are_an_error_of_compilation() {
    emulator::install();
    let source = with_seam(&format!(
        "{ARGUMENTS}KERNEL(large, Arguments, 1) {{ volatile float part[10000]; part[arguments.n] = 1; }}"
    ));
    let (_, log) = compile(&source, &["--gpu-architecture=sm_90"]).unwrap_err();
    assert!(log.contains("frame size"), "{log}");
}
