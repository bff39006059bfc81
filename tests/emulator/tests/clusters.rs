//! Clusters: distributed shared memory, their barrier, asynchronous copies, and grids that wait for each other.

#![cfg(target_os = "linux")]

mod support;

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaFunction, CudaStream, DriverError};
use support::*;

/// A launch with clusters that the launch, not the kernel, asks for.
fn launch_clusters(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    (grid, block, cluster): ([u32; 3], u32, [u32; 3]),
    arguments: Arguments,
) -> Result<(), DriverError> {
    // SAFETY: all zeros is a value of both, which are plain C structures.
    let (mut attribute, mut configuration): (sys::CUlaunchAttribute, sys::CUlaunchConfig) =
        unsafe { std::mem::zeroed() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
        x: cluster[0],
        y: cluster[1],
        z: cluster[2],
    };
    (configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ) = (grid[0], grid[1], grid[2]);
    (
        configuration.blockDimX,
        configuration.blockDimY,
        configuration.blockDimZ,
    ) = (block, 1, 1);
    configuration.sharedMemBytes = 1024;
    configuration.hStream = stream.cu_stream();
    configuration.attrs = &raw mut attribute;
    configuration.numAttrs = 1;
    let mut list = [(&raw const arguments).cast_mut().cast::<c_void>()];
    // SAFETY: the kernel takes `Arguments`; everything lives during the call, at whose end the kernel has run.
    unsafe {
        sys::cuLaunchKernelEx(
            &configuration,
            function.cu_function(),
            list.as_mut_ptr(),
            std::ptr::null_mut(),
        )
        .result()
    }
}

/// Each block shows its neighbours a number.
const NEIGHBOURS: &str = "
DEVICE void show_neighbours(const Arguments& arguments) {
  u32* mine = (u32*)shared_memory();
  if (threadIdx.x == 0) mine[3] = 100 * blockIdx.x + 10 * blockIdx.y + blockIdx.z;
  cluster_barrier();
  const u32 next = (cluster_rank() + 1) % cluster_size();
  const u32 theirs = load_remote<1>(remote(mine, next), 3).lane[0];
  cluster_arrive();
  const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) arguments.c[block] = theirs;
  cluster_wait();
}
KERNEL(any, Arguments, 64) { show_neighbours(arguments); }
CLUSTER_KERNEL(four, Arguments, 64, 4) { show_neighbours(arguments); }
CLUSTER_KERNEL(sixteen, Arguments, 64, 16) { show_neighbours(arguments); }
";

fn neighbours() -> String {
    format!("{ARGUMENTS}{NEIGHBOURS}")
}

/// What every block of the grid saw, for clusters of this shape.
fn expected(grid: [u32; 3], cluster: [u32; 3]) -> Vec<u32> {
    let number = |at: [u32; 3]| 100 * at[0] + 10 * at[1] + at[2];
    let volume = cluster[0] * cluster[1] * cluster[2];
    let mut seen = Vec::new();
    for z in 0..grid[2] {
        for y in 0..grid[1] {
            for x in 0..grid[0] {
                let base = [
                    x / cluster[0] * cluster[0],
                    y / cluster[1] * cluster[1],
                    z / cluster[2] * cluster[2],
                ];
                let inside = [x - base[0], y - base[1], z - base[2]];
                let rank = (inside[2] * cluster[1] + inside[1]) * cluster[0] + inside[0];
                let next = (rank + 1) % volume;
                let at = [
                    next % cluster[0],
                    next / cluster[0] % cluster[1],
                    next / cluster[0] / cluster[1],
                ];
                seen.push(number([base[0] + at[0], base[1] + at[1], base[2] + at[2]]));
            }
        }
    }
    seen
}

#[test]
fn blocks_of_a_cluster_see_each_others_shared_memory() {
    let (context, stream) = device("h200");
    let any = kernel(&context, &neighbours(), "any");
    for (grid, cluster) in [
        ([8, 1, 1], [4, 1, 1]),
        ([4, 6, 2], [2, 3, 1]),
        ([2, 2, 4], [1, 1, 4]),
        ([3, 1, 1], [1, 1, 1]),
    ] {
        let c = stream
            .alloc_zeros::<u32>((grid[0] * grid[1] * grid[2]) as usize)
            .unwrap();
        let arguments = Arguments {
            c: address(&c, &stream),
            ..Default::default()
        };
        launch_clusters(&stream, &any, (grid, 64, cluster), arguments).unwrap();
        assert_eq!(
            stream.clone_dtoh(&c).unwrap(),
            expected(grid, cluster),
            "{grid:?} in {cluster:?}"
        );
        assert_eq!(emulator::launches(stream.cu_stream())[0].cluster, cluster);
    }
}

