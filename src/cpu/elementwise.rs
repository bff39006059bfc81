//! Visits every element of a task once, in vectors.

use std::ops::Range;

use super::coefficients::{Coefficients, MEAN, Table, Uniform};
use super::geometry::{Geometry, Runs, STRIP, Task};
use super::memory::{Sink, Source};
use super::reduce::Block;
use super::simd::{LANES, LINE, LaneOrder, Lanes, Level, blocks, blocks_per_line};
use crate::element::{Dtype, Element, Real};

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
/// given, blocks fill whole lines of it, but for the first and the last of what is adjacent: a line that is written partly past
/// the caches takes as long as many whole ones.
#[inline(always)]
pub(super) fn visit<S: Level, P: Real, T: Element, const M: usize>(
    level: S,
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
                    let planes = planar.image_runs(&task.channels, chunk, image);
                    if planes.len < LANES {
                        for plane in 0..planes.count {
                            let block = Block::new(planes.start(plane), 0, planes.len).quickest();
                            visitor.visit(block, &table.uniform(plane), false);
                        }
                    } else {
                        visit_planes(level, &planes, table, aligned, order, visitor);
                    }
                }
            }
        }
        Geometry::Interleaved(interleaved) => {
            let runs = interleaved.rows(&task.channels, &task.chunks);
            // As often as there is room: where a stretch of coefficients ends, the next has to be found.
            let repeats = if runs.count == 1 {
                STRIP / task.channels.len()
            } else {
                1
            };
            let period = task.channels.len() * repeats;
            table.repeat(task.channels.len(), repeats);
            // Of several runs, each starts a stride behind the one before: in the same place of a line, or none is streamed.
            let aligned = aligned
                .filter(|sink| runs.count == 1 || sink.until_line(runs.start(0)) == sink.until_line(runs.start(1)));
            let head = head(runs.start(0), runs.len, aligned);
            if head > 0 {
                for run in 0..runs.count {
                    for (at, count) in blocks(head) {
                        visitor.visit(Block::new(runs.start(run), at, count), table, false);
                    }
                }
            }
            table.start_at(head, period);
            // Vectors may be in other lanes if none starts amidst those of the table.
            let other_lanes = T::DTYPE == Dtype::Bf16 && period.is_multiple_of(LANES);
            if other_lanes {
                table.order_for_bf16(level, period);
            }
            let per_line = multiple_of_lines(aligned);
            for run in 0..runs.count {
                let start = runs.start(run);
                let run = start + head..start + runs.len;
                // Asked here and not in the loop, as for planes.
                if other_lanes {
                    visit_blocks(run, period, per_line, LaneOrder::Quickest, order, visitor, table);
                } else {
                    visit_blocks(run, period, per_line, LaneOrder::Natural, order, visitor, table);
                }
            }
        }
    }
}

/// Visits planes of a vector at least, each behind the one before (or only one). Most planes do not end where a vector does: the
/// vector that has the end of one and the start of the next is visited as a whole, since two parts of it would take as long as
/// several vectors, and could not be streamed.
#[inline(always)]
fn visit_planes<S: Level, P: Real, T: Element, const M: usize>(
    level: S,
    planes: &Runs,
    table: &Table<P, M>,
    aligned: Option<Sink<'_, T>>,
    order: Order,
    visitor: &impl Visitor<P>,
) {
    debug_assert!(planes.count == 1 || planes.start(1) == planes.start(0) + planes.len);
    let start = planes.start(0);
    // So that neither what comes before the first line nor what comes behind the last is more than a plane.
    let aligned = aligned.filter(|_| planes.len >= LINE / size_of::<T>());
    let head = head(start, planes.len, aligned);
    visit_part(start, head, visitor, &table.uniform(0));
    let start = start + head;
    let whole = (planes.count * planes.len - head) / LANES;
    let whole = whole - whole % multiple_of_lines(aligned).unwrap_or(1);
    let aligned = aligned.is_some();
    for step in 0..planes.count {
        // What is visited of a plane is the vector that it shares with the plane visited before, and those of its own.
        let (plane, shared) = match order {
            Order::Ascending => (step, step),
            Order::Descending => (planes.count - 1 - step, planes.count - step),
        };
        let (vector, before) = border(planes, head, shared);
        if step > 0 && before > 0 {
            let both = Border {
                level,
                planes: [table.uniform(shared - 1), table.uniform(shared)],
                before,
                bf16: T::DTYPE == Dtype::Bf16,
            };
            let block = Block::new(start + vector * LANES, 0, LANES).quickest();
            visitor.visit(block, &both, aligned);
        }
        let (first, before) = border(planes, head, plane);
        let first = first + usize::from(before > 0);
        let (end, _) = border(planes, head, plane + 1);
        let end = end.min(whole);
        let coefficients = table.uniform(plane);
        let vectors = end.saturating_sub(first);
        let (vector, step) = match order {
            Order::Ascending => (first, LANES),
            Order::Descending => (end.wrapping_sub(1), LANES.wrapping_neg()),
        };
        let at = start.wrapping_add(vector.wrapping_mul(LANES));
        // Asked here and not in the loop, which has few other instructions.
        if aligned {
            visit_vectors(at, step, vectors, true, visitor, &coefficients);
        } else {
            visit_vectors(at, step, vectors, false, visitor, &coefficients);
        }
    }
    let rest = planes.count * planes.len - head - whole * LANES;
    visit_part(start + whole * LANES, rest, visitor, &table.uniform(planes.count - 1));
}

