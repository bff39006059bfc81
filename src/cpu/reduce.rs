//! Sums over the values of a channel, several at once, always in the same order.
//!
//! Terms are added in levels, so that no partial sum takes up more than about a hundred of them one after another and rounding
//! errors stay near those of pairwise summation (Higham 1993, *The accuracy of floating point summation*): a few to each other,
//! these into the lanes of a chain, chains into the lanes of a chunk, chunk upon chunk within a part, and parts pairwise
//! ([`pairwise`]).

use std::ops::Range;

use super::coefficients::Table;
use super::geometry::{Interleaved, Runs, STREAMS};
use super::simd::{LANES, LaneOrder, Lanes, Level, blocks, splat};
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
    /// Which lanes they are in.
    pub(super) lanes: LaneOrder,
}

impl Block {
    /// `count` values from `position` on of the run that starts at `start`.
    #[inline(always)]
    pub(super) fn new(start: usize, position: usize, count: usize) -> Self {
        Self {
            at: start + position,
            position,
            count,
            lanes: LaneOrder::Natural,
        }
    }

    /// The same values in whichever lanes are quickest.
    #[inline(always)]
    pub(super) fn quickest(self) -> Self {
        Self {
            lanes: LaneOrder::Quickest,
            ..self
        }
    }
}

/// What is added up: of two numbers a and b for each value, Σ a and Σ a · b, each product added with one rounding.
pub(super) trait Terms<P: Real> {
    /// a and b of the values of a block, b finite if its sum can be. Lanes beyond the block's count are ignored.
    fn terms(&self, block: Block) -> [Lanes<P>; 2];
}

/// a without the lanes before the last `count`, which are fewer than all.
#[inline(always)]
fn last<S: Level, P: Real>(level: S, [a, b]: [Lanes<P>; 2], count: usize) -> [Lanes<P>; 2] {
    [level.join(splat(P::ZERO), a, LANES - count), b]
}

/// Both sums, lane by lane.
type Sums<P> = [Lanes<P>; 2];

/// Adds a and a · b.
#[inline(always)]
fn add<S: Level, P: Real>(level: S, sums: &mut Sums<P>, [a, b]: [Lanes<P>; 2]) {
    sums[0] = level.add(sums[0], a);
    sums[1] = level.mul_add(a, b, sums[1]);
}

/// a without the lanes beyond `count`.
#[inline(always)]
fn first<S: Level, P: Real>(level: S, [a, b]: [Lanes<P>; 2], count: usize) -> [Lanes<P>; 2] {
    if count == LANES {
        [a, b]
    } else {
        [level.join(a, splat(P::ZERO), count), b]
    }
}

/// Sums over some runs of one channel.
#[inline(always)]
pub(super) fn planar_sums<S: Level, P: Real>(level: S, runs: Runs, terms: &impl Terms<P>) -> [P; 2] {
    let mut sums = ChainedSums::new();
    if runs.len < LANES {
        for run in 0..runs.count {
            let block = Block::new(runs.start(run), 0, runs.len);
            add(level, &mut sums.chain, first(level, terms.terms(block), runs.len));
            sums.end_after(level, 1);
        }
        return sums.total(level);
    }
    let side_by_side = runs.count / STREAMS;
    for run in 0..side_by_side {
        let starts = streams(&runs, run, side_by_side);
        let mut position = 0;
        while position + LANES <= runs.len {
            let (from, end) = (position, runs.len.min(position + CHAIN * LANES));
            while position + LANES <= end {
                add_streams::<_, _, true>(level, &mut sums.chain, starts, position, LANES, terms);
                position += LANES;
            }
            sums.end_after(level, (position - from) / LANES);
        }
        if position < runs.len {
            let (last, count) = (runs.len - LANES, runs.len - position);
            add_streams::<_, _, false>(level, &mut sums.chain, starts, last, count, terms);
        }
    }
    for run in side_by_side * STREAMS..runs.count {
        let start = runs.start(run);
        let mut position = 0;
        while position + LANES <= runs.len {
            let (from, end) = (position, runs.len.min(position + CHAIN * LANES));
            while position + LANES <= end {
                add(level, &mut sums.chain, terms.terms(Block::new(start, position, LANES)));
                position += LANES;
            }
            sums.end_after(level, (position - from) / LANES);
        }
        if position < runs.len {
            let block = Block::new(start, runs.len - LANES, LANES);
            add(
                level,
                &mut sums.chain,
                last(level, terms.terms(block), runs.len - position),
            );
        }
    }
    sums.total(level)
}

/// Additions one after another to one sum, about.
const CHAIN: usize = 64;

/// Sums of a chain of additions, and of the chains before it.
struct ChainedSums<P> {
    chain: Sums<P>,
    before: Sums<P>,
    added: usize,
}

