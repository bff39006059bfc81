//! The operation that candle's graph holds: its pass forward, and its pass backward.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Storage, Tensor, Var};

use super::shared::{Kept, Purpose, Shared, lock};
use super::storage::{Device, Moved, Place, Stored, memory};
use super::{channels_last, channels_second, described, wrap};
use crate::backend::{
    AsTensorMut, BackwardEpilogue, BackwardStatistics, BatchStatistics, ForwardEpilogue, ForwardStatistics,
    RunningUpdate,
};
use crate::config::Momentum;
use crate::cpu::Cpu;
use crate::element::{Dtype, Element};
use crate::epilogue::Epilogue;
use crate::shape::{Layout as MemoryOrder, Shape};
use crate::step::{Gradients, Operands, backward, batch_statistics, forward};

/// The name that candle's messages call it by.
pub(super) const NAME: &str = "batch-norm";

/// What candle is told if it asks for gradients that can be differentiated again.
const TWICE: &str = "batch-norm, differentiated twice";

/// `$body` with the type `$element` that `$dtype` stands for.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            Dtype::F16 => {
                type $element = half::f16;
                $body
            }
            Dtype::Bf16 => {
                type $element = half::bf16;
                $body
            }
            Dtype::F32 => {
                type $element = f32;
                $body
            }
            Dtype::F64 => {
                type $element = f64;
                $body
            }
        }
    };
}

/// What a module asks of an operation.
pub(super) struct Call {
    pub(super) shape: Shape,
    pub(super) dtype: Dtype,
    pub(super) epilogue: Epilogue,
    pub(super) eps: f64,
    pub(super) statistics: Statistics,
    pub(super) ordered: Ordered,
}

/// Contiguous copies, in the memory order of the call, of arguments that have another.
#[derive(Debug)]
pub(super) struct Ordered {
    pub(super) x: Option<Tensor>,
    pub(super) residual: Option<Tensor>,
}

/// One call of a module.
#[derive(Debug)]
pub(super) struct Operation {
    purpose: Purpose,
    eps: f64,
    statistics: Statistics,
    /// x, if it had to be copied: both passes read it.
    x: Option<Tensor>,
    /// The residual, if it had to be copied. The forward pass alone reads it, and drops it.
    residual: Mutex<Option<Tensor>>,
    shared: Arc<Shared>,
    /// The statistics of the batch, from the forward pass for the backward passes, which only read them: several may run
    /// at once.
    saved: OnceLock<Kept>,
    /// Whether another thread than that of the forward pass has read them.
    shown: AtomicBool,
}

/// What a call normalises by.
#[derive(Debug)]
pub(super) enum Statistics {
    /// Those of its batch.
    Batch {
        /// The running statistics that they move, in training.
        update: Option<Update>,
    },
    /// Given ones.
    Running {
        /// Mean per channel.
        mean: Tensor,
        /// Variance per channel.
        variance: Tensor,
    },
}

/// The running statistics that a call moves, and how.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) mean: Var,
    pub(super) variance: Var,
    pub(super) batches: Var,
    pub(super) momentum: Momentum,
    pub(super) skip_non_finite: bool,
}

/// The arguments of a call by what they are for.
#[derive(Clone, Copy)]
struct Arguments<A> {
    x: A,
    parameters: Option<Parameters<A>>,
    residual: Option<A>,
}

/// Weight and bias. candle's operations have three arguments at most, so with a residual they are one tensor.
#[derive(Clone, Copy)]
enum Parameters<A> {
    /// The weight, and the bias.
    Apart([A; 2]),
    /// The weight, with the bias behind it.
    Joined(A),
}

impl<A> Arguments<A> {
    fn of_one(x: A) -> Self {
        Arguments {
            x,
            parameters: None,
            residual: None,
        }
    }

    fn of_two([x, residual]: [A; 2]) -> Self {
        Arguments {
            x,
            parameters: None,
            residual: Some(residual),
        }
    }
}

