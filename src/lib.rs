//! BatchNorm2d for NVIDIA GPUs: hand-written CUDA kernels, compiled at run time, with the semantics of PyTorch's
//! `torch.nn.BatchNorm2d`. It needs the driver and NVRTC, and neither cuDNN nor libtorch. On a machine without a GPU
//! the same module runs on the CPU.
//!
//! # An example
//!
//! A training step on the CPU, where tensors are slices, vectors or arrays:
//!
//! ```
//! use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cpu, Shape};
//!
//! # fn main() -> batchnorm_cuda::Result<()> {
//! let mut bn: BatchNorm2d<Cpu> = BatchNorm2d::new(&Cpu::new(), BatchNorm2dConfig::new(3))?;
//! let shape = Shape::nchw(1, 3, 4, 4);
//! let mut saved = bn.prepare::<f32>(shape)?; // what a step of this shape needs beside its operands
//!
//! let x: Vec<f32> = (0..48u8).map(f32::from).collect();
//! let mut y = vec![0.0; x.len()];
//! bn.forward_train(&x, &mut y, &mut saved)?;
//! let start: Vec<String> = y[..3].iter().map(|y| format!("{y:.4}")).collect();
//! assert_eq!(start, ["-1.6270", "-1.4100", "-1.1931"]); // as PyTorch prints them
//! assert_eq!(bn.num_batches_tracked()?, Some(1));
//!
//! let dy = vec![1.0; x.len()];
//! let mut dx = vec![0.0; x.len()];
//! let mut gradients = bn.gradients()?;
//! bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)?;
//! assert_eq!(gradients.bias, [16.0; 3]);
//!
//! bn.forward_eval(shape, &x, &mut y)?; // by the running statistics
//! # Ok(())
//! # }
//! ```
//!
//! The same on a GPU, where tensors are `CudaSlice`, `CudaView` and `CudaViewMut` of [`cudarc`], in half precision. The
//! stream and the buffers are the caller's:
//!
//! ```no_run
//! use batchnorm_cuda::cudarc::driver::CudaContext;
//! use batchnorm_cuda::half::f16;
//! use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cuda, Shape};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let cuda = Cuda::on_stream(stream.clone())?; // or Cuda::new(0), where any stream will do
//! let mut bn = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(64))?;
//! let shape = Shape::nchw(32, 64, 56, 56).channels_last();
//! let mut saved = bn.prepare::<f16>(shape)?; // compiles, loads and allocates
//!
//! let x = stream.alloc_zeros::<f16>(shape.len()?)?;
//! let dy = stream.alloc_zeros::<f16>(shape.len()?)?;
//! let mut y = stream.alloc_zeros::<f16>(shape.len()?)?;
//! let mut dx = stream.alloc_zeros::<f16>(shape.len()?)?;
//! let mut gradients = bn.gradients()?;
//! bn.forward_train(&x, &mut y, &mut saved)?; // launches on the stream, and returns at once
//! bn.backward(&x, &dy, &mut saved, &mut dx, &mut gradients)?;
//! # Ok(())
//! # }
//! ```
//!
//! Those who come from PyTorch, candle or `cudarc` find in [`guide`] what is called what.
//!
//! What runs on both is written for a [`Backend`]: `examples/quickstart.rs` is such a program. [`cuda::is_available`]
//! tells whether this machine has what [`Cuda`] needs, and if not, what is missing; nothing here panics for want of it.
//!
//! # What is computed
//!
//! For every channel, with n = N · H · W values (Ioffe and Szegedy 2015, [*Batch Normalization: Accelerating Deep
//! Network Training by Reducing Internal Covariate Shift*](https://arxiv.org/abs/1502.03167)):
//!
//! | | |
//! |---|---|
//! | `mean` | `Σ x / n` |
//! | `var` | `Σ (x - mean)² / n`, the biased variance |
//! | `invstd` | `1 / sqrt(var + eps)` |
//! | `x̂` | `(x - mean) · invstd` |
//! | `y` | `x̂ · weight + bias` |
//! | running mean | `(1 - momentum) · running + momentum · mean` |
//! | running variance | `(1 - momentum) · running + momentum · var · n / (n - 1)`, towards the unbiased variance |
//! | `dbias` | `Σ dy` |
//! | `dweight` | `Σ dy · x̂` |
//! | `dx` | `weight · invstd · (dy - (dbias + x̂ · dweight) / n)` |
//!
//! In evaluation ([`BatchNorm2d::forward_eval`]) mean and variance are the running ones, and for the backward pass
//! ([`BatchNorm2d::backward_eval_with`]) they are constants: `dx = weight · invstd · dy`. A module that tracks no
//! statistics evaluates by those of the batch ([`BatchNorm2d::forward_eval_batch_statistics`]). With
//! [`Momentum::CumulativeAverage`], PyTorch's `momentum=None`, the factor is `1 / num_batches_tracked` with this batch
//! counted. Names, defaults and these rules are those of
//! [`torch.nn.BatchNorm2d`](https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html).
//!
//! A NaN or an infinity stays in its channel. A batch of 0 images is no error: statistics stay, gradients are zero.
//!
//! ## In floating point
//!
//! - Statistics are those of `x - K`, K being the channel's first element, and y is computed from `x - m`, m being the
//!   mean as it is rounded; what rounding took from it (Knuth's TwoSum) goes into the shift. So a constant channel gives
//!   exactly the bias, and a mean that is large for the deviation costs no digits.
//! - Threads gather mean and variance piece by piece, by sums of deviations from a centre and of their squares, and merge
//!   them (Welford 1962; Chan, Golub and LeVeque 1979). The centre is the mean of earlier values of the channel, which bounds
//!   what cancels whatever the values are: where these are a share p of some values, the square of its distance from the mean
//!   of all is at most (1 - p) / p times their variance. (The CPU, whose first centre is the mean of few values, looks whether
//!   it cost digits, and if so begins again from the better one.) What is merged is the variance, not the sum of squares,
//!   which overflows long before the variance does; pieces are joined in double precision.
//! - Half-precision values are converted before anything is computed with them, and results are rounded once.
//! - The order of every sum is fixed: the same call on the same device gives the same bits on every run. The CPU gives
//!   the same bits on any number of threads. CPU and GPU sum in different orders, and agree within rounding.
//!
//! # Elements
//!
//! | tensors ([`Element`]) | parameters, statistics, arithmetic ([`Element::Param`]) |
//! |---|---|
//! | [`f16`](half::f16), [`bf16`](half::bf16), `f32` | `f32` |
//! | `f64` | `f64` |
//!
//! The element type belongs to the call, not to the module: one `BatchNorm2d<B, f32>` normalises `f16`, `bf16` and
//! `f32`.
//!
//! # Shapes and layouts
//!
//! A [`Shape`] is N, C, H, W and the order in memory: [`Layout::Nchw`], PyTorch's default, or [`Layout::Nhwc`], its
//! `channels_last` ([`Shape::channels_last`]). Tensors are contiguous, and all tensors of a call have the same shape
//! and layout. A tensor may begin anywhere: a view at an odd offset is taken, if more slowly than one at a multiple of
//! 16 bytes.
//!
//! # Fused forms
//!
//! `relu(bn(x))` and, for the end of a residual block, `relu(bn(x) + z)` are computed in the same pass as the
//! normalisation, forward and backward: prepare with [`BatchNorm2d::prepare_fused`], ask with [`Forward::relu`] or
//! [`Forward::add_relu`]. [`Forward`] and [`Backward`] also offer the in-place forms, and [`Backward`] the choice of
//! gradients: of the input alone, of the parameters alone, written or added to what is there.
//!
//! # Several GPUs, machines, threads
//!
//! [`SyncBatchNorm`] takes a module and a [`Collective`], and normalises by the statistics of all ranks' batches, forward and
//! backward. With the feature `nccl`, `cudarc`'s communicators are collectives; [`ThreadRank`] is one for threads of a
//! process, on either backend. Its page says what is synchronised and what is not, and what happens when ranks do not fit
//! together.
//!
#![cfg_attr(feature = "nccl", doc = include_str!("guide/nccl.md"))]
//! # Inference
//!
//! [`BatchNorm2d::forward_eval`] needs one pass, and with a fused `relu` no other for that. Where a convolution comes before
//! the module, [`BatchNorm2d::fold_into_conv`] does away with the module altogether.
//!
//! # What allocates, and when
//!
//! [`BatchNorm2d::new`], [`BatchNorm2d::prepare`] and [`BatchNorm2d::gradients`] allocate, as do the methods that say
//! so. Passes over a prepared shape do not allocate, do not wait for the device and copy nothing to the host. (Two
//! exceptions: operands at addresses that are no multiples of 16 bytes may compile a kernel at their first use, and the
//! gradients of an empty batch allocate.) [`BatchNorm2d::prepare_eval`] and [`BatchNorm2d::prepare_backward_eval`] do for
//! evaluation what `prepare` does for training; without them the first such pass of a shape compiles.
//!
//! # CUDA graphs
//!
//! So a training step can be captured in a CUDA graph. What changes from step to step lives on the device,
//! `num_batches_tracked` and the factor of a cumulative average included: a replayed graph goes on counting. Loading a
//! state dict keeps the addresses, so that a graph goes on with the new values.
//!
//! Before the buffers are allocated, turn off `cudarc`'s event tracking, whose events a graph cannot hold (else
//! capturing is [`Error::CaptureWithEventTracking`]); run every pass once before the capture, so that its kernels are
//! loaded; and use a stream of your own, since the default stream cannot be captured:
//!
//! ```no_run
//! use batchnorm_cuda::cudarc::driver::CudaContext;
//! use batchnorm_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
//! use batchnorm_cuda::{BatchNorm2d, BatchNorm2dConfig, Cuda, Shape};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = CudaContext::new(0)?;
//! // SAFETY: this program uses one stream only, so no work needs events to be ordered.
//! unsafe { context.disable_event_tracking() };
//! let stream = context.new_stream()?;
//! let cuda = Cuda::on_stream(stream.clone())?;
//! let mut bn: BatchNorm2d<Cuda> = BatchNorm2d::new(&cuda, BatchNorm2dConfig::new(64))?;
//! let shape = Shape::nchw(32, 64, 56, 56);
//! let mut saved = bn.prepare::<f32>(shape)?;
//! let x = stream.alloc_zeros::<f32>(shape.len()?)?;
//! let mut y = stream.alloc_zeros::<f32>(shape.len()?)?;
//! bn.forward_train(&x, &mut y, &mut saved)?;
//!
//! stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
//! bn.forward_train(&x, &mut y, &mut saved)?;
//! let graph = stream
//!     .end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)?
//!     .expect("the stream was being captured");
//! graph.launch()?;
//! graph.launch()?;
//! assert_eq!(bn.num_batches_tracked()?, Some(3)); // one pass before the capture, two launches
//! # Ok(())
//! # }
//! ```
//!
//! The graph holds addresses: module, `saved` and tensors must live as long as it is launched. The example `cuda_graph`
//! captures a whole training step, and compares the graph's results with those of the steps one by one.
//!
//! # Compiled kernels
//!
//! A kernel is compiled by NVRTC for the very shape class, element type and epilogue it is needed for, and kept: per
//! context in memory, and on disk between program starts. The folder is `batchnorm-cuda` in the user's cache folder, or
//! the one that the environment variable `BATCHNORM_CUDA_CACHE` names (`off`: none), or the program's choice
//! ([`cuda::DiskCache`]). A file is used only if it is whole, was made from the same source by the same NVRTC with the
//! same options, and lies where no other user can write. [`Cuda::compile_report`] tells what it has cost;
//! [`cuda::compile_ahead`] compiles on a machine that has NVRTC but no GPU.
//!
//! # candle
//!
//! With the feature `candle` the module `candle` has a `BatchNorm2d` over candle's tensors, which takes the place of
//! `candle_nn::BatchNorm` by one line; with the feature `candle-cuda` on GPUs too. It has its own documentation and a table
//! of what is called what.
//!
#![cfg_attr(feature = "candle", doc = include_str!("guide/candle.md"))]
//! # Threads and streams
//!
//! Everything is `Send` and `Sync`. Training takes the module by `&mut`, evaluation by `&`, so several threads may
//! evaluate one module. Scratch memory belongs to [`Saved`]: steps that overlap need one each. All work of a [`Cuda`]
//! goes to its stream; buffers of the same `Arc<CudaContext>` may come from other streams, ordered by `cudarc`'s event
//! tracking, while buffers of another context are refused ([`Error::Context`]).
//!
//! # Errors
//!
//! Every method returns a [`Result`]. An [`Error`] names the argument, what was expected and what came; errors about
//! arguments are found before anything is launched or changed. After an error in training the running statistics are as
//! they were, unless the error is of a launch that the driver had already taken; [`Error::DeviceLost`] says that a
//! context is broken for good. [`StateError`] is what can be wrong with a state dict, and [`cuda::Unavailable`] what a
//! machine can lack.
//!
//! # Where to look
//!
//! | | |
//! |---|---|
//! | [`BatchNorm2d`], [`BatchNorm2dConfig`] | the module and what it is made from |
//! | [`Saved`], [`Gradients`] | what goes from the forward to the backward pass, and what comes out |
//! | [`Forward`], [`Backward`] | fused and in-place forms, choice of gradients |
//! | [`StateDict`] | PyTorch's names, safetensors files |
//! | [`SyncBatchNorm`], [`SyncSaved`], [`Collective`], [`ThreadRank`] | the module over several ranks |
//! | [`FoldedConv`] | the module folded into a convolution |
//! | [`Cpu`], [`Cuda`], [`Backend`] | the devices |
//! | `candle` | the same for candle's tensors, with the feature `candle` |
//! | [`guide`] | what is called what, for those who come from PyTorch, candle or `cudarc` |
//! | [`cuda::plan`] | which kernels run for a shape on a device, and the bytes they move; needs no GPU |

mod backend;
mod batch_norm;
#[cfg(feature = "candle")]
pub mod candle;
mod config;
pub mod cpu;
pub mod cuda;
mod element;
mod epilogue;
mod error;
mod fold;
pub mod guide;
mod overwrite;
mod request;
mod shape;
mod state;
// What is not of candle in its operations; tested without it.
#[cfg(any(feature = "candle", test))]
mod step;
mod sync;
mod welford;

mod sealed {
    /// Keeps traits whose implementors the kernels must be able to trust to this crate.
    pub trait Sealed {}
}

pub use backend::{AsTensor, AsTensorMut, Backend};
pub use batch_norm::{BatchNorm2d, Saved};
pub use config::{BatchNorm2dConfig, Momentum};
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use element::{Dtype, Element, Plain, Real};
pub use epilogue::Epilogue;
pub use error::{Error, Result, StateError};
pub use fold::FoldedConv;
pub use request::{Backward, Forward, Gradients};
pub use shape::{Layout, Shape};
pub use state::StateDict;
pub use sync::{Collective, SyncBackend, SyncBatchNorm, SyncSaved, ThreadRank};

pub use cudarc;
pub use half;

/// The examples of the README are tests too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
