//! Sums over the values of a channel, several at once, always in the same order.
//!
//! Terms are added in three levels, so that no partial sum takes up more than a few dozen of them one after another and
//! rounding errors stay near those of pairwise summation (Higham 1993, *The accuracy of floating point summation*): into
//! the lanes of a chunk, chunk upon chunk within a part, and parts pairwise ([`pairwise`]).

use std::ops::Range;

use super::coefficients::Table;
use super::geometry::{Interleaved, Planar};
use super::simd::{LANES, Lanes, blocks, lanes};
use crate::element::Real;

/// Some adjacent values of a run, not more than [`LANES`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// The first, as an index into the tensor.
    pub(super) at: usize,
    /// The first, as an index into the run.
    pub(super) position: usize,
    /// How many.
    pub(super) count: usize,
}

/// `M` sums over a chunk of one channel. `terms` gives what the values of a block add to each; lanes beyond its count are
/// ignored. `U` vectors are added to at once, so that additions need not wait for each other.
#[inline(always)]
pub(super) fn planar_sums<P: Real, const M: usize, const U: usize>(
    planar: &Planar,
    channel: usize,
    chunk: usize,
    terms: impl Fn(Block) -> [Lanes<P>; M],
) -> [P; M] {
    let mut sums = [[[P::ZERO; LANES]; U]; M];
    planar.runs(channel, chunk, |run| {
        let unrolled = run.len - run.len % (U * LANES);
        for position in (0..unrolled).step_by(U * LANES) {
            for vector in 0..U {
                let position = position + vector * LANES;
                let added = terms(Block {
                    at: run.start + position,
                    position,
                    count: LANES,
                });
                for (sum, added) in sums.iter_mut().zip(&added) {
                    sum[vector] = add(&sum[vector], added);
                }
            }
        }
        blocks(run.len - unrolled, |position, count| {
            let position = unrolled + position;
            let added = terms(Block {
                at: run.start + position,
                position,
                count,
            });
            for (sum, added) in sums.iter_mut().zip(&added) {
                sum[0] = add(&sum[0], &first(added, count));
            }
        });
    });
    sums.map(|vectors| total(&vectors))
}

/// `M` sums over some pixels for each channel of a strip, at the strip's positions in `sums`, which is overwritten.
#[inline(always)]
pub(super) fn interleaved_sums<P: Real, const M: usize>(
    interleaved: &Interleaved,
    channels: &Range<usize>,
    pixels: &Range<usize>,
    sums: &mut Table<P, M>,
    terms: impl Fn(Block) -> [Lanes<P>; M],
) {
    *sums = Table::new();
    let runs = interleaved.full_runs(channels, pixels);
    let quadruples = runs.count - runs.count % 4;
    for run in (0..quadruples).step_by(4) {
        blocks(runs.len, |position, count| {
            let term = |run| {
                terms(Block {
                    at: runs.start(run) + position,
                    position,
                    count,
                })
            };
            let four = [term(run), term(run + 1), term(run + 2), term(run + 3)];
            for index in 0..M {
                let added = add(
                    &add(&four[0][index], &four[1][index]),
                    &add(&four[2][index], &four[3][index]),
                );
                sums.add(index, position, &first(&added, count));
            }
        });
    }
    let mut add_run = |start: usize, len: usize| {
        blocks(len, |position, count| {
            let added = terms(Block {
                at: start + position,
                position,
                count,
            });
            for (index, added) in added.iter().enumerate() {
                sums.add(index, position, &first(added, count));
            }
        });
    };
    for run in quadruples..runs.count {
        add_run(runs.start(run), runs.len);
    }
    let last = interleaved.last_run(channels, pixels);
    add_run(last.start, last.len);
    sums.fold(channels.len(), interleaved.repeats());
}

/// Joins what `leaf` gives for each of `0..count`, at least one: neighbours, then pairs of neighbours, and so on.
#[inline(always)]
pub(super) fn pairwise<R>(count: usize, leaf: impl Fn(usize) -> R, join: impl Fn(R, R) -> R) -> R {
    // Level k waits with the join of 2^k leaves for the next 2^k: the digits of a binary counter. Not by recursion, which
    // could not be inlined (see `Kernel`).
    let mut waiting = [const { None }; usize::BITS as usize];
    for index in 0..count {
        let mut joined = leaf(index);
        let mut level = 0;
        while let Some(earlier) = Option::take(&mut waiting[level]) {
            joined = join(earlier, joined);
            level += 1;
        }
        waiting[level] = Some(joined);
    }
    waiting
        .into_iter()
        .flatten()
        .reduce(|later, earlier| join(earlier, later))
        .expect("at least one leaf")
}

#[inline(always)]
fn add<P: Real>(a: &Lanes<P>, b: &Lanes<P>) -> Lanes<P> {
    lanes(|i| a[i] + b[i])
}

/// The first `count` lanes, the others zero.
#[inline(always)]
fn first<P: Real>(values: &Lanes<P>, count: usize) -> Lanes<P> {
    if count == LANES {
        *values
    } else {
        lanes(|i| if i < count { values[i] } else { P::ZERO })
    }
}

/// The sum of all lanes of all vectors, halves with halves.
#[inline(always)]
fn total<P: Real, const U: usize>(vectors: &[Lanes<P>; U]) -> P {
    let mut sum = *vectors;
    let mut width = U;
    while width > 1 {
        width /= 2;
        for vector in 0..width {
            sum[vector] = add(&sum[vector], &sum[vector + width]);
        }
    }
    let mut sum = sum[0];
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sum[lane] = sum[lane] + sum[lane + width];
        }
    }
    sum[0]
}