impl<P: Real> ChainedSums<P> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            chain: [[P::ZERO; LANES]; 2],
            before: [[P::ZERO; LANES]; 2],
            added: 0,
        }
    }

    /// Counts additions to the chain, and ends it if it has become long.
    #[inline(always)]
    fn end_after<S: Level>(&mut self, level: S, additions: usize) {
        self.added += additions;
        if self.added >= CHAIN / 2 {
            for (before, chain) in self.before.iter_mut().zip(&mut self.chain) {
                *before = level.add(*before, *chain);
                *chain = [P::ZERO; LANES];
            }
            self.added = 0;
        }
    }

    #[inline(always)]
    fn total<S: Level>(&self, level: S) -> [P; 2] {
        let mut totals = [P::ZERO; 2];
        for (total, (before, chain)) in totals.iter_mut().zip(self.before.iter().zip(&self.chain)) {
            *total = sum_of_lanes(level.add(*before, *chain));
        }
        totals
    }
}

/// Where runs begin that are summed up side by side: far from each other, so that each is a stream of its own.
#[inline(always)]
fn streams(runs: &Runs, run: usize, distance: usize) -> [usize; STREAMS] {
    let mut starts = [0; STREAMS];
    for (stream, start) in starts.iter_mut().enumerate() {
        *start = runs.start(run + stream * distance);
    }
    starts
}

/// Adds a vector from a position on of each of several runs: all of it if it is `WHOLE`, else its last `count` values. They are
/// added to each other before they are added to the sum, which shortens the chain of additions that wait for each other, and of
/// their rounding errors.
#[inline(always)]
fn add_streams<S: Level, P: Real, const WHOLE: bool>(
    level: S,
    sums: &mut Sums<P>,
    starts: [usize; STREAMS],
    position: usize,
    count: usize,
    terms: &impl Terms<P>,
) {
    let mut pairs = [[[P::ZERO; LANES]; 2]; STREAMS / 2];
    for (stream, start) in starts.into_iter().enumerate() {
        let mut added = terms.terms(Block::new(start, position, LANES));
        if !WHOLE {
            added = last(level, added, count);
        }
        let pair = &mut pairs[stream / 2];
        if stream % 2 == 0 {
            let [a, b] = added;
            *pair = [a, level.mul(a, b)];
        } else {
            add(level, pair, added);
        }
    }
    for (sum, total) in sums.iter_mut().enumerate() {
        *total = level.add(*total, level.add(pairs[0][sum], pairs[1][sum]));
    }
}

/// Sums over some pixels for each channel of a strip, at the strip's positions in `sums`, which is overwritten. Of runs side by
/// side, sums are fetched once for several values.
#[inline(always)]
pub(super) fn interleaved_sums<S: Level, P: Real>(
    level: S,
    interleaved: &Interleaved,
    channels: &Range<usize>,
    pixels: &Range<usize>,
    sums: &mut Table<P, 2>,
    terms: &impl Terms<P>,
) {
    *sums = Table::new();
    let runs = interleaved.full_runs(channels, pixels);
    let side_by_side = runs.count / STREAMS;
    for run in 0..side_by_side {
        let starts = streams(&runs, run, side_by_side);
        let mut position = 0;
        while position + LANES <= runs.len {
            let mut sum = sums.both(position);
            add_streams::<_, _, true>(level, &mut sum, starts, position, LANES, terms);
            sums.set_both(position, &sum);
            position += LANES;
        }
        if position < runs.len {
            for start in starts {
                add_block(level, Block::new(start, position, runs.len - position), sums, terms);
            }
        }
    }
    for run in side_by_side * STREAMS..runs.count {
        add_run(level, runs.start(run), runs.len, sums, terms);
    }
    let last = interleaved.last_run(channels, pixels);
    for run in 0..last.count {
        add_run(level, last.start(run), last.len, sums, terms);
    }
    sums.fold(channels.len(), interleaved.repeats());
}

/// Adds a run.
#[inline(always)]
fn add_run<S: Level, P: Real>(level: S, start: usize, len: usize, sums: &mut Table<P, 2>, terms: &impl Terms<P>) {
    for (position, count) in blocks(len) {
        add_block(level, Block::new(start, position, count), sums, terms);
    }
}

/// Adds a block of a run.
#[inline(always)]
fn add_block<S: Level, P: Real>(level: S, block: Block, sums: &mut Table<P, 2>, terms: &impl Terms<P>) {
    let mut sum = sums.both(block.position);
    add(level, &mut sum, first(level, terms.terms(block), block.count));
    sums.set_both(block.position, &sum);
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

/// The sum of all lanes, halves with halves.
#[inline(always)]
fn sum_of_lanes<P: Real>(mut sum: Lanes<P>) -> P {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sum[lane] = sum[lane] + sum[lane + width];
        }
    }
    sum[0]
}
