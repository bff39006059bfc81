//! One pass forward and its pass backward, over memory that is not this crate's: the part that knows nothing of candle.

use crate::backend::{
    Backend, BackwardEpilogue, BackwardPass, BackwardStatistics, BatchStatistics, ForwardEpilogue, ForwardPass,
    ForwardStatistics, GradientFlow, InputOutput, ParameterGradients,
};
use crate::element::Element;
use crate::error::Result;
use crate::shape::Shape;

/// What both passes have in common. `'t` is how long the tensors are borrowed, `'m` the vectors per channel.
pub(crate) struct Operands<'t, 'm, B: Backend, T: Element> {
    /// The shape of every tensor.
    pub(crate) shape: Shape,
    /// Added to the variance.
    pub(crate) eps: f64,
    /// What is normalised.
    pub(crate) x: B::View<'t, T>,
    /// Weight and bias, if there are any.
    pub(crate) parameters: Option<[B::View<'m, T::Param>; 2]>,
}

/// What the backward pass is to compute, and where it goes.
pub(crate) struct Gradients<'t, B: Backend, T: Element> {
    /// At x.
    pub(crate) x: Option<B::ViewMut<'t, T>>,
    /// At weight and bias.
    pub(crate) parameters: Option<[B::ViewMut<'t, T::Param>; 2]>,
}

/// Memory for the statistics of one batch, from the forward pass for the backward pass.
pub(crate) fn batch_statistics<B: Backend, T: Element>(backend: &B, channels: usize) -> Result<BatchStatistics<B, T>> {
    let zeros = || backend.zeros(channels);
    Ok(BatchStatistics {
        pivot: zeros()?,
        mean_offset: zeros()?,
        invstd: zeros()?,
    })
}

/// Normalises.
pub(crate) fn forward<'t, 'm, B: Backend, T: Element>(
    backend: &B,
    operands: Operands<'t, 'm, B, T>,
    epilogue: ForwardEpilogue<'t, B, T>,
    y: B::ViewMut<'t, T>,
    statistics: ForwardStatistics<'m, B, T>,
) -> Result<()> {
    let [weight, bias] = apart(operands.parameters);
    backend.forward(ForwardPass {
        shape: operands.shape,
        eps: operands.eps,
        tensors: InputOutput::Separate { x: operands.x, y },
        epilogue,
        weight,
        bias,
        statistics,
    })
}

/// The gradients of [`forward`].
pub(crate) fn backward<'t, 'm, B: Backend, T: Element>(
    backend: &B,
    operands: Operands<'t, 'm, B, T>,
    epilogue: BackwardEpilogue<'t, B, T>,
    dy: B::View<'t, T>,
    gradients: Gradients<'t, B, T>,
    statistics: BackwardStatistics<'m, B, T>,
    workspace: &'m mut B::Workspace<T>,
) -> Result<()> {
    let [weight, bias] = apart(operands.parameters);
    backend.backward(BackwardPass {
        shape: operands.shape,
        eps: operands.eps,
        x: operands.x,
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
        statistics,
        workspace,
    })
}

fn apart<V>(parameters: Option<[V; 2]>) -> [Option<V>; 2] {
    parameters.map_or([None, None], |parameters| parameters.map(Some))
}

/// What a step costs a device, counted by the stand-in driver. candle's own kernels run on no stand-in, so the memory here
/// is plain. Beside these launches a step in candle has candle's, over vectors and, to add gradients up, over tensors: see
/// "What it costs" in the module's documentation.
#[cfg(all(test, target_os = "linux"))]
mod tests {
    use cudarc::driver::{CudaContext, CudaSlice};

    use super::*;
    use crate::backend::{AsTensor as _, AsTensorMut as _, RunningUpdate};
    use crate::config::Momentum;
    use crate::cuda::DiskCache;
    use crate::cuda::plan::{Choice, Operation, Problem};
    use crate::element::Dtype;
    use crate::epilogue::Epilogue;
    use crate::{Cuda, Result};

    /// Runs a pass of launches and no other calls, which are those of the plan, two at most, and move its bytes. Gives the
    /// tensors that it reads and writes.
    fn counted(cuda: &Cuda, problem: &Problem, pass: impl FnOnce() -> Result<()>) -> Result<f64> {
        let stream = cuda.stream().cu_stream();
        let _ = emulator::launches(stream);
        let before = emulator::thread_calls();
        pass()?;
        let after = emulator::thread_calls();
        let launches = emulator::launches(stream);
        let plan = cuda.plan(problem)?;
        assert!(plan.kernels.len() <= 2, "{plan}");
        assert_eq!(launches.len(), plan.kernels.len(), "{plan}");
        let expected = emulator::Calls {
            launches: before.launches + launches.len() as u64,
            ..before
        };
        assert_eq!(after, expected);
        let bytes: u64 = launches
            .iter()
            .map(|launch| launch.bytes_loaded + launch.bytes_stored)
            .sum();
        assert_eq!(bytes, plan.traffic().bytes(), "{plan}");
        Ok(plan.traffic().tensors as f64 / (problem.shape.len()? * size_of::<f32>()) as f64)
    }

