//! Visits every element of a task once, in vectors.

use super::coefficients::{Coefficients, NORMALISATION, Normalisation, OFFSET, PIVOT, Table};
use super::geometry::{Geometry, Run, Task};
use super::memory::Sink;
use super::reduce::Block;
use super::simd::{LANES, Lanes, Level, blocks, lanes};
use crate::element::{Element, Real};

/// Calls `visit` with every block of a task and with the coefficients of its channels, which are `M` numbers: those of
/// `normalisation`, and what `extend` adds to them. Where `aligned` is given, full blocks start where it may be streamed
/// to, if the task's runs are long enough.
///
/// # Safety
/// As [`Normalisation::statistics`] for the task's channels.
#[inline(always)]
pub(super) unsafe fn visit<S: Level, P: Real, T: Element, const M: usize>(
    level: S,
    geometry: &Geometry,
    task: &Task,
    normalisation: &Normalisation<'_, P>,
    extend: impl Fn(&mut Table<P, M>),
    aligned: Option<Sink<'_, T>>,
    mut visit: impl Visitor<P>,
) {
    const { assert!(M >= NORMALISATION) };
    let mut table = Table::<P, M>::new();
    // SAFETY: the caller's promise.
    unsafe { normalisation.fill(level, &task.channels, &mut table) };
    extend(&mut table);
    match geometry {
        Geometry::Planar(planar) => {
            let channel = table.uniform(0);
            for chunk in planar.part(task.part) {
                planar.runs(task.channels.start, chunk, |run| {
                    visit_run(run, aligned, |block| visit.visit(block, &channel));
                });
            }
        }
        Geometry::Interleaved(interleaved) => {
            table.repeat(task.channels.len(), interleaved.repeats());
            let pixels = interleaved.part(task.part);
            let runs = interleaved.full_runs(&task.channels, &pixels);
            for run in 0..runs.count {
                let run = Run {
                    start: runs.start(run),
                    len: runs.len,
                };
                visit_run(run, aligned, |block| visit.visit(block, &table));
            }
            let last = interleaved.last_run(&task.channels, &pixels);
            visit_run(last, aligned, |block| visit.visit(block, &table));
        }
    }
}

/// What is done with each block: a function that is generic over its coefficients.
pub(super) trait Visitor<P: Real> {
    /// Does it.
    fn visit(&mut self, block: Block, coefficients: &impl Coefficients<P>);
}

#[inline(always)]
fn visit_run<T: Element>(run: Run, aligned: Option<Sink<'_, T>>, mut visit: impl FnMut(Block)) {
    let head = aligned
        .map_or(0, |sink| sink.until_aligned(run.start))
        .min(run.len);
    let mut blocks_from = |from: usize, len: usize| {
        blocks(len, |position, count| {
            let position = from + position;
            visit(Block {
                at: run.start + position,
                position,
                count,
            });
        });
    };
    blocks_from(0, head);
    blocks_from(head, run.len - head);
}

/// (x - K) - d.
#[inline(always)]
pub(super) fn centred<P: Real>(
    x: &Lanes<P>,
    coefficients: &impl Coefficients<P>,
    position: usize,
) -> Lanes<P> {
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
