//! Sums over the values of a channel, several at once, always in the same order.
//!
//! Terms are added in three levels, so that no partial sum takes up more than a few dozen of them one after another and
//! rounding errors stay near those of pairwise summation (Higham 1993, *The accuracy of floating point summation*): into
//! the lanes of a chunk, chunk upon chunk within a part, and parts pairwise ([`pairwise`]).

use std::ops::Range;

use super::coefficients::Table;
use super::geometry::{Interleaved, Runs};
use super::simd::{LANES, Lanes, Level, blocks};
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

impl Block {
    /// `count` values from `position` on of the run that starts at `start`.
    #[inline(always)]
    pub(super) fn new(start: usize, position: usize, count: usize) -> Self {
        Self {
            at: start + position,
            position,
            count,
        }
    }
}

/// What is added up.
pub(super) trait Terms<P: Real, const M: usize> {
    /// What the values of a block add to each of `M` sums. Lanes beyond its count are ignored.
    fn terms(&self, block: Block) -> [Lanes<P>; M];
}

/// Sums over some runs of one channel. `U` vectors are added to at once, so that additions need not wait for each other.
#[inline(always)]
pub(super) fn planar_sums<S: Level, P: Real, const M: usize, const U: usize>(
    level: S,
    runs: Runs,
    terms: &impl Terms<P, M>,
) -> [P; M] {
    let mut sums = [[[P::ZERO; LANES]; U]; M];
    let mut rests = [[[P::ZERO; LANES]; 1]; M];
    for run in 0..runs.count {
        let start = runs.start(run);
        let mut position = 0;
        while position + U * LANES <= runs.len {
            for vector in 0..U {
                let block = Block::new(start, position + vector * LANES, LANES);
                add_block(level, &mut sums, vector, block, terms);
            }
            position += U * LANES;
        }
        while position + LANES <= runs.len {
            add_block(level, &mut rests, 0, Block::new(start, position, LANES), terms);
            position += LANES;
        }
        if position < runs.len {
            let rest = Block::new(start, position, runs.len - position);
            add_block(level, &mut rests, 0, rest, terms);
        }
    }
    let mut totals = [P::ZERO; M];
    for ((total, vectors), rest) in totals.iter_mut().zip(&sums).zip(&rests) {
        *total = sum_of_lanes(level, vectors) + sum_of_lanes(level, rest);
    }
    totals
}

/// Adds the values of a block to one vector of each sum.
#[inline(always)]
fn add_block<S: Level, P: Real, const M: usize, const U: usize>(
    level: S,
    sums: &mut [[Lanes<P>; U]; M],
    vector: usize,
    block: Block,
    terms: &impl Terms<P, M>,
) {
    let added = terms.terms(block);
    for (sum, added) in sums.iter_mut().zip(&added) {
        sum[vector] = level.add(sum[vector], first(level, *added, block.count));
    }
}

/// Sums over some pixels for each channel of a strip, at the strip's positions in `sums`, which is overwritten. In the order of
/// memory, four runs side by side: they are added pair to pair before they are added to the sum, which shortens the chain of
/// additions that wait for each other, and of their rounding errors, and has sums fetched once for four values.
#[inline(always)]
pub(super) fn interleaved_sums<S: Level, P: Real, const M: usize>(
    level: S,
    interleaved: &Interleaved,
    channels: &Range<usize>,
    pixels: &Range<usize>,
    sums: &mut Table<P, M>,
    terms: &impl Terms<P, M>,
) {
    *sums = Table::new();
    let runs = interleaved.full_runs(channels, pixels);
    let (full, rest) = (runs.len / LANES * LANES, runs.len % LANES);
    let fours = runs.count / 4;
    for four in 0..fours {
        let run = four * 4;
        let starts = [
            runs.start(run),
            runs.start(run + 1),
            runs.start(run + 2),
            runs.start(run + 3),
        ];
        let mut position = 0;
        while position < full {
            add_four(level, starts, position, LANES, sums, terms);
            position += LANES;
        }
        if rest > 0 {
            add_four(level, starts, full, rest, sums, terms);
        }
    }
    for run in fours * 4..runs.count {
        add_run(level, runs.start(run), runs.len, sums, terms);
    }
    let last = interleaved.last_run(channels, pixels);
    for run in 0..last.count {
        add_run(level, last.start(run), last.len, sums, terms);
    }
    sums.fold(channels.len(), interleaved.repeats());
}

/// Adds `count` values from a position on of each of four runs.
#[inline(always)]
fn add_four<S: Level, P: Real, const M: usize>(
    level: S,
    starts: [usize; 4],
    position: usize,
    count: usize,
    sums: &mut Table<P, M>,
    terms: &impl Terms<P, M>,
) {
    let a = terms.terms(Block::new(starts[0], position, count));
    let b = terms.terms(Block::new(starts[1], position, count));
    let c = terms.terms(Block::new(starts[2], position, count));
    let d = terms.terms(Block::new(starts[3], position, count));
    for sum in 0..M {
        let added = level.add(level.add(a[sum], b[sum]), level.add(c[sum], d[sum]));
        sums.add(level, sum, position, first(level, added, count));
    }
}

/// Adds a run.
#[inline(always)]
fn add_run<S: Level, P: Real, const M: usize>(
    level: S,
    start: usize,
    len: usize,
    sums: &mut Table<P, M>,
    terms: &impl Terms<P, M>,
) {
    for (position, count) in blocks(len) {
        let added = terms.terms(Block::new(start, position, count));
        for (sum, added) in added.iter().enumerate() {
            sums.add(level, sum, position, first(level, *added, count));
        }
    }
}

/// What is joined in pairs.
pub(super) trait Tree {
    /// What is joined.
    type Node;

    /// The node of one part.
    fn leaf(&self, part: usize) -> Self::Node;

    /// The node of two neighbours.
    fn join(&self, first: Self::Node, second: Self::Node) -> Self::Node;
}

/// Joins `count` leaves, at least one: neighbours, then pairs of neighbours, and so on.
#[inline(always)]
pub(super) fn pairwise<R: Tree>(tree: &R, count: usize) -> R::Node {
    // Level k waits with the join of 2^k leaves for the next 2^k: the digits of a binary counter. Not by recursion, which
    // could not be inlined.
    let mut waiting: [Option<R::Node>; usize::BITS as usize] = [const { None }; usize::BITS as usize];
    for part in 0..count {
        let mut node = tree.leaf(part);
        let mut level = 0;
        while let Some(earlier) = waiting[level].take() {
            node = tree.join(earlier, node);
            level += 1;
        }
        waiting[level] = Some(node);
    }
    let mut joined = None;
    for earlier in waiting.into_iter().flatten() {
        joined = Some(match joined {
            Some(later) => tree.join(earlier, later),
            None => earlier,
        });
    }
    joined.expect("at least one leaf")
}

/// The first `count` lanes, the others zero.
#[inline(always)]
fn first<S: Level, P: Real>(level: S, values: Lanes<P>, count: usize) -> Lanes<P> {
    if count == LANES {
        values
    } else {
        level.first(values, count)
    }
}

/// The sum of all lanes of all vectors, halves with halves.
#[inline(always)]
fn sum_of_lanes<S: Level, P: Real, const U: usize>(level: S, vectors: &[Lanes<P>; U]) -> P {
    let mut sum = *vectors;
    let mut width = U;
    while width > 1 {
        width /= 2;
        for vector in 0..width {
            sum[vector] = level.add(sum[vector], sum[vector + width]);
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
