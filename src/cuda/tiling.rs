//! How a tensor is cut into tasks: strips of channels, splits of rows, vectors of elements. Pure arithmetic; the words are
//! those of `kernels/tensor.cuh`.

use super::limits::DeviceLimits;
use super::tuning::{
    BLOCK_SIZES, COLUMN_VECTORS, REDUCED_COLUMN_VECTORS, REDUCED_TASKS_PER_MULTIPROCESSOR, SHORTEST_PLANE_WITH_EDGES,
    TASKS_PER_MULTIPROCESSOR, VECTORS_IN_FLIGHT, VECTORS_PER_TASK,
};
use crate::element::Dtype;
use crate::shape::{Layout, Shape};

/// Bytes of the widest memory access of a thread.
pub(super) const VECTOR_BYTES: u64 = 16;

/// Threads of one warp.
pub(super) const WARP: u64 = 32;

/// Shared memory that a block gets without asking for more.
pub(super) const SHARED_MEMORY: u64 = 48 << 10;

/// How a kernel walks a tensor: see `kernels/tensor.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// Along the planes of one channel, each a whole number of vectors.
    Planes,
    /// Along the planes of one channel, each of which may begin and end inside a vector.
    PlanesWithEdges,
    /// Down a column of vectors, a fixed set of channels.
    Columns,
}

impl Walk {
    /// `planes`, `planes with edges` or `columns`.
    pub const fn name(self) -> &'static str {
        match self {
            Walk::Planes => "planes",
            Walk::PlanesWithEdges => "planes with edges",
            Walk::Columns => "columns",
        }
    }
}

/// How the addresses of a call's tensors lie to one another.
///
/// Vector accesses need every tensor's address to differ from the others' by whole vectors: `grain` is the largest power
/// of two up to 16 bytes for which that holds, `phase` is the addresses' common remainder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Alignment {
    grain: u64,
    phase: u64,
}

impl Alignment {
    /// All addresses are multiples of 16 bytes, as those of whole buffers are.
    pub const FULL: Alignment = Alignment {
        grain: VECTOR_BYTES,
        phase: 0,
    };

    /// The alignment of tensors at these addresses.
    pub fn of(addresses: impl IntoIterator<Item = u64>) -> Self {
        let mut addresses = addresses.into_iter();
        let first = addresses.next().unwrap_or(0);
        let differing_bits = addresses.fold(VECTOR_BYTES, |bits, address| bits | (address ^ first));
        let grain = 1 << differing_bits.trailing_zeros();
        Alignment {
            grain,
            phase: first % grain,
        }
    }

    /// Every alignment that tensors of this element type can have.
    pub(super) fn all(dtype: Dtype) -> impl Iterator<Item = Self> {
        let size = dtype.size() as u64;
        let grains =
            std::iter::successors(Some(size), |grain| Some(grain * 2)).take_while(|&grain| grain <= VECTOR_BYTES);
        grains.flat_map(move |grain| {
            (0..grain)
                .step_by(size as usize)
                .map(move |phase| Alignment { grain, phase })
        })
    }

    /// Seen with vectors of at most so many bytes.
    fn up_to(self, bytes: u64) -> Self {
        let grain = self.grain.min(bytes);
        Self {
            grain,
            phase: self.phase % grain,
        }
    }

    /// Largest vector, in elements, at whose multiples every tensor begins.
    fn aligned_vector(self, dtype: Dtype) -> u64 {
        let bytes = if self.phase == 0 {
            self.grain
        } else {
            1 << self.phase.trailing_zeros()
        };
        (bytes / dtype.size() as u64).max(1)
    }

    /// Largest vector, in elements, that all tensors have in common places, whether they begin there or not.
    fn common_vector(self, dtype: Dtype) -> u64 {
        (self.grain / dtype.size() as u64).max(1)
    }
}

/// What a kernel asks of its launch shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Tensors it reads.
    pub(super) tensors_read: u64,
    /// Numbers of the parameter type in shared memory per channel of a strip.
    pub(super) numbers_per_channel: u64,
    /// Whether its threads exchange a result per lane through shared memory (`kernels/reduce.cuh`).
    pub(super) reduces: bool,
}

/// The geometry that a kernel is launched with. Field for field the structure of `kernels/tensor.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tiling {
    /// Rows.
    pub outer: u64,
    /// Elements of a row.
    pub stride: u64,
    /// Neighbours in a row that belong to one channel.
    pub inner: u64,
    /// Vectors of a row that a task runs over: of one plane, or of the whole row.
    pub slots: u64,
    /// Columns: vectors of a row in a strip. Planes: 1.
    pub width: u64,
    /// C.
    pub channels: u64,
    /// Channels of a strip.
    pub strip_channels: u64,
    /// Strips.
    pub strips: u64,
    /// Shares that the rows are cut into.
    pub splits: u64,
    /// Work of one split: vectors of a channel (planes), rows (columns).
    pub share: u64,
    /// Threads that reduce one channel together.
    pub team: u64,
}