impl<A> Parameters<A> {
    fn try_map<'a, B>(&'a self, mut f: impl FnMut(&'a A) -> Result<B>) -> Result<Parameters<B>> {
        Ok(match self {
            Parameters::Apart([weight, bias]) => Parameters::Apart([f(weight)?, f(bias)?]),
            Parameters::Joined(both) => Parameters::Joined(f(both)?),
        })
    }
}

/// The gradients at the arguments of a call, as far as candle needs them.
struct Results {
    x: Option<Tensor>,
    /// At the weight, with that at the bias behind it.
    parameters: Option<Tensor>,
    residual: Option<Tensor>,
}

impl Operation {
    pub(super) fn new(call: Call, shared: Arc<Shared>) -> Self {
        Self {
            purpose: Purpose {
                shape: call.shape,
                dtype: call.dtype,
                epilogue: call.epilogue,
                thread: thread::current().id(),
            },
            eps: call.eps,
            statistics: call.statistics,
            x: call.ordered.x,
            residual: Mutex::new(call.ordered.residual),
            shared,
            saved: OnceLock::new(),
            shown: AtomicBool::new(false),
        }
    }

    /// Applies the operation to tensors that have been found fit. y is contiguous: in the order N, H, W, C its dimensions
    /// are in that order too.
    pub(super) fn apply(
        self,
        x: &Tensor,
        parameters: Option<[&Tensor; 2]>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        match (parameters, residual) {
            (None, None) => x.apply_op1(self),
            (None, Some(residual)) => x.apply_op2(residual, self),
            (Some([weight, bias]), None) => x.apply_op3(weight, bias, self),
            (Some(both), Some(residual)) => x.apply_op3(&Tensor::cat(&both, 0)?, residual, self),
        }
    }

    fn of_three<A>(&self, [first, second, third]: [A; 3]) -> Arguments<A> {
        match self.purpose.epilogue {
            Epilogue::AddRelu => Arguments {
                x: first,
                parameters: Some(Parameters::Joined(second)),
                residual: Some(third),
            },
            Epilogue::Identity | Epilogue::Relu => Arguments {
                x: first,
                parameters: Some(Parameters::Apart([second, third])),
                residual: None,
            },
        }
    }

    fn forward<D: Device>(&self, arguments: Arguments<Place<'_, D>>) -> Result<(D::Storage, candle_core::Shape)> {
        let (beside, layout) = arguments.x;
        let backend = D::beside(beside, &self.shared)?;
        let residual = lock(&self.residual).take();
        // The locks of copies, which nobody else has.
        let (own_x, own_residual) = (self.x.as_ref(), residual.as_ref());
        let (own_x, own_residual) = (
            own_x.map(Tensor::storage_and_layout),
            own_residual.map(Tensor::storage_and_layout),
        );
        let arguments = Arguments {
            x: place_of::<D>(&own_x)?.unwrap_or(arguments.x),
            residual: place_of::<D>(&own_residual)?.or(arguments.residual),
            ..arguments
        };
        let y = with_element!(self.purpose.dtype, T => {
            D::into_storage(self.forward_as::<D, T>(&backend, arguments)?, beside)
        });
        Ok((y, self.in_memory(layout.shape())))
    }

    /// A tensor's dimensions in the order of the memory of x, y and their gradients.
    fn in_memory(&self, shape: &candle_core::Shape) -> candle_core::Shape {
        match (self.purpose.shape.layout, shape.dims()) {
            (MemoryOrder::Nhwc, [batch, channels, others @ ..]) => [&[*batch], others, &[*channels]].concat().into(),
            _ => shape.clone(),
        }
    }

