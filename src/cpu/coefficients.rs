//! What a channel's values are computed with, where vectors find it: the same for all lanes in NCHW, by position in a run
//! in NHWC.

use std::ops::Range;

use super::Cpu;
use super::geometry::STRIP;
use super::memory::Source;
use super::simd::{LANES, Lanes, Level, blocks, lanes, splat};
use crate::backend::BatchStatistics;
use crate::element::{Element, Real};

/// Index of the mean, rounded.
pub(super) const MEAN: usize = 0;
/// Index of invstd · weight.
pub(super) const SCALE: usize = 1;
/// Index of the bias, less what the rest of the mean makes of the scale.
pub(super) const SHIFT: usize = 2;
/// How many coefficients normalisation has.
pub(super) const NORMALISATION: usize = 3;

/// Coefficients of the values of a block.
pub(super) trait Coefficients<P: Real> {
    /// The coefficient `index` of the values from `position` in the run on.
    fn at(&self, index: usize, position: usize) -> Lanes<P>;
}

/// One channel: every position has the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Uniform<P, const M: usize>(pub(super) [P; M]);

impl<P: Real, const M: usize> Coefficients<P> for Uniform<P, M> {
    #[inline(always)]
    fn at(&self, index: usize, _position: usize) -> Lanes<P> {
        splat(self.0[index])
    }
}

/// A strip of channels, repeated as often as a run has pixels.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(super) struct Table<P, const M: usize>([[P; TABLE]; M]);

/// A run, and room for the whole of the last vector.
const TABLE: usize = STRIP + LANES;

impl<P: Real, const M: usize> Table<P, M> {
    /// All zero.
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self([[P::ZERO; TABLE]; M])
    }

    /// Sets a coefficient of the positions from `position` on.
    #[inline(always)]
    pub(super) fn set(&mut self, index: usize, position: usize, values: &Lanes<P>) {
        self.0[index][position..position + LANES].copy_from_slice(values);
    }

    /// As [`Table::set`] of what elements are computed with, every NaN as the one that all element types have: rounding relies on
    /// it ([`narrow_bf16`](Level::narrow_bf16)), and parameters may have others.
    #[inline(always)]
    pub(super) fn set_coefficient(&mut self, index: usize, position: usize, values: &Lanes<P>) {
        let nan = P::from_f64(f64::NAN);
        let values = lanes(|i| if values[i].is_nan() { nan } else { values[i] });
        self.set(index, position, &values);
    }

    /// Adds to a coefficient of the positions from `position` on.
    #[inline(always)]
    pub(super) fn add<S: Level>(&mut self, level: S, index: usize, position: usize, values: Lanes<P>) {
        let sum = level.add(self.at(index, position), values);
        self.set(index, position, &sum);
    }

    /// Copies the first `channels` positions over the following ones, so that they are there `repeats` times.
    #[inline(always)]
    pub(super) fn repeat(&mut self, channels: usize, repeats: usize) {
        for row in &mut self.0 {
            for repeat in 1..repeats {
                row.copy_within(..channels, repeat * channels);
            }
        }
    }

    /// Makes position `first` of those that come again after `period` the first position, and repeats as many as a vector
    /// has behind the last, so that vectors may start anywhere.
    #[inline(always)]
    pub(super) fn start_at(&mut self, first: usize, period: usize) {
        for row in &mut self.0 {
            row[..period].rotate_left(first % period);
            row.copy_within(..LANES, period);
        }
    }

    /// Puts each of the vectors that the first `period` positions consist of into the lanes in which [`LaneOrder::Quickest`] has
    /// the elements of a block of `bf16`.
    ///
    /// [`LaneOrder::Quickest`]: super::simd::LaneOrder::Quickest
    #[inline(always)]
    pub(super) fn order_for_bf16<S: Level>(&mut self, level: S, period: usize) {
        for row in &mut self.0 {
            for values in row[..period].as_chunks_mut::<LANES>().0 {
                *values = level.lanes_of_bf16(*values);
            }
        }
    }

    /// Adds the repetitions of the first `channels` positions to these.
    #[inline(always)]
    pub(super) fn fold(&mut self, channels: usize, repeats: usize) {
        for row in &mut self.0 {
            let (sums, repetitions) = row.split_at_mut(channels);
            for repetition in repetitions.chunks_exact(channels).take(repeats - 1) {
                for (sum, &value) in sums.iter_mut().zip(repetition) {
                    *sum = *sum + value;
                }
            }
        }
    }

    /// All positions of a coefficient.
    #[cfg(test)]
    pub(super) fn row(&self, index: usize) -> &[P] {
        &self.0[index]
    }

    /// The coefficients of one position.
    #[inline(always)]
    pub(super) fn uniform(&self, position: usize) -> Uniform<P, M> {
        let mut coefficients = [P::ZERO; M];
        for (coefficient, row) in coefficients.iter_mut().zip(&self.0) {
            *coefficient = row[position];
        }
        Uniform(coefficients)
    }
}