#[test]
fn a_kernel_may_bring_its_own_cluster_size() {
    let (context, stream) = device("b200");
    let four = kernel(&context, &neighbours(), "four");
    let c = stream.alloc_zeros::<u32>(12).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    launch(&stream, &four, shape(12, 64, 1024), arguments).unwrap();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), expected([12, 1, 1], [4, 1, 1]));

    let no_multiple = launch(&stream, &four, shape(6, 64, 1024), arguments).unwrap_err();
    assert_eq!(no_multiple.0, CUresult::CUDA_ERROR_INVALID_VALUE);
    let another_size = launch_clusters(&stream, &four, ([12, 1, 1], 64, [2, 1, 1]), arguments).unwrap_err();
    assert_eq!(another_size.0, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn sixteen_blocks_need_leave() {
    let (context, stream) = device("h200");
    let sixteen = kernel(&context, &neighbours(), "sixteen");
    let c = stream.alloc_zeros::<u32>(16).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    let refused = launch(&stream, &sixteen, shape(16, 64, 1024), arguments).unwrap_err();
    assert_eq!(refused.0, CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
    sixteen.set_attribute(attribute, 1).unwrap();
    launch(&stream, &sixteen, shape(16, 64, 1024), arguments).unwrap();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), expected([16, 1, 1], [16, 1, 1]));
}

#[test]
fn devices_without_clusters_refuse_them() {
    let (context, stream) = device("a100");
    let four = kernel(&context, &neighbours(), "four");
    let refused = launch(&stream, &four, shape(4, 64, 1024), Arguments::default()).unwrap_err();
    assert_eq!(refused.0, CUresult::CUDA_ERROR_NOT_SUPPORTED);
}

/// Runs two blocks as one cluster that must fail; the error and the message.
fn failure(body: &str) -> (CUresult, String) {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}CLUSTER_KERNEL(wrong, Arguments, 32, 2) {{\nu32* const mine = (u32*)shared_memory();\n{body}\n}}"
    );
    let wrong = kernel(&context, &source, "wrong");
    let a = stream.alloc_zeros::<f32>(64).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        ..Default::default()
    };
    let error = launch(&stream, &wrong, shape(2, 32, 512), arguments).unwrap_err();
    (error.0, emulator::last_fault().unwrap())
}

#[track_caller]
fn fails(body: &str, words: &str) {
    let (code, text) = failure(body);
    assert!(
        code != CUresult::CUDA_ERROR_INVALID_VALUE && text.contains(words),
        "{code:?}: {text}"
    );
}

#[test]
fn wrong_use_of_clusters_is_reported() {
    fails(
        "load_remote<1>(remote(mine, 1 - cluster_rank()), 0);",
        "before any cluster barrier",
    );
    fails(
        "cluster_barrier(); load_remote<1>(remote(mine, 2), 0);",
        "there is no block 2 in a cluster of 2",
    );
    fails(
        "cluster_barrier(); load_remote<1>(remote(mine, 1 - cluster_rank()), 128);",
        "bytes 512..516 of 512",
    );
    fails(
        "cluster_barrier(); load_remote<2>(remote(mine, 1 - cluster_rank()), 1);",
        "misaligned",
    );
    fails(
        "cluster_barrier(); remote((u32*)arguments.a, 0);",
        "is no address of shared memory",
    );
    fails(
        "mine[threadIdx.x] = 1; cluster_barrier(); if (cluster_rank() == 1) return;\n\
         block_barrier(); if (threadIdx.x == 0) load_remote<1>(remote(mine, 1), 0);",
        "which has exited",
    );
    fails(
        "mine[threadIdx.x] = 1; cluster_barrier(); if (cluster_rank() == 1) block_barrier();\n\
         else load_remote<1>(remote(mine, 1), 0);",
        "the block exits without a cluster barrier since block (0,0,0), thread (31,0,0) accessed its shared memory",
    );
    fails(
        "cluster_barrier(); mine[cluster_rank() == 0 ? 200 : 0] = 1;",
        "of shared memory out of bounds",
    );
    fails("cluster_wait();", "cluster_wait without cluster_arrive");
    fails("cluster_arrive(); cluster_arrive();", "cluster_arrive twice");
    fails("cluster_arrive();", "exits between cluster_arrive and cluster_wait");
    fails(
        "cluster_arrive(); if (cluster_rank() == 1 && threadIdx.x > 3) for (;;) block_barrier();\ncluster_wait();",
        "deadlock",
    );
    fails(
        "if (cluster_rank() == 0) cluster_barrier();",
        "32 threads exited, 32 threads waiting for the cluster (test.cu:4)",
    );
}