    fn operands<'a>(shape: Shape, [x, weight, bias]: [&'a CudaSlice<f32>; 3]) -> Operands<'a, 'a, Cuda, f32> {
        Operands {
            shape,
            eps: 1e-5,
            x: x.view(),
            parameters: Some([weight.view(), bias.view()]),
        }
    }

    #[test]
    fn a_step_is_launches_and_nothing_else() -> Result<()> {
        let shape = Shape::nchw(16, 8, 32, 32);
        let (len, channels) = (shape.len()?, shape.channels);
        emulator::install();
        let context = CudaContext::new(emulator::ordinal("h200")).expect("the stand-in's device");
        // With one stream in the context, cudarc has no events to record.
        let chosen = Cuda::with_cache(context.default_stream(), DiskCache::Off)?;
        let general = chosen.clone().with_choice(Choice::GENERAL);
        for (cuda, epilogue) in [chosen, general]
            .iter()
            .flat_map(|cuda| Epilogue::ALL.map(|epilogue| (cuda, epilogue)))
        {
            let problem = |operation| Problem::new(operation, shape, Dtype::F32).epilogue(epilogue);
            let tensor = || cuda.upload(&(0..len).map(|i| (i % 97) as f32 - 40.0).collect::<Vec<_>>());
            let vector = || cuda.upload(&vec![1.0f32; channels]);
            let (x, residual, dy) = (tensor()?, tensor()?, tensor()?);
            let (weight, bias) = (vector()?, vector()?);
            let (mut mean, mut variance, mut batches) = (vector()?, vector()?, cuda.zeros::<i64>(1)?);
            let (mut y, mut dx, mut dz) = (tensor()?, tensor()?, tensor()?);
            let (mut dweight, mut dbias) = (vector()?, vector()?);
            let mut saved = batch_statistics::<Cuda, f32>(cuda, channels)?;
            let mut workspace = cuda.prepare::<f32>(shape, epilogue)?;
            let forward_tensors = counted(cuda, &problem(Operation::Train), || {
                let epilogue = match epilogue {
                    Epilogue::Identity => ForwardEpilogue::Identity,
                    Epilogue::Relu => ForwardEpilogue::Relu,
                    Epilogue::AddRelu => ForwardEpilogue::AddRelu { z: residual.view() },
                };
                let update = RunningUpdate {
                    mean: mean.view_mut(),
                    variance: variance.view_mut(),
                    batches: batches.view_mut(),
                    momentum: Momentum::Factor(0.1),
                    skip_non_finite: false,
                };
                let statistics = ForwardStatistics::Batch {
                    saved: &mut saved,
                    workspace: &mut workspace,
                    update: Some(update),
                };
                let operands = operands(shape, [&x, &weight, &bias]);
                forward(cuda, operands, epilogue, y.view_mut(), statistics)
            })?;
            let backward_tensors = counted(cuda, &problem(Operation::Backward), || {
                let epilogue = match epilogue {
                    Epilogue::Identity => BackwardEpilogue::Identity,
                    Epilogue::Relu => BackwardEpilogue::Relu,
                    Epilogue::AddRelu => BackwardEpilogue::AddRelu {
                        y: y.view(),
                        dz: Some(dz.view_mut()),
                    },
                };
                let gradients = Gradients {
                    x: Some(dx.view_mut()),
                    parameters: Some([dweight.view_mut(), dbias.view_mut()]),
                };
                backward(
                    cuda,
                    operands(shape, [&x, &weight, &bias]),
                    epilogue,
                    dy.view(),
                    gradients,
                    BackwardStatistics::Batch(&saved),
                    &mut workspace,
                )
            })?;
            // The general path is two kernels that each read their inputs. What is chosen for this shape is one resident
            // kernel, which reads them once.
            let expected = match (*cuda.choice() == Choice::GENERAL, epilogue) {
                (true, Epilogue::Identity | Epilogue::Relu) => [3.0, 5.0],
                (true, Epilogue::AddRelu) => [4.0, 8.0],
                (false, Epilogue::Identity | Epilogue::Relu) => [2.0, 3.0],
                (false, Epilogue::AddRelu) => [3.0, 5.0],
            };
            assert_eq!([forward_tensors, backward_tensors], expected, "{epilogue}");
            assert_eq!(cuda.read(&batches)?, [1]);
        }
        Ok(())
    }
}