    fn forward_as<D: Device, T: Stored + Element<Param: Stored>>(
        &self,
        backend: &D,
        arguments: Arguments<Place<'_, D>>,
    ) -> Result<D::Buffer<T>> {
        let channels = self.purpose.shape.channels;
        let len = self.purpose.shape.len().map_err(wrap)?;
        if len == 0 {
            return backend.zeros(0).map_err(wrap);
        }
        let mut y = backend.unwritten::<T>(len)?;
        match &self.statistics {
            Statistics::Running { mean, variance } => {
                let ((mean, _), (variance, _)) = (mean.storage_and_layout(), variance.storage_and_layout());
                let statistics = ForwardStatistics::Running {
                    mean: D::view(memory::<D>(&mean)?, 0..channels)?,
                    variance: D::view(memory::<D>(&variance)?, 0..channels)?,
                };
                self.forward_by(backend, arguments, &mut y, statistics)?;
            }
            Statistics::Batch { update } => {
                let Purpose { shape, epilogue, .. } = self.purpose;
                let Shared {
                    workspaces, statistics, ..
                } = &*self.shared;
                let mut saved = statistics
                    .take(self.purpose, || batch_statistics::<D, T>(backend, channels))
                    .map_err(wrap)?;
                let mut workspace = workspaces
                    .take(self.purpose, || backend.prepare::<T>(shape, epilogue))
                    .map_err(wrap)?;
                let mut pass = |update: Option<Moved<'_, D>>| {
                    let update = match update {
                        None => None,
                        Some(moved) => Some(RunningUpdate {
                            mean: D::view_mut(moved.mean, 0..channels)?,
                            variance: D::view_mut(moved.variance, 0..channels)?,
                            batches: D::view_mut(moved.batches, 0..1)?,
                            momentum: moved.momentum,
                            skip_non_finite: moved.skip_non_finite,
                        }),
                    };
                    let statistics = ForwardStatistics::Batch {
                        saved: &mut *saved,
                        workspace: &mut *workspace,
                        update,
                    };
                    self.forward_by(backend, arguments, &mut y, statistics)
                };
                match update {
                    None => pass(None)?,
                    Some(update) => D::moving::<T::Param>(update, channels, |moved| pass(Some(moved)))?,
                }
                workspaces.put(self.purpose, workspace);
                // candle calls this once.
                let _ = self.saved.set(saved);
            }
        }
        Ok(y)
    }

    fn forward_by<'m, D: Device, T: Stored + Element<Param: Stored>>(
        &self,
        backend: &D,
        arguments: Arguments<Place<'m, D>>,
        y: &'m mut D::Buffer<T>,
        statistics: ForwardStatistics<'m, D, T>,
    ) -> Result<()> {
        let operands = self.operands(backend, arguments)?;
        let epilogue = self.forward_epilogue(backend, arguments)?;
        forward(backend, operands, epilogue, y.view_mut(), statistics).map_err(wrap)
    }

    fn operands<'m, D: Device, T: Stored + Element<Param: Stored>>(
        &self,
        backend: &D,
        arguments: Arguments<Place<'m, D>>,
    ) -> Result<Operands<'m, 'm, D, T>> {
        let channels = self.purpose.shape.channels;
        let vector = |place: Place<'m, D>, at: usize| {
            let start = start(place.1)? + at;
            let view = D::view(place.0, start..start + channels)?;
            backend.check_view("weight and bias", &view).map_err(wrap)?;
            Ok::<_, Error>(view)
        };
        Ok(Operands {
            shape: self.purpose.shape,
            eps: self.eps,
            x: self.tensor(backend, "x", arguments.x)?,
            parameters: match arguments.parameters {
                None => None,
                Some(Parameters::Apart([weight, bias])) => Some([vector(weight, 0)?, vector(bias, 0)?]),
                Some(Parameters::Joined(both)) => Some([vector(both, 0)?, vector(both, channels)?]),
            },
        })
    }

    fn forward_epilogue<'m, D: Device, T: Stored + Element>(
        &self,
        backend: &D,
        arguments: Arguments<Place<'m, D>>,
    ) -> Result<ForwardEpilogue<'m, D, T>> {
        Ok(match (arguments.residual, self.purpose.epilogue) {
            (Some(residual), _) => ForwardEpilogue::AddRelu {
                z: self.tensor(backend, "residual", residual)?,
            },
            (None, Epilogue::Relu) => ForwardEpilogue::Relu,
            (None, _) => ForwardEpilogue::Identity,
        })
    }

    /// All elements of a tensor of the call's shape, which lie one after another in the order of the call.
    fn tensor<'m, D: Device, T: Stored>(
        &self,
        backend: &D,
        argument: &'static str,
        (memory, layout): Place<'m, D>,
    ) -> Result<D::View<'m, T>> {
        let start = match self.purpose.shape.layout {
            MemoryOrder::Nhwc if !layout.is_contiguous() => {
                start(&layout.permute(&channels_last(layout.dims().len()))?)?
            }
            _ => start(layout)?,
        };
        let view = D::view(memory, start..start + layout.shape().elem_count())?;
        backend.check_view(argument, &view).map_err(wrap)?;
        Ok(view)
    }

    fn backward(&self, arguments: Arguments<&Tensor>, y: &Tensor, dy: &Tensor) -> Result<Results> {
        let results = match arguments.x.device() {
            // The gradients are made by kernels, and would be constants to a second derivative.
            _ if dy.track_op() => Err(Error::BackwardNotSupported { op: TWICE }.bt()),
            candle_core::Device::Cpu => self.backward_on::<Cpu>(arguments, y, dy),
            #[cfg(feature = "candle-cuda")]
            candle_core::Device::Cuda(_) => self.backward_on::<crate::Cuda>(arguments, y, dy),
            _ => Err(Error::BackwardNotSupported { op: NAME }.bt()),
        };
        results.map_err(|error| {
            error.context(format!(
                "backward pass of {NAME} of {} channels over x {}, gradient {}",
                self.purpose.shape.channels,
                described(arguments.x),
                described(dy)
            ))
        })
    }

    fn backward_on<D: Device>(&self, arguments: Arguments<&Tensor>, y: &Tensor, dy: &Tensor) -> Result<Results> {
        let dy = dy.contiguous()?;
        let wants = |tensor: &&Tensor| tensor.track_op();
        let wanted = Wanted {
            x: wants(&arguments.x),
            parameters: match &arguments.parameters {
                None => false,
                Some(Parameters::Apart(parameters)) => parameters.iter().any(wants),
                Some(Parameters::Joined(both)) => wants(both),
            },
            residual: arguments.residual.as_ref().is_some_and(wants),
        };
        let dims = arguments.x.shape();
        D::look(self.x.as_ref().unwrap_or(arguments.x), |x| {
            D::look(y, |y| {
                D::look(&dy, |dy| {
                    // The CPU's are copies that nobody else locks.
                    let parameters = arguments
                        .parameters
                        .as_ref()
                        .map(|parameters| parameters.try_map(|tensor| Ok(tensor.storage_and_layout())))
                        .transpose()?;
                    let parameters = parameters
                        .as_ref()
                        .map(|parameters| parameters.try_map(|(storage, layout)| Ok((memory::<D>(storage)?, *layout))))
                        .transpose()?;
                    let arguments = Arguments {
                        x,
                        parameters,
                        // Its values are not needed any more.
                        residual: None,
                    };
                    self.backward_at::<D>(dims, arguments, y, dy, wanted)
                })
            })
        })
    }

    fn backward_at<D: Device>(
        &self,
        dims: &candle_core::Shape,
        arguments: Arguments<Place<'_, D>>,
        y: Place<'_, D>,
        dy: Place<'_, D>,
        wanted: Wanted,
    ) -> Result<Results> {
        let (beside, _) = arguments.x;
        let backend = D::beside(beside, &self.shared)?;
        let in_memory = self.in_memory(dims);
        // As views of the arguments' dimensions.
        let logical = |gradient: Option<Tensor>| match (gradient, self.purpose.shape.layout) {
            (Some(gradient), MemoryOrder::Nhwc) => channels_second(&gradient).map(Some),
            (gradient, _) => Ok(gradient),
        };
        with_element!(self.purpose.dtype, T => {
            let buffers = self.backward_as::<D, T>(&backend, arguments, y, dy, wanted)?;
            let both = candle_core::Shape::from(2 * self.purpose.shape.channels);
            Ok(Results {
                x: logical(buffers.x.map(|dx| tensor_of::<D, T>(dx, beside, &in_memory)))?,
                parameters: buffers.parameters.map(|parameters| tensor_of::<D, _>(parameters, beside, &both)),
                residual: logical(buffers.residual.map(|dz| tensor_of::<D, T>(dz, beside, &in_memory)))?,
            })
        })
    }

    fn backward_as<D: Device, T: Stored + Element<Param: Stored>>(
        &self,
        backend: &D,
        arguments: Arguments<Place<'_, D>>,
        y: Place<'_, D>,
        dy: Place<'_, D>,
        wanted: Wanted,
    ) -> Result<Buffers<D, T>> {
        let shape = self.purpose.shape;
        let len = shape.len().map_err(wrap)?;
        if len == 0 {
            return Buffers::empty(backend, shape.channels, wanted).map_err(wrap);
        }
        let tensor = |wanted: bool| wanted.then(|| backend.unwritten(len)).transpose();
        let mut buffers = Buffers {
            x: tensor(wanted.x)?,
            parameters: wanted
                .parameters
                .then(|| backend.unwritten(2 * shape.channels))
                .transpose()?,
            residual: tensor(wanted.residual)?,
        };

        // The CPU's running statistics are copies that nobody else locks.
        let guards = match &self.statistics {
            Statistics::Batch { .. } => None,
            Statistics::Running { mean, variance } => Some((mean.storage_and_layout(), variance.storage_and_layout())),
        };
        let statistics = match &guards {
            Some(((mean, _), (variance, _))) => BackwardStatistics::Running {
                mean: D::view(memory::<D>(mean)?, 0..shape.channels)?,
                variance: D::view(memory::<D>(variance)?, 0..shape.channels)?,
            },
            None => BackwardStatistics::Batch(self.saved()?),
        };
        let purpose = self.purpose.here();
        let mut workspace = self
            .shared
            .workspaces
            .take(purpose, || backend.prepare::<T>(shape, purpose.epilogue))
            .map_err(wrap)?;
        let epilogue = match self.purpose.epilogue {
            Epilogue::Identity => BackwardEpilogue::Identity,
            Epilogue::Relu => BackwardEpilogue::Relu,
            Epilogue::AddRelu => BackwardEpilogue::AddRelu {
                y: self.tensor(backend, "y", y)?,
                dz: buffers.residual.as_mut().map(AsTensorMut::view_mut),
            },
        };
        let gradients = Gradients {
            x: buffers.x.as_mut().map(AsTensorMut::view_mut),
            parameters: buffers
                .parameters
                .as_mut()
                .map(|parameters| D::split_at(parameters, shape.channels)),
        };
        let operands = self.operands(backend, arguments)?;
        let dy = self.tensor(backend, "dy", dy)?;
        backward(backend, operands, epilogue, dy, gradients, statistics, &mut workspace).map_err(wrap)?;
        self.shared.workspaces.put(purpose, workspace);
        Ok(buffers)
    }

    /// What the forward pass left.
    fn saved<D: Device, T: Element>(&self) -> Result<&BatchStatistics<D, T>> {
        if thread::current().id() != self.purpose.thread {
            self.shown.store(true, Ordering::Relaxed);
        }
        self.saved
            .get()
            .and_then(|saved| (**saved).downcast_ref())
            .ok_or_else(|| wrap(crate::Error::SavedEmpty))
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let (Some(saved), false) = (self.saved.take(), self.shown.load(Ordering::Relaxed)) {
            self.shared.statistics.put(self.purpose, saved);
        }
    }
}

