//! Mean and variance per channel of a part of the batch, and what becomes of them.

use std::ops::Range;

use super::coefficients::{Coefficients, Table, Uniform, batch_invstd};
use super::geometry::{Geometry, Interleaved, Planar, Task};
use super::memory::{Sink, Source};
use super::reduce::{Block, Terms, Tree, interleaved_sums, pairwise, planar_sums};
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

/// x - K.
struct Shifted<'a, S, T, C> {
    level: S,
    x: Source<'a, T>,
    coefficients: &'a C,
}

impl<S: Level, T: Element, C: Coefficients<T::Param>> Terms<T::Param, 1> for Shifted<'_, S, T, C> {
    #[inline(always)]
    fn terms(&self, block: Block) -> [Lanes<T::Param>; 1] {
        // SAFETY: the geometry's blocks are inside a tensor of its shape, and nothing writes x in these passes.
        let x = unsafe { self.x.load(self.level, block.at, block.count) };
        let pivot = self.coefficients.at(PIVOT, block.position);
        [self.level.sub(x, pivot)]
    }
}

/// What the values of a chunk add to its variance: the squares of (x - K) - mean, each divided by the number of values, so
/// that nothing overflows while the variance fits the type. The values were read just before; meanwhile what is read next is
/// fetched.
struct Squares<'a, S, T: Element, C> {
    shifted: Shifted<'a, S, T, C>,
    /// 1 / number of values.
    share: Lanes<T::Param>,
    /// How far behind a value is the one that is read next in its place.
    ahead: usize,
}

impl<S: Level, T: Element, C: Coefficients<T::Param>> Terms<T::Param, 1> for Squares<'_, S, T, C> {
    #[inline(always)]
    fn terms(&self, block: Block) -> [Lanes<T::Param>; 1] {
        let Shifted { level, x, coefficients } = self.shifted;
        x.prefetch(level, block.at.wrapping_add(self.ahead));
        let [shifted] = self.shifted.terms(block);
        let mean = coefficients.at(MEAN, block.position);
        let deviation = level.sub(shifted, mean);
        [level.mul(level.mul(deviation, self.share), deviation)]
    }
}