#[test]
fn a_pointer_into_another_blocks_shared_memory_is_no_way_in() {
    let body =
        "cluster_barrier(); if (cluster_rank() == 0) ((u32*)remote(mine, 1).address)[0] = 1;\ncluster_barrier();";
    let (code, text) = failure(body);
    assert_eq!(code, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert!(text.contains("it belongs to another block"), "{text}");
}

#[test]
fn a_store_reaches_another_block() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}CLUSTER_KERNEL(send, Arguments, 32, 2) {{
           u32* const mine = (u32*)shared_memory();
           cluster_barrier();
           store_remote<1>(remote(mine, 1 - cluster_rank()), threadIdx.x, Vector<u32, 1>{{{{100 * blockIdx.x + threadIdx.x}}}});
           cluster_barrier();
           arguments.c[blockIdx.x * 32 + threadIdx.x] = mine[threadIdx.x];
         }}"
    );
    let send = kernel(&context, &source, "send");
    let c = stream.alloc_zeros::<u32>(128).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    launch(&stream, &send, shape(4, 32, 128), arguments).unwrap();
    let expected: Vec<u32> = (0..128).map(|i| 100 * ((i / 32) ^ 1) + i % 32).collect();
    assert_eq!(stream.clone_dtoh(&c).unwrap(), expected);
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

/// One block copies 64 floats a round to shared memory, in two pieces, and from there to b.
fn bulk(rounds: u32, wait: &str) -> String {
    format!(
        "{ARGUMENTS}KERNEL(bulk, Arguments, 64) {{
           u64* const barrier = (u64*)shared_memory();
           float* const here = (float*)(shared_memory() + 16);
           if (threadIdx.x == 0) mbarrier_init(barrier, 1);
           block_barrier();
           for (u32 round = 0; round < {rounds}; round++) {{
             if (threadIdx.x == 0) {{
               mbarrier_arrive(barrier, 256);
               bulk_copy(here, arguments.a + 64 * round, 128, barrier);
               bulk_copy(here + 32, arguments.a + 64 * round + 32, 128, barrier);
             }}
             {wait}
             arguments.b[64 * round + threadIdx.x] = here[threadIdx.x];
             block_barrier();
           }}
         }}"
    )
}

fn run_bulk(rounds: u32, wait: &str) -> Result<(Vec<f32>, Vec<f32>, emulator::Launch), DriverError> {
    let (context, stream) = device("h200");
    let function = kernel(&context, &bulk(rounds, wait), "bulk");
    let values: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let a = stream.clone_htod(&values).unwrap();
    let b = stream.alloc_zeros::<f32>(128).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        b: address(&b, &stream),
        ..Default::default()
    };
    launch(&stream, &function, shape(1, 64, 272), arguments)?;
    Ok((
        values,
        stream.clone_dtoh(&b).unwrap(),
        emulator::launches(stream.cu_stream()).remove(0),
    ))
}

#[test]
fn a_bulk_copy_has_arrived_when_its_barrier_says_so() {
    let (values, result, launch) = run_bulk(2, "mbarrier_wait(barrier, round & 1);").unwrap();
    assert_eq!(result, values);
    assert_eq!((launch.bytes_loaded, launch.bytes_stored), (512, 512));
}

#[test]
fn who_does_not_wait_for_a_bulk_copy_is_found_out() {
    run_bulk(1, "block_barrier();").unwrap_err();
    let text = emulator::last_fault().unwrap();
    assert!(text.contains("while a copy into it is in flight"), "{text}");
}

