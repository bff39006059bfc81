//! Mean and variance of one channel, gathered piece by piece and merged: the state of the CPU backend's statistics and of
//! whatever merges statistics on the host.
//!
//! Pieces come with their mean and variance, and are merged pairwise. The update of a mean by one more observation is
//! Welford's (1962, *Note on a method for calculating corrected sums of squares and products*, Technometrics 4); its form for
//! two sets is that of Chan, Golub and LeVeque (1979, *Updating formulae and a pairwise algorithm for computing sample
//! variances*, Stanford STAN-CS-79-773). Unlike theirs, the state holds the variance and not the sum of squared deviations:
//! in `f32`, with a deviation of 1e17, the sum overflows long before the variance does.

use crate::element::Real;

/// Count, mean and biased variance of a set of values. In this crate the values are `x - K`, K the channel's pivot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Welford<P> {
    /// How many values. An integer: `f32` cannot count beyond 2²⁴.
    pub(crate) count: u64,
    /// Their mean.
    pub(crate) mean: P,
    /// The mean square of their deviations from the mean.
    pub(crate) variance: P,
}

impl<P: Real> Welford<P> {
    /// No values.
    pub(crate) const EMPTY: Self = Self {
        count: 0,
        mean: P::ZERO,
        variance: P::ZERO,
    };

    /// Adds `count` values at once: their mean, and the mean square of their deviations from it.
    #[inline(always)]
    pub(crate) fn push_chunk(self, count: u64, mean: P, variance: P) -> Self {
        self.merge(Self { count, mean, variance })
    }

    /// Both sets as one.
    #[inline(always)]
    pub(crate) fn merge(self, other: Self) -> Self {
        if self.count == 0 {
            return other;
        }
        if other.count == 0 {
            return self;
        }
        let weights = Weights::new(self.count, other.count);
        let (mean, variance) = weights.merge((self.mean, self.variance), (other.mean, other.variance));
        Self {
            count: self.count + other.count,
            mean,
            variance,
        }
    }
}

/// The shares of two sets, neither empty, in their union. Apart from the state because all channels of a piece have the
/// same, so that a vector of channels is merged with one division.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<P> {
    first: P,
    second: P,
}

impl<P: Real> Weights<P> {
    /// The shares of sets of `first` and `second` values.
    #[inline(always)]
    pub(crate) fn new(first: u64, second: u64) -> Self {
        let both = (first + second) as f64;
        Self {
            first: P::from_f64(first as f64 / both),
            second: P::from_f64(second as f64 / both),
        }
    }