impl Tiling {
    /// Number of tasks; a block takes one at a time.
    pub fn tasks(&self) -> u64 {
        self.strips * self.splits
    }
}

/// A tiling with the compile-time constants it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) tiling: Tiling,
    pub(super) walk: Walk,
    pub(super) vector: u32,
    pub(super) unroll: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    pub(super) wide_index: bool,
}

/// How the walk cuts a row, before the rows are split and threads are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) walk: Walk,
    pub(super) vector: u64,
    pub(super) tiling: Tiling,
}

impl Cut {
    /// What is dealt out to the splits of a strip: vectors of a channel (planes), or rows (columns).
    pub(super) fn work(&self) -> u64 {
        match self.walk {
            Walk::Planes | Walk::PlanesWithEdges => self.tiling.outer * self.tiling.slots,
            Walk::Columns => self.tiling.outer,
        }
    }
}

/// How wide a cut may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widths {
    /// Bytes of a vector, at most.
    pub(super) vector_bytes: u64,
    /// Vectors of every row in a strip of columns, about.
    pub(super) column_vectors: u64,
}

/// Chooses walk, vector, block size and splits. The shape is not empty and has been checked for overflow.
pub(super) fn choose(
    shape: Shape,
    dtype: Dtype,
    alignment: Alignment,
    limits: &DeviceLimits,
    demand: Demand,
) -> Launch {
    let unroll = u64::from(unroll(demand.tensors_read));
    let (column_vectors, tasks) = if demand.reduces {
        (REDUCED_COLUMN_VECTORS, REDUCED_TASKS_PER_MULTIPROCESSOR)
    } else {
        (COLUMN_VECTORS, TASKS_PER_MULTIPROCESSOR)
    };
    let widths = Widths {
        vector_bytes: VECTOR_BYTES,
        column_vectors,
    };
    let (cut, threads) = BLOCK_SIZES
        .into_iter()
        .map(|threads| (cut(shape, dtype, alignment, threads, widths), threads))
        .find(|(cut, threads)| {
            let fits = shared_bytes(cut, dtype, *threads, demand)
                <= SHARED_MEMORY.min(u64::from(limits.shared_memory_per_block));
            let filled = work_items(cut) > threads / 2 * unroll || *threads == WARP;
            fits && filled
        })
        .unwrap_or_else(|| (cut(shape, dtype, alignment, WARP, widths), WARP));
    let tiling = split(&cut, threads, tasks * u64::from(limits.multiprocessors));
    Launch {
        walk: cut.walk,
        vector: cut.vector as u32,
        unroll: unroll as u32,
        threads: threads as u32,
        shared_bytes: shared_bytes(&cut, dtype, threads, demand) as u32,
        wide_index: needs_wide_index(&tiling, cut.vector),
        tiling,
    }
}

/// Vectors of each tensor that a thread has under way at a time.
pub(super) fn unroll(tensors_read: u64) -> u32 {
    (VECTORS_IN_FLIGHT / tensors_read).max(1) as u32
}

/// The walk for a shape: the widest vectors, and among equals the plainest walk.
pub(super) fn cut(shape: Shape, dtype: Dtype, alignment: Alignment, threads: u64, widths: Widths) -> Cut {
    let alignment = alignment.up_to(widths.vector_bytes);
    let wanted = widths.column_vectors.min(threads);
    let plane = (shape.height * shape.width) as u64;
    let channels = shape.channels as u64;
    // One pixel per image: NCHW and NHWC are the same order.
    if shape.layout == Layout::Nhwc || plane == 1 {
        let rows = (shape.batch as u64) * plane;
        return columns((rows, channels), 1, channels, alignment, dtype, threads, wanted);
    }
    let plain = planes(shape, alignment.aligned_vector(dtype));
    let edges = planes_with_edges(shape, alignment.common_vector(dtype));
    let rows = (shape.batch as u64, channels * plane);
    let short = columns(rows, plane, channels, alignment, dtype, threads, wanted);
    // Columns need no lane by lane reading, so they come before edges.
    let short_fits = short.tiling.width <= threads;
    let edges_pay = edges.tiling.slots >= SHORTEST_PLANE_WITH_EDGES;
    [(plain, true), (short, short_fits), (edges, edges_pay)]
        .into_iter()
        .filter_map(|(cut, allowed)| allowed.then_some(cut))
        .reduce(|best, cut| if cut.vector > best.vector { cut } else { best })
        .unwrap_or(plain)
}

fn planes(shape: Shape, aligned_vector: u64) -> Cut {
    let plane = (shape.height * shape.width) as u64;
    let vector = largest_divisor(aligned_vector, plane);
    Cut {
        walk: Walk::Planes,
        vector,
        tiling: plane_tiling(shape, plane / vector),
    }
}

