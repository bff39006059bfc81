//! Number types: what tensors hold, and in what parameters and statistics are kept.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

use crate::cpu::Passes;
use crate::sealed::Sealed;

/// A number that a device buffer can hold: the [`Element`]s and `i64` (`num_batches_tracked`).
pub trait Plain:
    Sealed + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + DeviceRepr + ValidAsZeroBits + 'static
{
}

/// An element type of a tensor: `f16`, `bf16`, `f32` or `f64`.
///
/// Half values are storage only. They are converted to [`Element::Param`] before anything is computed, and results are
/// rounded once.
pub trait Element: Plain + Passes {
    /// The type of parameters, statistics and arithmetic: `f32`, or `f64` for `f64`.
    type Param: Real;

    /// The element type as a value.
    const DTYPE: Dtype;

    /// Converts exactly to the parameter type.
    fn to_param(self) -> Self::Param;

    /// Rounds to nearest even; too large a value becomes infinite, NaN stays NaN.
    fn from_param(value: Self::Param) -> Self;
}

/// A type of parameters and statistics: `f32` or `f64`.
pub trait Real:
    Element<Param = Self>
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::iter::Sum
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;

    /// Rounds a double to this type.
    fn from_f64(value: f64) -> Self;

    /// Converts exactly to a double.
    fn to_f64(self) -> f64;

    /// `self * factor + term`, rounded once.
    fn mul_add(self, factor: Self, term: Self) -> Self;

    /// The square root, rounded to nearest.
    fn sqrt(self) -> Self;

    /// Whether this is neither infinite nor NaN.
    fn is_finite(self) -> bool;

    /// Whether this is NaN.
    fn is_nan(self) -> bool;
}

/// An [`Element`] type as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE half precision, 2 bytes.
    F16,
    /// Brain floating point: the upper half of an `f32`, 2 bytes.
    Bf16,
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE double precision, 8 bytes.
    F64,
}

impl Dtype {
    /// All element types.
    pub const ALL: [Dtype; 4] = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 => 8,
        }
    }

    /// The type of parameters and statistics that goes with it.
    pub const fn param(self) -> Dtype {
        match self {
            Dtype::F64 => Dtype::F64,
            _ => Dtype::F32,
        }
    }

    /// `f16`, `bf16`, `f32` or `f64`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Dtype::ALL
            .into_iter()
            .find(|dtype| dtype.name() == text)
            .ok_or_else(|| format!("unknown element type {text:?}: expected f16, bf16, f32 or f64"))
    }
}

macro_rules! half_element {
    ($type:ty, $dtype:expr) => {
        impl Sealed for $type {}
        impl Plain for $type {}
        impl Element for $type {
            type Param = f32;
            const DTYPE: Dtype = $dtype;

            #[inline(always)]
            fn to_param(self) -> f32 {
                self.to_f32()
            }

            #[inline(always)]
            fn from_param(value: f32) -> Self {
                Self::from_f32(value)
            }
        }
    };
}

macro_rules! real_element {
    ($type:ty, $dtype:expr) => {
        impl Sealed for $type {}
        impl Plain for $type {}
        impl Element for $type {
            type Param = $type;
            const DTYPE: Dtype = $dtype;

            #[inline(always)]
            fn to_param(self) -> $type {
                self
            }

            #[inline(always)]
            fn from_param(value: $type) -> Self {
                value
            }
        }
        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;

            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn mul_add(self, factor: Self, term: Self) -> Self {
                self.mul_add(factor, term)
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }

            #[inline(always)]
            fn is_finite(self) -> bool {
                self.is_finite()
            }

            #[inline(always)]
            fn is_nan(self) -> bool {
                self.is_nan()
            }
        }
    };
}

half_element!(f16, Dtype::F16);
half_element!(bf16, Dtype::Bf16);
real_element!(f32, Dtype::F32);
real_element!(f64, Dtype::F64);

impl Sealed for i64 {}
impl Plain for i64 {}
