//! Visits every element of a task once, in vectors.

use super::coefficients::{Coefficients, OFFSET, PIVOT, Table};
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
                            visitor.visit(Block::new(start, 0, head), &coefficients);
                        }
                        visit_blocks(start + head, runs.len - head, usize::MAX, order, visitor, &coefficients);
                    }
                }
            }
        }
        Geometry::Interleaved(interleaved) => {
            let period = task.channels.len() * interleaved.repeats();
            table.repeat(task.channels.len(), interleaved.repeats());
            let runs = interleaved.rows(&task.channels, &task.chunks);
            // All runs have the same head, or there is no streaming.
            let head = head(runs.start(0), runs.len, aligned);
            if head > 0 {
                for run in 0..runs.count {
                    visitor.visit(Block::new(runs.start(run), 0, head), table);
                }
            }
            table.start_at(head, period);
            for run in 0..runs.count {
                visit_blocks(runs.start(run) + head, runs.len - head, period, order, visitor, table);
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
    /// Does it.
    fn visit(&self, block: Block, coefficients: &impl Coefficients<P>);
}

/// Visits adjacent elements whose coefficients come again after `period` positions.
#[inline(always)]
fn visit_blocks<P: Real>(
    start: usize,
    len: usize,
    period: usize,
    order: Order,
    visitor: &impl Visitor<P>,
    coefficients: &impl Coefficients<P>,
) {
    let full = len - len % LANES;
    let mut at = match order {
        Order::Ascending => 0,
        Order::Descending => full.saturating_sub(LANES),
    };
    let mut position = at % period;
    for _ in 0..full / LANES {
        let block = Block {
            at: start + at,
            position,
            count: LANES,
        };
        visitor.visit(block, coefficients);
        match order {
            Order::Ascending => {
                at += LANES;
                position += LANES;
                if position >= period {
                    position -= period;
                }
            }
            Order::Descending => {
                at = at.wrapping_sub(LANES);
                if position < LANES {
                    position += period;
                }
                position -= LANES;
            }
        }
    }
    if full < len {
        let block = Block {
            at: start + full,
            position: full % period,
            count: len - full,
        };
        visitor.visit(block, coefficients);
    }
}

/// (x - K) - d.
#[inline(always)]
pub(super) fn centred<S: Level, P: Real>(
    level: S,
    x: Lanes<P>,
    coefficients: &impl Coefficients<P>,
    position: usize,
) -> Lanes<P> {
    let pivot = coefficients.at(PIVOT, position);
    let offset = coefficients.at(OFFSET, position);
    level.sub(level.sub(x, pivot), offset)
}

/// Rounds and writes a block, past the caches if `streamed` and possible.
///
/// # Safety
/// As [`Sink::store`].
#[inline(always)]
pub(super) unsafe fn write<S: Level, T: Element>(
    level: S,
    to: Sink<'_, T>,
    block: Block,
    values: &Lanes<T::Param>,
    streamed: bool,
) {
    if streamed && block.count == LANES && to.until_aligned(block.at) == 0 {
        // SAFETY: the caller's promise, and the alignment has been checked.
        unsafe { to.stream(level, block.at, values) };
    } else {
        // SAFETY: the caller's promise.
        unsafe { to.store(level, block.at, block.count, values) };
    }
}