    /// Mean and variance of the union from (mean, variance) of each set.
    #[inline(always)]
    pub(crate) fn merge(self, first: (P, P), second: (P, P)) -> (P, P) {
        let delta = second.0 - first.0;
        // From an infinite mean on, delta is infinite too, and inf - inf would make a NaN of a mean that is infinite.
        let mean = if first.0.is_finite() {
            delta.mul_add(self.second, first.0)
        } else {
            first.0 + second.0
        };
        // Each factor is shrunk before they are multiplied: delta² alone may overflow.
        let variance = first.1 * self.first + second.1 * self.second + (delta * self.first) * (delta * self.second);
        (mean, variance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds a slice, by two passes over it.
    fn push<P: Real>(state: Welford<P>, values: &[P]) -> Welford<P> {
        let mean = values.iter().copied().sum::<P>() / P::from_f64(values.len() as f64);
        let share = P::ONE / P::from_f64(values.len() as f64);
        let variance = values
            .iter()
            .map(|&value| (value - mean) * share * (value - mean))
            .sum();
        state.push_chunk(values.len() as u64, mean, variance)
    }

    fn of_chunks<P: Real>(values: &[P], chunk: usize) -> Welford<P> {
        values.chunks(chunk).fold(Welford::EMPTY, push)
    }

    fn reference(values: &[f64]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        (mean, values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n)
    }

    /// Numbers without a pattern, in [-1, 1).
    fn noise(len: usize) -> Vec<f64> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .take(len)
        .collect()
    }

    #[test]
    fn chunks_of_any_size_give_the_moments_of_the_whole() {
        let values = noise(1000);
        let (mean, variance) = reference(&values);
        for chunk in [1, 2, 7, 64, 999, 1000] {
            let state = of_chunks(&values, chunk);
            assert_eq!(state.count, 1000);
            assert!(
                (state.mean - mean).abs() < 1e-15,
                "chunk {chunk}: {} for {mean}",
                state.mean
            );
            assert!((state.variance - variance).abs() < 1e-15, "chunk {chunk}");
        }
    }

    #[test]
    fn a_single_precision_state_stays_within_its_precision_of_the_truth() {
        let narrow: Vec<f32> = noise(1 << 16).into_iter().map(|value| value as f32).collect();
        let (mean, variance) = reference(&narrow.iter().map(|&value| value.into()).collect::<Vec<_>>());
        let state = of_chunks(&narrow, 64);
        assert!((f64::from(state.mean) - mean).abs() < 1e-7);
        assert!((f64::from(state.variance) / variance - 1.0).abs() < 6e-7);
    }

    #[test]
    fn the_same_order_gives_the_same_bits() {
        let values = noise(5000);
        let first = of_chunks(&values, 48);
        let second = of_chunks(&values, 48);
        assert_eq!(first.mean.to_bits(), second.mean.to_bits());
        assert_eq!(first.variance.to_bits(), second.variance.to_bits());
    }

    #[test]
    fn an_empty_side_gives_the_other_side() {
        let state = push(Welford::EMPTY, &[1.0f32, 2.0, 4.0]);
        assert_eq!(state.merge(Welford::EMPTY), state);
        assert_eq!(Welford::EMPTY.merge(state), state);
        assert_eq!(Welford::<f32>::EMPTY.merge(Welford::EMPTY), Welford::EMPTY);
    }

    #[test]
    fn one_value_is_its_own_mean_without_variance() {
        let state = push(Welford::EMPTY, &[-3.5f64]);
        assert_eq!((state.count, state.mean, state.variance), (1, -3.5, 0.0));
    }

    #[test]
    fn an_infinity_stays_an_infinity_in_the_mean() {
        for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
            let infinite = push(Welford::EMPTY, &[1.0, infinity]);
            let finite = push(Welford::EMPTY, &[1.0, 2.0, 3.0]);
            for state in [infinite.merge(finite), finite.merge(infinite), infinite.merge(infinite)] {
                assert_eq!(state.mean, infinity);
                assert!(state.variance.is_nan());
            }
        }
        let opposite = push(Welford::EMPTY, &[f32::INFINITY]).merge(push(Welford::EMPTY, &[f32::NEG_INFINITY]));
        assert!(opposite.mean.is_nan());
    }

    #[test]
    fn a_nan_spoils_mean_and_variance() {
        let spoilt = push(push(Welford::EMPTY, &[1.0f32]), &[f32::NAN]).merge(push(Welford::EMPTY, &[2.0]));
        assert!(spoilt.mean.is_nan() && spoilt.variance.is_nan());
    }

    #[test]
    fn nothing_overflows_while_the_variance_fits_the_type() {
        // 1e17 squared is 1e34; the sum of more than 34000 of them would be beyond f32.
        let values: Vec<f32> = (0..100_000).map(|i| if i % 2 == 0 { 1e17 } else { -1e17 }).collect();
        let state = values
            .chunks(1000)
            .map(|chunk| push(Welford::EMPTY, chunk))
            .fold(Welford::EMPTY, Welford::merge);
        assert!(state.mean.abs() < 1e11);
        assert!((state.variance / 1e34 - 1.0).abs() < 1e-4, "{}", state.variance);

        let apart = Welford {
            count: 1,
            mean: 1e19f32,
            variance: 0.0,
        }
        .merge(Welford {
            count: 1 << 20,
            mean: 0.0,
            variance: 0.0,
        });
        assert!(apart.variance.is_finite());
    }

    #[test]
    fn counts_beyond_single_precision_are_exact() {
        let big = Welford {
            count: 1 << 24,
            mean: 1.0f32,
            variance: 0.5,
        };
        let one = Welford {
            count: 1,
            mean: 1.0f32,
            variance: 0.5,
        };
        assert_eq!(big.merge(one).count, (1 << 24) + 1);
        let huge = Welford {
            count: u64::MAX / 4,
            ..big
        };
        let both = huge.merge(huge);
        assert_eq!(both.count, u64::MAX / 4 * 2);
        assert_eq!((both.mean, both.variance), (1.0, 0.5));
    }
}
