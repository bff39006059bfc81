//! [`BatchNorm2d`]: configuration, parameters, running statistics, and the passes over them.

use crate::backend::{
    AsTensor, AsTensorMut, Backend, BackwardPass, BackwardStatistics, BatchStatistics, ForwardPass, ForwardStatistics,
    InputOutput, RunningUpdate,
};
use crate::config::BatchNorm2dConfig;
use crate::element::{Element, Real};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::overwrite::{Change, overwrite};
use crate::request::{Backward, Forward, Gradients};
use crate::shape::Shape;

/// Batch normalisation over the channels of four-dimensional tensors, as PyTorch's `torch.nn.BatchNorm2d`
/// ([Ioffe and Szegedy 2015](https://arxiv.org/abs/1502.03167)):
///
/// `y = (x - mean) / sqrt(var + eps) * weight + bias`
///
/// In training, `mean` and the biased `var` are those of the batch, per channel, and the running statistics move towards
/// them (towards the unbiased variance). In evaluation they are the running statistics.
///
/// `B` is the device, `P` the type of parameters and statistics: `f32` serves tensors of `f32`, `f16` and `bf16`, `f64`
/// serves `f64`. The element type is the method's own, so that one trained module normalises several.
///
/// Training takes `&mut self`, evaluation `&self`. No method but those that say so allocates, waits for the device or
/// copies to the host.
#[derive(Debug)]
pub struct BatchNorm2d<B: Backend, P: Real = f32> {
    pub(crate) backend: B,
    pub(crate) config: BatchNorm2dConfig,
    pub(crate) parameters: Option<Parameters<B, P>>,
    pub(crate) running: Option<RunningStatistics<B, P>>,
}

/// What is learnt: one weight and one bias per channel.
#[derive(Debug)]
pub(crate) struct Parameters<B: Backend, P: Real> {
    pub(crate) weight: B::Buffer<P>,
    pub(crate) bias: B::Buffer<P>,
}

/// What evaluation normalises by.
#[derive(Debug)]
pub(crate) struct RunningStatistics<B: Backend, P: Real> {
    pub(crate) mean: B::Buffer<P>,
    pub(crate) variance: B::Buffer<P>,
    /// One number. On the device, so that a replayed CUDA graph goes on counting.
    pub(crate) batches: B::Buffer<i64>,
}

/// The statistics of one batch, from the forward pass for the backward pass, with the kernels and the scratch memory that
/// passes of this shape need. Made once by [`BatchNorm2d::prepare`], used for every step.
///
/// Two steps that overlap need two: the scratch memory is theirs alone. A module of as many channels on the same device may
/// use another's; the statistics are those of the last forward pass, whichever module ran it.
#[derive(Debug)]
pub struct Saved<B: Backend, T: Element> {
    pub(crate) backend: B,
    pub(crate) shape: Shape,
    pub(crate) epilogue: Epilogue,
    pub(crate) statistics: BatchStatistics<B, T>,
    pub(crate) workspace: B::Workspace<T>,
    /// Whether a forward pass has filled the statistics.
    pub(crate) filled: bool,
}

impl<B: Backend, T: Element> Saved<B, T> {
    /// The shape it was prepared for.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The epilogue it was prepared for.
    pub fn epilogue(&self) -> Epilogue {
        self.epilogue
    }

    /// The batch mean per channel, as the last forward pass found it (PyTorch's `save_mean`). Copies to the host and
    /// waits.
    ///
    /// # Errors
    /// [`Error::SavedEmpty`] before the first forward pass; the driver's.
    pub fn mean(&self) -> Result<Vec<T::Param>> {
        self.check_filled()?;
        let pivot = self.backend.to_vec(self.statistics.pivot.view())?;
        let offset = self.backend.to_vec(self.statistics.mean_offset.view())?;
        Ok(pivot.into_iter().zip(offset).map(|(k, d)| k + d).collect())
    }

    /// `1 / sqrt(biased variance + eps)` per channel (PyTorch's `save_invstd`). Copies to the host and waits.
    ///
    /// # Errors
    /// [`Error::SavedEmpty`] before the first forward pass; the driver's.
    pub fn invstd(&self) -> Result<Vec<T::Param>> {
        self.check_filled()?;
        self.backend.to_vec(self.statistics.invstd.view())
    }

