//! Batch normalisation for [candle](https://docs.rs/candle-core) (features `candle` and `candle-cuda`).
//!
//! # From candle-nn
//!
//! [`BatchNorm2d`] takes the place of [`candle_nn::BatchNorm`], and [`batch_norm`] that of
//! [`candle_nn::batch_norm()`]. Where a model says
//!
//! ```
//! use candle_nn::{batch_norm, BatchNorm};
//! ```
//!
//! it says
//!
//! ```
//! use batchnorm_cuda::candle::{batch_norm, BatchNorm2d as BatchNorm};
//! ```
//!
//! and all else stays:
//!
//! | with candle-nn | here |
//! |---|---|
//! | `batch_norm(channels, config, vb)` | the same, with candle-nn's own [`BatchNormConfig`] or a number for its eps |
//! | `BatchNorm::new(..)`, `new_no_bias`, `new_with_momentum`, `new_no_bias_with_momentum` | the same |
//! | `bn.forward_t(&x, train)`, `bn.forward_train(&x)` | the same |
//! | `bn.forward_t(&x, train)?.relu()` | [`bn.forward_relu_t(&x, train)`](BatchNorm2d::forward_relu_t) |
//! | `(bn.forward_t(&x, train)? + z)?.relu()` | [`bn.forward_add_relu_t(&x, &z, train)`](BatchNorm2d::forward_add_relu_t) |
//! | `running_mean()`, `running_var()`, `weight_and_bias()`, `eps()`, `momentum()` | the same |
//! | variables and checkpoints: `weight`, `bias`, `running_mean`, `running_var` | the same, in both directions |
//! | no [`Module`]: a closure around `forward_t(x, false)` | [`bn.inference()`](BatchNorm2d::inference) |
//! | nothing | [`bn.num_batches_tracked()`](BatchNorm2d::num_batches_tracked), and [`batch_norm2d`] with PyTorch's options |
//!
//! ```
//! use batchnorm_cuda::candle::batch_norm;
//! use candle_core::{DType, Device, ModuleT, Tensor};
//! use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu; // or Device::new_cuda(0)?, with the feature `candle-cuda`
//! let variables = VarMap::new();
//! let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
//! let bn = batch_norm(3, 1e-5, vb.pp("bn1"))?;
//! let mut optimizer = SGD::new(variables.all_vars(), 0.1)?;
//!
//! let x = Tensor::arange(0f32, 48., &device)?.reshape((1, 3, 4, 4))?;
//! let y = bn.forward_t(&x, true)?; // normalises by this batch, and moves the running statistics
//! let start: Vec<String> = y.flatten_all()?.to_vec1::<f32>()?[..3].iter().map(|y| format!("{y:.4}")).collect();
//! assert_eq!(start, ["-1.6270", "-1.4100", "-1.1931"]); // as PyTorch prints them
//!
//! optimizer.backward_step(&y.sqr()?.sum_all()?)?; // moves `bn1.weight` and `bn1.bias`
//! let y = bn.forward_t(&x, false)?; // by the running statistics
//! let y = bn.forward_relu_t(&y, false)?; // relu(bn(y)) in one pass
//! let y = bn.forward_add_relu_t(&y, &x, false)?; // relu(bn(y) + x) in one pass
//! # assert_eq!(y.dims(), x.dims());
//! # Ok(())
//! # }
//! ```
//!
//! # What it costs
//!
//! A forward pass allocates y, and the backward pass the gradients that some variable needs. No other tensor of their
//! size is made, nothing is copied to the host, and passes run in candle's own memory: on the CPU on candle's slices, on
//! a GPU on candle's stream. (candle itself adds every gradient to a tensor of zeros that it makes for the purpose.)
//! Scratch memory is kept by the module for the next step. Tensors whose memory is in the order N, C, H, W or N, H, W, C
//! (`channels_last`, such as a permuted tensor) are taken as they are, at any offset, and y has the memory order of x;
//! others are copied first, and a residual in another order than x is brought into that of x.
//!
//! On a GPU each pass is at most two kernels of this crate (a test counts them). candle puts others on the stream, all but the
//! last two over one value per channel:
//!
//! - with a residual, two copies that join weight and bias, since candle's operations have three arguments at most;
//! - in evaluation of what is differentiated, two copies of the running statistics of that moment;
//! - for weight and bias of half precision or as views that are not contiguous, a conversion or a copy each;
//! - in the backward pass, zeros and a sum for every gradient: of weight and bias, of x and the residual;
//! - a copy of x or of the residual where it has to be copied.
//!
//! With N, H, W, C two things remain that are candle's. Its tensors are made in the order of their dimensions, so y is a
//! permuted view, and the backward pass of that view costs a tensor of zeros and a sum. And the gradient that is left for x
//! is a sum with zeros in the order N, C, H, W, although the pass makes it in that of x.
//!
//! # Locks
//!
//! candle's tensors have locks. On the CPU a pass holds none that another task of the same [`rayon`] pool could want to
//! write: parameters and, in evaluation, running statistics are copied first (a few numbers per channel), and in training
//! the running statistics are moved after the pass, one channel after another on the calling thread. So any tasks of a pool
//! may train and evaluate the same module. x and the residual are locked to be read, as in all of candle's operations: a
//! task that writes over them while another task of its pool computes with them waits for itself. On a GPU the locks of the
//! running statistics are held while the kernels are put on the stream, not while they run.
//!
//! Whoever locks several at once takes the running mean first, then the running variance, then the count of batches.
//!
//! Backward passes through one y may run at the same time. All read the statistics that its forward pass left, and each has
//! scratch memory of its own.
//!
//! # What is taken
//!
//! | tensors | parameters and running statistics |
//! |---|---|
//! | `F16`, `BF16`, `F32` | `F32` |
//! | `F64` | `F64` |
//!
//! A [`VarBuilder`] of `F16` or `BF16` thus gives variables of `F32`. Where a module is made of tensors of half precision,
//! as by [`BatchNorm2d::new`], its running statistics are copies of them in `F32`, also where they are variables: those do
//! not move. Weight and bias stay the tensors that were given, and each call converts them, so that variables of half
//! precision are trained. Tensors have the shape [N, C, ..] with at least two
//! dimensions, as for candle-nn: [N, C], [N, C, L] and [N, C, D, H, W] too.
//!
//! # Differences from `candle_nn::BatchNorm`
//!
//! - Half-precision tensors can be trained with. Running statistics of half precision are copied to `F32`.
//! - One value per channel in training is an error; candle-nn makes NaN of the running variance.
//! - The running statistics are changed where they lie; on a GPU by the kernel that computes y.
//! - `remove_mean: false` is candle-nn's own code, unfused: it divides by the root of the mean square, moves the running
//!   variance alone in training and counts no batches, but in evaluation subtracts the running mean, as candle-nn does. x
//!   and the residual are converted to the dtype of the parameters and y back, so that half precision can be trained with
//!   there too; candle-nn itself refuses it.
//! - The operation has no second derivative. Where candle tracks gradients (`CANDLE_GRAD_DO_NOT_DETACH`), a backward pass
//!   with a gradient that is tracked is [`Error::BackwardNotSupported`]; with one that is not, as of a loss linear in y, it
//!   yields gradients that are constants.
//!
//! # Errors
//!
//! All are [`candle_core::Error`]. Their context names shape, dtype and device of the tensors: of x and the residual
//! forward, of x and of the gradient in the backward pass, of the parameter where a module is made of tensors; a builder's
//! names its dtype and prefix. What [`crate::Error`] says comes as its text.