impl<P: Real> Table<P, 2> {
    /// Both coefficients of the positions from `position` on.
    #[inline(always)]
    pub(super) fn both(&self, position: usize) -> [Lanes<P>; 2] {
        [self.at(0, position), self.at(1, position)]
    }

    /// Sets both.
    #[inline(always)]
    pub(super) fn set_both(&mut self, position: usize, [first, second]: &[Lanes<P>; 2]) {
        self.set(0, position, first);
        self.set(1, position, second);
    }
}

impl<P: Real, const M: usize> Coefficients<P> for Table<P, M> {
    #[inline(always)]
    fn at(&self, index: usize, position: usize) -> Lanes<P> {
        // Changes nothing, and costs less than the check that it makes needless.
        debug_assert!(position < STRIP);
        let position = position % STRIP;
        *self.0[index][position..]
            .first_chunk()
            .expect("a position has a vector's room behind it")
    }
}

/// What tensors are normalised by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Normalisation<'a, P> {
    /// Mean and deviation.
    pub(super) statistics: Statistics<'a, P>,
    /// Scale per channel; 1 if absent.
    pub(super) weight: Option<&'a [P]>,
    /// Shift per channel; 0 if absent.
    pub(super) bias: Option<&'a [P]>,
}

/// Mean and deviation per channel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Statistics<'a, P> {
    /// Given.
    Running {
        /// Mean per channel.
        mean: &'a [P],
        /// Variance per channel.
        variance: &'a [P],
        /// Added to the variance.
        eps: P,
    },
    /// Of the batch.
    Batch {
        /// K per channel.
        pivot: Source<'a, P>,
        /// d per channel.
        offset: Source<'a, P>,
        /// 1 / sqrt(variance + eps) per channel.
        invstd: Source<'a, P>,
    },
}

impl<'a, P: Real> Statistics<'a, P> {
    /// Those that a forward pass left.
    pub(super) fn of_batch<T: Element<Param = P>>(saved: &'a BatchStatistics<Cpu, T>) -> Self {
        Self::Batch {
            pivot: Source::from(saved.pivot.as_slice()),
            offset: Source::from(saved.mean_offset.as_slice()),
            invstd: Source::from(saved.invstd.as_slice()),
        }
    }
}

/// `1 / sqrt(variance + eps)` of a batch, rounded once. As in PyTorch it is 0 where both are 0, so that a constant channel gives
/// the bias without an eps too.
#[inline(always)]
pub(super) fn batch_invstd<P: Real>(variance: P, eps: f64) -> P {
    let sum = variance.to_f64() + eps;
    if sum == 0.0 {
        P::ZERO
    } else {
        P::from_f64(1.0 / sum.sqrt())
    }
}

/// `1 / sqrt(variance + eps)`, each operation rounded once.
#[inline(always)]
pub(super) fn invstd<P: Real>(variance: P, eps: P) -> P {
    P::ONE / (variance + eps).sqrt()
}

/// What some channels are normalised by: `x̂ = ((x - mean) - rest) · invstd`.
pub(super) struct Centres<P> {
    /// The mean, rounded; of a batch so coarsely that x - mean is exact for most x: see [`coarse`].
    pub(super) mean: Lanes<P>,
    /// What rounding took from it.
    pub(super) rest: Lanes<P>,
    /// 1 / sqrt(variance + eps).
    pub(super) invstd: Lanes<P>,
}