impl<T: Element> TaskStatistics<'_, T> {
    #[inline(always)]
    fn planar<S: Level>(&self, level: S, planar: &Planar) {
        let Task { channels, chunks } = self.task;
        for channel in channels.clone() {
            // SAFETY: every channel has a first element, and nothing writes x in these passes.
            let pivot = unsafe { pivot(self.x, self.geometry, channel) };
            let mut state = Welford::EMPTY;
            for chunk in chunks.clone() {
                let values = planar.chunk_values(chunk);
                let shifted = Shifted {
                    level,
                    x: self.x,
                    coefficients: &Uniform([pivot]),
                };
                let [sum] = planar_sums::<_, _, 1, 4>(level, planar, channel, chunk, &shifted);
                let mean = sum / T::Param::from_f64(values as f64);
                let squares = Squares {
                    shifted: Shifted {
                        level,
                        x: self.x,
                        coefficients: &Uniform([pivot, mean]),
                    },
                    share: splat(T::Param::ONE / T::Param::from_f64(values as f64)),
                    ahead: planar.ahead(channel, chunk, chunks),
                };
                let [variance] = planar_sums::<_, _, 1, 4>(level, planar, channel, chunk, &squares);
                state = state.push_chunk(values as u64, mean, variance);
            }
            let partial = [splat(state.mean), splat(state.variance)];
            // SAFETY: no other task has this channel and part.
            unsafe {
                self.partials
                    .store(level, Geometry::part_of(chunks), channel, 1, &partial)
            };
        }
    }

    #[inline(always)]
    fn interleaved<S: Level>(&self, level: S, interleaved: &Interleaved) {
        let Task { channels, chunks } = self.task;
        let mut strip = Table::<T::Param, 2>::new();
        for (at, count) in blocks(channels.len()) {
            // SAFETY: the first pixel has all channels, and nothing writes x in these passes.
            let first = unsafe { self.x.load(level, channels.start + at, count) };
            strip.set(PIVOT, at, &lanes(|i| finite_or_zero(first[i])));
        }
        let mut state = Table::<T::Param, 2>::new();
        let mut counted = 0;
        for chunk in chunks.clone() {
            let pixels = interleaved.pixels(&(chunk..chunk + 1));
            self.push_chunk(level, interleaved, &pixels, &mut strip, &mut state, counted);
            counted += pixels.len() as u64;
        }
        for (at, count) in blocks(channels.len()) {
            let partial = [state.at(0, at), state.at(1, at)];
            // SAFETY: no other task has these channels and this part.
            unsafe {
                self.partials
                    .store(level, Geometry::part_of(chunks), channels.start + at, count, &partial)
            };
        }
    }

    /// Merges the mean and variance of some pixels into `state`, which has `counted` pixels. `strip` has the pivots, and
    /// room for the mean of the chunk.
    #[inline(always)]
    fn push_chunk<S: Level>(
        &self,
        level: S,
        interleaved: &Interleaved,
        pixels: &Range<usize>,
        strip: &mut Table<T::Param, 2>,
        state: &mut Table<T::Param, 2>,
        counted: u64,
    ) {
        let channels = &self.task.channels;
        let values = T::Param::from_f64(pixels.len() as f64);
        let mut sums = Table::<T::Param, 1>::new();

        strip.repeat(channels.len(), interleaved.repeats());
        let shifted = Shifted {
            level,
            x: self.x,
            coefficients: &*strip,
        };
        interleaved_sums::<_, _, 1>(level, interleaved, channels, pixels, &mut sums, &shifted);
        for (at, _) in blocks(channels.len()) {
            let sum = sums.at(0, at);
            strip.set(MEAN, at, &lanes(|i| sum[i] / values));
        }
        strip.repeat(channels.len(), interleaved.repeats());
        let squares = Squares {
            shifted: Shifted {
                level,
                x: self.x,
                coefficients: &*strip,
            },
            share: splat(T::Param::ONE / values),
            ahead: interleaved.ahead(pixels),
        };
        interleaved_sums::<_, _, 1>(level, interleaved, channels, pixels, &mut sums, &squares);
        for (at, _) in blocks(channels.len()) {
            let mut moments = [strip.at(MEAN, at), sums.at(0, at)];
            if counted > 0 {
                let weights = Weights::new(counted, pixels.len() as u64);
                moments = merge(weights, &[state.at(0, at), state.at(1, at)], &moments);
            }
            state.set(0, at, &moments[0]);
            state.set(1, at, &moments[1]);
        }
    }
}

/// K of a channel.
///
/// # Safety
/// The channel exists, and no thread writes x meanwhile.
#[inline(always)]
unsafe fn pivot<T: Element>(x: Source<'_, T>, geometry: &Geometry, channel: usize) -> T::Param {
    // SAFETY: the caller's promise.
    finite_or_zero(unsafe { x.get(geometry.first_value(channel)) })
}

/// A pivot that can be subtracted without making a NaN.
#[inline(always)]
fn finite_or_zero<P: Real>(value: P) -> P {
    if value.is_finite() { value } else { P::ZERO }
}

/// (mean, variance) of the union, lane by lane.
#[inline(always)]
fn merge<P: Real>(weights: Weights<P>, first: &[Lanes<P>; 2], second: &[Lanes<P>; 2]) -> [Lanes<P>; 2] {
    let mut merged = [[P::ZERO; LANES]; 2];
    for i in 0..LANES {
        (merged[0][i], merged[1][i]) = weights.merge((first[0][i], first[1][i]), (second[0][i], second[1][i]));
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

/// Pivot, mean of x - K and variance of this rank's batch from the statistics of its parts: what a rank tells the others.
pub(super) struct FinishRank<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    pub(super) channels: Range<usize>,
    pub(super) x: Source<'a, T>,
    pub(super) partials: Partials<'a, T::Param>,
    /// Get pivot, mean and variance.
    pub(super) found: [Sink<'a, T::Param>; 3],
}

impl<T: Element> Kernel for FinishRank<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        for (at, count) in blocks(self.channels.len()) {
            let channel = self.channels.start + at;
            // SAFETY: the channels exist, and nothing writes x in these passes.
            let pivots = unsafe { pivots(self.x, self.geometry, channel, count) };
            let parts = PartMoments {
                level,
                geometry: self.geometry,
                partials: self.partials,
                channel,
                count,
            };
            let ([mean, variance], _) = pairwise(&parts, self.geometry.parts());
            for (found, values) in self.found.iter().zip([pivots, mean, variance]) {
                // SAFETY: no other task has these channels, and all sinks have one element per channel.
                unsafe { found.store(level, channel, count, &values) };
            }
        }
    }
}

