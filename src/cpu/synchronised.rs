//! The halves of a synchronised pass: what a rank finds in its own batch, and what follows when the ranks have met.

use std::ops::Range;

use super::Cpu;
use super::coefficients::batch_invstd;
use super::forward::{count, move_running};
use super::geometry::{Geometry, Task};
use super::gradients::Part;
use super::memory::{Sink, Source};
use super::schedule::{Pass, Phases, run};
use super::simd::Simd;
use super::statistics::{FinishRank, TaskStatistics};
use super::workspace::{Partials, Workspace};
use crate::backend::{Backend, BackwardPass, BatchStatistics, RunningUpdate};
use crate::element::{Element, Real};
use crate::epilogue::Epilogue;
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::sync::{Exchange, Kind, Layout, MergeStatistics, ONE_VALUE, RANKS_DISAGREE, SOUND, SyncBackend};
use crate::welford::Welford;

impl SyncBackend for Cpu {
    fn prepare_synchronised<T: Element>(
        &self,
        shape: Shape,
        epilogue: Epilogue,
        _ranks: usize,
    ) -> Result<Workspace<T>> {
        self.prepare(shape, epilogue)
    }

    fn ready_to_meet(&self) -> Result<()> {
        Ok(())
    }

    fn rank_statistics<T: Element>(
        &self,
        shape: Shape,
        x: &&[T],
        saved: &mut BatchStatistics<Self, T>,
        workspace: &mut Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        T::find_rank_statistics(self.threads_from, shape, x, saved, workspace);
        let [variance, _] = workspace.vectors();
        let found = [&saved.pivot, &saved.mean_offset, variance];
        write_message(exchange.layout, &mut exchange.statistics, found);
        Ok(())
    }

    fn merge_statistics<T: Element>(
        &self,
        pass: MergeStatistics<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let layout = exchange.layout;
        exchange.outcome[0] = RANKS_DISAGREE;
        let messages = layout.messages(Kind::Statistics, &exchange.gathered)?;
        let values: u64 = messages.iter().map(|(count, _)| count).sum();
        if values == 1 {
            exchange.outcome[0] = ONE_VALUE;
            return Err(Error::OneValuePerChannel { shape: pass.shape });
        }
        let [variances, _] = pass.workspace.vectors();
        for (channel, variance_kept) in variances.iter_mut().enumerate() {
            let (mut pivot, mut all) = (0.0, Welford::EMPTY);
            for (count, message) in &messages {
                let [own_pivot, mean, variance] = [0, 1, 2].map(|vector| layout.get(message, vector, channel));
                if all.count == 0 {
                    pivot = own_pivot;
                }
                all = all.merge(Welford {
                    count: *count,
                    mean: (own_pivot - pivot) + mean,
                    variance,
                });
            }
            let variance = T::Param::from_f64(all.variance);
            pass.saved.pivot[channel] = T::Param::from_f64(pivot);
            pass.saved.mean_offset[channel] = T::Param::from_f64(all.mean);
            pass.saved.invstd[channel] = batch_invstd(variance, pass.eps);
            *variance_kept = variance;
        }
        exchange.outcome.copy_from_slice(&[SOUND, values as i64]);
        Ok(())
    }

    fn update_running<T: Element>(
        &self,
        _shape: Shape,
        saved: &BatchStatistics<Self, T>,
        workspace: &mut Workspace<T>,
        update: RunningUpdate<'_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let values = exchange.outcome[1] as f64;
        if values < 2.0 {
            return Ok(());
        }
        let factor: T::Param = count(&mut update.batches[0], update.momentum);
        let unbias = T::Param::from_f64(values / (values - 1.0));
        let [variances, _] = workspace.vectors();
        let means = saved
            .pivot
            .iter()
            .zip(&saved.mean_offset)
            .map(|(&pivot, &offset)| pivot + offset);
        let batch = means
            .zip(&*variances)
            .map(|(mean, &variance)| [mean, variance * unbias]);
        move_running([update.mean, update.variance], factor, update.skip_non_finite, batch);
        Ok(())
    }

