//! The seam between the module and the devices: what a device must be able to do.
//!
//! [`Backend`] is sealed. Its two implementations are [`Cpu`](crate::Cpu) and [`Cuda`](crate::Cuda). Whoever comes
//! through this seam has checked every length, shape and owner; a backend only computes.

use crate::config::Momentum;
use crate::element::{Element, Plain};
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::sealed::Sealed;
use crate::shape::Shape;

/// A device that can normalise. Sealed: the kernels trust what its buffers say.
pub trait Backend: Sealed + Clone + std::fmt::Debug + Send + Sync + Sized + 'static {
    /// Memory of the device, owned.
    type Buffer<T: Plain>: AsTensor<Self, T> + AsTensorMut<Self, T> + std::fmt::Debug + Send + Sync;
    /// Memory of the device, read.
    type View<'a, T: Plain>;
    /// Memory of the device, written.
    type ViewMut<'a, T: Plain>;
    /// What a step of one shape needs beside its operands: prepared kernels and scratch memory.
    type Workspace<T: Element>: std::fmt::Debug + Send + Sync;

    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the driver's errors.
    fn zeros<T: Plain>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Allocates a copy of `values`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the driver's errors.
    fn upload<T: Plain>(&self, values: &[T]) -> Result<Self::Buffer<T>>;

    /// Copies a buffer or view to the host, and waits for it.
    ///
    /// # Errors
    /// The driver's errors.
    fn to_vec<T: Plain>(&self, from: Self::View<'_, T>) -> Result<Vec<T>>;

    /// Copies a whole buffer to the host, and waits for it.
    ///
    /// # Errors
    /// The driver's errors.
    fn read<T: Plain>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>> {
        self.to_vec(buffer.view())
    }

    /// Waits until everything that was asked of the device is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`](crate::Error::DeviceLost) if a kernel failed; the driver's.
    fn synchronize(&self) -> Result<()>;

    /// Copies `from` over `to`, of the same length, on the device.
    ///
    /// # Errors
    /// The driver's errors.
    fn copy<T: Plain>(&self, from: Self::View<'_, T>, to: Self::ViewMut<'_, T>) -> Result<()>;

    /// Number of elements of a view.
    fn view_len<T: Plain>(view: &Self::View<'_, T>) -> usize;

    /// Number of elements of a view.
    fn view_mut_len<T: Plain>(view: &Self::ViewMut<'_, T>) -> usize;

    /// Gives up writing through a view.
    #[doc(hidden)]
    fn read_only<'a, T: Plain>(view: Self::ViewMut<'a, T>) -> Self::View<'a, T>;

    /// Refuses memory that this device's work would not be ordered with.
    ///
    /// # Errors
    /// [`Error::Context`](crate::Error::Context).
    #[doc(hidden)]
    fn check_view<T: Plain>(&self, argument: &'static str, view: &Self::View<'_, T>) -> Result<()>;

    /// As [`Backend::check_view`].
    ///
    /// # Errors
    /// [`Error::Context`](crate::Error::Context).
    #[doc(hidden)]
    fn check_view_mut<T: Plain>(&self, argument: &'static str, view: &Self::ViewMut<'_, T>) -> Result<()>;

    /// Whether both stand for the same device, so that memory of one may be used with the other.
    #[doc(hidden)]
    fn same_device(&self, other: &Self) -> bool;

    /// Compiles, loads and allocates what the training and backward passes of a shape need.
    ///
    /// # Errors
    /// [`Error::Compile`](crate::Error::Compile), [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the driver's.
    #[doc(hidden)]
    fn prepare<T: Element>(&self, shape: Shape, epilogue: Epilogue) -> Result<Self::Workspace<T>>;

    /// Compiles and loads what evaluation of a shape by running statistics needs, forward or backward.
    ///
    /// # Errors
    /// [`Error::Compile`](crate::Error::Compile) and the driver's.
    #[doc(hidden)]
    fn prepare_evaluation<T: Element>(&self, shape: Shape, epilogue: Epilogue, backward: bool) -> Result<()>;

    /// Normalises. The shape is not empty.
    ///
    /// # Errors
    /// The driver's errors. The running statistics are changed by the last launch alone.
    #[doc(hidden)]
    fn forward<T: Element>(&self, pass: ForwardPass<'_, '_, Self, T>) -> Result<()>;

    /// Computes gradients. The shape is not empty.
    ///
    /// # Errors
    /// The driver's errors. The gradients at weight and bias are changed by the last launch alone.
    #[doc(hidden)]
    fn backward<T: Element>(&self, pass: BackwardPass<'_, '_, Self, T>) -> Result<()>;
}

/// What may be given for a tensor of `T` that a call reads: the backend's buffers, views and, on the CPU, slices, vectors
/// and arrays. Sealed, because kernels trust the address and the length.
pub trait AsTensor<B: Backend, T: Plain>: Sealed {
    /// A view of the whole tensor.
    fn view(&self) -> B::View<'_, T>;
}

/// What may be given for a tensor of `T` that a call writes.
pub trait AsTensorMut<B: Backend, T: Plain>: Sealed {
    /// A view of the whole tensor.
    fn view_mut(&mut self) -> B::ViewMut<'_, T>;
}

/// Input and output of a forward pass.
#[doc(hidden)]
pub enum InputOutput<'a, B: Backend, T: Element> {
    /// y gets what comes of x.
    Separate {
        /// What is normalised.
        x: B::View<'a, T>,
        /// What comes of it.
        y: B::ViewMut<'a, T>,
    },
    /// y replaces x.
    InPlace {
        /// What is normalised, then what comes of it.
        x: B::ViewMut<'a, T>,
    },
}

