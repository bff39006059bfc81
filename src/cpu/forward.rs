//! The forward pass: what the module asks for, as a [`Pass`] over tasks.

use std::ops::Range;

use super::Cpu;
use super::apply::{AddRelu, Apply, Elements, Epilogue, Identity, Relu};
use super::coefficients::{Normalisation, Statistics};
use super::geometry::{Geometry, Task};
use super::memory::{Sink, Source};
use super::schedule::{Pass, Phases, run};
use super::simd::{Fence, Simd};
use super::statistics::{FinishStatistics, Running, Saved, TaskStatistics};
use super::streams;
use super::workspace::Partials;
use crate::backend::{ForwardEpilogue, ForwardPass, ForwardStatistics, InputOutput, RunningUpdate};
use crate::config::Momentum;
use crate::element::{Element, Real};

/// Runs a forward pass with the instructions of `simd`, on one thread below `threads_from` bytes.
pub(super) fn forward<T: Element>(simd: Simd, threads_from: usize, pass: ForwardPass<'_, '_, Cpu, T>) {
    let (x, y) = match pass.tensors {
        InputOutput::Separate { x, y } => (Source::from(x), Sink::from(y)),
        InputOutput::InPlace { x } => {
            let y = Sink::from(x);
            (y.source(), y)
        }
    };
    let eps = T::Param::from_f64(pass.eps);
    let (statistics, batch) = match pass.statistics {
        ForwardStatistics::Running { mean, variance } => (Statistics::Running { mean, variance, eps }, None),
        ForwardStatistics::Saved(saved) => (Statistics::of_batch(saved), None),
        ForwardStatistics::Batch {
            saved,
            workspace,
            update,
        } => {
            let saved = Saved {
                pivot: Sink::from(saved.pivot.as_mut_slice()),
                offset: Sink::from(saved.mean_offset.as_mut_slice()),
                invstd: Sink::from(saved.invstd.as_mut_slice()),
            };
            let statistics = Statistics::Batch {
                pivot: saved.pivot.source(),
                offset: saved.offset.source(),
                invstd: saved.invstd.source(),
            };
            let batch = Batch {
                partials: workspace.partials(pass.shape.channels),
                eps: pass.eps,
                saved,
                running: update.map(count_batch),
            };
            (statistics, Some(batch))
        }
    };
    let geometry = if batch.is_some() {
        Geometry::new(pass.shape)
    } else {
        Geometry::elementwise(pass.shape)
    };
    let forward = Forward {
        simd,
        threads_from,
        geometry,
        normalisation: Normalisation {
            statistics,
            weight: pass.weight,
            bias: pass.bias,
        },
        batch,
        elements: Elements {
            x,
            y,
            epilogue: (),
            streamed: streams::<T>(&geometry),
        },
    };
    match pass.epilogue {
        ForwardEpilogue::Identity => forward.run(Identity),
        ForwardEpilogue::Relu => forward.run(Relu),
        ForwardEpilogue::AddRelu { z } => forward.run(AddRelu { z: z.into() }),
    }
}

/// Counts the batch, and says how far the running statistics move towards it.
fn count_batch<T: Element>(update: RunningUpdate<'_, Cpu, T>) -> Running<'_, T::Param> {
    Running {
        factor: count(&mut update.batches[0], update.momentum),
        mean: Sink::from(update.mean),
        variance: Sink::from(update.variance),
        skip_non_finite: update.skip_non_finite,
    }
}

/// Moves running statistics towards the mean and unbiased variance of a batch, channel by channel on the calling thread, in the
/// operations of [`Running`], for the same bits.
pub(crate) fn move_running<P: Real>(
    [means, variances]: [&mut [P]; 2],
    factor: P,
    skip_non_finite: bool,
    batch: impl Iterator<Item = [P; 2]>,
) {
    let keep = P::ONE - factor;
    for ((mean, variance), batch) in means.iter_mut().zip(variances).zip(batch) {
        if skip_non_finite && !batch.into_iter().all(P::is_finite) {
            continue;
        }
        *mean = keep * *mean + factor * batch[0];
        *variance = keep * *variance + factor * batch[1];
    }
}

/// Counts a batch; the factor of its statistics in the running ones.
pub(crate) fn count<P: Real>(batches: &mut i64, momentum: Momentum) -> P {
    *batches += 1;
    match momentum {
        Momentum::Factor(momentum) => P::from_f64(momentum),
        Momentum::CumulativeAverage => P::ONE / P::from_f64(*batches as f64),
    }
}

/// A forward pass in the backend's terms.
struct Forward<'a, T: Element, E> {
    simd: Simd,
    threads_from: usize,
    geometry: Geometry,
    normalisation: Normalisation<'a, T::Param>,
    batch: Option<Batch<'a, T::Param>>,
    elements: Elements<'a, T, E>,
}

/// What a pass by the statistics of its batch has beside the elements.
#[derive(Clone, Copy)]
struct Batch<'a, P> {
    partials: Partials<'a, f64>,
    eps: f64,
    saved: Saved<'a, P>,
    running: Option<Running<'a, P>>,
}

impl<T: Element> Forward<'_, T, ()> {
    fn run<E: Epilogue<T>>(self, epilogue: E) {
        let Elements { x, y, streamed, .. } = self.elements;
        let phases = if self.batch.is_some() {
            Phases::ReduceThenApply
        } else {
            Phases::Apply
        };
        let forward = Forward {
            simd: self.simd,
            threads_from: self.threads_from,
            geometry: self.geometry,
            normalisation: self.normalisation,
            batch: self.batch,
            elements: Elements {
                x,
                y,
                epilogue,
                streamed,
            },
        };
        run(&self.geometry, phases, self.threads_from, &forward);
    }
}

impl<T: Element, E: Epilogue<T>> Pass for Forward<'_, T, E> {
    fn bytes_per_channel(&self) -> usize {
        self.geometry.values() * size_of::<T>()
    }

    fn reduce(&self, task: &Task) {
        if let Some(batch) = self.batch {
            self.simd.run(TaskStatistics {
                geometry: &self.geometry,
                task,
                x: self.elements.x,
                partials: batch.partials,
            });
        }
    }

    fn finish(&self, channels: Range<usize>) {
        if let Some(batch) = self.batch {
            self.simd.run(FinishStatistics {
                geometry: &self.geometry,
                channels,
                x: self.elements.x,
                partials: batch.partials,
                eps: batch.eps,
                saved: batch.saved,
                running: batch.running,
            });
        }
    }

    fn apply(&self, task: &Task) {
        self.simd.run(Apply {
            geometry: &self.geometry,
            task,
            normalisation: self.normalisation,
            elements: self.elements,
        });
    }

    fn publish(&self) {
        self.simd.run(Fence);
    }
}
