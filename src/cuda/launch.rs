//! Carries a plan out on a stream: takes the operands' addresses, fills in the kernels' arguments, launches.

use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUstreamCaptureStatus};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, SyncOnDrop,
};

use super::Cuda;
use super::arguments::{self, Normalisation, Partials};
use super::device::Prepared;
use super::driver_error::driver_error;
use super::kernel::Kernel;
use super::plan::{Alignment, KernelLaunch, Operation, Problem, Stage, Tracking};
use super::workspace::Workspace;
use crate::backend::{
    BackwardEpilogue, BackwardPass, BackwardStatistics, BatchStatistics, ForwardEpilogue, ForwardPass,
    ForwardStatistics, GradientFlow, InputOutput, ParameterGradients, RunningUpdate,
};
use crate::config::Momentum;
use crate::element::{Element, Plain};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};

/// An operand of a pass: its address, and the guard that tells `cudarc` when the launches that use it are on the stream.
/// None is an operand that is not there.
pub(super) struct Operand<'a> {
    pub(super) address: CUdeviceptr,
    _until_launched: Option<SyncOnDrop<'a>>,
}

impl<'a> Operand<'a> {
    pub(super) const ABSENT: Operand<'static> = Operand {
        address: 0,
        _until_launched: None,
    };

    pub(super) fn read<T: Plain>(view: &'a CudaView<'_, T>, stream: &'a CudaStream) -> Self {
        Self::of(view.device_ptr(stream))
    }

    pub(super) fn read_if<T: Plain>(view: Option<&'a CudaView<'_, T>>, stream: &'a CudaStream) -> Self {
        view.map_or(Operand::ABSENT, |view| Operand::read(view, stream))
    }

    pub(super) fn written<T: Plain>(view: &'a mut CudaViewMut<'_, T>, stream: &'a CudaStream) -> Self {
        Self::of(view.device_ptr_mut(stream))
    }

    pub(super) fn buffer<T: Plain>(buffer: &'a CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::of(buffer.device_ptr(stream))
    }

    pub(super) fn buffer_mut<T: DeviceRepr>(buffer: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::of(buffer.device_ptr_mut(stream))
    }

    /// Its address, if it is there: no buffer lies at 0.
    pub(super) fn present(&self) -> Option<CUdeviceptr> {
        (self.address != 0).then_some(self.address)
    }

    fn of((address, guard): (CUdeviceptr, SyncOnDrop<'a>)) -> Self {
        Operand {
            address,
            _until_launched: Some(guard),
        }
    }
}

/// A workspace's buffers as operands.
pub(super) struct WorkspaceOperands<'a> {
    partial_weight: Operand<'a>,
    partial_first: Operand<'a>,
    partial_second: Operand<'a>,
    arrived: Operand<'a>,
    ready: Operand<'a>,
    finished: Operand<'a>,
    pub(super) first: Operand<'a>,
    pub(super) second: Operand<'a>,
    pub(super) momentum: Operand<'a>,
}

impl<'a> WorkspaceOperands<'a> {
    pub(super) fn new<T: Element>(workspace: &'a mut Workspace<T>, stream: &'a CudaStream) -> Self {
        Self {
            partial_weight: Operand::buffer_mut(&mut workspace.partial_weight, stream),
            partial_first: Operand::buffer_mut(&mut workspace.partial_first, stream),
            partial_second: Operand::buffer_mut(&mut workspace.partial_second, stream),
            arrived: Operand::buffer_mut(&mut workspace.arrived, stream),
            ready: Operand::buffer_mut(&mut workspace.ready, stream),
            finished: Operand::buffer_mut(&mut workspace.finished, stream),
            first: Operand::buffer_mut(&mut workspace.first, stream),
            second: Operand::buffer_mut(&mut workspace.second, stream),
            momentum: Operand::buffer_mut(&mut workspace.momentum, stream),
        }
    }

    pub(super) fn partials(&self) -> Partials {
        Partials {
            weight: self.partial_weight.address,
            first: self.partial_first.address,
            second: self.partial_second.address,
            arrived: self.arrived.address,
            ready: self.ready.address,
        }
    }
}