#[cfg(feature = "candle-cuda")]
mod cuda;
mod operation;
mod shared;
mod storage;

use std::sync::Arc;

use candle_core::{DType, Device, Error, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{BatchNormConfig, Init, VarBuilder};

use self::operation::{Call, NAME, Operation, Ordered, Statistics, Update};
use self::shared::Shared;
use self::storage::Device as _;
use crate::config::{BatchNorm2dConfig, Momentum};
use crate::cpu::Cpu;
use crate::element::Dtype;
use crate::epilogue::Epilogue;
use crate::shape::{Layout, Shape};

/// Batch normalisation over the second dimension of candle's tensors: see the [module's documentation](self).
///
/// Clones share parameters and running statistics, as those of [`candle_nn::BatchNorm`] do.
#[derive(Clone, Debug)]
pub struct BatchNorm2d {
    config: BatchNorm2dConfig,
    weight_and_bias: Option<(Tensor, Tensor)>,
    running_mean: Var,
    running_var: Var,
    num_batches_tracked: Var,
    shared: Arc<Shared>,
    /// Set for candle's `remove_mean: false`, which this crate has no kernels for.
    without_mean: Option<candle_nn::BatchNorm>,
}

/// As [`candle_nn::batch_norm()`]: a module of the variables `running_mean`, `running_var` and, if affine, `weight` and
/// `bias` under the builder's prefix. A number converts to a configuration with that eps.
///
/// Where the builder has `num_batches_tracked`, as PyTorch's files do, the count goes on from there; a new [`VarMap`]
/// gets no such entry, so that its files and candle-nn's can take each other's place. ([`batch_norm2d`] makes one.)
///
/// [`VarMap`]: candle_nn::VarMap
///
/// # Errors
/// Those of the builder; [`Error::UnexpectedDType`] where it holds variables of another dtype than the module needs;
/// [`crate::Error::NoFeatures`], [`crate::Error::Eps`] and [`crate::Error::Momentum`].
pub fn batch_norm<C: Into<BatchNormConfig>>(num_features: usize, config: C, vb: VarBuilder) -> Result<BatchNorm2d> {
    let config: BatchNormConfig = config.into();
    from_candles_config(num_features, config, &vb).map_err(|error| error.context(about_builder(num_features, &vb)))
}

fn from_candles_config(num_features: usize, config: BatchNormConfig, vb: &VarBuilder) -> Result<BatchNorm2d> {
    let vb = vb.clone().to_dtype(parameter_dtype(vb.dtype())?);
    let without_mean = if config.remove_mean {
        None
    } else {
        Some(candle_nn::batch_norm(num_features, config, vb.clone())?)
    };
    let counted = vb.contains_tensor("num_batches_tracked");
    let config = BatchNorm2dConfig::new(num_features)
        .eps(config.eps)
        .momentum(config.momentum)
        .affine(config.affine);
    let module = from_builder(config, &vb, counted)?;
    Ok(match without_mean {
        None => module,
        // The variables of a builder that reads a file are copies: these are the ones that move.
        Some(candle) => BatchNorm2d {
            running_mean: Var::from_tensor(candle.running_mean())?,
            running_var: Var::from_tensor(candle.running_var())?,
            without_mean: Some(candle),
            ..module
        },
    })
}

/// A module as PyTorch's `torch.nn.BatchNorm2d`, with all of its variables under the builder's prefix, as far as `config`
/// has them: `weight`, `bias`, `running_mean`, `running_var`, `num_batches_tracked`.
///
/// # Errors
/// As [`batch_norm`].
pub fn batch_norm2d(config: BatchNorm2dConfig, vb: VarBuilder) -> Result<BatchNorm2d> {
    let about = about_builder(config.num_features, &vb);
    let tracked = config.track_running_stats;
    parameter_dtype(vb.dtype())
        .and_then(|dtype| from_builder(config, &vb.to_dtype(dtype), tracked))
        .map_err(|error| error.context(about))
}

/// What a module was to be made of, for an error's context.
fn about_builder(num_features: usize, vb: &VarBuilder) -> String {
    format!(
        "{NAME} of variables of shape [{num_features}] and dtype {:?} under {:?} on {:?}",
        vb.dtype(),
        vb.prefix(),
        vb.device().location()
    )
}

fn from_builder(config: BatchNorm2dConfig, vb: &VarBuilder, counted: bool) -> Result<BatchNorm2d> {
    let channels = config.num_features;
    let (dtype, device) = (vb.dtype(), vb.device());
    let vector = |name, value| vb.get_with_hints(channels, name, Init::Const(value));
    let (mean, variance) = if config.track_running_stats {
        (vector("running_mean", 0.0)?, vector("running_var", 1.0)?)
    } else {
        (
            Tensor::zeros(channels, dtype, device)?,
            Tensor::ones(channels, dtype, device)?,
        )
    };
    let batches = if counted {
        vb.get_with_hints_dtype((), "num_batches_tracked", Init::Const(0.0), DType::I64)?
    } else {
        Tensor::zeros((), DType::I64, device)?
    };
    let weight_and_bias = if config.affine {
        Some((vector("weight", 1.0)?, vector("bias", 0.0)?))
    } else {
        None
    };
    BatchNorm2d::from_tensors(config, &mean, &variance, &batches, weight_and_bias)
}

impl BatchNorm2d {
    /// As [`candle_nn::BatchNorm::new`]. Tensors that are no variables are copied for the running statistics, and so are
    /// those of half precision, to `F32`. Weight and bias of half precision are converted in every call.
    ///
    /// # Errors
    /// [`Error::UnexpectedShape`], [`Error::UnexpectedDType`], [`Error::DeviceMismatchBinaryOp`] where the tensors do not
    /// fit each other; [`crate::Error::NoFeatures`], [`crate::Error::Eps`].
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        let config = BatchNorm2dConfig::new(num_features).eps(eps);
        Self::uncounted(config, running_mean, running_var, Some((weight, bias)))
    }

    /// As [`candle_nn::BatchNorm::new_no_bias`]: neither weight nor bias.
    ///
    /// # Errors
    /// As [`BatchNorm2d::new`].
    pub fn new_no_bias(num_features: usize, running_mean: Tensor, running_var: Tensor, eps: f64) -> Result<Self> {
        let config = BatchNorm2dConfig::new(num_features).eps(eps).affine(false);
        Self::uncounted(config, running_mean, running_var, None)
    }

    /// As [`candle_nn::BatchNorm::new_with_momentum`].
    ///
    /// # Errors
    /// As [`BatchNorm2d::new`], and [`crate::Error::Momentum`].
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let config = BatchNorm2dConfig::new(num_features).eps(eps).momentum(momentum);
        Self::uncounted(config, running_mean, running_var, Some((weight, bias)))
    }

    /// As [`candle_nn::BatchNorm::new_no_bias_with_momentum`].
    ///
    /// # Errors
    /// As [`BatchNorm2d::new_with_momentum`].
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let config = BatchNorm2dConfig::new(num_features)
            .eps(eps)
            .momentum(momentum)
            .affine(false);
        Self::uncounted(config, running_mean, running_var, None)
    }

    fn uncounted(
        config: BatchNorm2dConfig,
        running_mean: Tensor,
        running_var: Tensor,
        weight_and_bias: Option<(Tensor, Tensor)>,
    ) -> Result<Self> {
        let features = config.num_features;
        let make = || {
            let batches = Tensor::zeros((), DType::I64, running_mean.device())?;
            Self::from_tensors(config, &running_mean, &running_var, &batches, weight_and_bias)
        };
        make().map_err(|error| {
            error.context(format!(
                "{NAME} of {features} channels, running_mean {}",
                described(&running_mean)
            ))
        })
    }

    fn from_tensors(
        config: BatchNorm2dConfig,
        running_mean: &Tensor,
        running_var: &Tensor,
        num_batches_tracked: &Tensor,
        weight_and_bias: Option<(Tensor, Tensor)>,
    ) -> Result<Self> {
        config.validate().map_err(wrap)?;
        let dtype = parameter_dtype(running_mean.dtype())?;
        let device = running_mean.device();
        // A running variable is written: only one of the right dtype can be taken as it is.
        let running = |tensor: &Tensor| Var::from_tensor(&converted(tensor, dtype)?);
        let check = |name: &str, tensor: &Tensor| {
            check_vector(tensor, config.num_features, dtype, device)
                .map_err(|error| error.context(format!("{name} {}", described(tensor))))
        };
        check("running_mean", running_mean)?;
        check("running_var", running_var)?;
        if let Some((weight, bias)) = &weight_and_bias {
            check("weight", weight)?;
            check("bias", bias)?;
        }
        let module = Self {
            config,
            weight_and_bias,
            running_mean: running(running_mean)?,
            running_var: running(running_var)?,
            num_batches_tracked: Var::from_tensor(num_batches_tracked)?,
            shared: Arc::default(),
            without_mean: None,
        };
        module.check_apart()?;
        Ok(module)
    }

    /// Refuses running statistics that share memory with each other or with the parameters: a pass locks them to write.
    fn check_apart(&self) -> Result<()> {
        let (mean, variance) = (address(&self.running_mean)?, address(&self.running_var)?);
        let mut shared = mean == variance;
        if let Some((weight, bias)) = &self.weight_and_bias {
            for parameter in [weight, bias] {
                shared |= [mean, variance].contains(&address(parameter)?);
            }
        }
        if shared {
            return Err(Error::msg(format_args!(
                "{NAME}: running_mean and running_var must not share memory with each other, weight or bias"
            ))
            .bt());
        }
        Ok(())
    }

    /// What the module was made from.
    pub fn config(&self) -> &BatchNorm2dConfig {
        &self.config
    }

    /// The running mean per channel; zeros in a module that tracks none.
    pub fn running_mean(&self) -> &Tensor {
        self.running_mean.as_tensor()
    }

    /// The running (unbiased) variance per channel; ones in a module that tracks none.
    pub fn running_var(&self) -> &Tensor {
        self.running_var.as_tensor()
    }

    /// How many batches have moved the running statistics: a scalar of `I64`, on the module's device.
    pub fn num_batches_tracked(&self) -> &Tensor {
        self.num_batches_tracked.as_tensor()
    }

    /// Added to the variance.
    pub fn eps(&self) -> f64 {
        self.config.eps
    }

    /// Weight and bias per channel, if affine.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.weight_and_bias.as_ref().map(|(weight, bias)| (weight, bias))
    }

    /// How far a batch moves the running statistics. NaN for a cumulative average, which has no one number: see
    /// [`BatchNorm2d::config`].
    pub fn momentum(&self) -> f64 {
        match self.config.momentum {
            Momentum::Factor(momentum) => momentum,
            Momentum::CumulativeAverage => f64::NAN,
        }
    }

    /// `y = bn(x)` by the statistics of this batch, towards which the running statistics move:
    /// [`forward_t`](ModuleT::forward_t) with `train`.
    ///
    /// # Errors
    /// See [`BatchNorm2d::forward_relu_t`].
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.forward(x, None, Epilogue::Identity, true)
    }

    /// `y = relu(bn(x))` in one pass. NaN stays NaN.
    ///
    /// # Errors
    /// [`Error::UnexpectedNumberOfDims`] for fewer than two dimensions, [`Error::UnexpectedShape`] for another number of
    /// channels, [`Error::UnexpectedDType`], [`Error::DeviceMismatchBinaryOp`]; [`crate::Error::OneValuePerChannel`] in
    /// training, [`crate::Error::EmptyDimension`]; on a GPU those of [`crate::Cuda`], as [`Error::Cuda`].
    pub fn forward_relu_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(x, None, Epilogue::Relu, train)
    }

    /// `y = relu(bn(x) + residual)` in one pass, the end of a residual block. The residual has the shape, dtype and device
    /// of x. NaN stays NaN.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_relu_t`], and [`Error::ShapeMismatchBinaryOp`], [`Error::DTypeMismatchBinaryOp`].
    pub fn forward_add_relu_t(&self, x: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(x, Some(residual), Epilogue::AddRelu, train)
    }

    /// The module for inference alone, with the same parameters and running statistics: a [`Module`], for what takes no
    /// `train`, such as [`candle_nn::Sequential`].
    pub fn inference(&self) -> Inference {
        Inference(self.clone())
    }

    fn forward(&self, x: &Tensor, residual: Option<&Tensor>, epilogue: Epilogue, train: bool) -> Result<Tensor> {
        self.forward_checked(x, residual, epilogue, train).map_err(|error| {
            let residual = match residual {
                None => String::new(),
                Some(residual) => format!(" with a residual {}", described(residual)),
            };
            error.context(format!(
                "{NAME} of {} channels, {:?} on {:?}, over x {}{residual}",
                self.config.num_features,
                self.running_mean.dtype(),
                self.running_mean.device().location(),
                described(x)
            ))
        })
    }

    fn forward_checked(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        epilogue: Epilogue,
        train: bool,
    ) -> Result<Tensor> {
        let (shape, dtype) = self.check(x, residual)?;
        let by_batch = train || !self.config.track_running_stats;
        if by_batch && shape.values_per_channel().map_err(wrap)? == 1 {
            return Err(wrap(crate::Error::OneValuePerChannel { shape }));
        }
        if let Some(candle) = &self.without_mean {
            return unfused(candle, x, residual, epilogue, train);
        }

        // The operation is of the tensors as they came: what it needs of another order it copies, and no node of candle's
        // graph, which would cost the backward pass two more tensors each, stands between.
        let x = &self.apart(x)?;
        let residual = residual.map(|residual| self.apart(residual)).transpose()?;
        let residual = residual.as_ref();
        let found = memory_order(x)?;
        let layout = found.unwrap_or(Layout::Nchw);
        let ordered = Ordered {
            x: match found {
                Some(_) => None,
                None => Some(in_layout(x, layout)?),
            },
            residual: match residual {
                Some(residual) if !lies_in(residual, layout)? => Some(in_layout(residual, layout)?),
                _ => None,
            },
        };
        let parameters = match &self.weight_and_bias {
            None => None,
            Some((weight, bias)) => {
                let dtype = self.running_mean.dtype();
                Some([parameter(weight, dtype)?, parameter(bias, dtype)?])
            }
        };
        let mut arguments = [x].into_iter().chain(parameters.iter().flatten()).chain(residual);
        let statistics = self.statistics(train, arguments.any(Tensor::track_op))?;
        let shape = Shape { layout, ..shape };
        let call = Call {
            shape,
            dtype,
            epilogue,
            eps: self.config.eps,
            statistics,
            ordered,
        };
        let operation = Operation::new(call, self.shared.clone());
        let y = operation.apply(x, parameters.as_ref().map(<[Tensor; 2]>::each_ref), residual)?;
        match layout {
            Layout::Nchw => Ok(y),
            Layout::Nhwc => channels_second(&y),
        }
    }

    /// The tensor, or a copy in candle's graph where it repeats the numbers of a running statistic: candle locks what an
    /// operation is of, and the operation would wait for itself.
    fn apart(&self, tensor: &Tensor) -> Result<Tensor> {
        // A tensor of either order has more numbers than a running statistic.
        if memory_order(tensor)?.is_none() {
            let memory = address(tensor)?;
            for running in [&self.running_mean, &self.running_var] {
                if memory == address(running)? {
                    return tensor.contiguous();
                }
            }
        }
        Ok(tensor.clone())
    }

    /// Refuses what cannot be normalised, before anything is changed.
    fn check(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<(Shape, Dtype)> {
        let &[batch, channels, ref plane @ ..] = x.dims() else {
            return Err(Error::UnexpectedNumberOfDims {
                expected: 4,
                got: x.rank(),
                shape: x.shape().clone(),
            }
            .bt());
        };
        let (width, rows) = plane.split_last().unwrap_or((&1, &[]));
        let shape = Shape::nchw(batch, channels, rows.iter().product(), *width);
        let features = self.config.num_features;
        if channels != features {
            let mut expected = x.dims().to_vec();
            expected[1] = features;
            return Err(Error::UnexpectedShape {
                msg: format!("{features} channels (num_features) expected, not {channels}"),
                expected: expected.into(),
                got: x.shape().clone(),
            }
            .bt());
        }
        if shape.height == 0 || shape.width == 0 {
            return Err(wrap(crate::Error::EmptyDimension { shape }));
        }
        let dtype = element_dtype(x.dtype(), self.running_mean.dtype())?;
        check_device(self.running_mean.device(), x.device())?;
        if let Some(residual) = residual {
            if residual.shape() != x.shape() {
                return Err(Error::ShapeMismatchBinaryOp {
                    lhs: x.shape().clone(),
                    rhs: residual.shape().clone(),
                    op: NAME,
                }
                .bt());
            }
            if residual.dtype() != x.dtype() {
                return Err(Error::DTypeMismatchBinaryOp {
                    lhs: x.dtype(),
                    rhs: residual.dtype(),
                    op: NAME,
                }
                .bt());
            }
            check_device(x.device(), residual.device())?;
        }
        Ok((shape, dtype))
    }

    fn statistics(&self, train: bool, differentiable: bool) -> Result<Statistics> {
        let tracked = self.config.track_running_stats;
        if train || !tracked {
            return Ok(Statistics::Batch {
                update: (train && tracked).then(|| Update {
                    mean: self.running_mean.clone(),
                    variance: self.running_var.clone(),
                    batches: self.num_batches_tracked.clone(),
                    momentum: self.config.momentum,
                    skip_non_finite: self.config.skip_non_finite,
                }),
            });
        }
        let (mean, variance) = (
            self.running_mean.as_detached_tensor(),
            self.running_var.as_detached_tensor(),
        );
        // The backward pass needs those of this call, and a step of training may move them before. On the CPU nobody else
        // may want the locks of what a pass reads: see "Locks".
        Ok(if differentiable || mean.device().is_cpu() {
            // Both of the same moment.
            let _locked = (mean.storage_and_layout(), variance.storage_and_layout());
            Statistics::Running {
                mean: mean.copy()?,
                variance: variance.copy()?,
            }
        } else {
            Statistics::Running { mean, variance }
        })
    }
}

