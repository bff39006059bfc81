//! What is called what here, for those who come from somewhere else:
//!
//! - [`from_pytorch`]: each argument and method of `torch.nn.BatchNorm2d` beside this crate's, and what differs.
//! - [`from_cuda_slice`]: a program's own buffers and streams.
//! - From candle: the documentation of the module `candle`, with the feature of that name.

#[doc = include_str!("from_pytorch.md")]
pub mod from_pytorch {}

#[doc = include_str!("from_cuda_slice.md")]
pub mod from_cuda_slice {}