    pub(crate) fn check_filled(&self) -> Result<()> {
        if self.filled { Ok(()) } else { Err(Error::SavedEmpty) }
    }

    /// Refuses to serve a call it was not prepared for.
    pub(crate) fn check_prepared(&self, backend: &B, channels: usize, epilogue: Epilogue) -> Result<()> {
        let mismatch = |what, expected: String, got: String| Err(Error::SavedMismatch { what, expected, got });
        if !self.backend.same_device(backend) {
            return mismatch("device", format!("{:?}", self.backend), format!("{backend:?}"));
        }
        if self.shape.channels != channels {
            return mismatch(
                "shape",
                self.shape.to_string(),
                format!("a module of {channels} channels"),
            );
        }
        if self.epilogue != epilogue {
            return mismatch("epilogue", self.epilogue.to_string(), epilogue.to_string());
        }
        Ok(())
    }
}

impl<B: Backend, P: Real> BatchNorm2d<B, P> {
    /// A module with weight 1, bias 0, running mean 0 and running variance 1. Allocates.
    ///
    /// # Errors
    /// [`Error::NoFeatures`], [`Error::Eps`], [`Error::Momentum`]; [`Error::OutOfMemory`] and the driver's.
    pub fn new(backend: &B, config: BatchNorm2dConfig) -> Result<Self> {
        config.validate()?;
        let channels = config.num_features;
        let zeros = || backend.zeros::<P>(channels);
        let ones = || backend.upload(&ones(channels)?);
        let parameters = if config.affine {
            Some(Parameters {
                weight: ones()?,
                bias: zeros()?,
            })
        } else {
            None
        };
        let running = if config.track_running_stats {
            Some(RunningStatistics {
                mean: zeros()?,
                variance: ones()?,
                batches: backend.zeros(1)?,
            })
        } else {
            None
        };
        Ok(Self {
            backend: backend.clone(),
            config,
            parameters,
            running,
        })
    }

    /// The device the module lives on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What the module was made from.
    pub fn config(&self) -> &BatchNorm2dConfig {
        &self.config
    }

    /// The scale per channel, if affine.
    pub fn weight(&self) -> Option<&B::Buffer<P>> {
        self.parameters.as_ref().map(|parameters| &parameters.weight)
    }