impl ModuleT for BatchNorm2d {
    /// `y = bn(x)`, in training (`train`) by the statistics of the batch, else by the running statistics.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(x, None, Epilogue::Identity, train)
    }
}

/// A [`BatchNorm2d`] that only infers. Made by [`BatchNorm2d::inference`].
#[derive(Clone, Debug)]
pub struct Inference(BatchNorm2d);

impl Module for Inference {
    /// `y = bn(x)` by the running statistics.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x, None, Epilogue::Identity, false)
    }
}

/// candle-nn's own normalisation, with the epilogue behind it, in the dtype of the parameters, which is all that it takes.
fn unfused(
    candle: &candle_nn::BatchNorm,
    x: &Tensor,
    residual: Option<&Tensor>,
    epilogue: Epilogue,
    train: bool,
) -> Result<Tensor> {
    let dtype = candle.running_var().dtype();
    let y = candle.forward_t(&converted(x, dtype)?, train)?;
    let y = match (epilogue, residual) {
        (Epilogue::Identity, _) => y,
        (_, None) => y.relu()?,
        (_, Some(residual)) => (y + converted(residual, dtype)?)?.relu()?,
    };
    converted(&y, x.dtype())
}

/// The tensor in this dtype.
fn converted(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype {
        return Ok(tensor.clone());
    }
    tensor.to_dtype(dtype)
}