/// Which gradients candle needs.
#[derive(Clone, Copy)]
struct Wanted {
    x: bool,
    parameters: bool,
    residual: bool,
}

/// The gradients, before they are candle's.
struct Buffers<D: Device, T: Element> {
    x: Option<D::Buffer<T>>,
    parameters: Option<D::Buffer<T::Param>>,
    residual: Option<D::Buffer<T>>,
}

impl<D: Device, T: Element> Buffers<D, T> {
    /// Those of an empty batch.
    fn empty(backend: &D, channels: usize, wanted: Wanted) -> crate::Result<Self> {
        let tensor = |wanted: bool| wanted.then(|| backend.zeros(0)).transpose();
        Ok(Self {
            x: tensor(wanted.x)?,
            parameters: wanted.parameters.then(|| backend.zeros(2 * channels)).transpose()?,
            residual: tensor(wanted.residual)?,
        })
    }
}

/// Where a copy lies, if there is one.
fn place_of<'a, D: Device>(copy: &'a Option<(impl Deref<Target = Storage>, &Layout)>) -> Result<Option<Place<'a, D>>> {
    match copy {
        None => Ok(None),
        Some((storage, layout)) => Ok(Some((memory::<D>(storage)?, layout))),
    }
}

/// Where a contiguous tensor begins in its memory.
fn start(layout: &Layout) -> Result<usize> {
    let (start, _) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::RequiresContiguous { op: NAME }.bt())?;
    Ok(start)
}

