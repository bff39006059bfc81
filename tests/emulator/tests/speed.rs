//! The stand-in must be quick enough for a suite of thousands of launches.

#![cfg(target_os = "linux")]

mod support;

use std::time::Instant;

use support::*;

/// Mean of each channel by Welford's rule, a block of 256 per channel: loads, divisions, shuffles, shared memory.
const WELFORD: &str = "
struct Shape { const float* x; float* mean; u64 batch; u64 channels; u64 plane; };
struct State { float count, mean, m2; };
DEVICE State merge(State a, State b) {
  const float count = a.count + b.count;
  const float share = divide_rn(b.count, count > 0 ? count : 1.0f);
  const float delta = b.mean - a.mean;
  return {count, fma_rn(delta, share, a.mean), a.m2 + b.m2 + delta * delta * a.count * share};
}
DEVICE State warp_total(State state) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    state = merge(state, {shuffle_xor(state.count, lanes), shuffle_xor(state.mean, lanes), shuffle_xor(state.m2, lanes)});
  return state;
}
KERNEL(welford, Shape, 256) {
  State* partial = (State*)shared_memory();
  State state = {0, 0, 0};
  for (u32 i = threadIdx.x; i < arguments.batch * arguments.plane; i += 256) {
    const u32 n = i / arguments.plane, p = i % arguments.plane;
    const float x = load<1>(arguments.x + (n * arguments.channels + blockIdx.x) * arguments.plane + p).lane[0];
    state = merge(state, {1.0f, x, 0.0f});
  }
  state = warp_total(state);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = state;
  block_barrier();
  State mine = {0, 0, 0};
  if (threadIdx.x % 32 < 8) mine = partial[threadIdx.x % 32];
  mine = warp_total(mine);
  Vector<float, 1> out;
  out.lane[0] = mine.mean;
  if (threadIdx.x == 0) store<1>(arguments.mean + blockIdx.x, out);
}";

#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    x: u64,
    mean: u64,
    batch: u64,
    channels: u64,
    plane: u64,
}

// SAFETY: five integers without padding.
unsafe impl cudarc::driver::DeviceRepr for Shape {}

#[test]
fn statistics_of_a_small_tensor_take_milliseconds() {
    use cudarc::driver::PushKernelArg;
    let (context, stream) = device("h200");
    let welford = kernel(&context, WELFORD, "welford");
    let (batch, channels, plane) = (8, 16, 196);
    let values: Vec<f32> = (0..batch * channels * plane)
        .map(|i| ((i * 7919) % 1000) as f32 / 500.0)
        .collect();
    let x = stream.clone_htod(&values).unwrap();
    let mean = stream.alloc_zeros::<f32>(channels).unwrap();
    let arguments = Shape {
        x: address(&x, &stream),
        mean: address(&mean, &stream),
        batch: batch as u64,
        channels: channels as u64,
        plane: plane as u64,
    };
    // The best of several: other tests use the same processor.
    let best = (0..20)
        .map(|_| {
            let start = Instant::now();
            let mut builder = stream.launch_builder(&welford);
            // SAFETY: the kernel takes `Shape`, whose addresses are live.
            unsafe { builder.arg(&arguments).launch(shape(channels as u32, 256, 96)) }.unwrap();
            start.elapsed()
        })
        .min()
        .unwrap();
    println!("welford over (8, 16, 14, 14): {best:?}");
    assert!(best.as_millis() < 50, "{best:?}");

    for (channel, mean) in stream.clone_dtoh(&mean).unwrap().into_iter().enumerate() {
        let of_channel = (0..batch).flat_map(|n| {
            let begin = (n * channels + channel) * plane;
            values[begin..begin + plane].iter().map(|x| f64::from(*x))
        });
        let truth = of_channel.sum::<f64>() / (batch * plane) as f64;
        assert!(
            (f64::from(mean) - truth).abs() < 1e-6,
            "channel {channel}: {mean} for {truth}"
        );
    }
}

#[test]
fn an_empty_launch_costs_next_to_nothing() {
    let (context, stream) = device("h200");
    let nothing = kernel(
        &context,
        &format!("{ARGUMENTS}KERNEL(nothing, Arguments, 32) {{}}"),
        "nothing",
    );
    emulator::set_empty_launches(context.cu_ctx(), true);
    let launches = 10_000;
    let start = Instant::now();
    for _ in 0..launches {
        launch(&stream, &nothing, shape(1, 32, 0), Arguments::default()).unwrap();
    }
    let each = start.elapsed() / launches;
    println!("an empty launch: {each:?}");
    assert!(each.as_micros() < 20, "{each:?}");
    assert!(emulator::launches(stream.cu_stream()).is_empty(), "nothing was run");
}
