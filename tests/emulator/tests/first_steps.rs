//! The way that every user of the stand-in takes: context, NVRTC, module, launch, result, and what was written down.

#![cfg(target_os = "linux")]

mod support;

use support::*;

const SCALE: &str = "
KERNEL(scale, Arguments, 256) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < arguments.n) {
    Vector<float, 1> x = load<1>(arguments.a + i);
    x.lane[0] = fma_rn(x.lane[0], 2.0f, 1.0f);
    store<1>(arguments.b + i, x);
  }
}";

#[test]
fn a_kernel_runs_and_is_written_down() {
    let (context, stream) = device("h200");
    let scale = kernel(&context, &format!("{ARGUMENTS}{SCALE}"), "scale");
    let input: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let a = stream.clone_htod(&input).unwrap();
    let b = stream.alloc_zeros::<f32>(1000).unwrap();
    let arguments = Arguments {
        a: address(&a, &stream),
        b: address(&b, &stream),
        n: 1000,
        c: 0,
    };
    launch(&stream, &scale, shape(4, 256, 0), arguments).unwrap();
    let output = stream.clone_dtoh(&b).unwrap();
    let expected: Vec<f32> = input.iter().map(|x| 2.0 * x + 1.0).collect();
    assert_eq!(output, expected);

    let launches = emulator::launches(stream.cu_stream());
    assert_eq!(launches.len(), 1);
    let only = &launches[0];
    assert_eq!(only.kernel, "scale");
    assert_eq!(
        (only.grid, only.block, only.cluster),
        ([4, 1, 1], [256, 1, 1], [1, 1, 1])
    );
    assert_eq!((only.bytes_loaded, only.bytes_stored), (4000, 4000));
    assert!(!only.cooperative);
    assert!(emulator::launches(stream.cu_stream()).is_empty(), "they are taken once");
}