/// What a forward pass does to the normalised value before it is stored.
#[doc(hidden)]
pub enum ForwardEpilogue<'a, B: Backend, T: Element> {
    /// y = bn(x)
    Identity,
    /// y = relu(bn(x))
    Relu,
    /// y = relu(bn(x) + z)
    AddRelu {
        /// The residual.
        z: B::View<'a, T>,
    },
}

/// Statistics of one batch, one value per channel: as the forward pass left them for the backward pass.
///
/// The mean is kept as the sum of two numbers, the channel's first element (or 0 where that is not finite) and the mean
/// of the differences from it, because their sum rounded to one number would lose what `x - mean` needs where the mean is
/// large for the deviation.
#[doc(hidden)]
#[derive(Debug)]
pub struct BatchStatistics<B: Backend, T: Element> {
    /// K: the channel's first element.
    pub pivot: B::Buffer<T::Param>,
    /// d: the mean of x - K.
    pub mean_offset: B::Buffer<T::Param>,
    /// 1 / sqrt(biased variance + eps).
    pub invstd: B::Buffer<T::Param>,
}

/// The running statistics that a training pass moves on, and how.
#[doc(hidden)]
pub struct RunningUpdate<'a, B: Backend, T: Element> {
    /// Moved towards the batch mean.
    pub mean: B::ViewMut<'a, T::Param>,
    /// Moved towards the unbiased batch variance.
    pub variance: B::ViewMut<'a, T::Param>,
    /// One number: grows by one.
    pub batches: B::ViewMut<'a, i64>,
    /// How far.
    pub momentum: Momentum,
    /// Whether channels with statistics that are not finite stay as they are.
    pub skip_non_finite: bool,
}

/// The statistics a forward pass normalises by.
#[doc(hidden)]
pub enum ForwardStatistics<'a, B: Backend, T: Element> {
    /// Given: evaluation.
    Running {
        /// Mean per channel.
        mean: B::View<'a, T::Param>,
        /// Variance per channel.
        variance: B::View<'a, T::Param>,
    },
    /// Found before: those of all ranks' batches, in a synchronised pass.
    Saved(&'a BatchStatistics<B, T>),
    /// Of this batch.
    Batch {
        /// Where they are left for the backward pass.
        saved: &'a mut BatchStatistics<B, T>,
        /// Kernels and scratch.
        workspace: &'a mut B::Workspace<T>,
        /// What else they move, in training.
        update: Option<RunningUpdate<'a, B, T>>,
    },
}

