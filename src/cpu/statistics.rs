//! Mean and variance per channel of a part of the batch, and what becomes of them.

use std::ops::Range;

use super::coefficients::{Coefficients, Table, Uniform, invstd};
use super::geometry::{Geometry, Interleaved, Planar, Task};
use super::memory::{Sink, Source};
use super::reduce::{Block, interleaved_sums, pairwise, planar_sums};
use super::simd::{Kernel, LANES, Lanes, Level, blocks, lanes, splat};
use super::workspace::Partials;
use crate::element::{Element, Real};
use crate::welford::{Weights, Welford};

/// Index of the pivot among a strip's numbers.
const PIVOT: usize = 0;
/// Index of a chunk's mean among a strip's numbers.
const MEAN: usize = 1;

/// Mean and variance of x - K in one task, into `partials`.
pub(super) struct TaskStatistics<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    pub(super) task: &'a Task,
    pub(super) x: Source<'a, T>,
    pub(super) partials: Partials<'a, T::Param>,
}

impl<T: Element> Kernel for TaskStatistics<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        match self.geometry {
            Geometry::Planar(planar) => self.planar(level, planar),
            Geometry::Interleaved(interleaved) => self.interleaved(level, interleaved),
        }
    }
}

impl<T: Element> TaskStatistics<'_, T> {
    /// x - K of a block.
    #[inline(always)]
    fn shifted<S: Level>(
        &self,
        level: S,
        block: Block,
        coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param> {
        // SAFETY: the geometry's blocks are inside a tensor of its shape, and nothing writes x in these passes.
        let x = unsafe { self.x.load(level, block.at, block.count) };
        let pivot = coefficients.at(PIVOT, block.position);
        lanes(|i| x[i] - pivot[i])
    }

    /// The squares of (x - K) - mean of a block.
    #[inline(always)]
    fn squares<S: Level>(
        &self,
        level: S,
        block: Block,
        coefficients: &impl Coefficients<T::Param>,
    ) -> Lanes<T::Param> {
        let shifted = self.shifted(level, block, coefficients);
        let mean = coefficients.at(MEAN, block.position);
        lanes(|i| (shifted[i] - mean[i]) * (shifted[i] - mean[i]))
    }

    #[inline(always)]
    fn planar<S: Level>(&self, level: S, planar: &Planar) {
        let channel = self.task.channels.start;
        // SAFETY: every channel has a first element, and nothing writes x in these passes.
        let pivot = unsafe { pivot(self.x, self.geometry, channel) };
        let mut state = Welford::EMPTY;
        for chunk in planar.part(self.task.part) {
            state = state.push_chunk(
                planar.chunk_values(chunk) as u64,
                || {
                    let pivot = Uniform([pivot]);
                    let [sum] = planar_sums::<_, 1, 4>(planar, channel, chunk, |block| {
                        [self.shifted(level, block, &pivot)]
                    });
                    sum
                },
                |mean| {
                    let centre = Uniform([pivot, mean]);
                    let [sum] = planar_sums::<_, 1, 4>(planar, channel, chunk, |block| {
                        [self.squares(level, block, &centre)]
                    });
                    sum
                },
            );
        }
        let partial = [splat(state.mean), splat(state.variance)];
        // SAFETY: no other task has this channel and part.
        unsafe {
            self.partials
                .store(level, self.task.part, channel, 1, &partial)
        };
    }

    #[inline(always)]
    fn interleaved<S: Level>(&self, level: S, interleaved: &Interleaved) {
        let channels = &self.task.channels;
        let repeats = interleaved.repeats();
        let mut strip = Table::<T::Param, 2>::new();
        blocks(channels.len(), |at, count| {
            // SAFETY: the first pixel has all channels, and nothing writes x in these passes.
            let first = unsafe { self.x.load(level, channels.start + at, count) };
            strip.set(
                PIVOT,
                at,
                &lanes(|i| {
                    if first[i].is_finite() {
                        first[i]
                    } else {
                        T::Param::ZERO
                    }
                }),
            );
        });
        strip.repeat(channels.len(), repeats);

        let mut state = Table::<T::Param, 2>::new();
        let mut counted = 0;
        let mut sums = Table::<T::Param, 1>::new();
        interleaved.chunks(self.task.part, |pixels| {
            let values = T::Param::from_f64(pixels.len() as f64);
            interleaved_sums(interleaved, channels, &pixels, &mut sums, |block| {
                [self.shifted(level, block, &strip)]
            });
            blocks(channels.len(), |at, _| {
                let sum = sums.at(0, at);
                strip.set(MEAN, at, &lanes(|i| sum[i] / values));
            });
            strip.repeat(channels.len(), repeats);
            interleaved_sums(interleaved, channels, &pixels, &mut sums, |block| {
                [self.squares(level, block, &strip)]
            });
            let weights = (counted > 0).then(|| Weights::new(counted, pixels.len() as u64));
            blocks(channels.len(), |at, _| {
                let squares = sums.at(0, at);
                let chunk = [strip.at(MEAN, at), lanes(|i| squares[i] / values)];
                let merged = match weights {
                    Some(weights) => merge(weights, &[state.at(0, at), state.at(1, at)], &chunk),
                    None => chunk,
                };
                state.set(0, at, &merged[0]);
                state.set(1, at, &merged[1]);
            });
            counted += pixels.len() as u64;
        });
        blocks(channels.len(), |at, count| {
            let partial = [state.at(0, at), state.at(1, at)];
            // SAFETY: no other task has these channels and this part.
            unsafe {
                self.partials
                    .store(level, self.task.part, channels.start + at, count, &partial)
            };
        });
    }
}