/// Which part of a backward pass is launched. The parts of a synchronised one keep their sums at the addresses given: in this
/// rank's message.
#[derive(Clone, Copy, Debug)]
pub(super) enum BackwardPart {
    /// All of it.
    Whole,
    /// The sums: a synchronised pass before the ranks meet.
    Sums { sum: CUdeviceptr, sum_centred: CUdeviceptr },
    /// The gradients at x and at the residual, by the means that the workspace has, and those at weight and bias, by this
    /// rank's own sums: a synchronised pass after they have met.
    Elements { sum: CUdeviceptr, sum_centred: CUdeviceptr },
}

impl BackwardPart {
    fn stage(self) -> Stage {
        match self {
            BackwardPart::Whole => Stage::Whole,
            BackwardPart::Sums { .. } => Stage::Rank,
            BackwardPart::Elements { .. } => Stage::Apply,
        }
    }
}

/// The operands that every forward pass has.
struct ForwardOperands<'a> {
    /// In place: absent, and y is both.
    x: Operand<'a>,
    z: Operand<'a>,
    y: Operand<'a>,
    weight: Operand<'a>,
    bias: Operand<'a>,
    eps: f64,
    /// Of an evaluation; training differs by what it does with the running statistics.
    problem: Problem,
}

impl ForwardOperands<'_> {
    fn x(&self) -> CUdeviceptr {
        self.x.present().unwrap_or(self.y.address)
    }

    fn normalisation(&self, pivot: CUdeviceptr, mean_offset: CUdeviceptr, invstd: CUdeviceptr) -> Normalisation {
        Normalisation {
            pivot,
            mean_offset,
            invstd,
            weight: self.weight.address,
            bias: self.bias.address,
            eps: self.eps,
        }
    }

    fn apply(&self, normalisation: Normalisation, launch: &KernelLaunch) -> arguments::Apply {
        arguments::Apply {
            x: self.x(),
            z: self.z.address,
            y: self.y.address,
            normalisation,
            update: arguments::RunningUpdate::default(),
            batch_variance: 0,
            cumulative: 0,
            tiling: launch.tiling,
        }
    }
}

impl Cuda {
    /// Launches a forward pass.
    pub(super) fn launch_forward<T: Element>(&self, pass: ForwardPass<'_, '_, Self, T>) -> Result<()> {
        let ForwardPass {
            shape,
            eps,
            mut tensors,
            epilogue,
            weight,
            bias,
            statistics,
        } = pass;
        self.check_capture()?;
        let stream = &*self.stream;
        let (epilogue, z) = match &epilogue {
            ForwardEpilogue::Identity => (Epilogue::Identity, Operand::ABSENT),
            ForwardEpilogue::Relu => (Epilogue::Relu, Operand::ABSENT),
            ForwardEpilogue::AddRelu { z } => (Epilogue::AddRelu, Operand::read(z, stream)),
        };
        let (x, y) = match &mut tensors {
            InputOutput::Separate { x, y } => (Operand::read(x, stream), Operand::written(y, stream)),
            InputOutput::InPlace { x } => (Operand::ABSENT, Operand::written(x, stream)),
        };
        let problem = Problem {
            affine: weight.is_some(),
            alignment: alignment([x.present(), z.present(), y.present()]),
            ..Problem::new(Operation::Eval, shape, T::DTYPE).epilogue(epilogue)
        };
        let operands = ForwardOperands {
            x,
            z,
            y,
            weight: Operand::read_if(weight.as_ref(), stream),
            bias: Operand::read_if(bias.as_ref(), stream),
            eps,
            problem,
        };
        match statistics {
            ForwardStatistics::Running { mean, variance } => {
                let (mean, variance) = (Operand::read(&mean, stream), Operand::read(&variance, stream));
                let normalisation = operands.normalisation(mean.address, 0, variance.address);
                let prepared = self.device.prepare(&problem, &self.choice)?;
                self.run(&prepared, |stream, function, launch| {
                    launch_kernel(stream, function, launch, &operands.apply(normalisation, launch))
                })
            }
            ForwardStatistics::Saved(saved) => {
                let pivot = Operand::buffer(&saved.pivot, stream);
                let mean_offset = Operand::buffer(&saved.mean_offset, stream);
                let invstd = Operand::buffer(&saved.invstd, stream);
                let normalisation = operands.normalisation(pivot.address, mean_offset.address, invstd.address);
                let problem = Problem {
                    operation: Operation::Train,
                    stage: Stage::Apply,
                    ..problem
                };
                let prepared = self.device.prepare(&problem, &self.choice)?;
                self.run(&prepared, |stream, function, launch| {
                    launch_kernel(stream, function, launch, &operands.apply(normalisation, launch))
                })
            }
            ForwardStatistics::Batch {
                saved,
                workspace,
                update,
            } => self.launch_forward_by_batch(&operands, saved, workspace, update),
        }
    }

