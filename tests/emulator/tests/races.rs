//! Accesses that nothing orders are found whichever way the threads happen to run, and ordered ones raise nothing.

#![cfg(target_os = "linux")]

mod support;

use cudarc::driver::{DriverError, PushKernelArg};
use support::*;

/// Runs one kernel in two blocks of 64 threads with 512 bytes of shared memory, cooperatively, `a` and `b` being 128
/// floats and `c` four counters; `b` was written by nobody.
fn run(body: &str) -> Result<Vec<f32>, String> {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(shared, Arguments, 64) {{\nfloat* const mine = (float*)shared_memory();\nconst u32 i = \
         threadIdx.x;\n{body}\n}}"
    );
    let function = kernel(&context, &source, "shared");
    let a = stream.alloc_zeros::<f32>(128).unwrap();
    // SAFETY: what is loaded before it is stored is what some of these tests are about.
    let b = unsafe { stream.alloc::<f32>(128) }.unwrap();
    let c = stream.alloc_zeros::<u32>(4).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        b: address(&b, &stream),
        c: address(&c, &stream),
        n: 1,
    };
    let mut builder = stream.launch_builder(&function);
    // SAFETY: the kernel takes `Arguments`, whose addresses are live.
    let launched: Result<_, DriverError> = unsafe { builder.arg(&arguments).launch_cooperative(shape(2, 64, 512)) };
    match launched {
        Ok(_) => Ok(stream.clone_dtoh(&a).unwrap()),
        Err(_) => Err(emulator::last_fault().expect("a message")),
    }
}

