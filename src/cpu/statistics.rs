//! Mean and variance per channel of a part of the batch, and what becomes of them.

use std::ops::Range;

use super::coefficients::{Coefficients, Table, Uniform, batch_invstd};
use super::geometry::{Geometry, Interleaved, Planar, Task};
use super::memory::{Sink, Source};
use super::reduce::{Block, Terms, Tree, interleaved_sums, pairwise, planar_sums};
use super::simd::{Kernel, LANES, Lanes, Level, blocks, lanes, splat};
use super::workspace::Partials;
use crate::element::{Dtype, Element, Real};
use crate::welford::{Weights, Welford};

/// Index of the pivot among a strip's numbers.
const PIVOT: usize = 0;
/// Index of the [offset](offset_of) that makes scaled deviations from a centre.
const OFFSET: usize = 1;
/// How many numbers there are.
const NUMBERS: usize = 2;

/// Values of a channel in NCHW, at most, whose mean is the first centre.
const PLANAR_SAMPLE: usize = 128;
/// Runs in NHWC whose mean is the first centre.
const INTERLEAVED_SAMPLE: usize = 8;
/// The first chunk is summed up again if the square of C - mean is more than so many times its variance: the sample was unlike it.
/// Little more than two bits may be lost.
const UNLIKE: f64 = 4.0;

/// Mean and variance of x - K in one task, into `partials`.
///
/// Each chunk is read once: the sums of x - C and its square give mean and variance, as long as the square of C - mean, which is
/// lost of the sum of squares, is not large beside the variance. The centre C is the mean of what the task has seen before; before
/// that, of a sample of the first chunk, and if that turns out to be unlike the chunk, of the chunk. Where a later chunk is far
/// from what came before, then so is the variance of both together large: of a share p of all values so far and 1 - p in the
/// chunk it is at least p · (1 - p) times the square of their distance, of which 1 - p times the square is what cancels.
pub(super) struct TaskStatistics<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    pub(super) task: &'a Task,
    pub(super) x: Source<'a, T>,
    pub(super) partials: Partials<'a, f64>,
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

/// What x - C is multiplied by before it is summed up, so that no sum of squares overflows before their mean does: a chunk has
/// fewer values than 1 / its square. A power of two, which rounds nothing: `bf16` has the exponents of `f32`, but the spacing of its smallest numbers is 2^16 times as wide. Squares
/// of `f16` are far from the largest `f32`. Where elements are as precise as parameters, there is no such room at the lower
/// end: of two equal factors, one is divided by the number of values instead (see [`Divisor`]), which is one operation more.
const fn scale(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 | Dtype::F32 | Dtype::F64 => 1.0,
    }
}

/// What is added to a scaled x to give its scaled deviation from a centre.
#[inline(always)]
fn offset_of<T: Element>(centre: T::Param) -> T::Param {
    -(centre * T::Param::from_f64(scale(T::DTYPE)))
}

/// The centre that an offset means, exactly.
#[inline(always)]
fn centre_of<T: Element>(offset: T::Param) -> T::Param {
    -(offset * T::Param::from_f64(1.0 / scale(T::DTYPE)))
}

/// Deviations x - C, scaled, and the same multiplied by the share. Meanwhile what is read next is fetched.
struct Deviations<'a, S, T: Element, C> {
    level: S,
    x: Source<'a, T>,
    coefficients: &'a C,
    /// See [`Divisor`].
    share: Lanes<T::Param>,
    /// How far behind a value is the one that is read next in its place.
    ahead: Option<usize>,
}

impl<S: Level, T: Element, C: Coefficients<T::Param>> Terms<T::Param> for Deviations<'_, S, T, C> {
    #[inline(always)]
    fn terms(&self, block: Block) -> [Lanes<T::Param>; 2] {
        let level = self.level;
        if let Some(ahead) = self.ahead {
            self.x.prefetch(level, block.at.wrapping_add(ahead));
        }
        // SAFETY: the geometry's blocks are inside a tensor of its shape, and nothing writes x in these passes.
        let x = unsafe { self.x.load_block(level, block) };
        let offset = self.coefficients.at(OFFSET, block.position);
        match T::DTYPE {
            Dtype::F16 => {
                let deviation = level.add(x, offset);
                [deviation, deviation]
            }
            Dtype::Bf16 => {
                let scale = splat(T::Param::from_f64(scale(T::DTYPE)));
                let deviation = level.mul_add(x, scale, offset);
                [deviation, deviation]
            }
            Dtype::F32 | Dtype::F64 => {
                let deviation = level.add(x, offset);
                [deviation, level.mul(deviation, self.share)]
            }
        }
    }
}

