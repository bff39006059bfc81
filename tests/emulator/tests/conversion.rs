//! Conversion of half-precision numbers agrees with the `half` crate, bit by bit.

#![cfg(target_os = "linux")]

mod support;

use support::*;

/// Converts n numbers from b to c, and back.
const CONVERT: &str = "
#define CONVERSIONS(HALF)                                                                     \\
  KERNEL(narrow_##HALF, Arguments, 256) {                                                     \\
    for (u64 i = threadIdx.x; i < arguments.n; i += 256) {                                    \\
      Vector<HALF, 1> out;                                                                    \\
      from_real(load<1>(arguments.b + i).lane[0], out.lane[0]);                               \\
      store<1>((HALF*)arguments.c + i, out);                                                  \\
    }                                                                                         \\
  }                                                                                           \\
  KERNEL(widen_##HALF, Arguments, 256) {                                                      \\
    for (u64 i = threadIdx.x; i < arguments.n; i += 256) {                                    \\
      Vector<float, 1> out;                                                                   \\
      out.lane[0] = to_real(load<1>((const HALF*)arguments.c + i).lane[0]);                   \\
      store<1>(arguments.b + i, out);                                                         \\
    }                                                                                         \\
  }
CONVERSIONS(f16)
CONVERSIONS(bf16)
";

/// Every float whose upper 19 bits are anything and whose lower 13 are next to where rounding changes: for f16 the
/// lower 13 are what a normal number loses, and for bf16 and for subnormals they are the tail that decides a tie.
fn floats() -> Vec<f32> {
    let tails = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x1fff];
    (0..1u32 << 19)
        .flat_map(|upper| tails.map(|tail| f32::from_bits(upper << 13 | tail)))
        .collect()
}

fn narrow(kind: &str, reference: impl Fn(f32) -> u16, is_nan: impl Fn(u16) -> bool) {
    let (context, stream) = device("h200");
    let function = kernel(&context, &format!("{ARGUMENTS}{CONVERT}"), &format!("narrow_{kind}"));
    let values = floats();
    let b = stream.clone_htod(&values).unwrap();
    let c = stream.alloc_zeros::<u16>(values.len()).unwrap();
    let arguments = Arguments {
        b: address(&b, &stream),
        c: address(&c, &stream),
        n: values.len() as u64,
        ..Default::default()
    };
    launch(&stream, &function, shape(1, 256, 0), arguments).unwrap();
    for (x, bits) in values.into_iter().zip(stream.clone_dtoh(&c).unwrap()) {
        if x.is_nan() {
            assert!(is_nan(bits), "{x} became {bits:#06x}");
        } else {
            assert_eq!(bits, reference(x), "{x:e} ({:#010x}) became {bits:#06x}", x.to_bits());
        }
    }
}

fn widen(kind: &str, reference: impl Fn(u16) -> f32) {
    let (context, stream) = device("h200");
    let function = kernel(&context, &format!("{ARGUMENTS}{CONVERT}"), &format!("widen_{kind}"));
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let c = stream.clone_htod(&all).unwrap();
    let b = stream.alloc_zeros::<f32>(all.len()).unwrap();
    let arguments = Arguments {
        b: address(&b, &stream),
        c: address(&c, &stream),
        n: all.len() as u64,
        ..Default::default()
    };
    launch(&stream, &function, shape(1, 256, 0), arguments).unwrap();
    for (bits, x) in all.into_iter().zip(stream.clone_dtoh(&b).unwrap()) {
        let expected = reference(bits);
        let same = x.to_bits() == expected.to_bits() || x.is_nan() && expected.is_nan();
        assert!(same, "{bits:#06x} became {x:e}, not {expected:e}");
    }
}

#[test]
fn floats_are_rounded_to_f16() {
    narrow(
        "f16",
        |x| half::f16::from_f32(x).to_bits(),
        |bits| half::f16::from_bits(bits).is_nan(),
    );
}

#[test]
fn floats_are_rounded_to_bf16() {
    narrow(
        "bf16",
        |x| half::bf16::from_f32(x).to_bits(),
        |bits| half::bf16::from_bits(bits).is_nan(),
    );
}

#[test]
fn every_f16_is_widened() {
    widen("f16", |bits| half::f16::from_bits(bits).to_f32());
}

#[test]
fn every_bf16_is_widened() {
    widen("bf16", |bits| half::bf16::from_bits(bits).to_f32());
}
