//! Warps and blocks: what shuffles give, where threads meet, and what is said of those that never do.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::sys::CUresult;
use support::*;

/// Runs one block whose every thread gives a number; the numbers.
fn numbers(threads: u32, body: &str) -> Vec<u32> {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(give, Arguments, 1024) {{\nconst u32 i = threadIdx.x; {body}\narguments.c[i] = result;\n}}"
    );
    let give = kernel(&context, &source, "give");
    let c = stream.alloc_zeros::<u32>(threads as usize).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    launch(&stream, &give, shape(1, threads, 4096), arguments).unwrap_or_else(|error| panic!("{error:?}"));
    stream.clone_dtoh(&c).unwrap()
}

/// Runs one block that must fail; the error and the message.
fn failure(threads: u32, body: &str) -> (CUresult, String) {
    let (context, stream) = device("h200");
    let source =
        format!("{ARGUMENTS}KERNEL(wrong, Arguments, 1024) {{\nconst u32 i = threadIdx.x; u32 result = 0;\n{body}\n}}");
    let wrong = kernel(&context, &source, "wrong");
    let error = launch(&stream, &wrong, shape(1, threads, 4096), Arguments::default()).unwrap_err();
    (error.0, emulator::last_fault().unwrap())
}

fn deadlock(threads: u32, body: &str) -> String {
    let (code, text) = failure(threads, body);
    assert_eq!(code, CUresult::CUDA_ERROR_LAUNCH_TIMEOUT, "{text}");
    assert!(text.starts_with("kernel wrong: deadlock in block (0,0,0): "), "{text}");
    text
}

fn misuse(threads: u32, body: &str) -> String {
    let (code, text) = failure(threads, body);
    assert_eq!(code, CUresult::CUDA_ERROR_LAUNCH_FAILED, "{text}");
    text
}

#[test]
fn shuffles_move_values_between_lanes() {
    let in_warp = |f: fn(u32) -> u32| (0..64).map(|i| i / 32 * 32 + f(i % 32)).collect::<Vec<u32>>();
    assert_eq!(numbers(64, "u32 result = shuffle_xor(i, 5);"), in_warp(|lane| lane ^ 5));
    assert_eq!(
        numbers(64, "u32 result = shuffle_down(i, 3);"),
        in_warp(|lane| if lane + 3 < 32 { lane + 3 } else { lane })
    );
    assert_eq!(
        numbers(64, "u32 result = shuffle_up(i, 3);"),
        in_warp(|lane| if lane >= 3 { lane - 3 } else { lane })
    );
    assert_eq!(numbers(64, "u32 result = shuffle_from(i, 7);"), in_warp(|_| 7));
    assert_eq!(numbers(64, "u32 result = ballot(i % 3 == 0) & 15;")[..1], [0b1001]);
}

#[test]
fn eight_bytes_are_moved_whole() {
    let body = "const u64 wide = (u64)i << 40 | 7; u32 result = (u32)(shuffle_xor(wide, 1) >> 40); \
                const double half = shuffle_xor((double)i + 0.5, 1); if (half != (i ^ 1) + 0.5) result = 99;";
    assert_eq!(numbers(32, body), (0..32).map(|i| i ^ 1).collect::<Vec<u32>>());
}

#[test]
fn half_warps_meet_by_their_masks() {
    let body = "const u32 mask = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u; u32 result; \
                if (i % 32 < 16) result = shuffle_xor(i, 8, mask); else { result = shuffle_xor(i + 100, 1, mask); }";
    let expected: Vec<u32> = (0..32).map(|i| if i < 16 { i ^ 8 } else { (i ^ 1) + 100 }).collect();
    assert_eq!(numbers(32, body), expected);
}

#[test]
fn a_warp_barrier_orders_shared_memory() {
    let body = "u32* s = (u32*)shared_memory(); s[i] = i * 10; warp_barrier(); u32 result = s[i ^ 31];";
    assert_eq!(numbers(64, body), (0..64).map(|i| (i ^ 31) * 10).collect::<Vec<u32>>());
}

#[test]
fn a_block_barrier_orders_shared_memory() {
    let body = "u32* s = (u32*)shared_memory(); u32 result = 0; \
                for (u32 round = 0; round < 5; round++) \
                { s[i] = i + round; block_barrier(); result += s[(i + 500) % 1000]; block_barrier(); }";
    assert_eq!(
        numbers(1000, body),
        (0..1000).map(|i| (i + 500) % 1000 * 5 + 10).collect::<Vec<u32>>()
    );
}

#[test]
fn blocks_of_three_dimensions_number_their_threads() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(where, Arguments, 1024) {{
           const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
           const u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
           arguments.c[block * 24 + thread] = shuffle_from(block * 24 + thread, 23, 0xffffff) * 100 + thread;
         }}"
    );
    let where_am_i = kernel(&context, &source, "where");
    let c = stream.alloc_zeros::<u32>(24 * 30).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    let shape = cudarc::driver::LaunchConfig {
        grid_dim: (5, 3, 2),
        block_dim: (2, 3, 4),
        shared_mem_bytes: 0,
    };
    launch(&stream, &where_am_i, shape, arguments).unwrap();
    let expected: Vec<u32> = (0..720).map(|i| (i / 24 * 24 + 23) * 100 + i % 24).collect();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), expected);
}

