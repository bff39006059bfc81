//! One pass forward and its pass backward, over memory that is not this crate's: the part that knows nothing of candle.

use crate::backend::{
    Backend, BackwardEpilogue, BackwardPass, BackwardStatistics, BatchStatistics, ForwardEpilogue, ForwardPass,
    ForwardStatistics, GradientFlow, InputOutput, ParameterGradients, RunningUpdate,
};
use crate::element::Element;
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::shape::Shape;

/// The statistics of one batch, from the forward pass for the backward pass, and the scratch memory of both.
#[derive(Debug)]
pub(super) struct Step<B: Backend, T: Element> {
    statistics: BatchStatistics<B, T>,
    workspace: B::Workspace<T>,
}

/// What both passes have in common. `'t` is how long the tensors are borrowed, `'m` the vectors per channel.
pub(super) struct Operands<'t, 'm, B: Backend, T: Element> {
    /// The shape of every tensor.
    pub(super) shape: Shape,
    /// Added to the variance.
    pub(super) eps: f64,
    /// What is normalised.
    pub(super) x: B::View<'t, T>,
    /// Weight and bias, if there are any.
    pub(super) parameters: Option<[B::View<'m, T::Param>; 2]>,
}

/// Running statistics, as evaluation takes them.
pub(super) struct Running<'m, B: Backend, T: Element> {
    /// Mean per channel.
    pub(super) mean: B::View<'m, T::Param>,
    /// Variance per channel.
    pub(super) variance: B::View<'m, T::Param>,
}

/// What the backward pass is to compute, and where it goes.
pub(super) struct Gradients<'t, B: Backend, T: Element> {
    /// At x.
    pub(super) x: Option<B::ViewMut<'t, T>>,
    /// At weight and bias.
    pub(super) parameters: Option<[B::ViewMut<'t, T::Param>; 2]>,
}

impl<B: Backend, T: Element> Step<B, T> {
    /// Allocates, and compiles what is not compiled yet.
    pub(super) fn new(backend: &B, shape: Shape, epilogue: Epilogue) -> Result<Self> {
        let zeros = || backend.zeros(shape.channels);
        Ok(Self {
            statistics: BatchStatistics {
                pivot: zeros()?,
                mean_offset: zeros()?,
                invstd: zeros()?,
            },
            workspace: backend.prepare::<T>(shape, epilogue)?,
        })
    }

    /// Normalises by the statistics of the batch, keeps them, and moves the running ones towards them.
    pub(super) fn forward<'t, 'm>(
        &'m mut self,
        backend: &B,
        operands: Operands<'t, 'm, B, T>,
        epilogue: ForwardEpilogue<'t, B, T>,
        y: B::ViewMut<'t, T>,
        update: Option<RunningUpdate<'m, B, T>>,
    ) -> Result<()> {
        let statistics = ForwardStatistics::Batch {
            saved: &mut self.statistics,
            workspace: &mut self.workspace,
            update,
        };
        backend.forward(operands.forward(epilogue, y, statistics))
    }

    /// The gradients of [`Step::forward`] or, where `running` is given, of [`evaluate`], which needs the scratch memory
    /// alone.
    pub(super) fn backward<'t, 'm>(
        &'m mut self,
        backend: &B,
        operands: Operands<'t, 'm, B, T>,
        epilogue: BackwardEpilogue<'t, B, T>,
        running: Option<Running<'m, B, T>>,
        dy: B::View<'t, T>,
        gradients: Gradients<'t, B, T>,
    ) -> Result<()> {
        let Operands {
            shape,
            eps,
            x,
            parameters,
        } = operands;
        let [weight, bias] = apart(parameters);
        backend.backward(BackwardPass {
            shape,
            eps,
            x,
            flow: match gradients.x {
                Some(dx) => GradientFlow::Separate { dy, dx },
                None => GradientFlow::Stops { dy },
            },
            epilogue,
            weight,
            bias,
            parameters: gradients.parameters.map(|[weight, bias]| ParameterGradients {
                weight,
                bias,
                accumulate: false,
            }),
            statistics: match running {
                Some(Running { mean, variance }) => BackwardStatistics::Running { mean, variance },
                None => BackwardStatistics::Batch(&self.statistics),
            },
            workspace: &mut self.workspace,
        })
    }
}

/// Normalises by the running statistics.
pub(super) fn evaluate<'t, 'm, B: Backend, T: Element>(
    backend: &B,
    operands: Operands<'t, 'm, B, T>,
    epilogue: ForwardEpilogue<'t, B, T>,
    y: B::ViewMut<'t, T>,
    running: Running<'m, B, T>,
) -> Result<()> {
    let Running { mean, variance } = running;
    backend.forward(operands.forward(epilogue, y, ForwardStatistics::Running { mean, variance }))
}

impl<'t, 'm, B: Backend, T: Element> Operands<'t, 'm, B, T> {
    fn forward(
        self,
        epilogue: ForwardEpilogue<'t, B, T>,
        y: B::ViewMut<'t, T>,
        statistics: ForwardStatistics<'m, B, T>,
    ) -> ForwardPass<'t, 'm, B, T> {
        let Operands {
            shape,
            eps,
            x,
            parameters,
        } = self;
        let [weight, bias] = apart(parameters);
        ForwardPass {
            shape,
            eps,
            tensors: InputOutput::Separate { x, y },
            epilogue,
            weight,
            bias,
            statistics,
        }
    }
}

fn apart<V>(parameters: Option<[V; 2]>) -> [Option<V>; 2] {
    parameters.map_or([None, None], |parameters| parameters.map(Some))
}