/// A parameter for a pass to read. On the CPU a copy, whose lock nobody else wants: see "Locks" in the module's documentation.
fn parameter(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    let tensor = converted(tensor, dtype)?;
    if tensor.device().is_cpu() {
        tensor.force_contiguous()
    } else {
        tensor.contiguous()
    }
}

/// Where a tensor's memory is kept, the same for all that share it.
fn address(tensor: &Tensor) -> Result<usize> {
    if tensor.device().is_cpu() {
        return Cpu::look(tensor, |(memory, _)| Ok(std::ptr::from_ref(memory).addr()));
    }
    Ok(std::ptr::from_ref(&*tensor.storage_and_layout().0).addr())
}

/// The order of a tensor's memory, if it has one of the two: [N, C, ..], or [N, .., C].
fn memory_order(tensor: &Tensor) -> Result<Option<Layout>> {
    for layout in [Layout::Nchw, Layout::Nhwc] {
        if lies_in(tensor, layout)? {
            return Ok(Some(layout));
        }
    }
    Ok(None)
}

fn lies_in(tensor: &Tensor, layout: Layout) -> Result<bool> {
    Ok(match layout {
        Layout::Nchw => tensor.is_contiguous(),
        Layout::Nhwc => tensor.layout().permute(&channels_last(tensor.rank()))?.is_contiguous(),
    })
}

