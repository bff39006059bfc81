//! BatchNorm2d for NVIDIA GPUs. (crate documentation follows with the README)
mod backend;
mod batch_norm;
mod config;
pub mod cpu;
pub mod cuda;
mod element;
mod epilogue;
mod error;
mod request;
mod shape;
mod state;
mod welford;

mod sealed {
    /// Keeps traits whose implementors the kernels must be able to trust to this crate.
    pub trait Sealed {}
}

pub use backend::{AsTensor, AsTensorMut, Backend};
pub use batch_norm::{BatchNorm2d, Gradients, Saved};
pub use config::{BatchNorm2dConfig, Momentum};
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use element::{Dtype, Element, Plain, Real};
pub use epilogue::Epilogue;
pub use error::{Error, Result, StateError};
pub use request::{Backward, Forward};
pub use shape::{Layout, Shape};
pub use state::StateDict;

pub use cudarc;
pub use half;
