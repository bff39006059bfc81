//! Visits every element of a task once, in vectors.

use super::coefficients::{Coefficients, OFFSET, PIVOT, Table};
use super::geometry::{Geometry, Task};
use super::memory::Sink;
use super::reduce::Block;
use super::simd::{LANES, Lanes, Level, lanes};
use crate::element::{Element, Real};

/// Calls `visitor` with every block of a task. `table` has the coefficients of the task's channels, once. Where `aligned` is
/// given, blocks start where it may be streamed to, but for the first and the last of a run.
#[inline(always)]
pub(super) fn visit<P: Real, T: Element, const M: usize>(
    geometry: &Geometry,
    task: &Task,
    table: &mut Table<P, M>,
    aligned: Option<Sink<'_, T>>,
    visitor: &impl Visitor<P>,
) {
    match geometry {
        Geometry::Planar(planar) => {
            for chunk in task.chunks.clone() {
                for image in 0..planar.images(chunk) {
                    let runs = planar.image_runs(&task.channels, chunk, image);
                    for run in 0..runs.count {
                        visit_run(runs.start(run), runs.len, aligned, visitor, &table.uniform(run));
                    }
                }
            }
        }
        Geometry::Interleaved(interleaved) => {
            table.repeat(task.channels.len(), interleaved.repeats());
            let pixels = interleaved.pixels(&task.chunks);
            for runs in [
                interleaved.full_runs(&task.channels, &pixels),
                interleaved.last_run(&task.channels, &pixels),
            ] {
                for run in 0..runs.count {
                    visit_run(runs.start(run), runs.len, aligned, visitor, table);
                }
            }
        }
    }
}

/// What is done with each block.
pub(super) trait Visitor<P: Real> {
    /// Does it.
    fn visit(&self, block: Block, coefficients: &impl Coefficients<P>);
}

#[inline(always)]
fn visit_run<P: Real, T: Element>(
    start: usize,
    len: usize,
    aligned: Option<Sink<'_, T>>,
    visitor: &impl Visitor<P>,
    coefficients: &impl Coefficients<P>,
) {
    let mut position = match aligned {
        Some(sink) => sink.until_aligned(start).min(len),
        None => 0,
    };
    if position > 0 {
        visitor.visit(Block::new(start, 0, position), coefficients);
    }
    while position + LANES <= len {
        visitor.visit(Block::new(start, position, LANES), coefficients);
        position += LANES;
    }
    if position < len {
        visitor.visit(Block::new(start, position, len - position), coefficients);
    }
}

/// (x - K) - d.
#[inline(always)]
pub(super) fn centred<P: Real>(x: &Lanes<P>, coefficients: &impl Coefficients<P>, position: usize) -> Lanes<P> {
    let pivot = coefficients.at(PIVOT, position);
    let offset = coefficients.at(OFFSET, position);
    lanes(|i| (x[i] - pivot[i]) - offset[i])
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