fn tensor_of<D: Device, T: Stored>(buffer: D::Buffer<T>, beside: &D::Storage, shape: &candle_core::Shape) -> Tensor {
    let storage = D::into_candle(D::into_storage(buffer, beside));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

impl CustomOp1 for Operation {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, candle_core::Shape)> {
        self.forward::<Cpu>(Arguments::of_one((x, layout)))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, candle_core::Shape)> {
        self.forward::<crate::Cuda>(Arguments::of_one((x, layout)))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(Arguments::of_one(x), y, dy)?.x)
    }
}

impl CustomOp2 for Operation {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, candle_core::Shape)> {
        self.forward::<Cpu>(Arguments::of_two([(x, x_layout), (residual, residual_layout)]))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        residual: &CudaStorage,
        residual_layout: &Layout,
    ) -> Result<(CudaStorage, candle_core::Shape)> {
        self.forward::<crate::Cuda>(Arguments::of_two([(x, x_layout), (residual, residual_layout)]))
    }

    fn bwd(&self, x: &Tensor, residual: &Tensor, y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let results = self.backward(Arguments::of_two([x, residual]), y, dy)?;
        Ok((results.x, results.residual))
    }
}

impl CustomOp3 for Operation {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
        third: &CpuStorage,
        third_layout: &Layout,
    ) -> Result<(CpuStorage, candle_core::Shape)> {
        self.forward::<Cpu>(self.of_three([(first, first_layout), (second, second_layout), (third, third_layout)]))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        first: &CudaStorage,
        first_layout: &Layout,
        second: &CudaStorage,
        second_layout: &Layout,
        third: &CudaStorage,
        third_layout: &Layout,
    ) -> Result<(CudaStorage, candle_core::Shape)> {
        self.forward::<crate::Cuda>(self.of_three([
            (first, first_layout),
            (second, second_layout),
            (third, third_layout),
        ]))
    }

    fn bwd(
        &self,
        first: &Tensor,
        second: &Tensor,
        third: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let arguments = self.of_three([first, second, third]);
        let results = self.backward(arguments, y, dy)?;
        if arguments.residual.is_some() {
            return Ok((results.x, results.parameters, results.residual));
        }
        let channels = self.purpose.shape.channels;
        let part = |argument: &Tensor, at: usize| match &results.parameters {
            Some(parameters) if argument.track_op() => parameters.narrow(0, at, channels).map(Some),
            _ => Ok(None),
        };
        let (weight, bias) = (part(second, 0)?, part(third, channels)?);
        Ok((results.x, weight, bias))
    }
}