/// How many vectors aligned ones come in multiples of, if any are aligned.
#[inline(always)]
fn multiple_of_lines<T: Element>(aligned: Option<Sink<'_, T>>) -> Option<usize> {
    aligned.map(|_| blocks_per_line::<T>())
}

/// Visits some values of a plane, which are less than a line and not aligned.
#[inline(always)]
fn visit_part<P: Real>(start: usize, len: usize, visitor: &impl Visitor<P>, coefficients: &impl Coefficients<P>) {
    for (at, count) in blocks(len) {
        visitor.visit(Block::new(start, at, count).quickest(), coefficients, false);
    }
}

/// Visits so many vectors of one plane, each a step behind the one before.
#[inline(always)]
fn visit_vectors<P: Real>(
    mut at: usize,
    step: usize,
    vectors: usize,
    aligned: bool,
    visitor: &impl Visitor<P>,
    coefficients: &impl Coefficients<P>,
) {
    for _ in 0..vectors {
        visitor.visit(Block::new(at, 0, LANES).quickest(), coefficients, aligned);
        at = at.wrapping_add(step);
    }
}

/// Where a plane begins, or the last one ends: so many vectors and elements behind the first vector, which comes behind a head.
#[inline(always)]
fn border(planes: &Runs, head: usize, plane: usize) -> (usize, usize) {
    let elements = (plane * planes.len).saturating_sub(head);
    (elements / LANES, elements % LANES)
}

/// The last values of one plane and the first of the next.
struct Border<S, P, const M: usize> {
    level: S,
    planes: [Uniform<P, M>; 2],
    /// How many values are of the first plane.
    before: usize,
    /// Whether the elements are `bf16`, which [`LaneOrder::Quickest`](super::simd::LaneOrder) may order otherwise.
    bf16: bool,
}

impl<S: Level, P: Real, const M: usize> Coefficients<P> for Border<S, P, M> {
    #[inline(always)]
    fn at(&self, index: usize, position: usize) -> Lanes<P> {
        let [first, second] = &self.planes;
        let (first, second) = (first.at(index, position), second.at(index, position));
        if self.bf16 {
            self.level.join_bf16(first, second, self.before)
        } else {
            self.level.join(first, second, self.before)
        }
    }
}

/// How many elements of a run come before the first whole line.
#[inline(always)]
fn head<T: Element>(start: usize, len: usize, aligned: Option<Sink<'_, T>>) -> usize {
    match aligned {
        Some(sink) => sink.until_line(start).min(len),
        None => 0,
    }
}

/// What is done with each block.
pub(super) trait Visitor<P: Real> {
    /// Does it. `aligned` blocks are full, and all those of a line of the sink that [`visit`] was told of are visited.
    fn visit(&self, block: Block, coefficients: &impl Coefficients<P>, aligned: bool);
}

/// Visits adjacent elements whose coefficients come again after `period` positions. `aligned`, if the first is, has how many
/// vectors fill a line.
#[inline(always)]
fn visit_blocks<P: Real>(
    run: Range<usize>,
    period: usize,
    aligned: Option<usize>,
    lanes: LaneOrder,
    order: Order,
    visitor: &impl Visitor<P>,
    coefficients: &impl Coefficients<P>,
) {
    let start = run.start;
    let blocks = run.len() / LANES;
    let blocks = blocks - blocks % aligned.unwrap_or(1);
    let aligned = aligned.is_some();
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
                lanes,
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
    // What is left over, less than a line.
    let mut at = blocks * LANES;
    while at < run.len() {
        let block = Block {
            at: start + at,
            position: at % period,
            count: (run.len() - at).min(LANES),
            lanes,
        };
        visitor.visit(block, coefficients, false);
        at += LANES;
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
/// As [`Sink::store`]; an aligned block is as [`Sink::stream`] wants it, and full.
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
        unsafe { to.stream(level, block, values) };
    } else {
        // SAFETY: the caller's promise.
        unsafe { to.store_block(level, block, values) };
    }
}