/// Divides sums of scaled deviations by the number of values, in double precision as all that is done once for a chunk.
#[derive(Clone, Copy)]
struct Divisor<P> {
    /// The number of values, times the scale.
    scaled_values: f64,
    /// What squares are multiplied by, beside the scale: about 1 / number of values, or 1 if they need not be.
    share: P,
    /// What makes the mean square of their sum.
    correction: f64,
}

impl<P: Real> Divisor<P> {
    #[inline(always)]
    fn new<T: Element<Param = P>>(values: usize) -> Self {
        let values = values as f64;
        let scale = scale(T::DTYPE);
        let share = match T::DTYPE {
            Dtype::F16 | Dtype::Bf16 => P::ONE,
            Dtype::F32 | Dtype::F64 => P::from_f64(1.0 / values),
        };
        Self {
            scaled_values: scale * values,
            share,
            correction: 1.0 / (scale * scale * values * share.to_f64()),
        }
    }

    /// Mean of the deviations, of their scaled sum.
    #[inline(always)]
    fn mean(&self, sum: P) -> f64 {
        sum.to_f64() / self.scaled_values
    }

    /// Mean and variance of the deviations, of their scaled sum and of that of their squares, multiplied by the share.
    #[inline(always)]
    fn moments(&self, sum: P, squares: P) -> [f64; 2] {
        let mean = self.mean(sum);
        let variance = squares.to_f64() * self.correction - mean * mean;
        // Not a maximum, which would drop a NaN.
        [mean, if variance < 0.0 { 0.0 } else { variance }]
    }
}

/// Whether a centre whose distance from the mean is `mean` takes too many digits from the variance.
#[inline(always)]
fn unlike(mean: f64, variance: f64) -> bool {
    mean * mean > UNLIKE * variance
}

/// What is summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The sample.
    Sample,
    /// The first chunk, about the mean of the sample.
    First,
    /// A chunk, about the mean of what was summed up before.
    Next,
}