    /// The scale per channel, for an optimiser to change in place. (A view, so that the buffer cannot be exchanged for another.)
    pub fn weight_mut(&mut self) -> Option<B::ViewMut<'_, P>> {
        self.parameters.as_mut().map(|parameters| parameters.weight.view_mut())
    }

    /// The shift per channel, if affine.
    pub fn bias(&self) -> Option<&B::Buffer<P>> {
        self.parameters.as_ref().map(|parameters| &parameters.bias)
    }

    /// The shift per channel, for an optimiser to change in place, as [`BatchNorm2d::weight_mut`].
    pub fn bias_mut(&mut self) -> Option<B::ViewMut<'_, P>> {
        self.parameters.as_mut().map(|parameters| parameters.bias.view_mut())
    }

    /// The running mean per channel, if tracked.
    pub fn running_mean(&self) -> Option<&B::Buffer<P>> {
        self.running.as_ref().map(|running| &running.mean)
    }

    /// The running (unbiased) variance per channel, if tracked.
    pub fn running_var(&self) -> Option<&B::Buffer<P>> {
        self.running.as_ref().map(|running| &running.variance)
    }

    /// How many batches have moved the running statistics, if tracked. Copies to the host and waits.
    ///
    /// # Errors
    /// The driver's.
    pub fn num_batches_tracked(&self) -> Result<Option<i64>> {
        self.running
            .as_ref()
            .map(|running| Ok(self.backend.to_vec(running.batches.view())?[0]))
            .transpose()
    }

    /// Sets the running mean to 0, the running variance to 1 and the count of batches to 0, in place. All or nothing.
    /// Allocates.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and the driver's.
    pub fn reset_running_stats(&mut self) -> Result<()> {
        self.reset(false)
    }

    /// Sets weight to 1 and bias to 0 in place, and resets the running statistics. All or nothing. Allocates.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and the driver's.
    pub fn reset_parameters(&mut self) -> Result<()> {
        self.reset(true)
    }

    fn reset(&mut self, parameters_too: bool) -> Result<()> {
        let backend = &self.backend;
        let channels = self.config.num_features;
        let zeros = || backend.zeros::<P>(channels);
        let ones = || backend.upload(&ones(channels)?);
        let mut changes = Vec::new();
        if let Some(parameters) = self.parameters.as_mut().filter(|_| parameters_too) {
            changes.push(Change::boxed(backend, &mut parameters.weight, ones()?)?);
            changes.push(Change::boxed(backend, &mut parameters.bias, zeros()?)?);
        }
        if let Some(running) = &mut self.running {
            changes.push(Change::boxed(backend, &mut running.mean, zeros()?)?);
            changes.push(Change::boxed(backend, &mut running.variance, ones()?)?);
            changes.push(Change::boxed(backend, &mut running.batches, backend.zeros(1)?)?);
        }
        overwrite(&mut changes)
    }

    /// Compiles, loads and allocates what training and backward passes of `shape` need, so that they themselves do not.
    ///
    /// Operands whose addresses are multiples of 16 bytes (every whole buffer is one) are served by what is compiled
    /// here; others may compile a kernel at their first use.
    ///
    /// # Errors
    /// [`Error::Channels`], [`Error::EmptyDimension`], [`Error::ShapeOverflow`]; [`Error::Compile`],
    /// [`Error::OutOfMemory`] and the driver's.
    pub fn prepare<T: Element<Param = P>>(&self, shape: Shape) -> Result<Saved<B, T>> {
        self.prepare_fused(shape, Epilogue::Identity)
    }

    /// As [`BatchNorm2d::prepare`], for passes with a fused `epilogue`.
    ///
    /// # Errors
    /// As [`BatchNorm2d::prepare`].
    pub fn prepare_fused<T: Element<Param = P>>(&self, shape: Shape, epilogue: Epilogue) -> Result<Saved<B, T>> {
        self.prepare_with(shape, epilogue, || self.backend.prepare::<T>(shape, epilogue))
    }

    pub(crate) fn prepare_with<T: Element<Param = P>>(
        &self,
        shape: Shape,
        epilogue: Epilogue,
        workspace: impl FnOnce() -> Result<B::Workspace<T>>,
    ) -> Result<Saved<B, T>> {
        self.check_shape(shape)?;
        let zeros = || self.backend.zeros::<P>(self.config.num_features);
        Ok(Saved {
            backend: self.backend.clone(),
            shape,
            epilogue,
            statistics: BatchStatistics {
                pivot: zeros()?,
                mean_offset: zeros()?,
                invstd: zeros()?,
            },
            workspace: workspace()?,
            filled: false,
        })
    }

    /// Compiles and loads what evaluation of `shape` needs. Without it the first evaluation does.
    ///
    /// # Errors
    /// As [`BatchNorm2d::prepare`].
    pub fn prepare_eval<T: Element<Param = P>>(&self, shape: Shape, epilogue: Epilogue) -> Result<()> {
        self.check_shape(shape)?;
        self.backend.prepare_evaluation::<T>(shape, epilogue, false)
    }

    /// Compiles and loads what [`BatchNorm2d::backward_eval_with`] needs for all gradients of `shape`. Without it the first
    /// such pass does.
    ///
    /// # Errors
    /// As [`BatchNorm2d::prepare`].
    pub fn prepare_backward_eval<T: Element<Param = P>>(&self, shape: Shape, epilogue: Epilogue) -> Result<()> {
        self.check_shape(shape)?;
        self.backend.prepare_evaluation::<T>(shape, epilogue, true)
    }

    /// Zeros for the gradients at weight and bias. Allocates.
    ///
    /// # Errors
    /// [`Error::NotAffine`]; [`Error::OutOfMemory`] and the driver's.
    pub fn gradients(&self) -> Result<Gradients<B, P>> {
        if self.parameters.is_none() {
            return Err(Error::NotAffine);
        }
        let zeros = || self.backend.zeros::<P>(self.config.num_features);
        Ok(Gradients {
            weight: zeros()?,
            bias: zeros()?,
        })
    }

    /// `y = bn(x)` by the statistics of this batch, which `saved` keeps for the backward pass and towards which the
    /// running statistics move.
    ///
    /// `x` and `y` have the shape of `saved`. A batch of 0 images changes nothing.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Context`], [`Error::SavedMismatch`], [`Error::OneValuePerChannel`] before anything is
    /// launched; the driver's.
    pub fn forward_train<T, X, Y>(&mut self, x: &X, y: &mut Y, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
        Y: AsTensorMut<B, T> + ?Sized,
    {
        self.forward_train_with(Forward::new(x, y), saved)
    }

    /// [`BatchNorm2d::forward_train`] with a fused epilogue: that of `saved`.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_train`], and [`Error::InPlaceTraining`].
    pub fn forward_train_with<T>(&mut self, forward: Forward<'_, B, T>, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        if matches!(forward.tensors, InputOutput::InPlace { .. }) {
            return Err(Error::InPlaceTraining);
        }
        let momentum = self.config.momentum;
        let skip_non_finite = self.config.skip_non_finite;
        let update = self.running.as_mut().map(|running| RunningUpdate {
            mean: running.mean.view_mut(),
            variance: running.variance.view_mut(),
            batches: running.batches.view_mut(),
            momentum,
            skip_non_finite,
        });
        forward_by_batch(
            &self.backend,
            &self.config,
            self.parameters.as_ref(),
            forward,
            saved,
            update,
        )
    }

    /// [`BatchNorm2d::forward_train`] into a new buffer. Allocates.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_train`]; [`Error::OutOfMemory`].
    pub fn forward_train_alloc<T, X>(&mut self, x: &X, saved: &mut Saved<B, T>) -> Result<B::Buffer<T>>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
    {
        let mut y = self.backend.zeros::<T>(saved.shape.len()?)?;
        self.forward_train(x, &mut y, saved)?;
        Ok(y)
    }

    /// [`BatchNorm2d::forward_train`] into `y`, which is replaced by a new buffer if its length is not the shape's. So a loop
    /// that keeps `y` allocates once: memory that was never written costs more than the pass itself, since the system
    /// provides it page by page.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_train`]; [`Error::OutOfMemory`].
    pub fn forward_train_reusing<T, X>(&mut self, x: &X, y: &mut B::Buffer<T>, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
    {
        self.fit(saved.shape, y)?;
        self.forward_train(x, y, saved)
    }

    /// `y = bn(x)` by the running statistics, which stay as they are.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Channels`], [`Error::EmptyDimension`], [`Error::ShapeOverflow`], [`Error::Context`],
    /// [`Error::NoRunningStatistics`] before anything is launched; [`Error::Compile`] and the driver's.
    pub fn forward_eval<T, X, Y>(&self, shape: Shape, x: &X, y: &mut Y) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
        Y: AsTensorMut<B, T> + ?Sized,
    {
        self.forward_eval_with(shape, Forward::new(x, y))
    }

    /// `x = bn(x)` by the running statistics.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_eval`].
    pub fn forward_eval_in_place<T, X>(&self, shape: Shape, x: &mut X) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensorMut<B, T> + ?Sized,
    {
        self.forward_eval_with(shape, Forward::in_place(x))
    }

    /// [`BatchNorm2d::forward_eval`] with a fused epilogue or in place.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_eval`].
    pub fn forward_eval_with<T>(&self, shape: Shape, forward: Forward<'_, B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        self.check_shape(shape)?;
        let running = self.running.as_ref().ok_or(Error::NoRunningStatistics)?;
        forward.validate(&self.backend, shape)?;
        if shape.is_empty() {
            return Ok(());
        }
        self.backend.forward(ForwardPass {
            shape,
            eps: self.config.eps,
            tensors: forward.tensors,
            epilogue: forward.epilogue,
            weight: self.weight().map(|weight| weight.view()),
            bias: self.bias().map(|bias| bias.view()),
            statistics: ForwardStatistics::Running {
                mean: running.mean.view(),
                variance: running.variance.view(),
            },
        })
    }

    /// [`BatchNorm2d::forward_eval`] into a new buffer. Allocates.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_eval`]; [`Error::OutOfMemory`].
    pub fn forward_eval_alloc<T, X>(&self, shape: Shape, x: &X) -> Result<B::Buffer<T>>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
    {
        let mut y = self.backend.zeros::<T>(shape.len()?)?;
        self.forward_eval(shape, x, &mut y)?;
        Ok(y)
    }

    /// [`BatchNorm2d::forward_eval`] into `y`, which is replaced by a new buffer if its length is not the shape's; see
    /// [`BatchNorm2d::forward_train_reusing`].
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_eval`]; [`Error::OutOfMemory`].
    pub fn forward_eval_reusing<T, X>(&self, shape: Shape, x: &X, y: &mut B::Buffer<T>) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
    {
        self.fit(shape, y)?;
        self.forward_eval(shape, x, y)
    }

    /// Replaces a buffer that has not the length of `shape`.
    fn fit<T: Element<Param = P>>(&self, shape: Shape, buffer: &mut B::Buffer<T>) -> Result<()> {
        let len = shape.len()?;
        if B::view_len(&buffer.view()) != len {
            *buffer = self.backend.zeros(len)?;
        }
        Ok(())
    }

    /// Evaluation by the statistics of the batch at hand, for a module that tracks none: PyTorch's evaluation with
    /// `track_running_stats=False`. The backward pass is the training one.
    ///
    /// # Errors
    /// As [`BatchNorm2d::forward_train`], and [`Error::HasRunningStatistics`].
    pub fn forward_eval_batch_statistics<T>(&self, forward: Forward<'_, B, T>, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        if self.running.is_some() {
            return Err(Error::HasRunningStatistics);
        }
        forward_by_batch(
            &self.backend,
            &self.config,
            self.parameters.as_ref(),
            forward,
            saved,
            None,
        )
    }

    /// Gradients of a training pass: at x into `dx`, at weight and bias over what `gradients` holds.
    ///
    /// `dbias = Σ dy`, `dweight = Σ dy · x̂`, `dx = weight · invstd · (dy - (dbias + x̂ · dweight) / n)` with
    /// `x̂ = (x - mean) · invstd` and n values per channel (Ioffe and Szegedy 2015, section 3). `saved` is that of the
    /// forward pass; its statistics stay, its scratch memory is used.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::VectorLength`], [`Error::Context`], [`Error::SavedMismatch`], [`Error::SavedEmpty`],
    /// [`Error::NotAffine`] before anything is launched; the driver's. `gradients` is as it was then, unless the device is lost.
    pub fn backward<T, X, D, G>(
        &self,
        x: &X,
        dy: &D,
        saved: &mut Saved<B, T>,
        dx: &mut G,
        gradients: &mut Gradients<B, P>,
    ) -> Result<()>
    where
        T: Element<Param = P>,
        X: AsTensor<B, T> + ?Sized,
        D: AsTensor<B, T> + ?Sized,
        G: AsTensorMut<B, T> + ?Sized,
    {
        self.backward_with(Backward::new(x, dy).dx(dx).parameters(gradients), saved)
    }

    /// Those gradients of a training pass that `backward` asks for, through its fused epilogue.
    ///
    /// # Errors
    /// As [`BatchNorm2d::backward`].
    pub fn backward_with<T>(&self, backward: Backward<'_, B, T>, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        saved.check_prepared(&self.backend, self.config.num_features, backward.epilogue())?;
        saved.check_filled()?;
        let Saved {
            shape,
            statistics,
            workspace,
            ..
        } = saved;
        self.run_backward(backward, *shape, BackwardStatistics::Batch(statistics), workspace)
    }

    /// Gradients of an evaluation pass, where the running statistics are constants: `dx = weight · invstd · dy`.
    ///
    /// Of `saved` only the scratch memory is used; the statistics it may hold stay.
    ///
    /// # Errors
    /// As [`BatchNorm2d::backward`], without [`Error::SavedEmpty`], and [`Error::NoRunningStatistics`].
    pub fn backward_eval_with<T>(&self, backward: Backward<'_, B, T>, saved: &mut Saved<B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        let running = self.running.as_ref().ok_or(Error::NoRunningStatistics)?;
        saved.check_prepared(&self.backend, self.config.num_features, backward.epilogue())?;
        let statistics = BackwardStatistics::Running {
            mean: running.mean.view(),
            variance: running.variance.view(),
        };
        self.run_backward(backward, saved.shape, statistics, &mut saved.workspace)
    }

    fn run_backward<'m, T>(
        &'m self,
        backward: Backward<'_, B, T>,
        shape: Shape,
        statistics: BackwardStatistics<'m, B, T>,
        workspace: &'m mut B::Workspace<T>,
    ) -> Result<()>
    where
        T: Element<Param = P>,
    {
        self.check_backward(&backward, shape)?;
        if shape.is_empty() {
            return self.zero_parameter_gradients(backward);
        }
        self.backend
            .backward(self.backward_pass(backward, shape, statistics, workspace))
    }

    pub(crate) fn check_backward<T>(&self, backward: &Backward<'_, B, T>, shape: Shape) -> Result<()>
    where
        T: Element<Param = P>,
    {
        if backward.parameters.is_some() && self.parameters.is_none() {
            return Err(Error::NotAffine);
        }
        backward.validate(&self.backend, shape)
    }

    pub(crate) fn backward_pass<'t, 'm, T>(
        &'m self,
        backward: Backward<'t, B, T>,
        shape: Shape,
        statistics: BackwardStatistics<'m, B, T>,
        workspace: &'m mut B::Workspace<T>,
    ) -> BackwardPass<'t, 'm, B, T>
    where
        T: Element<Param = P>,
    {
        BackwardPass {
            shape,
            eps: self.config.eps,
            x: backward.x,
            flow: backward.flow,
            epilogue: backward.epilogue,
            weight: self.weight().map(|weight| weight.view()),
            bias: self.bias().map(|bias| bias.view()),
            parameters: backward.parameters,
            statistics,
            workspace,
        }
    }

    /// An empty batch adds nothing to gradients, and written gradients are zero. Allocates.
    pub(crate) fn zero_parameter_gradients<T>(&self, backward: Backward<'_, B, T>) -> Result<()>
    where
        T: Element<Param = P>,
    {
        match backward.parameters {
            Some(gradients) if !gradients.accumulate => {
                let zeros = self.backend.zeros::<P>(self.config.num_features)?;
                self.backend.copy(zeros.view(), gradients.weight)?;
                self.backend.copy(zeros.view(), gradients.bias)
            }
            _ => Ok(()),
        }
    }

    fn check_shape(&self, shape: Shape) -> Result<()> {
        if shape.channels == 0 || shape.height == 0 || shape.width == 0 {
            return Err(Error::EmptyDimension { shape });
        }
        if shape.channels != self.config.num_features {
            return Err(Error::Channels {
                shape,
                expected: self.config.num_features,
            });
        }
        shape.len().map(|_| ())
    }
}

/// A forward pass by the statistics of its batch: training, or evaluation without running statistics.
fn forward_by_batch<'m, B: Backend, T: Element>(
    backend: &B,
    config: &BatchNorm2dConfig,
    parameters: Option<&'m Parameters<B, T::Param>>,
    forward: Forward<'_, B, T>,
    saved: &'m mut Saved<B, T>,
    update: Option<RunningUpdate<'m, B, T>>,
) -> Result<()> {
    saved.check_prepared(backend, config.num_features, forward.epilogue())?;
    let shape = saved.shape;
    forward.validate(backend, shape)?;
    match shape.values_per_channel()? {
        0 => {
            saved.filled = true;
            return Ok(());
        }
        1 => return Err(Error::OneValuePerChannel { shape }),
        _ => {}
    }
    // Only a pass that came to its end leaves statistics that a backward pass may use.
    saved.filled = false;
    backend.forward(ForwardPass {
        shape,
        eps: config.eps,
        tensors: forward.tensors,
        epilogue: forward.epilogue,
        weight: parameters.map(|parameters| parameters.weight.view()),
        bias: parameters.map(|parameters| parameters.bias.view()),
        statistics: ForwardStatistics::Batch {
            saved: &mut saved.statistics,
            workspace: &mut saved.workspace,
            update,
        },
    })?;
    saved.filled = true;
    Ok(())
}

/// Ones on the host, or an error where so many do not fit.
fn ones<P: Real>(len: usize) -> Result<Vec<P>> {
    let mut ones = Vec::new();
    ones.try_reserve_exact(len)
        .map_err(|_| Error::out_of_memory::<P>(len))?;
    ones.resize(len, P::ONE);
    Ok(ones)
}