/// The kernel, its line, its thread and what was wrong, all in one message.
#[track_caller]
fn found(body: &str, words: &[&str]) {
    let text = run(body).expect_err(body);
    assert!(
        text.starts_with("kernel shared at test.cu:") && text.contains(": block (") && text.contains("), thread ("),
        "{text}"
    );
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[track_caller]
fn ordered(body: &str) {
    if let Err(text) = run(body) {
        panic!("{body}\n{text}");
    }
}

#[test]
fn shared_memory_needs_a_barrier_between_store_and_load() {
    found(
        "mine[i] = 0; block_barrier();\nmine[i] = i;\narguments.a[i + 64 * blockIdx.x] = mine[i ^ 1];",
        &[
            "at test.cu:6: ",
            "race: store of 4 bytes of shared memory at byte",
            "loaded it at test.cu:7",
        ],
    );
    ordered("mine[i] = i; block_barrier(); arguments.a[i + 64 * blockIdx.x] = mine[i ^ 1];");
}

#[test]
fn shared_memory_needs_a_barrier_before_it_is_stored_again() {
    found(
        "mine[i] = i; block_barrier(); const float x = mine[i ^ 1];\nmine[i] = x + 1;",
        &["race:", "of shared memory"],
    );
    ordered("mine[i] = i; block_barrier(); const float x = mine[i ^ 1]; block_barrier(); mine[i] = x + 1;");
}

#[test]
fn two_threads_must_not_store_to_one_place() {
    found(
        "mine[i / 2] = 1;",
        &["race: store of 4 bytes", "thread (0,0,0) stored it at test.cu:5"],
    );
    ordered("((u16*)mine)[i] = 1;");
    ordered("((u8*)mine)[i] = 1;");
}

#[test]
fn a_warp_barrier_orders_its_lanes_and_nobody_else() {
    ordered("mine[i] = i; warp_barrier(); arguments.a[i + 64 * blockIdx.x] = mine[i ^ 1];");
    found(
        "mine[i] = 0; block_barrier(); mine[i] = i; warp_barrier(); arguments.a[i + 64 * blockIdx.x] = mine[i ^ 32];",
        &["race:"],
    );
    ordered(
        "if (i < 4) { mine[i] = i; warp_barrier(15); mine[i ^ 1]; arguments.a[4 * blockIdx.x + i] = mine[i ^ 3]; }",
    );
    found(
        "mine[i] = 0; block_barrier(); mine[i] = i; if (i < 4) { warp_barrier(15); arguments.a[4 * blockIdx.x + i] = mine[i + 4]; }",
        &["race:"],
    );
}

#[test]
fn a_shuffle_orders_nothing() {
    found(
        "mine[i] = 0; block_barrier(); mine[i] = i; const float x = shuffle_xor((float)i, 1); arguments.a[i + 64 * blockIdx.x] = x + mine[i ^ 1];",
        &["race:"],
    );
}

#[test]
fn what_nobody_wrote_is_not_loaded() {
    found(
        "if (i == 0) mine[0] = 1; block_barrier(); arguments.a[i + 64 * blockIdx.x] = mine[i];",
        &["uninitialised: load of 4 bytes of shared memory at byte"],
    );
    found(
        "store<1>(arguments.a + i, load<1>(arguments.b + i));",
        &["uninitialised: load of 4 bytes of global memory, of which byte 0 of an allocation of 512 bytes"],
    );
    found(
        "if (i == 0) arguments.b[0] = arguments.b[1] = arguments.b[2] = 1;\nif (i == 0) load<4>((u32*)arguments.b);",
        &["uninitialised: load of 16 bytes of global memory, of which byte 12 of an allocation"],
    );
    ordered(
        "arguments.b[i + 64 * blockIdx.x] = 1; arguments.a[i + 64 * blockIdx.x] = arguments.b[i + 64 * blockIdx.x];",
    );
}

#[test]
fn two_blocks_must_not_store_to_one_place() {
    found(
        "store<1>(arguments.a + i, Vector<float, 1>{{1}});",
        &[
            "race: store of 4 bytes of global memory",
            "block (0,0,0), thread (0,0,0) stored it at test.cu:5",
        ],
    );
}

#[test]
fn what_another_block_stores_is_not_loaded_without_order() {
    let body = |between: &str| {
        format!(
            "store<1>(arguments.a + 64 * blockIdx.x + i, Vector<float, 1>{{{{1}}}});\n{between}\n\
             load<1>(arguments.a + (64 * blockIdx.x + i + 64) % 128);"
        )
    };
    found(&body(""), &["race:", "of global memory"]);
    found(&body("block_barrier();"), &["race:", "of global memory"]);
    ordered(&body("grid_barrier(arguments.c);"));
}

/// The block that arrives last may load what the other one stored, if each of its threads' stores was over before the
/// arrival, and if its threads waited for the one that arrived.
#[test]
fn the_last_block_to_arrive_sees_what_the_others_stored() {
    let body = |before: &str, arrive: &str, after: &str| {
        format!(
            "u32* const count = (u32*)mine;\n\
             store<1>(arguments.b + 64 * blockIdx.x + i, Vector<float, 1>{{{{1}}}});\n{before}\n\
             if (i == 0) *count = {arrive};\n{after}\n\
             if (*count == 1) arguments.a[i] = load_coherent<1>(arguments.b + (i * 2 + 1) % 128).lane[0];\n\
             if (*count == 1 && i == 0) store<1>(arguments.c, Vector<u32, 1>{{{{0}}}});"
        )
    };
    ordered(&body("block_barrier();", "arrive(arguments.c)", "block_barrier();"));
    found(
        &body("", "arrive(arguments.c)", "block_barrier();"),
        &["race:", "of global memory"],
    );
    found(
        &body("block_barrier();", "arrive(arguments.c)", ""),
        &["of shared memory"],
    );
    found(
        &body(
            "block_barrier();",
            "arrive(arguments.c + blockIdx.x) + blockIdx.x",
            "block_barrier();",
        ),
        &["race:"],
    );
}

#[test]
fn arrivals_may_meet_but_not_with_plain_stores() {
    ordered("arrive(arguments.c);");
    found(
        "arrive(arguments.c); if (i == 0 && blockIdx.x == 0) store<1>(arguments.c, Vector<u32, 1>{{0}});",
        &["race:", "of global memory at byte 0"],
    );
}

#[test]
fn an_mbarrier_shows_what_was_done_before_arriving() {
    let body = |wait: &str| {
        format!(
            "u64* const barrier = (u64*)(mine + 64);\nif (i == 0) mbarrier_init(barrier, 64);\nblock_barrier();\n\
             mine[i] = 0; block_barrier(); mine[i] = i; mbarrier_arrive(barrier, 0);\n{wait}\narguments.a[64 * blockIdx.x + i] = mine[63 - i];"
        )
    };
    ordered(&body("mbarrier_wait(barrier, 0);"));
    found(&body(""), &["race:"]);
}

#[test]
fn a_copy_on_the_device_copies_what_is_known() {
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(look, Arguments, 1) {{ load<1>(arguments.a + arguments.n); }}");
    let look = kernel(&context, &source, "look");
    // SAFETY: what is loaded before it is stored is what this is about.
    let (mut half, mut copy) = unsafe { (stream.alloc::<f32>(64).unwrap(), stream.alloc::<f32>(64).unwrap()) };
    stream.memset_zeros(&mut half.slice_mut(3..35)).unwrap();
    stream.memcpy_dtod(&half, &mut copy).unwrap();
    for (n, written) in [(2, false), (3, true), (34, true), (35, false)] {
        let arguments = Arguments {
            a: address(&copy, &stream),
            n,
            ..Default::default()
        };
        assert_eq!(
            launch(&stream, &look, shape(1, 1, 0), arguments).is_ok(),
            written,
            "{n}"
        );
    }
}

// ---- clusters -------------------------------------------------------------------------------------------------------

/// As [`run`], in a cluster of both blocks; `mine` and `theirs` are the two blocks' shared memory, zero at first.
fn run_cluster(body: &str) -> Result<Vec<f32>, String> {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}CLUSTER_KERNEL(shared, Arguments, 64, 2) {{\nfloat* const mine = (float*)shared_memory();\n\
         const u32 i = threadIdx.x; mine[i] = 0; cluster_barrier(); const auto theirs = remote(mine, 1 - \
         cluster_rank());\n{body}\n}}"
    );
    let function = kernel(&context, &source, "shared");
    let a = stream.clone_htod(&[1.0f32; 128]).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        ..Default::default()
    };
    match launch(&stream, &function, shape(2, 64, 512), arguments) {
        Ok(()) => Ok(stream.clone_dtoh(&a).unwrap()),
        Err(_) => Err(emulator::last_fault().expect("a message")),
    }
}

