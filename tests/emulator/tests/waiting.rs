//! Waiting for what others do: a thread's own asynchronous copies, arrivals at a counter, and the fence before a bulk copy.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::{DriverError, PushKernelArg};
use support::*;

/// Runs a kernel of two blocks of 64 threads with 1 KiB of shared memory: what it leaves in b, and in c.
fn run(body: &str, cooperative: bool) -> Result<(Vec<f32>, Vec<u32>), DriverError> {
    let (context, stream) = device("small-90");
    let source =
        format!("{ARGUMENTS}KERNEL(waits, Arguments, 64) {{\nfloat* const here = (float*)shared_memory();\n{body}\n}}");
    let function = kernel(&context, &source, "waits");
    let a = stream
        .clone_htod(&(0..256).map(|i| i as f32).collect::<Vec<_>>())
        .unwrap();
    let b = stream.alloc_zeros::<f32>(128).unwrap();
    let c = stream.alloc_zeros::<u32>(4).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        b: address(&b, &stream),
        c: address(&c, &stream),
        n: 0,
    };
    let mut builder = stream.launch_builder(&function);
    builder.arg(&arguments);
    let shape = shape(2, 64, 1024);
    // SAFETY: the kernel takes `Arguments`, whose addresses are live.
    unsafe {
        if cooperative {
            builder.launch_cooperative(shape)
        } else {
            builder.launch(shape)
        }
    }?;
    Ok((stream.clone_dtoh(&b).unwrap(), stream.clone_dtoh(&c).unwrap()))
}

fn fails(body: &str, cooperative: bool, words: &str) {
    run(body, cooperative).expect_err(words);
    let text = emulator::last_fault().expect("a message");
    assert!(text.contains(words), "{text}");
}

const GLOBAL: &str = "const u32 at = 64 * blockIdx.x + threadIdx.x;";

#[test]
fn a_thread_finds_its_own_copies_once_it_has_waited() {
    let body = format!(
        "{GLOBAL}
         copy_async<1>(here + threadIdx.x, arguments.a + at); copy_commit();
         copy_async<1>(here + 64 + threadIdx.x, arguments.a + 128 + at); copy_commit();
         copy_wait<1>();
         const float first = here[threadIdx.x];
         copy_wait<0>();
         arguments.b[at] = first + here[64 + threadIdx.x];"
    );
    let (sums, _) = run(&body, false).unwrap();
    let expected: Vec<f32> = (0..128).map(|i| (i + i + 128) as f32).collect();
    assert_eq!(sums, expected);
}

#[test]
fn a_copy_that_was_not_waited_for_is_found_out() {
    let copy = format!("{GLOBAL} copy_async<1>(here + threadIdx.x, arguments.a + at); copy_commit();");
    let take = "arguments.b[at] = here[threadIdx.x];";
    fails(&format!("{copy} {take}"), false, "while a copy into it is in flight");
    // The newest group may go on; it is the only one.
    fails(
        &format!("{copy} copy_wait<1>(); {take}"),
        false,
        "while a copy into it is in flight",
    );
    let other = "arguments.b[at] = here[63 - threadIdx.x];";
    // The other thread may not even have begun.
    fails(&format!("{copy} copy_wait<0>(); {other}"), false, "which nobody wrote");
    run(&format!("{copy} copy_wait<0>(); block_barrier(); {other}"), false).unwrap();
    fails(
        &format!("{GLOBAL} copy_async<4>(here + 4 * threadIdx.x % 64 + 1, arguments.a);"),
        false,
        "misaligned",
    );
}

const HAND_OVER: &str = "
    if (blockIdx.x == 0 && threadIdx.x == 0) { store(arguments.b, Vector<float, 1>{{7.0f}}); arrive(arguments.c); }
    if (blockIdx.x == 1 && threadIdx.x == 0) {
      WAIT
      store(arguments.b + 1, load_coherent<1>(arguments.b));
    }";

#[test]
fn who_waits_for_arrivals_sees_what_was_written_before() {
    let (b, c) = run(&HAND_OVER.replace("WAIT", "await_arrivals(arguments.c, 1);"), true).unwrap();
    assert_eq!((b[1], c[0]), (7.0, 1));
    fails(&HAND_OVER.replace("WAIT", ""), true, "race: ");
}

#[test]
fn waiting_for_others_needs_a_cooperative_launch_and_somebody_who_comes() {
    let wait = HAND_OVER.replace("WAIT", "await_arrivals(arguments.c, 1);");
    fails(
        &wait,
        false,
        "waiting for other blocks in a launch that is not cooperative",
    );
    let too_many = HAND_OVER.replace("WAIT", "await_arrivals(arguments.c, 2);");
    fails(&too_many, true, "1 threads waiting for arrivals at a counter");
}

#[test]
fn a_bulk_copy_over_what_threads_stored_needs_a_fence() {
    let body = |fence: &str| {
        format!(
            "u64* const barrier = (u64*)here; float* const room = here + 4;
             if (threadIdx.x == 0) mbarrier_init(barrier, 1);
             room[threadIdx.x] = 1.0f;
             {fence}
             block_barrier();
             if (threadIdx.x == 0) {{ mbarrier_arrive(barrier, 256); bulk_copy(room, arguments.a, 256, barrier); }}
             mbarrier_wait(barrier, 0);
             if (blockIdx.x == 0) arguments.b[threadIdx.x] = room[threadIdx.x];"
        )
    };
    let (b, _) = run(&body("bulk_fence();"), false).unwrap();
    assert_eq!(b[63], 63.0);
    fails(&body(""), false, "without a bulk_fence since");
}
