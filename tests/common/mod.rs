//! What the tests of numbers share: cases and how to run them on any device, the float64 reference they are held
//! against, and the reader of the golden files.

// Every test binary compiles this module and uses its own part of it.
#![allow(dead_code, unused_imports, unused_macros)]

mod case;
mod device;
pub mod golden;
mod random;
mod reference;

pub use case::{Case, Form, Gradient, Outcome, run, run_as};
pub use device::{Device, cpu};
pub use random::Random;
pub use reference::{Scales, Values, errors, limit, reference, sum};

/// Makes of each function `f(device: &impl Device)` a test on the CPU and one on CUDA.
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
    };
}
pub(crate) use on_every_device;
