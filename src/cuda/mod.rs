//! The CUDA backend.
pub(crate) mod probe;
/// placeholder
pub struct Cuda;