/// A mean K + d rounded to the spacing that numbers of 16 deviations have. Of all x between there and the mean, which are multiples
/// of finer ones, it can be subtracted without rounding; of a mean far from 0 in deviations little or nothing is rounded. A
/// constant channel keeps its own, so that y is the bias to the last bit.
#[inline(always)]
pub(super) fn coarse<P: Real>(mean: P, offset: P, invstd: P) -> P {
    let deviations = P::from_f64(16.0) / invstd;
    let rounded = (mean + deviations) - deviations;
    if offset != P::ZERO && rounded.is_finite() {
        rounded
    } else {
        mean
    }
}

impl<P: Real> Normalisation<'_, P> {
    /// The numbers of `count` channels from `channel` on.
    ///
    /// # Safety
    /// The channels exist, and no thread writes their statistics meanwhile.
    #[inline(always)]
    pub(super) unsafe fn centres<S: Level>(&self, level: S, channel: usize, count: usize) -> Centres<P> {
        // SAFETY: the caller's promise.
        unsafe {
            match self.statistics {
                Statistics::Running { mean, variance, eps } => {
                    let variance = Source::from(variance).load(level, channel, count);
                    Centres {
                        mean: Source::from(mean).load(level, channel, count),
                        rest: splat(P::ZERO),
                        invstd: lanes(|i| invstd(variance[i], eps)),
                    }
                }
                Statistics::Batch { pivot, offset, invstd } => {
                    let pivot = pivot.load(level, channel, count);
                    let offset = offset.load(level, channel, count);
                    let invstd = invstd.load(level, channel, count);
                    let [mean, rest] = two_sum(level, pivot, offset);
                    let coarse = lanes(|i| coarse(mean[i], offset[i], invstd[i]));
                    let rest = lanes(|i| (mean[i] - coarse[i]) + rest[i]);
                    Centres {
                        mean: coarse,
                        rest,
                        invstd,
                    }
                }
            }
        }
    }

    /// The weights of `count` channels from `channel` on.
    #[inline(always)]
    pub(super) fn weight<S: Level>(&self, level: S, channel: usize, count: usize) -> Lanes<P> {
        load_or(level, self.weight, P::ONE, channel, count)
    }

    /// Writes the coefficients of `channels` to the first positions of `table`.
    ///
    /// # Safety
    /// As [`Normalisation::centres`].
    #[inline(always)]
    pub(super) unsafe fn fill<S: Level, const M: usize>(
        &self,
        level: S,
        channels: &Range<usize>,
        table: &mut Table<P, M>,
    ) {
        for (at, count) in blocks(channels.len()) {
            let channel = channels.start + at;
            // SAFETY: the caller's promise.
            let Centres { mean, rest, invstd } = unsafe { self.centres(level, channel, count) };
            let weight = self.weight(level, channel, count);
            let bias = load_or(level, self.bias, P::ZERO, channel, count);
            let scale = lanes(|i| invstd[i] * weight[i]);
            table.set_coefficient(MEAN, at, &mean);
            table.set_coefficient(SCALE, at, &scale);
            table.set_coefficient(SHIFT, at, &lanes(|i| less_rest(bias[i], rest[i], scale[i])));
        }
    }
}

/// The sum, rounded, and what rounding took from it (Knuth's TwoSum).
#[inline(always)]
fn two_sum<S: Level, P: Real>(level: S, a: Lanes<P>, b: Lanes<P>) -> [Lanes<P>; 2] {
    let sum = level.add(a, b);
    let taken = level.sub(sum, a);
    let rest = level.add(level.sub(a, level.sub(sum, taken)), level.sub(b, taken));
    [sum, rest]
}

/// `term - rest · factor`: where x - mean, times the factor, is added to the result, it is as if x had been taken from the mean
/// before that was rounded. An infinite factor makes of every x what it will, and nothing of a rest.
#[inline(always)]
pub(super) fn less_rest<P: Real>(term: P, rest: P, factor: P) -> P {
    let corrected = (-rest).mul_add(factor, term);
    if factor.is_finite() && rest.is_finite() {
        corrected
    } else {
        term
    }
}

/// Values of `count` channels from `channel` on, or `absent` for all.
#[inline(always)]
fn load_or<S: Level, P: Real>(level: S, values: Option<&[P]>, absent: P, channel: usize, count: usize) -> Lanes<P> {
    match values {
        // SAFETY: a slice cannot be written meanwhile, and this part of it exists.
        Some(values) => unsafe { Source::from(&values[channel..channel + count]).load(level, 0, count) },
        None => splat(absent),
    }
}