/// A copy of the values as a contiguous tensor in this order, outside of candle's graph.
fn in_layout(tensor: &Tensor, layout: Layout) -> Result<Tensor> {
    let tensor = tensor.detach();
    match layout {
        Layout::Nchw => tensor.contiguous(),
        Layout::Nhwc => tensor.permute(channels_last(tensor.rank()))?.contiguous(),
    }
}

/// The dimensions with the second one last.
fn channels_last(rank: usize) -> Vec<usize> {
    [0].into_iter().chain(2..rank).chain([1]).collect()
}

/// A view with the last dimension second.
fn channels_second(x: &Tensor) -> Result<Tensor> {
    let last = x.rank() - 1;
    let order: Vec<usize> = [0, last].into_iter().chain(1..last).collect();
    x.permute(order)
}

/// The dtype of parameters and statistics in a model of this dtype.
fn parameter_dtype(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F16 | DType::BF16 | DType::F32 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        got => Err(unexpected_dtype(DType::F32, got)),
    }
}

/// What this crate calls the dtype of a tensor, if it goes with parameters of this dtype.
fn element_dtype(tensor: DType, parameters: DType) -> Result<Dtype> {
    match (tensor, parameters) {
        (DType::F16, DType::F32) => Ok(Dtype::F16),
        (DType::BF16, DType::F32) => Ok(Dtype::Bf16),
        (DType::F32, DType::F32) => Ok(Dtype::F32),
        (DType::F64, DType::F64) => Ok(Dtype::F64),
        (got, expected) => Err(unexpected_dtype(expected, got)),
    }
}