    /// Launches a forward pass by the statistics of its batch, which moves the running statistics in training.
    fn launch_forward_by_batch<T: Element>(
        &self,
        operands: &ForwardOperands<'_>,
        saved: &mut BatchStatistics<Cuda, T>,
        workspace: &mut Workspace<T>,
        mut update: Option<RunningUpdate<'_, Cuda, T>>,
    ) -> Result<()> {
        let stream = &*self.stream;
        let pivot = Operand::buffer_mut(&mut saved.pivot, stream);
        let mean_offset = Operand::buffer_mut(&mut saved.mean_offset, stream);
        let invstd = Operand::buffer_mut(&mut saved.invstd, stream);
        let workspace = WorkspaceOperands::new(workspace, stream);
        let (tracking, momentum) = match update.as_ref().map(|update| update.momentum) {
            None => (Tracking::None, 0.0),
            Some(Momentum::Factor(momentum)) => (Tracking::Momentum, momentum),
            Some(Momentum::CumulativeAverage) => (Tracking::CumulativeAverage, 0.0),
        };
        let cumulative = tracking == Tracking::CumulativeAverage;
        let skip_non_finite = update.as_ref().is_some_and(|update| update.skip_non_finite);
        let (running_mean, running_variance, batches) = match &mut update {
            Some(update) => (
                Operand::written(&mut update.mean, stream),
                Operand::written(&mut update.variance, stream),
                Operand::written(&mut update.batches, stream),
            ),
            None => (Operand::ABSENT, Operand::ABSENT, Operand::ABSENT),
        };
        let normalisation = operands.normalisation(pivot.address, mean_offset.address, invstd.address);
        let update = arguments::RunningUpdate {
            mean: running_mean.address,
            variance: running_variance.address,
            batches: batches.address,
            momentum,
            skip_non_finite: u64::from(skip_non_finite),
            values: operands.problem.shape.values_per_channel()? as u64,
        };
        let problem = Problem {
            operation: Operation::Train,
            tracking,
            ..operands.problem
        };
        let prepared = self.device.prepare(&problem, &self.choice)?;
        self.run(&prepared, |stream, function, launch| {
            match launch.instantiation.kernel {
                Kernel::Statistics => {
                    let arguments = arguments::Statistics {
                        x: operands.x(),
                        pivot: pivot.address,
                        mean_offset: mean_offset.address,
                        invstd: invstd.address,
                        variance: workspace.first.address,
                        partials: workspace.partials(),
                        batches: if cumulative { batches.address } else { 0 },
                        momentum: workspace.momentum.address,
                        eps: operands.eps,
                        tiling: launch.tiling,
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
                Kernel::ResidentForward => {
                    let arguments = arguments::ResidentForward {
                        x: operands.x(),
                        z: operands.z.address,
                        y: operands.y.address,
                        pivot: pivot.address,
                        mean_offset: mean_offset.address,
                        invstd: invstd.address,
                        weight: operands.weight.address,
                        bias: operands.bias.address,
                        update,
                        cumulative: u64::from(cumulative),
                        finished: workspace.finished.address,
                        partials: workspace.partials(),
                        eps: operands.eps,
                        tiling: launch.tiling,
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
                _ => {
                    let arguments = arguments::Apply {
                        update,
                        batch_variance: workspace.first.address,
                        cumulative: if cumulative { workspace.momentum.address } else { 0 },
                        ..operands.apply(normalisation, launch)
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
            }
        })
    }

    /// Launches a backward pass, or a part of one.
    pub(super) fn launch_backward<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        part: BackwardPart,
    ) -> Result<()> {
        let BackwardPass {
            shape,
            eps,
            x,
            flow,
            epilogue,
            weight,
            bias,
            parameters,
            statistics,
            workspace,
        } = pass;
        let (shape, eps) = (*shape, *eps);
        self.check_capture()?;
        let stream = &*self.stream;
        let x = Operand::read(x, stream);
        let (dy, dx) = match flow {
            GradientFlow::Stops { dy } => (Operand::read(dy, stream), Operand::ABSENT),
            GradientFlow::Separate { dy, dx } => (Operand::read(dy, stream), Operand::written(dx, stream)),
            GradientFlow::InPlace { dy } => (Operand::ABSENT, Operand::written(dy, stream)),
        };
        // In place, one operand is both.
        let dy_address = dy.present().unwrap_or(dx.address);
        let (epilogue, y, dz) = match epilogue {
            BackwardEpilogue::Identity => (Epilogue::Identity, Operand::ABSENT, Operand::ABSENT),
            BackwardEpilogue::Relu => (Epilogue::Relu, Operand::ABSENT, Operand::ABSENT),
            BackwardEpilogue::AddRelu { y, dz } => {
                let dz = dz.as_mut().map_or(Operand::ABSENT, |dz| Operand::written(dz, stream));
                (Epilogue::AddRelu, Operand::read(y, stream), dz)
            }
        };
        let weight = Operand::read_if(weight.as_ref(), stream);
        let bias = Operand::read_if(bias.as_ref(), stream);
        let accumulate = parameters.as_ref().is_some_and(|parameters| parameters.accumulate);
        let (weight_gradient, bias_gradient) = match parameters {
            Some(ParameterGradients { weight, bias, .. }) => {
                (Operand::written(weight, stream), Operand::written(bias, stream))
            }
            None => (Operand::ABSENT, Operand::ABSENT),
        };
        let (operation, pivot, mean_offset, invstd) = match statistics {
            BackwardStatistics::Running { mean, variance } => (
                Operation::BackwardEval,
                Operand::read(mean, stream),
                Operand::ABSENT,
                Operand::read(variance, stream),
            ),
            BackwardStatistics::Batch(saved) => (
                Operation::Backward,
                Operand::buffer(&saved.pivot, stream),
                Operand::buffer(&saved.mean_offset, stream),
                Operand::buffer(&saved.invstd, stream),
            ),
        };
        let workspace = WorkspaceOperands::new(workspace, stream);
        let tensors = [x.present(), dy.present(), y.present(), dx.present(), dz.present()];
        let problem = Problem {
            affine: weight.present().is_some(),
            alignment: alignment(tensors),
            input_gradient: dx.present().is_some(),
            residual_gradient: dz.present().is_some(),
            parameter_gradients: weight_gradient.present().is_some(),
            accumulate,
            ..Problem::new(operation, shape, T::DTYPE).epilogue(epilogue)
        };
        let normalisation = Normalisation {
            pivot: pivot.address,
            mean_offset: mean_offset.address,
            invstd: invstd.address,
            weight: weight.address,
            bias: bias.address,
            eps,
        };
        let tensors = arguments::BackwardTensors {
            x: x.address,
            y: y.address,
            dy: dy_address,
            dx: dx.address,
            dz: dz.address,
        };
        let stage = part.stage();
        let (sum, sum_centred) = match part {
            BackwardPart::Whole => (workspace.first.address, workspace.second.address),
            BackwardPart::Sums { sum, sum_centred } | BackwardPart::Elements { sum, sum_centred } => (sum, sum_centred),
        };
        let (mean, mean_centred) = match part {
            BackwardPart::Elements { .. } => (workspace.first.address, workspace.second.address),
            BackwardPart::Whole | BackwardPart::Sums { .. } => (0, 0),
        };
        let values = shape.values_per_channel()? as u64;
        let parameter_gradients = arguments::ParameterGradients {
            weight: weight_gradient.address,
            bias: bias_gradient.address,
            accumulate: u64::from(accumulate),
        };
        let prepared = self.device.prepare(&Problem { stage, ..problem }, &self.choice)?;
        self.run(&prepared, |stream, function, launch| {
            let gradients = if launch.writes_parameter_gradients {
                parameter_gradients
            } else {
                arguments::ParameterGradients::default()
            };
            match launch.instantiation.kernel {
                Kernel::BackwardReduce => {
                    let arguments = arguments::BackwardReduce {
                        tensors,
                        normalisation,
                        partials: workspace.partials(),
                        sum,
                        sum_centred,
                        gradients,
                        tiling: launch.tiling,
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
                Kernel::ResidentBackward => {
                    let arguments = arguments::ResidentBackward {
                        tensors,
                        normalisation,
                        partials: workspace.partials(),
                        gradients,
                        values,
                        tiling: launch.tiling,
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
                _ => {
                    let arguments = arguments::BackwardApply {
                        tensors,
                        normalisation,
                        sum,
                        sum_centred,
                        mean,
                        mean_centred,
                        values,
                        gradients,
                        tiling: launch.tiling,
                    };
                    launch_kernel(stream, function, launch, &arguments)
                }
            }
        })
    }

    /// Launches the kernels of a plan in their order.
    pub(super) fn run(
        &self,
        prepared: &Prepared,
        mut launch: impl FnMut(&Arc<CudaStream>, &CudaFunction, &KernelLaunch) -> Result<()>,
    ) -> Result<()> {
        prepared
            .plan
            .kernels
            .iter()
            .zip(&prepared.functions)
            .try_for_each(|(kernel, function)| launch(&self.stream, function, kernel))
    }

    /// A graph cannot hold the events by which `cudarc` orders the streams of a context.
    pub(super) fn check_capture(&self) -> Result<()> {
        if !self.stream.context().is_managing_stream_synchronization() {
            return Ok(());
        }
        let status = self
            .stream
            .capture_status()
            .map_err(|error| driver_error("asking for the stream's capture status", error))?;
        match status {
            CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => Err(Error::CaptureWithEventTracking),
        }
    }
}

impl KernelLaunch {
    /// The same in `cudarc`'s terms.
    pub(super) fn config(&self) -> LaunchConfig {
        // A resident kernel finds its team in y and its place in the team in x; a cluster lies along x.
        let teams = match self.instantiation.resident {
            Some(_) => self.grid / self.tiling.splits as u32,
            None => 1,
        };
        LaunchConfig {
            grid_dim: (self.grid / teams, teams, 1),
            block_dim: (self.block(), 1, 1),
            shared_mem_bytes: self.shared_bytes,
        }
    }
}

pub(super) fn alignment<const N: usize>(addresses: [Option<CUdeviceptr>; N]) -> Alignment {
    Alignment::of(addresses.into_iter().flatten())
}

pub(super) fn launch_kernel<A: DeviceRepr>(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    launch: &KernelLaunch,
    arguments: &A,
) -> Result<()> {
    let config = launch.config();
    // SAFETY: the function is the kernel of the plan, which takes one structure of this type by value. The addresses in it
    // are of buffers of this context that hold as many elements as the plan's shape has (the module has checked them, the
    // workspace was made for the shape), whose guards live until all launches of the pass are on the stream, and of which
    // the written ones are borrowed exclusively.
    unsafe {
        let mut builder = stream.launch_builder(function);
        builder.arg(arguments);
        if launch.is_cooperative() {
            builder.launch_cooperative(config)
        } else {
            builder.launch(config)
        }
    }
    .map(|_events| ())
    .map_err(|error| driver_error(launch.instantiation.kernel.name(), error))
}