/// K of a channel.
///
/// # Safety
/// The channel exists, and no thread writes x meanwhile.
#[inline(always)]
unsafe fn pivot<T: Element>(x: Source<'_, T>, geometry: &Geometry, channel: usize) -> T::Param {
    // SAFETY: the caller's promise.
    let first = unsafe { x.get(geometry.first_value(channel)) };
    if first.is_finite() {
        first
    } else {
        T::Param::ZERO
    }
}

/// (mean, variance) of the union, lane by lane.
#[inline(always)]
fn merge<P: Real>(
    weights: Weights<P>,
    first: &[Lanes<P>; 2],
    second: &[Lanes<P>; 2],
) -> [Lanes<P>; 2] {
    let mut merged = [[P::ZERO; LANES]; 2];
    for i in 0..LANES {
        (merged[0][i], merged[1][i]) =
            weights.merge((first[0][i], first[1][i]), (second[0][i], second[1][i]));
    }
    merged
}

/// The statistics of the whole batch from those of its parts: saved for the backward pass, and the running ones moved.
pub(super) struct FinishStatistics<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    pub(super) channels: Range<usize>,
    pub(super) x: Source<'a, T>,
    pub(super) partials: Partials<'a, T::Param>,
    pub(super) eps: T::Param,
    pub(super) saved: Saved<'a, T::Param>,
    pub(super) running: Option<Running<'a, T::Param>>,
}

/// Where the statistics of the batch are left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saved<'a, P> {
    pub(super) pivot: Sink<'a, P>,
    pub(super) offset: Sink<'a, P>,
    pub(super) invstd: Sink<'a, P>,
}

/// The running statistics, and how far they move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running<'a, P> {
    pub(super) mean: Sink<'a, P>,
    pub(super) variance: Sink<'a, P>,
    pub(super) factor: P,
    pub(super) skip_non_finite: bool,
}

impl<T: Element> Kernel for FinishStatistics<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        blocks(self.channels.len(), |at, count| {
            let channel = self.channels.start + at;
            let mut pivots = [T::Param::ZERO; LANES];
            for (lane, value) in pivots.iter_mut().take(count).enumerate() {
                // SAFETY: the channel exists, and nothing writes x in these passes.
                *value = unsafe { pivot(self.x, self.geometry, channel + lane) };
            }
            let [mean, variance] = self.batch(level, channel, count);
            // SAFETY: no other task has these channels, and all sinks have one element per channel.
            unsafe {
                self.saved.pivot.store(level, channel, count, &pivots);
                self.saved.offset.store(level, channel, count, &mean);
                self.saved.invstd.store(
                    level,
                    channel,
                    count,
                    &lanes(|i| invstd(variance[i], self.eps)),
                );
            }
            if let Some(running) = self.running {
                let values = self.geometry.values() as f64;
                let unbiased = T::Param::from_f64(values / (values - 1.0));
                let batch = [
                    lanes(|i| pivots[i] + mean[i]),
                    lanes(|i| variance[i] * unbiased),
                ];
                // SAFETY: as above.
                unsafe { running.update(level, channel, count, &batch) };
            }
        });
    }
}

impl<T: Element> FinishStatistics<'_, T> {
    /// (mean of x - K, variance) of `count` channels from `channel` on.
    #[inline(always)]
    fn batch<S: Level>(&self, level: S, channel: usize, count: usize) -> [Lanes<T::Param>; 2] {
        let (moments, _) = pairwise(
            self.geometry.parts(),
            |part| {
                // SAFETY: all parts of these channels have been computed, and nothing writes them any more.
                let moments = unsafe { self.partials.load(level, part, channel, count) };
                (moments, self.geometry.part_values(part) as u64)
            },
            |(first, first_values), (second, second_values)| {
                let weights = Weights::new(first_values, second_values);
                (
                    merge(weights, &first, &second),
                    first_values + second_values,
                )
            },
        );
        moments
    }
}

impl<P: Real> Running<'_, P> {
    /// Moves the statistics of `count` channels towards (mean, variance) of the batch.
    ///
    /// # Safety
    /// The channels exist, and no other thread accesses their running statistics meanwhile.
    #[inline(always)]
    unsafe fn update<S: Level>(
        &self,
        level: S,
        channel: usize,
        count: usize,
        batch: &[Lanes<P>; 2],
    ) {
        let keep = P::ONE - self.factor;
        let skip = |i: usize| {
            self.skip_non_finite && !(batch[0][i].is_finite() && batch[1][i].is_finite())
        };
        for (running, batch) in [self.mean, self.variance].into_iter().zip(batch) {
            // SAFETY: the caller's promise.
            unsafe {
                let before = running.source().load(level, channel, count);
                let after = lanes(|i| {
                    if skip(i) {
                        before[i]
                    } else {
                        keep * before[i] + self.factor * batch[i]
                    }
                });
                running.store(level, channel, count, &after);
            }
        }
    }
}