#[track_caller]
fn found_in_cluster(body: &str, words: &str) {
    let text = run_cluster(body).expect_err(body);
    assert!(text.contains(words), "{words:?} is not in: {text}");
}

#[track_caller]
fn ordered_in_cluster(body: &str) {
    if let Err(text) = run_cluster(body) {
        panic!("{body}\n{text}");
    }
}

#[test]
fn distributed_shared_memory_needs_a_cluster_barrier() {
    let body = |between: &str| {
        format!(
            "mine[i] = i;\n{between}\nconst float x = load_remote<1>(theirs, 63 - i).lane[0];\n\
                 cluster_barrier(); arguments.a[64 * blockIdx.x + i] = x;"
        )
    };
    ordered_in_cluster(&body("cluster_barrier();"));
    found_in_cluster(&body(""), "race: ");
    // A barrier of the block is none of the cluster's.
    found_in_cluster(&body("block_barrier();"), "race: ");
}

#[test]
fn a_remote_store_must_not_meet_the_owners_load() {
    let body = |between: &str| {
        format!(
            "store_remote<1>(theirs, i, Vector<float, 1>{{{{1}}}});\n{between}\n\
                 arguments.a[64 * blockIdx.x + i] = mine[i]; cluster_barrier();"
        )
    };
    ordered_in_cluster(&body("cluster_barrier();"));
    found_in_cluster(&body(""), "race: ");
}

#[test]
fn a_cluster_barrier_orders_what_came_before_arriving_only() {
    ordered_in_cluster("mine[i] = i; cluster_arrive(); cluster_wait(); load_remote<1>(theirs, i); cluster_barrier();");
    found_in_cluster(
        "cluster_arrive(); mine[i] = i; cluster_wait(); load_remote<1>(theirs, i); cluster_barrier();",
        "race: ",
    );
    // What the block's barrier shows after the wait of one of its threads, the others may count on.
    ordered_in_cluster(
        "mine[i] = i; cluster_arrive(); cluster_wait(); block_barrier();\n\
         load_remote<1>(theirs, 63 - i); cluster_barrier(); mine[i] = 1; cluster_barrier();",
    );
    found_in_cluster(
        "cluster_barrier(); load_remote<1>(theirs, 63 - i); mine[i] = 1; cluster_barrier();",
        "race: ",
    );
}

#[test]
fn global_memory_is_ordered_by_cluster_barriers() {
    let body = |between: &str| {
        format!(
            "arguments.a[64 * blockIdx.x + i] = i;\n{between}\n\
                 mine[i] = arguments.a[(64 * blockIdx.x + i + 64) % 128]; cluster_barrier();"
        )
    };
    ordered_in_cluster(&body("cluster_barrier();"));
    found_in_cluster(&body(""), "race: ");
}

#[test]
fn a_buffer_is_not_copied_into_while_others_load_from_it() {
    let body = |between: &str| {
        format!(
            "u64* const barrier = (u64*)(mine + 64);\nif (i == 0) mbarrier_init(barrier, 1);\nbulk_fence();\nblock_barrier();\n\
             for (u32 round = 0; round < 2; round++) {{\n\
               if (i == 0) {{ mbarrier_arrive(barrier, 256); bulk_copy(mine, arguments.a, 256, barrier); }}\n\
               mbarrier_wait(barrier, round);\nmine[63 - i] == 2.0f ? store<1>(arguments.a + i, Vector<float, 1>{{}}) : void();\n\
               {between}\n}}"
        )
    };
    ordered_in_cluster(&body("block_barrier();"));
    found_in_cluster(&body(""), "race: ");
}

#[test]
fn an_mbarrier_is_shown_before_it_is_used() {
    found_in_cluster(
        "u64* const barrier = (u64*)(mine + 64);\nif (cluster_rank() == 0) return;\n\
         if (i == 63) mbarrier_init(barrier, 64);\nmbarrier_arrive(barrier, 0);",
        "race: ",
    );
}
