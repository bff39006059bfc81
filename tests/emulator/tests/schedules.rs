//! Random schedules: one seed is one order, other seeds are other orders, of threads, of blocks and of bulk copies.

#![cfg(target_os = "linux")]

mod support;

use std::collections::HashSet;

use support::*;

/// Runs a kernel in `blocks` blocks of 64 threads under a schedule, `c` being 8 counters and 64 numbers a block; gives
/// the numbers.
fn run(kernels: &str, name: &str, blocks: u32, seed: Option<u64>) -> Vec<u32> {
    let (context, stream) = device("h200");
    let function = kernel(&context, &format!("{ARGUMENTS}{kernels}"), name);
    let a = stream.clone_htod(&vec![1.0f32; 64]).unwrap();
    let c = stream.alloc_zeros::<u32>(8 + 64 * blocks as usize).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        c: address(&c, &stream),
        ..Default::default()
    };
    emulator::set_schedule(seed);
    let launched = launch(&stream, &function, shape(blocks, 64, 1024), arguments);
    emulator::set_schedule(None);
    launched.unwrap_or_else(|_| panic!("{:?}", emulator::last_fault()));
    stream.clone_dtoh(&c).unwrap().split_off(8)
}

/// The order in which threads arrive at one counter, twice over.
const ORDER: &str = "
KERNEL(order, Arguments, 64) {
  u32* const mine = arguments.c + 8 + 64 * blockIdx.x;
  mine[threadIdx.x] = arrive(arguments.c);
  block_barrier();
  mine[threadIdx.x] = 1000 * mine[threadIdx.x] + arrive(arguments.c + 1);
}";

#[test]
fn without_a_seed_threads_run_in_their_order() {
    let order = run(ORDER, "order", 2, None);
    assert!(order.iter().map(|number| number / 1000).eq(0..128));
}

#[test]
fn one_seed_is_one_order() {
    for seed in [0, 1, u64::MAX] {
        assert_eq!(run(ORDER, "order", 5, Some(seed)), run(ORDER, "order", 5, Some(seed)));
    }
    let orders: HashSet<Vec<u32>> = (0..20).map(|seed| run(ORDER, "order", 5, Some(seed))).collect();
    assert_eq!(orders.len(), 20);
}

#[test]
fn every_block_runs_once_in_any_order_and_several_at_a_time() {
    let (mut first, mut interleaved) = (HashSet::new(), false);
    for seed in 0..40 {
        let order: Vec<u32> = run(ORDER, "order", 7, Some(seed))
            .iter()
            .map(|number| number / 1000)
            .collect();
        let mut sorted = order.clone();
        sorted.sort();
        assert!(sorted.into_iter().eq(0..7 * 64), "seed {seed}");
        let begin = |block: usize| *order[64 * block..64 * (block + 1)].iter().min().unwrap();
        let end = |block: usize| *order[64 * block..64 * (block + 1)].iter().max().unwrap();
        first.insert((0..7).min_by_key(|&block| begin(block)).unwrap());
        interleaved |= (1..7).any(|block| begin(block) < end(block - 1) && begin(block - 1) < end(block));
    }
    assert_eq!(first.len(), 7, "every block was the first to arrive under some seed");
    assert!(interleaved);
}

/// A thread that loses its turn between two accesses of its own: what it loaded may be old when it stores.
#[test]
fn threads_lose_their_turn_between_accesses() {
    let lost = "
KERNEL(lost, Arguments, 64) {
  u32* const mine = arguments.c + 8 + 64 * blockIdx.x;
  const u32 before = arrive(arguments.c);
  mine[threadIdx.x] = arrive(arguments.c) - before;
}";
    assert!(run(lost, "lost", 1, None).iter().all(|&steps| steps == 1));
    assert!((0..10).any(|seed| run(lost, "lost", 1, Some(seed)).iter().any(|&steps| steps > 1)));
}

/// Two bulk copies, each with an mbarrier of its own, and a thread that waits for each: who comes first?
#[test]
fn bulk_copies_end_in_any_order() {
    let copies = "
KERNEL(copies, Arguments, 64) {
  u64* const barriers = (u64*)shared_memory();
  if (threadIdx.x < 2) mbarrier_init(barriers + threadIdx.x, 1);
  block_barrier();
  if (threadIdx.x < 2) {
    mbarrier_arrive(barriers + threadIdx.x, 64);
    bulk_copy(shared_memory() + 64 + 64 * threadIdx.x, arguments.a, 64, barriers + threadIdx.x);
    mbarrier_wait(barriers + threadIdx.x, 0);
    arguments.c[8 + threadIdx.x] = arrive(arguments.c);
  }
}";
    let winners: HashSet<Vec<u32>> = (0..20)
        .map(|seed| run(copies, "copies", 1, Some(seed))[..2].to_vec())
        .collect();
    assert_eq!(winners, HashSet::from([vec![0, 1], vec![1, 0]]));
}

/// What is wrong is found under any schedule, not only where it happens to show.
#[test]
fn a_race_is_found_under_every_schedule() {
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(racy, Arguments, 64) {{
           u32* const mine = (u32*)shared_memory();
           mine[threadIdx.x] = 0;
           block_barrier();
           mine[threadIdx.x] = threadIdx.x;
           arguments.c[threadIdx.x] = mine[63 - threadIdx.x];
         }}"
    );
    let racy = kernel(&context, &source, "racy");
    let c = stream.alloc_zeros::<u32>(64).unwrap();
    let arguments = Arguments {
        c: address(&c, &stream),
        ..Default::default()
    };
    for seed in 0..50 {
        emulator::set_schedule(Some(seed));
        let launched = launch(&stream, &racy, shape(1, 64, 256), arguments);
        emulator::set_schedule(None);
        launched.unwrap_err();
        let text = emulator::last_fault().unwrap();
        assert!(text.contains("race: "), "seed {seed}: {text}");
    }
}