/// K of `count` channels from `channel` on.
///
/// # Safety
/// The channels exist, and no thread writes x meanwhile.
#[inline(always)]
unsafe fn pivots<T: Element>(x: Source<'_, T>, geometry: &Geometry, channel: usize, count: usize) -> Lanes<T::Param> {
    let mut pivots = [T::Param::ZERO; LANES];
    for (lane, value) in pivots.iter_mut().take(count).enumerate() {
        // SAFETY: the caller's promise.
        *value = unsafe { pivot(x, geometry, channel + lane) };
    }
    pivots
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
        for (at, count) in blocks(self.channels.len()) {
            let channel = self.channels.start + at;
            // SAFETY: the channels exist, and nothing writes x in these passes.
            let pivots = unsafe { pivots(self.x, self.geometry, channel, count) };
            let parts = PartMoments {
                level,
                geometry: self.geometry,
                partials: self.partials,
                channel,
                count,
            };
            let ([mean, variance], _) = pairwise(&parts, self.geometry.parts());
            // SAFETY: no other task has these channels, and all sinks have one element per channel.
            unsafe {
                self.saved.pivot.store(level, channel, count, &pivots);
                self.saved.offset.store(level, channel, count, &mean);
                let invstd = lanes(|i| batch_invstd(variance[i], self.eps));
                self.saved.invstd.store(level, channel, count, &invstd);
            }
            if let Some(running) = self.running {
                let values = self.geometry.values() as f64;
                let unbiased = T::Param::from_f64(values / (values - 1.0));
                let batch = [lanes(|i| pivots[i] + mean[i]), lanes(|i| variance[i] * unbiased)];
                // SAFETY: as above.
                unsafe { running.update(level, channel, count, &batch) };
            }
        }
    }
}

/// Mean and variance of all parts of some channels.
struct PartMoments<'a, S, P> {
    level: S,
    geometry: &'a Geometry,
    partials: Partials<'a, P>,
    channel: usize,
    count: usize,
}

impl<S: Level, P: Real> Tree for PartMoments<'_, S, P> {
    type Node = ([Lanes<P>; 2], u64);

    #[inline(always)]
    fn leaf(&self, part: usize) -> Self::Node {
        // SAFETY: all parts of these channels have been computed, and nothing writes them any more.
        let moments = unsafe { self.partials.load(self.level, part, self.channel, self.count) };
        (moments, self.geometry.part_values(part) as u64)
    }

    #[inline(always)]
    fn join(&self, first: Self::Node, second: Self::Node) -> Self::Node {
        let weights = Weights::new(first.1, second.1);
        (merge(weights, &first.0, &second.0), first.1 + second.1)
    }
}

impl<P: Real> Running<'_, P> {
    /// Moves the statistics of `count` channels towards (mean, variance) of the batch.
    ///
    /// # Safety
    /// The channels exist, and no other thread accesses their running statistics meanwhile.
    #[inline(always)]
    unsafe fn update<S: Level>(&self, level: S, channel: usize, count: usize, batch: &[Lanes<P>; 2]) {
        let keep = P::ONE - self.factor;
        let skip = |i: usize| self.skip_non_finite && !(batch[0][i].is_finite() && batch[1][i].is_finite());
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