    fn rank_sums<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        T::run_backward(self.threads_from, pass, Part::Sums);
        let [sum, slope] = pass.workspace.vectors();
        write_message(exchange.layout, &mut exchange.sums, [sum, slope]);
        Ok(())
    }

    fn merge_sums<T: Element>(
        &self,
        _shape: Shape,
        workspace: &mut Workspace<T>,
        exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        let layout = exchange.layout;
        exchange.outcome[0] = RANKS_DISAGREE;
        let messages = layout.messages(Kind::Sums, &exchange.gathered)?;
        exchange.outcome[0] = SOUND;
        let values: u64 = messages.iter().map(|(count, _)| count).sum();
        for (vector, merged) in workspace.vectors().iter_mut().enumerate() {
            for (channel, merged) in merged.iter_mut().enumerate() {
                let sum: f64 = messages
                    .iter()
                    .map(|(_, message)| layout.get(message, vector, channel))
                    .sum();
                *merged = T::Param::from_f64(sum / values.max(1) as f64);
            }
        }
        Ok(())
    }

    fn rank_gradient<T: Element>(
        &self,
        pass: &mut BackwardPass<'_, '_, Self, T>,
        _exchange: &mut Exchange<Self>,
    ) -> Result<()> {
        T::run_backward(self.threads_from, pass, Part::Elements);
        T::run_backward(self.threads_from, pass, Part::Parameters);
        Ok(())
    }
}

/// Pivot, mean and variance of this rank's batch: the first two into `saved`, the variance into the first of the workspace's
/// vectors. With the instructions of `simd`, on one thread below `threads_from` bytes.
pub(super) fn rank_statistics<T: Element>(
    simd: Simd,
    threads_from: usize,
    shape: Shape,
    x: &[T],
    saved: &mut BatchStatistics<Cpu, T>,
    workspace: &mut Workspace<T>,
) {
    // Out of the workspace while its other parts are in use.
    let mut variance = std::mem::take(&mut workspace.vectors()[0]);
    let geometry = Geometry::new(shape);
    let rank = RankStatistics {
        simd,
        geometry,
        x: Source::from(x),
        partials: workspace.partials(shape.channels),
        found: [&mut saved.pivot, &mut saved.mean_offset, &mut variance].map(|found| Sink::from(found.as_mut_slice())),
    };
    run(&geometry, Phases::Reduce, threads_from, &rank);
    workspace.vectors()[0] = variance;
}

fn write_message<P: Real, const N: usize>(layout: Layout, message: &mut [i64], vectors: [&Vec<P>; N]) {
    for (vector, values) in vectors.into_iter().enumerate() {
        for (channel, value) in values.iter().enumerate() {
            layout.put(message, vector, channel, *value);
        }
    }
}

/// Mean and variance of one rank's batch.
struct RankStatistics<'a, T: Element> {
    simd: Simd,
    geometry: Geometry,
    x: Source<'a, T>,
    partials: Partials<'a, f64>,
    found: [Sink<'a, T::Param>; 3],
}

impl<T: Element> Pass for RankStatistics<'_, T> {
    fn bytes_per_channel(&self) -> usize {
        self.geometry.values() * size_of::<T>()
    }

    fn reduce(&self, task: &Task) {
        self.simd.run(TaskStatistics {
            geometry: &self.geometry,
            task,
            x: self.x,
            partials: self.partials,
        });
    }

    fn finish(&self, channels: Range<usize>) {
        self.simd.run(FinishRank {
            geometry: &self.geometry,
            channels,
            x: self.x,
            partials: self.partials,
            found: self.found,
        });
    }

    /// The elements wait for the other ranks.
    fn apply(&self, _task: &Task) {}

    fn publish(&self) {}
}