impl<T: Element> TaskStatistics<'_, T> {
    #[inline(always)]
    fn planar<S: Level>(&self, level: S, planar: &Planar) {
        let Task { channels, chunks } = self.task;
        for channel in channels.clone() {
            // SAFETY: every channel has a first element, and nothing writes x in these passes.
            let pivot = unsafe { pivot(self.x, self.geometry, channel) };
            let mut offset = offset_of::<T>(pivot);
            let mut state = Welford::EMPTY;
            let mut chunk = chunks.start;
            let mut stage = Stage::Sample;
            // All stages with one piece of code.
            while chunk < chunks.end {
                let whole = planar.runs(channel, chunk);
                let runs = match stage {
                    Stage::Sample => whole.sample(PLANAR_SAMPLE),
                    Stage::First | Stage::Next => whole,
                };
                let divisor = Divisor::new::<T>(runs.values());
                let deviations = Deviations {
                    level,
                    x: self.x,
                    coefficients: &Uniform([pivot, offset]),
                    share: splat(divisor.share),
                    ahead: Some(planar.ahead(channel, chunk, chunks)),
                };
                let [sum, squares] = planar_sums(level, runs, &deviations);
                let [mean, variance] = divisor.moments(sum, squares);
                let centre = centre_of::<T>(offset);
                stage = match stage {
                    Stage::Sample => Stage::First,
                    Stage::First if unlike(mean, variance) => Stage::Next,
                    Stage::First | Stage::Next => {
                        state = state.push_chunk(runs.values() as u64, mean_from(pivot, centre, mean), variance);
                        offset = offset_of::<T>(centre_at(pivot, state.mean));
                        chunk += 1;
                        Stage::Next
                    }
                };
                if state.count == 0 {
                    offset = offset_of::<T>(centre_at(centre, mean));
                }
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
        let mut strip = Table::<T::Param, NUMBERS>::new();
        for (at, count) in blocks(channels.len()) {
            // SAFETY: the first pixel has all channels, and nothing writes x in these passes.
            let first = unsafe { self.x.load(level, channels.start + at, count) };
            let pivots = lanes(|i| finite_or_zero(first[i]));
            strip.set(PIVOT, at, &pivots);
            strip.set(OFFSET, at, &lanes(|i| offset_of::<T>(pivots[i])));
        }
        let mut state = Table::<f64, 2>::new();
        let mut sums = Table::<T::Param, 2>::new();
        let mut counted = 0;
        let mut chunk = chunks.start;
        let mut stage = Stage::Sample;
        // All stages with one piece of code.
        while chunk < chunks.end {
            let mut pixels = interleaved.pixels(&(chunk..chunk + 1));
            if stage == Stage::Sample {
                let sample = INTERLEAVED_SAMPLE * interleaved.repeats();
                pixels.end = pixels.end.min(pixels.start + sample);
            }
            let divisor = Divisor::new::<T>(pixels.len());
            strip.repeat(channels.len(), interleaved.repeats());
            let deviations = Deviations {
                level,
                x: self.x,
                coefficients: &strip,
                share: splat(divisor.share),
                ahead: None,
            };
            interleaved_sums(level, interleaved, channels, &pixels, &mut sums, &deviations);
            let weights = (counted > 0).then(|| Weights::new(counted, pixels.len() as u64));
            let mut any_unlike = false;
            for (at, _) in blocks(channels.len()) {
                let (pivot, offset) = (strip.at(PIVOT, at), strip.at(OFFSET, at));
                let [sum, squares] = sums.both(at);
                let mut seen = [[0.0; LANES]; 2];
                for i in 0..LANES {
                    let [mean, variance] = divisor.moments(sum[i], squares[i]);
                    let centre = centre_of::<T>(offset[i]);
                    [seen[0][i], seen[1][i]] = [mean_from(pivot[i], centre, mean), variance];
                }
                if stage == Stage::First {
                    for i in 0..LANES {
                        any_unlike |= unlike(divisor.mean(sum[i]), seen[1][i]);
                    }
                }
                if let Some(weights) = weights {
                    seen = merge(weights, &state.both(at), &seen);
                }
                state.set_both(at, &seen);
                strip.set(OFFSET, at, &lanes(|i| offset_of::<T>(centre_at(pivot[i], seen[0][i]))));
            }
            stage = match stage {
                Stage::Sample => Stage::First,
                Stage::First if any_unlike => Stage::Next,
                Stage::First | Stage::Next => {
                    counted += pixels.len() as u64;
                    chunk += 1;
                    Stage::Next
                }
            };
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

/// The mean of x - K, of the mean of x - C.
#[inline(always)]
fn mean_from<P: Real>(pivot: P, centre: P, mean: f64) -> f64 {
    (centre.to_f64() - pivot.to_f64()) + mean
}

/// A centre at a distance from another one.
#[inline(always)]
fn centre_at<P: Real>(from: P, distance: f64) -> P {
    finite_or_zero(P::from_f64(from.to_f64() + distance))
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
    pub(super) partials: Partials<'a, f64>,
    pub(super) eps: f64,
    pub(super) saved: Saved<'a, T::Param>,
    pub(super) running: Option<Running<'a, T::Param>>,
}

/// Pivot, mean of x - K and variance of this rank's batch from the statistics of its parts: what a rank tells the others.
pub(super) struct FinishRank<'a, T: Element> {
    pub(super) geometry: &'a Geometry,
    pub(super) channels: Range<usize>,
    pub(super) x: Source<'a, T>,
    pub(super) partials: Partials<'a, f64>,
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
            for (found, values) in self.found.iter().zip([pivots, rounded(&mean), rounded(&variance)]) {
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
            let (mean, variance): (Lanes<T::Param>, Lanes<T::Param>) = (rounded(&mean), rounded(&variance));
            // SAFETY: no other task has these channels, and all sinks have one element per channel.
            unsafe {
                self.saved.pivot.store(level, channel, count, &pivots);
                self.saved.offset.store(level, channel, count, &mean);
                let invstd = lanes(|i| batch_invstd(variance[i], self.eps));
                self.saved.invstd.store(level, channel, count, &invstd);
            }
            if let Some(running) = self.running {
                let values = self.geometry.values() as f64;
                let unbias = T::Param::from_f64(values / (values - 1.0));
                let batch = [lanes(|i| pivots[i] + mean[i]), lanes(|i| variance[i] * unbias)];
                // SAFETY: as above.
                unsafe { running.update(level, channel, count, &batch) };
            }
        }
    }
}

/// The lanes in the precision of parameters.
#[inline(always)]
fn rounded<P: Real>(values: &Lanes<f64>) -> Lanes<P> {
    lanes(|i| P::from_f64(values[i]))
}

/// Mean and variance of all parts of some channels.
struct PartMoments<'a, S> {
    level: S,
    geometry: &'a Geometry,
    partials: Partials<'a, f64>,
    channel: usize,
    count: usize,
}

impl<S: Level> Tree for PartMoments<'_, S> {
    type Node = ([Lanes<f64>; 2], u64);

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
