//! Sectors of 32 bytes, counted as the lanes of a warp touch them together.

#![cfg(target_os = "linux")]

mod support;

use support::*;

/// Runs a kernel in one block of 64 threads, two warps, on 4096 floats; the sectors it loaded and stored.
fn sectors(body: &str) -> (u64, u64) {
    let (context, stream) = device("h200");
    let source = format!("{ARGUMENTS}KERNEL(touch, Arguments, 64) {{\nconst u32 i = threadIdx.x;\n{body}\n}}");
    let touch = kernel(&context, &source, "touch");
    let a = stream.alloc_zeros::<f32>(4096).unwrap();
    let b = stream.alloc_zeros::<f32>(4096).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        b: address(&b, &stream),
        n: 3,
        ..Default::default()
    };
    launch(&stream, &touch, shape(1, 64, 256), arguments).unwrap_or_else(|_| panic!("{:?}", emulator::last_fault()));
    let launch = emulator::launches(stream.cu_stream()).remove(0);
    (launch.sectors_loaded, launch.sectors_stored)
}

#[test]
fn neighbours_share_sectors() {
    // 128 bytes a warp are 4 sectors, 512 bytes are 16.
    assert_eq!(sectors("load<1>(arguments.a + i);"), (8, 0));
    assert_eq!(sectors("load<4>((const u32*)arguments.a + 4 * i);"), (32, 0));
    assert_eq!(sectors("store<1>(arguments.a + i, Vector<float, 1>{{1}});"), (0, 8));
    assert_eq!(
        sectors("store<4>((u16*)arguments.a + 4 * i, Vector<u16, 4>{});"),
        (0, 16)
    );
}

#[test]
fn lanes_far_apart_move_a_sector_each() {
    assert_eq!(sectors("load<1>(arguments.a + 8 * i);"), (64, 0));
    assert_eq!(
        sectors("store<1>(arguments.a + 64 * i, Vector<float, 1>{{1}});"),
        (0, 64)
    );
    // Half of the bytes are wanted, all of the sectors are moved.
    assert_eq!(sectors("load<1>(arguments.a + 2 * i);"), (16, 0));
}

#[test]
fn what_lies_across_the_end_of_a_sector_moves_one_more() {
    assert_eq!(sectors("load<1>(arguments.a + i + 1);"), (10, 0));
}

#[test]
fn a_warp_moves_a_sector_once_and_the_next_warp_again() {
    assert_eq!(sectors("load<1>(arguments.a);"), (2, 0));
    assert_eq!(sectors("load<1>(arguments.a); load<1>(arguments.a);"), (4, 0));
}

#[test]
fn rounds_of_a_loop_are_told_apart() {
    assert_eq!(
        sectors("for (u32 k = 0; k < 5; k++) load<1>(arguments.a + 64 * k + i);"),
        (40, 0)
    );
    assert_eq!(
        sectors("for (u32 k = i; k < 80; k += 64) load<1>(arguments.a + k);"),
        (10, 0)
    );
    // Lanes that take part in some rounds only come together again at a barrier.
    let odd = "for (u32 k = 0; k < arguments.n; k++) {\n\
                 if (i % 2 == 0 || k == 2) load<1>(arguments.a + 64 * k + i);\nblock_barrier();\n}";
    assert_eq!(sectors(odd), (24, 0));
}

#[test]
fn plain_pointers_are_counted_too() {
    assert_eq!(sectors("arguments.b[i] = arguments.a[2 * i];"), (16, 8));
}

#[test]
fn a_bulk_copy_moves_each_sector_once() {
    let copy = "u64* const barrier = (u64*)shared_memory();
        if (i == 0) {
          mbarrier_init(barrier, 1);
          mbarrier_arrive(barrier, 128);
          bulk_copy(shared_memory() + 16, arguments.a, 128, barrier);
          mbarrier_wait(barrier, 0);
        }";
    assert_eq!(sectors(copy), (4, 0));
}