#[test]
fn a_thread_that_leaves_before_a_barrier_is_missed() {
    let text = deadlock(128, "if (i >= 96) return;\nblock_barrier();");
    assert!(
        text.contains("96 threads at a block barrier (test.cu:5), 32 threads exited"),
        "{text}"
    );
    // Also where they have left before the others come.
    let text = deadlock(128, "if (i < 32) return;\nblock_barrier();");
    assert!(
        text.contains("96 threads at a block barrier (test.cu:5), 32 threads exited"),
        "{text}"
    );
}

#[test]
fn a_barrier_that_some_threads_pass_by_is_reported() {
    let text = misuse(64, "if (i < 32) block_barrier();\nblock_barrier();");
    assert!(
        text.contains("at test.cu:5") && text.contains("barrier in divergent code: 32 threads"),
        "{text}"
    );
    assert!(text.contains("test.cu:4"), "{text}");
}

#[test]
fn a_barrier_too_many_in_some_threads_is_a_deadlock() {
    let text = deadlock(64, "block_barrier();\nif (i < 32) block_barrier();");
    assert!(
        text.contains("32 threads at a block barrier (test.cu:5), 32 threads exited"),
        "{text}"
    );
}

#[test]
fn a_lane_that_does_not_come_is_missed() {
    let text = deadlock(32, "if (i != 5) result = shuffle_xor(i, 1);");
    assert!(
        text.contains("31 threads at a shuffle, ballot or warp barrier (test.cu:4), 1 threads exited"),
        "{text}"
    );
}

#[test]
fn masks_are_checked() {
    let text = misuse(32, "result = shuffle_xor(i, 1, 0xffff);");
    assert!(text.contains("lane 16 is not in its own mask 0x0000ffff"), "{text}");
    let text = misuse(20, "result = shuffle_xor(i, 1);");
    assert!(
        text.contains("mask 0xffffffff names lanes that a warp of 20 threads lacks"),
        "{text}"
    );
    let text = misuse(32, "if (i < 16) result = shuffle_xor(i, 16, 0xffff);");
    assert!(
        text.contains("asks for the value of lane") && text.contains("which does not take part"),
        "{text}"
    );
    let text = misuse(32, "if (i < 16) result = shuffle_xor(i, 1);\nelse warp_barrier();");
    assert!(text.contains("is at another operation (test.cu:4)"), "{text}");
}

#[test]
fn an_arrival_counts_once() {
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(count, Arguments, 64) {{ arguments.c[1 + arrive(arguments.c)] = 1; }}");
    let count = kernel(&context, &source, "count");
    let c = stream.alloc_zeros::<u32>(6401).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    launch(&stream, &count, shape(100, 64, 0), arguments).unwrap();
    let result = stream.clone_dtoh(&c).unwrap();
    assert_eq!(result[0], 6400);
    assert!(result[1..].iter().all(|mark| *mark == 1));
}

/// The last block to arrive adds up what all wrote: the sum must not depend on which block that is, nor on how many
/// threads of the host ran them.
#[test]
fn results_do_not_depend_on_the_order_of_blocks() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(total, Arguments, 64) {{
           u32* last = (u32*)shared_memory();
           if (threadIdx.x == 0) {{
             store<1>(arguments.a + blockIdx.x, Vector<float, 1>{{{{divide_rn(1.0f, 1.0f + blockIdx.x)}}}});
             *last = arrive(arguments.c) == gridDim.x - 1;
           }}
           block_barrier();
           if (*last && threadIdx.x == 0) {{
             float sum = 0;
             for (u32 i = 0; i < gridDim.x; i++) sum += load_coherent<1>(arguments.a + i).lane[0];
             store<1>(arguments.b, Vector<float, 1>{{{{sum}}}});
           }}
         }}"
    );
    let total = kernel(&context, &source, "total");
    let blocks = 2000;
    let expected = (0..blocks).fold(0f32, |sum, i| sum + 1.0 / (1.0 + i as f32));
    for _ in 0..10 {
        let a = stream.alloc_zeros::<f32>(blocks as usize).unwrap();
        let b = stream.alloc_zeros::<f32>(1).unwrap();
        let c = stream.alloc_zeros::<u32>(1).unwrap();
        let arguments = Arguments {
            a: address(&a, &stream),
            b: address(&b, &stream),
            c: address(&c, &stream),
            n: 0,
        };
        launch(&stream, &total, shape(blocks, 64, 4), arguments).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap(), [expected]);
        let launch = &emulator::launches(stream.cu_stream())[0];
        assert_eq!(
            launch.bytes_loaded,
            4 * u64::from(blocks) * 2,
            "each block's arrival, and the last block's loads"
        );
        assert_eq!(launch.bytes_stored, 4 * u64::from(blocks) * 2 + 4);
    }
}