/// One forward pass. Lengths, shapes and owners have been checked. `'t` is how long the tensors are
/// borrowed, `'m` the module.
#[doc(hidden)]
pub struct ForwardPass<'t, 'm, B: Backend, T: Element> {
    /// The shape of x, y and z.
    pub shape: Shape,
    /// Added to the variance.
    pub eps: f64,
    /// Input and output.
    pub tensors: InputOutput<'t, B, T>,
    /// What follows the normalisation.
    pub epilogue: ForwardEpilogue<'t, B, T>,
    /// Scale per channel; 1 if absent.
    pub weight: Option<B::View<'m, T::Param>>,
    /// Shift per channel; 0 if absent.
    pub bias: Option<B::View<'m, T::Param>>,
    /// What to normalise by.
    pub statistics: ForwardStatistics<'m, B, T>,
}

/// The gradient at y, and where the gradient at x goes.
#[doc(hidden)]
pub enum GradientFlow<'a, B: Backend, T: Element> {
    /// The gradient at x is not wanted.
    Stops {
        /// Gradient at y.
        dy: B::View<'a, T>,
    },
    /// dx gets it.
    Separate {
        /// Gradient at y.
        dy: B::View<'a, T>,
        /// Gradient at x.
        dx: B::ViewMut<'a, T>,
    },
    /// dx replaces dy.
    InPlace {
        /// Gradient at y, then at x.
        dy: B::ViewMut<'a, T>,
    },
}

/// Where the forward pass's epilogue lets the gradient through.
#[doc(hidden)]
pub enum BackwardEpilogue<'a, B: Backend, T: Element> {
    /// Everywhere.
    Identity,
    /// Where y is not <= 0; y is computed again from x.
    Relu,
    /// Where y is not <= 0; y is read, since it depends on the residual.
    AddRelu {
        /// What the forward pass gave.
        y: B::View<'a, T>,
        /// Gradient at the residual.
        dz: Option<B::ViewMut<'a, T>>,
    },
}

/// Where the gradients at weight and bias go.
#[doc(hidden)]
pub struct ParameterGradients<'a, B: Backend, T: Element> {
    /// Σ dy · x̂ per channel.
    pub weight: B::ViewMut<'a, T::Param>,
    /// Σ dy per channel.
    pub bias: B::ViewMut<'a, T::Param>,
    /// Whether they are added to what is there, or written over it.
    pub accumulate: bool,
}

/// The statistics the forward pass normalised by.
#[doc(hidden)]
pub enum BackwardStatistics<'a, B: Backend, T: Element> {
    /// Constants: evaluation.
    Running {
        /// Mean per channel.
        mean: B::View<'a, T::Param>,
        /// Variance per channel.
        variance: B::View<'a, T::Param>,
    },
    /// Of the batch, so that the gradient flows through them too.
    Batch(&'a BatchStatistics<B, T>),
}

/// One backward pass. Lengths, shapes and owners have been checked. Lifetimes as in [`ForwardPass`].
#[doc(hidden)]
pub struct BackwardPass<'t, 'm, B: Backend, T: Element> {
    /// The shape of all tensors.
    pub shape: Shape,
    /// Added to the variance.
    pub eps: f64,
    /// Input of the forward pass.
    pub x: B::View<'t, T>,
    /// Gradient at y, and where the gradient at x goes.
    pub flow: GradientFlow<'t, B, T>,
    /// The forward pass's epilogue.
    pub epilogue: BackwardEpilogue<'t, B, T>,
    /// Scale per channel as in the forward pass; 1 if absent.
    pub weight: Option<B::View<'m, T::Param>>,
    /// Shift per channel as in the forward pass; 0 if absent.
    pub bias: Option<B::View<'m, T::Param>>,
    /// Where the gradients at weight and bias go, if they are wanted.
    pub parameters: Option<ParameterGradients<'t, B, T>>,
    /// What the forward pass normalised by.
    pub statistics: BackwardStatistics<'m, B, T>,
    /// Kernels and scratch.
    pub workspace: &'m mut B::Workspace<T>,
}
