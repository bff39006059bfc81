//! Visits every element of a task once, in vectors.

use std::ops::Range;

use super::coefficients::{Coefficients, MEAN, Table};
use super::geometry::{Geometry, Task};
use super::memory::{Sink, Source};
use super::reduce::Block;
use super::simd::{LANES, Lanes, Level};
use crate::element::{Element, Real};

/// In which direction the blocks of a run are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// From the lowest address on.
    Ascending,
    /// From the highest address down.
    Descending,
}

impl Order {
    /// The better one for writing to `sink` what is computed from `sources`.
    ///
    /// A core holds a load back behind an earlier store whose address is the same in its lowest twelve bits. Tensors lie
    /// thus as a rule: allocated one after the other, with sizes that are multiples of 4096 and a few bytes of the allocator
    /// between them. Where the store is a little ahead of the next loads, the other direction brings it behind them. (Fog,
    /// *The microarchitecture of Intel, AMD and VIA CPUs*; as much as a factor of 2.5 was measured.)
    #[inline(always)]
    pub(super) fn of<T: Element>(sink: Option<Sink<'_, T>>, sources: &[Source<'_, T>]) -> Self {
        const REACH: usize = 2048;
        let Some(sink) = sink else {
            return Order::Ascending;
        };
        let ahead = |source: &&Source<'_, T>| (1..REACH).contains(&sink.distance_within_page(**source));
        let behind = |source: &&Source<'_, T>| sink.distance_within_page(**source) > REACH;
        if sources.iter().filter(ahead).count() > sources.iter().filter(behind).count() {
            Order::Descending
        } else {
            Order::Ascending
        }
    }
}

/// Calls `visitor` with every block of a task. `table` has the coefficients of the task's channels, once. Where `aligned` is
/// given, blocks start where it may be streamed to, but for the first and the last of a run.
#[inline(always)]
pub(super) fn visit<P: Real, T: Element, const M: usize>(
    geometry: &Geometry,
    task: &Task,
    table: &mut Table<P, M>,
    aligned: Option<Sink<'_, T>>,
    order: Order,
    visitor: &impl Visitor<P>,
) {
    match geometry {
        Geometry::Planar(planar) => {
            for chunk in task.chunks.clone() {
                for image in 0..planar.images(chunk) {
                    let runs = planar.image_runs(&task.channels, chunk, image);
                    for run in 0..runs.count {
                        let start = runs.start(run);
                        let coefficients = table.uniform(run);
                        let head = head(start, runs.len, aligned);
                        if head > 0 {
                            visitor.visit(Block::new(start, 0, head), &coefficients, false);
                        }
                        let run = start + head..start + runs.len;
                        visit_blocks(run, usize::MAX, aligned.is_some(), order, visitor, &coefficients);
                    }
                }
            }
        }
        Geometry::Interleaved(interleaved) => {
            let period = task.channels.len() * interleaved.repeats();
            table.repeat(task.channels.len(), interleaved.repeats());
            let runs = interleaved.rows(&task.channels, &task.chunks);
            // Of several runs, each starts a stride behind the one before: in the same place of a line, or none is streamed.
            let aligned = aligned.filter(|sink| {
                runs.count == 1 || sink.until_aligned(runs.start(0)) == sink.until_aligned(runs.start(1))
            });
            let head = head(runs.start(0), runs.len, aligned);
            if head > 0 {
                for run in 0..runs.count {
                    visitor.visit(Block::new(runs.start(run), 0, head), table, false);
                }
            }
            table.start_at(head, period);
            for run in 0..runs.count {
                let start = runs.start(run);
                let run = start + head..start + runs.len;
                visit_blocks(run, period, aligned.is_some(), order, visitor, table);
            }
        }
    }
}

/// How many elements of a run come before the first full block.
#[inline(always)]
fn head<T: Element>(start: usize, len: usize, aligned: Option<Sink<'_, T>>) -> usize {
    match aligned {
        Some(sink) => sink.until_aligned(start).min(len),
        None => 0,
    }
}

/// What is done with each block.
pub(super) trait Visitor<P: Real> {
    /// Does it. `aligned` blocks are full, and begin where the sink that [`visit`] was told of may be streamed to.
    fn visit(&self, block: Block, coefficients: &impl Coefficients<P>, aligned: bool);
}

/// Visits adjacent elements whose coefficients come again after `period` positions. The first is `aligned` or not.
#[inline(always)]
fn visit_blocks<P: Real>(
    run: Range<usize>,
    period: usize,
    aligned: bool,
    order: Order,
    visitor: &impl Visitor<P>,
    coefficients: &impl Coefficients<P>,
) {
    let (start, blocks, rest) = (run.start, run.len() / LANES, run.len() % LANES);
    let first = match order {
        Order::Ascending => 0,
        Order::Descending => blocks.saturating_sub(1) * LANES,
    };
    let step = match order {
        Order::Ascending => LANES,
        Order::Descending => LANES.wrapping_neg(),
    };
    let (mut at, mut position, mut left) = (start + first, first % period, blocks);
    while left > 0 {
        // A stretch within a period, so that its blocks need not ask where that ends.
        let stretch = match order {
            Order::Ascending => (period - position).div_ceil(LANES),
            Order::Descending => position / LANES + 1,
        };
        for _ in 0..stretch.min(left) {
            let block = Block {
                at,
                position,
                count: LANES,
            };
            visitor.visit(block, coefficients, aligned);
            at = at.wrapping_add(step);
            position = position.wrapping_add(step);
        }
        left = left.saturating_sub(stretch);
        position = match order {
            Order::Ascending => position.wrapping_sub(period),
            Order::Descending => position.wrapping_add(period),
        };
    }
    if rest > 0 {
        let full = blocks * LANES;
        let block = Block {
            at: start + full,
            position: full % period,
            count: rest,
        };
        visitor.visit(block, coefficients, false);
    }
}

/// x less the mean as it was rounded.
#[inline(always)]
pub(super) fn centred<S: Level, P: Real>(
    level: S,
    x: Lanes<P>,
    coefficients: &impl Coefficients<P>,
    position: usize,
) -> Lanes<P> {
    level.sub(x, coefficients.at(MEAN, position))
}

/// Rounds and writes a block, past the caches if it is `aligned` for that.
///
/// # Safety
/// As [`Sink::store`]; of an aligned block [`Sink::until_aligned`] is 0, and it is full.
#[inline(always)]
pub(super) unsafe fn write<S: Level, T: Element>(
    level: S,
    to: Sink<'_, T>,
    block: Block,
    values: &Lanes<T::Param>,
    aligned: bool,
) {
    if aligned {
        // SAFETY: the caller's promise.
        unsafe { to.stream(level, block.at, values) };
    } else {
        // SAFETY: the caller's promise.
        unsafe { to.store(level, block.at, block.count, values) };
    }
}