#[test]
fn wrong_use_of_mbarriers_is_reported() {
    let start = "u64* const b = (u64*)mine; if (threadIdx.x == 0) mbarrier_init(b, 1);\nblock_barrier();";
    let alone = "if (threadIdx.x == 0)";
    fails("mbarrier_wait((u64*)mine, 0);", "the mbarrier was not initialised");
    fails(
        &format!("{start} mbarrier_wait(b, 0);"),
        "threads waiting for an mbarrier (test.cu:5)",
    );
    fails(
        &format!("{start} {alone} {{ mbarrier_arrive(b, 16); }} mbarrier_wait(b, 0);"),
        "waiting for an mbarrier",
    );
    fails(
        &format!("{start} {alone} {{ mbarrier_arrive(b, 16); mbarrier_arrive(b, 0); }}"),
        "more arrivals at the mbarrier than the 1",
    );
    fails(
        &format!("{start} {alone} bulk_copy(mine + 4, arguments.a + 1, 16, b);"),
        "must be multiples of 16",
    );
    fails(
        &format!("{start} {alone} bulk_copy(mine + 4, arguments.a, 24, b);"),
        "must be multiples of 16",
    );
    fails(
        &format!("{start} {alone} bulk_copy(mine + 4, arguments.a + 60, 32, b);"),
        "bytes 240..272 of an allocation of 256 bytes",
    );
    fails(
        &format!("{start} {alone} bulk_copy(mine + 120, arguments.a, 64, b);"),
        "bytes 480..544 of 512",
    );
    fails(
        &format!("{start} {alone} bulk_copy(arguments.a, arguments.a, 16, b);"),
        "is no address of shared memory",
    );
}

// ---- cooperative launches -------------------------------------------------------------------------------------------

const GRID_SUM: &str = "
KERNEL(grid_sum, Arguments, 64) {
  if (threadIdx.x == 0) arguments.a[blockIdx.x] = (float)blockIdx.x;
  grid_barrier(arguments.c);
  float sum = 0;
  for (u32 i = 0; i < gridDim.x; i++) sum += load_coherent<1>(arguments.a + i).lane[0];
  grid_barrier(arguments.c);
  if (threadIdx.x == 0) arguments.a[blockIdx.x] = sum;
}";

#[test]
fn blocks_of_a_cooperative_launch_meet() {
    use cudarc::driver::PushKernelArg;
    let (context, stream) = device("small-90");
    let grid_sum = kernel(&context, &format!("{ARGUMENTS}{GRID_SUM}"), "grid_sum");
    let resident = grid_sum
        .occupancy_max_active_blocks_per_multiprocessor(64, 0, None)
        .unwrap()
        * 4;
    let run = |blocks: u32| {
        let a = stream.alloc_zeros::<f32>(blocks as usize).unwrap();
        let c = stream.alloc_zeros::<u32>(1).unwrap();
        let arguments = Arguments {
            a: address(&a, &stream),
            c: address(&c, &stream),
            ..Default::default()
        };
        let mut builder = stream.launch_builder(&grid_sum);
        // SAFETY: the kernel takes `Arguments`, whose addresses are live.
        let result = unsafe { builder.arg(&arguments).launch_cooperative(shape(blocks, 64, 0)) };
        result.map(|_| (stream.clone_dtoh(&a).unwrap(), stream.clone_dtoh(&c).unwrap()))
    };
    let (sums, counter) = run(20).unwrap();
    assert_eq!(sums, [190.0; 20]);
    assert_eq!(counter, [40], "every block counts once at each barrier");
    assert!(emulator::launches(stream.cu_stream())[0].cooperative);
    let too_large = run(resident + 1).unwrap_err();
    assert_eq!(too_large.0, CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
}

#[test]
fn a_grid_barrier_needs_a_cooperative_launch() {
    let (context, stream) = device("h200");
    let grid_sum = kernel(&context, &format!("{ARGUMENTS}{GRID_SUM}"), "grid_sum");
    let a = stream.alloc_zeros::<f32>(2).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        ..Default::default()
    };
    launch(&stream, &grid_sum, shape(2, 64, 0), arguments).unwrap_err();
    assert!(
        emulator::last_fault()
            .unwrap()
            .contains("grid barrier in a launch that is not cooperative")
    );
}