fn planes_with_edges(shape: Shape, vector: u64) -> Cut {
    let plane = (shape.height * shape.width) as u64;
    // Every vector that some plane could touch: it may begin at the last element of one and end at the first of another.
    Cut {
        walk: Walk::PlanesWithEdges,
        vector,
        tiling: plane_tiling(shape, (plane + 2 * (vector - 1)) / vector),
    }
}

fn plane_tiling(shape: Shape, slots: u64) -> Tiling {
    let plane = (shape.height * shape.width) as u64;
    let channels = shape.channels as u64;
    Tiling {
        outer: shape.batch as u64,
        stride: channels * plane,
        inner: plane,
        slots,
        width: 1,
        channels,
        strip_channels: 1,
        strips: channels,
        team: WARP,
        ..Tiling::default()
    }
}

/// Rows of `channels * inner` elements, cut into strips of whole channels that are whole vectors too: about `wanted` of
/// them.
fn columns(
    (rows, row): (u64, u64),
    inner: u64,
    channels: u64,
    alignment: Alignment,
    dtype: Dtype,
    threads: u64,
    wanted: u64,
) -> Cut {
    let vector = largest_divisor(alignment.aligned_vector(dtype), row);
    let slots = row / vector;
    // Fewest vectors that hold a whole number of channels.
    let unit = inner / greatest_common_divisor(inner, vector);
    let wanted = wanted.max(unit) / unit * unit;
    // Strips of nearly equal width.
    let strips = slots.div_ceil(wanted);
    let width = slots.div_ceil(strips).div_ceil(unit) * unit;
    let strip_channels = width * vector / inner;
    let team = WARP.min(floor_power_of_two(threads / strip_channels.min(threads)));
    Cut {
        walk: Walk::Columns,
        vector,
        tiling: Tiling {
            outer: rows,
            stride: row,
            inner,
            slots,
            width,
            channels,
            strip_channels,
            strips: slots.div_ceil(width),
            team,
            ..Tiling::default()
        },
    }
}

/// Vectors (planes) or rows per column of threads (columns) that one strip consists of, in threads' worth of work.
fn work_items(cut: &Cut) -> u64 {
    match cut.walk {
        Walk::Planes | Walk::PlanesWithEdges => cut.tiling.outer * cut.tiling.slots,
        Walk::Columns => cut.tiling.outer * cut.tiling.width,
    }
}

/// Cuts the rows so that there are about so many tasks, but no share is so small that its threads have nothing to do.
fn split(cut: &Cut, threads: u64, tasks: u64) -> Tiling {
    let tiling = cut.tiling;
    let work = cut.work();
    // How much of it keeps all threads of a block busy once.
    let at_once = match cut.walk {
        Walk::Planes | Walk::PlanesWithEdges => threads,
        Walk::Columns => threads / tiling.width,
    };
    let wanted = tasks.div_ceil(tiling.strips);
    let most = work.div_ceil(at_once.max(1) * VECTORS_PER_TASK);
    let share = work.div_ceil(wanted.clamp(1, most)).max(1);
    Tiling {
        share,
        splits: work.div_ceil(share),
        ..tiling
    }
}

fn shared_bytes(cut: &Cut, dtype: Dtype, threads: u64, demand: Demand) -> u64 {
    let exchange = if demand.reduces {
        exchange_bytes(cut, dtype, threads)
    } else {
        0
    };
    cut.tiling.strip_channels * demand.numbers_per_channel * dtype.param().size() as u64 + exchange
}

/// Shared memory in which the threads of a block exchange their results.
pub(super) fn exchange_bytes(cut: &Cut, dtype: Dtype, threads: u64) -> u64 {
    const WEIGHT_BYTES: u64 = 4;
    let lanes = match cut.walk {
        Walk::Columns => cut.vector,
        Walk::Planes | Walk::PlanesWithEdges => 1,
    };
    threads * (2 * lanes * dtype.param().size() as u64 + WEIGHT_BYTES)
}

/// Whether the offset of some element, a count of vectors or a number of tasks may pass 31 bits. Offsets beyond a thread's
/// last vector may wrap: nothing is read there.
pub(super) fn needs_wide_index(tiling: &Tiling, vector: u64) -> bool {
    let slots = tiling.outer * tiling.slots;
    let elements = (tiling.outer * tiling.stride).max(slots * vector);
    elements.max(tiling.tasks()) > i32::MAX as u64
}

/// The largest power of two up to `limit` that divides `number`.
fn largest_divisor(limit: u64, number: u64) -> u64 {
    limit.min(1 << number.trailing_zeros().min(63))
}

fn floor_power_of_two(number: u64) -> u64 {
    1 << number.max(1).ilog2()
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
