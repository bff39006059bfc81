//! What the tests of numbers share: cases and how to run them on any device, the float64 reference they are held
//! against, and the reader of the golden files.

// Every test binary compiles this module and uses its own part of it.
#![allow(dead_code, unused_imports, unused_macros)]

use batchnorm_cuda::{Element, Shape};

mod alone;
#[cfg(feature = "candle")]
pub mod candle;
mod case;
mod device;
pub mod golden;
mod random;
mod reference;

pub use alone::alone;
pub use case::{
    Case, Form, Gradient, Outcome, assert_same, assert_same_bits, by_channel, channel_indices, element, run, run_as,
    wide,
};
pub use device::{Device, Driver, cpu, cuda, cuda_device, driver, on_own_stream, on_stream, say};
pub use random::Random;
pub use reference::{Scales, Values, errors, limit, reference, sum};

/// `$body` with the type `$element` that `$dtype` stands for.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            batchnorm_cuda::Dtype::F16 => {
                type $element = batchnorm_cuda::half::f16;
                $body
            }
            batchnorm_cuda::Dtype::Bf16 => {
                type $element = batchnorm_cuda::half::bf16;
                $body
            }
            batchnorm_cuda::Dtype::F32 => {
                type $element = f32;
                $body
            }
            batchnorm_cuda::Dtype::F64 => {
                type $element = f64;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// Fails where a step's results are further from the float64 reference than [`limit`] allows.
pub fn assert_near_reference<T: Element>(device: &str, case: &Case<T>, outcome: &Outcome<T>) {
    let (want, scales) = reference(case);
    assert_near::<T>(device, case.shape, &outcome.values(), &want, &scales, 1.0);
}

/// Fails where two results are further apart than `times` the [`limit`].
pub fn assert_near<T: Element>(what: &str, shape: Shape, got: &Values, want: &Values, scales: &Scales, times: f64) {
    for (name, error) in errors(shape, got, want, scales) {
        let dtype = match name {
            "y" | "dx" | "dz" => T::DTYPE,
            _ => T::Param::DTYPE,
        };
        let limit = times * limit(dtype);
        assert!(
            error <= limit,
            "{what}, {shape}, {}: {name} has scaled error {error:.2e}, limit {limit:.1e}",
            T::DTYPE
        );
    }
    assert_eq!(got.num_batches_tracked, want.num_batches_tracked, "{what}, {shape}");
}

/// Makes of each function `f(device: &impl Device)` a test on the CPU, one on CUDA, and one on CUDA's general path.
macro_rules! on_every_device {
    ($($(#[$attribute:meta])* $name:ident),+ $(,)?) => {
        mod on_cpu {
            $(
                #[test]
                $(#[$attribute])*
                fn $name() {
                    super::$name(&super::common::cpu());
                }
            )+
        }

        /// Where there is neither a GPU nor the stand-in, which is for Linux, these tests do not exist.
        #[cfg(target_os = "linux")]
        mod on_cuda {
            $(
                #[test]
                $(#[$attribute])*
                fn $name() {
                    super::$name(&super::common::cuda());
                }
            )+
        }

        /// The general path, which large tensors take, and `f64`.
        #[cfg(target_os = "linux")]
        mod on_cuda_general {
            $(
                #[test]
                $(#[$attribute])*
                fn $name() {
                    let general = batchnorm_cuda::cuda::plan::Choice::GENERAL;
                    super::$name(&super::common::cuda().with_choice(general));
                }
            )+
        }
    };
}
pub(crate) use on_every_device;