fn unexpected_dtype(expected: DType, got: DType) -> Error {
    Error::UnexpectedDType {
        msg: "tensors of F16, BF16 and F32 go with parameters of F32, tensors of F64 with parameters of F64",
        expected,
        got,
    }
    .bt()
}

/// What a tensor is, for an error's context.
fn described(tensor: &Tensor) -> String {
    format!(
        "of shape {:?} and dtype {:?} on {:?}",
        tensor.shape(),
        tensor.dtype(),
        tensor.device().location()
    )
}

fn check_vector(tensor: &Tensor, channels: usize, dtype: DType, device: &Device) -> Result<()> {
    if tensor.dims() != [channels] {
        return Err(Error::UnexpectedShape {
            msg: "one value per channel".into(),
            expected: channels.into(),
            got: tensor.shape().clone(),
        }
        .bt());
    }
    if parameter_dtype(tensor.dtype()).ok() != Some(dtype) {
        return Err(unexpected_dtype(dtype, tensor.dtype()));
    }
    check_device(device, tensor.device())
}

fn check_device(expected: &Device, got: &Device) -> Result<()> {
    if expected.same_device(got) {
        return Ok(());
    }
    Err(Error::DeviceMismatchBinaryOp {
        lhs: expected.location(),
        rhs: got.location(),
        op: NAME,
    }
    .bt())
}

/// An error of this crate as one of candle's.
fn wrap(error: crate::Error) -> Error {
    use crate::Error as Own;
    match error {
        Own::Unavailable(_)
        | Own::Compile { .. }
        | Own::Nvrtc { .. }
        | Own::Driver { .. }
        | Own::DeviceLost { .. }
        | Own::Context { .. }
        | Own::CaptureWithEventTracking => Error::Cuda(Box::new(error)).bt(),
        _ => Error::wrap(error),
    }
}
