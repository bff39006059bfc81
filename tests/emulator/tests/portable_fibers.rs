//! The C library's way to switch threads, which other processors than x86-64 rely on, gives the same results.

#![cfg(target_os = "linux")]

mod support;

use support::*;

#[test]
fn swapcontext_will_do() {
    emulator::install();
    let (context, stream) = device("h200");
    let source = format!(
        "{ARGUMENTS}KERNEL(mixed, Arguments, 256) {{
           float* const part = (float*)shared_memory();
           float sum = divide_rn(1.0f, 1.0f + threadIdx.x + blockIdx.x);
           for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
           if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
           block_barrier();
           for (u32 i = 0; i < 8; i++) sum = fma_rn(sum, 0.5f, part[i]);
           arguments.a[blockIdx.x * 256 + threadIdx.x] = sum;
         }}"
    );
    let mixed = kernel(&context, &source, "mixed");
    let run = || {
        let a = stream.alloc_zeros::<f32>(40 * 256).unwrap();
        let arguments = Arguments {
            a: address(&a, &stream),
            ..Default::default()
        };
        launch(&stream, &mixed, shape(40, 256, 32), arguments).unwrap();
        let wrong = launch(&stream, &mixed, shape(1, 256, 28), arguments).unwrap_err();
        let text = emulator::last_fault().unwrap();
        (stream.clone_dtoh(&a).unwrap(), wrong.0, text)
    };
    let native = run();
    emulator::use_portable_fibers(true);
    let portable = run();
    emulator::use_portable_fibers(false);
    assert_eq!(run(), native);
    assert_eq!(portable, native);
    assert!(native.2.contains("bytes 28..32 of 28"), "{}", native.2);
}
