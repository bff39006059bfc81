//! Which elements a task works on, in which order: the one place that knows the layouts.
//!
//! The tensor is cut by its shape alone, never by the number of threads, so that every sum is taken in the same order
//! whoever computes it:
//!
//! - The channels are cut into **groups** of neighbours, the values of each channel into **chunks**: what is summed up about one
//!   centre.
//! - Several chunks are a **part**: what is summed up one after another, by one task.
//! - A chunk is several **runs** of adjacent elements, some of which are summed up side by side.
//!
//! Planar (NCHW): a run is a plane or a piece of one. A group has several channels only if their planes are small.
//! Interleaved (NHWC): a run is the group's channels of one pixel; with few channels, several pixels make one run, so that
//! vectors are full.

use std::ops::Range;

use super::simd::LANES;
use crate::shape::{Layout, Shape};

/// Greatest number of channels of a group, and of elements of a run in NHWC.
pub(super) const STRIP: usize = 256;
/// Values of a run in NCHW, at most about: 16 KB of `f32`.
const PLANAR_RUN: usize = 4096;
/// Values of a chunk of one channel in NCHW, at most about, where that are several runs: 64 KB of `f32`.
const PLANAR_CHUNK: usize = 16384;
/// Shortest run in NHWC, with as many channels as fill vectors.
const INTERLEAVED_RUN: usize = 64;
/// Elements of a chunk of a group in NHWC, about: 64 runs of the greatest length, 64 KB of `f32`.
const INTERLEAVED_CHUNK: usize = 16384;
/// Chunks of a part.
const CHUNKS_PER_PART: usize = 4;
/// Runs that are summed up side by side. A core reads several streams of memory faster than one (four 1.6 times as fast, on an
/// EPYC): what it fetches ahead of one by itself is not enough, and stops at the end of each page.
pub(super) const STREAMS: usize = 4;
/// Elements of a group that has more channels than it needs to: 512 KB of `f32`, so that it stays in a core's cache.
const GROUP: usize = 128 << 10;

/// Elements of a task that needs no sums, in NCHW, about: 128 KB of `f32`.
const ELEMENTWISE_TASK: usize = 32 << 10;

/// A tensor cut into tasks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Geometry {
    /// The values of a channel are adjacent.
    Planar(Planar),
    /// The channels of a pixel are adjacent.
    Interleaved(Interleaved),
}

/// What is worked on at once: adjacent channels, and a range of their chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    /// Which channels: those of a group.
    pub(super) channels: Range<usize>,
    /// Which chunks.
    pub(super) chunks: Range<usize>,
}

/// Runs of one length, at equal distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Runs {
    start: usize,
    stride: usize,
    /// How many.
    pub(super) count: usize,
    /// Elements of each.
    pub(super) len: usize,
}

impl Runs {
    /// Where a run starts, as an index into the tensor.
    #[inline(always)]
    pub(super) fn start(&self, run: usize) -> usize {
        self.start + run * self.stride
    }

    /// Number of elements of all.
    #[inline(always)]
    pub(super) fn values(&self) -> usize {
        self.count * self.len
    }

    /// The beginnings of the first ones, `values` elements together at most: of several runs if there are.
    #[inline(always)]
    pub(super) fn sample(self, values: usize) -> Self {
        let len = self.len.min(values / STREAMS);
        Self {
            count: self.count.min(values / len),
            len,
            ..self
        }
    }
}

impl Geometry {
    /// Cuts a tensor that is not empty.
    pub(super) fn new(shape: Shape) -> Self {
        let plane = shape.height * shape.width;
        let pixels = shape.batch * plane;
        // The layouts agree where there is one channel, or one pixel per image. The other one then has the longer runs.
        match shape.layout {
            Layout::Nhwc if shape.channels == 1 => Geometry::Planar(Planar::new(1, 1, pixels)),
            Layout::Nchw if plane == 1 && shape.channels > 1 => {
                Geometry::Interleaved(Interleaved::new(pixels, shape.channels))
            }
            Layout::Nchw => Geometry::Planar(Planar::new(shape.batch, shape.channels, plane)),
            Layout::Nhwc => Geometry::Interleaved(Interleaved::new(pixels, shape.channels)),
        }
    }

    /// The same tensor cut for a pass without sums, whose tasks need not have much of one channel: what follows each other in
    /// memory is together.
    pub(super) fn elementwise(shape: Shape) -> Self {
        match Geometry::new(shape) {
            Geometry::Planar(planar) => Geometry::Planar(planar.elementwise()),
            interleaved => interleaved,
        }
    }

    /// Number of channels.
    pub(super) fn channels(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.channels,
            Geometry::Interleaved(interleaved) => interleaved.channels,
        }
    }

    /// Number of values of each channel.
    pub(super) fn values(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.batch * planar.plane,
            Geometry::Interleaved(interleaved) => interleaved.pixels,
        }
    }

    /// Where a channel's first value is.
    #[inline(always)]
    pub(super) fn first_value(&self, channel: usize) -> usize {
        match self {
            Geometry::Planar(planar) => channel * planar.plane,
            Geometry::Interleaved(_) => channel,
        }
    }

    /// Number of groups of channels.
    pub(super) fn groups(&self) -> usize {
        self.channels().div_ceil(self.group_channels())
    }

    /// The channels of a group.
    pub(super) fn group(&self, group: usize) -> Range<usize> {
        let channels = self.group_channels();
        group * channels..self.channels().min((group + 1) * channels)
    }

    fn group_channels(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.group,
            Geometry::Interleaved(interleaved) => interleaved.group,
        }
    }

    /// Number of adjacent elements that a task has in the order of memory, but for the last of several: those of a group's planes,
    /// if they are whole.
    pub(super) fn row_len(&self) -> usize {
        match self {
            Geometry::Planar(planar) if planar.pieces > 1 => planar.piece,
            Geometry::Planar(planar) => planar.group * planar.plane,
            Geometry::Interleaved(interleaved) => interleaved.rows(&self.group(0), &self.part(0)).len,
        }
    }

    /// Number of chunks of the values of each channel.
    pub(super) fn chunks(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.chunks(),
            Geometry::Interleaved(interleaved) => interleaved.pixels.div_ceil(interleaved.chunk_pixels()),
        }
    }

    /// Number of parts of the values of each channel.
    pub(super) fn parts(&self) -> usize {
        self.chunks().div_ceil(CHUNKS_PER_PART)
    }

    /// The chunks of a part.
    pub(super) fn part(&self, part: usize) -> Range<usize> {
        part * CHUNKS_PER_PART..self.chunks().min((part + 1) * CHUNKS_PER_PART)
    }

    /// The part that starts with these chunks.
    #[inline(always)]
    pub(super) fn part_of(chunks: &Range<usize>) -> usize {
        chunks.start / CHUNKS_PER_PART
    }

    /// Number of chunks of a task that needs no sums: as many as follow each other in memory, and not more than a part's.
    pub(super) fn adjacent_chunks(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.pieces.min(CHUNKS_PER_PART),
            Geometry::Interleaved(_) => CHUNKS_PER_PART,
        }
    }

    /// Number of values of each channel in a part.
    pub(super) fn part_values(&self, part: usize) -> usize {
        match self {
            Geometry::Planar(planar) => self.part(part).map(|chunk| planar.chunk_values(chunk)).sum(),
            Geometry::Interleaved(interleaved) => interleaved.pixels(&self.part(part)).len(),
        }
    }
}

/// NCHW.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planar {
    batch: usize,
    channels: usize,
    plane: usize,
    /// Channels of a group.
    group: usize,
    /// Images of a chunk.
    images_per_chunk: usize,
    /// Pieces that a plane is cut into; 1 if a chunk has whole planes.
    pieces: usize,
    /// Values of a piece; the plane's, if it is not cut.
    piece: usize,
}

impl Planar {
    fn new(batch: usize, channels: usize, plane: usize) -> Self {
        let piece = Self::piece(plane, PLANAR_RUN);
        // Small planes are touched in the order of memory, so that pages and lines that they share are fetched once.
        let adjacent = (PLANAR_RUN / plane).min(GROUP / (batch * plane));
        Self {
            batch,
            channels,
            plane,
            group: adjacent.clamp(1, STRIP.min(channels)),
            images_per_chunk: Self::chunk_images(batch, PLANAR_CHUNK / piece),
            pieces: plane.div_ceil(piece),
            piece,
        }
    }

    /// Images of a chunk, at most `most` or as many as are summed up side by side: as few as that number of chunks needs, so that
    /// the last one, too, has nearly as many, and what is fetched in one of them is what the next one reads.
    fn chunk_images(batch: usize, most: usize) -> usize {
        let chunks = batch.div_ceil(most.max(STREAMS));
        batch.div_ceil(chunks).next_multiple_of(STREAMS).min(batch)
    }

    /// Pieces of nearly one size, at most about `most`, and whole vectors but for the last.
    fn piece(plane: usize, most: usize) -> usize {
        match plane.div_ceil(most) {
            1 => plane,
            pieces => plane.div_ceil(pieces).next_multiple_of(4 * LANES),
        }
    }

    /// Cut into planes that follow each other, and images only if a task has all of their channels.
    fn elementwise(self) -> Self {
        let piece = Self::piece(self.plane, ELEMENTWISE_TASK);
        let group = (ELEMENTWISE_TASK / self.plane).clamp(1, STRIP.min(self.channels));
        let images = ELEMENTWISE_TASK / (self.plane * group);
        Self {
            group,
            images_per_chunk: if group == self.channels {
                images.clamp(1, self.batch)
            } else {
                1
            },
            pieces: self.plane.div_ceil(piece),
            piece,
            ..self
        }
    }

    fn chunks(&self) -> usize {
        self.batch.div_ceil(self.images_per_chunk) * self.pieces
    }

    /// The images of a chunk, and which elements of their planes.
    #[inline(always)]
    fn chunk(&self, chunk: usize) -> (Range<usize>, Range<usize>) {
        let first = chunk / self.pieces * self.images_per_chunk;
        let start = chunk % self.pieces * self.piece;
        (
            first..self.batch.min(first + self.images_per_chunk),
            start..self.plane.min(start + self.piece),
        )
    }

    /// Number of values of a chunk.
    pub(super) fn chunk_values(&self, chunk: usize) -> usize {
        let (images, within) = self.chunk(chunk);
        images.len() * within.len()
    }

    /// The runs of a channel's chunk, image by image.
    #[inline(always)]
    pub(super) fn runs(&self, channel: usize, chunk: usize) -> Runs {
        let (images, within) = self.chunk(chunk);
        Runs {
            start: (images.start * self.channels + channel) * self.plane + within.start,
            stride: self.channels * self.plane,
            count: images.len(),
            len: within.len(),
        }
    }

    /// How far behind the values of a chunk are those that a task reads after it: the next chunk's, or the next channel's
    /// first. Modulo 2^64, since that may be before it.
    #[inline(always)]
    pub(super) fn ahead(&self, channel: usize, chunk: usize, chunks: &Range<usize>) -> usize {
        let next = if chunk + 1 < chunks.end {
            self.runs(channel, chunk + 1)
        } else {
            self.runs(channel + 1, chunks.start)
        };
        next.start.wrapping_sub(self.runs(channel, chunk).start)
    }

    /// Number of images of a chunk.
    #[inline(always)]
    pub(super) fn images(&self, chunk: usize) -> usize {
        self.chunk(chunk).0.len()
    }

    /// The runs of a chunk in one of its images, channel by channel.
    #[inline(always)]
    pub(super) fn image_runs(&self, channels: &Range<usize>, chunk: usize, image: usize) -> Runs {
        let (images, within) = self.chunk(chunk);
        Runs {
            start: ((images.start + image) * self.channels + channels.start) * self.plane + within.start,
            stride: self.plane,
            count: channels.len(),
            len: within.len(),
        }
    }
}

/// NHWC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interleaved {
    /// N · H · W.
    pixels: usize,
    channels: usize,
    /// Channels of a group.
    group: usize,
    /// Pixels of a run: more than 1 only with few channels.
    pixels_per_run: usize,
}

impl Interleaved {
    fn new(pixels: usize, channels: usize) -> Self {
        let groups = channels.div_ceil(STRIP);
        Self {
            pixels,
            channels,
            group: channels.div_ceil(groups).next_multiple_of(LANES).min(channels),
            pixels_per_run: Self::pixels_per_run(channels),
        }
    }

    /// Enough for some full vectors, if that can be; else as many as keep a run within a strip.
    fn pixels_per_run(channels: usize) -> usize {
        if channels.is_multiple_of(LANES) {
            return (INTERLEAVED_RUN / channels).max(1);
        }
        let most = (STRIP / channels).max(1);
        let full = LANES >> channels.trailing_zeros();
        if most >= full { most / full * full } else { most }
    }

    fn chunk_pixels(&self) -> usize {
        let run = self.group * self.pixels_per_run;
        self.pixels_per_run * (INTERLEAVED_CHUNK / run)
    }

    /// The pixels of some chunks.
    #[inline(always)]
    pub(super) fn pixels(&self, chunks: &Range<usize>) -> Range<usize> {
        chunks.start * self.chunk_pixels()..self.pixels.min(chunks.end * self.chunk_pixels())
    }

    /// How many times the channels of a group follow each other in a run.
    #[inline(always)]
    pub(super) fn repeats(&self) -> usize {
        self.pixels_per_run
    }

    /// What some channels have in some chunks, in as few runs as can be: one, if they are all channels.
    #[inline(always)]
    pub(super) fn rows(&self, channels: &Range<usize>, chunks: &Range<usize>) -> Runs {
        let pixels = self.pixels(chunks);
        let (count, pixels_per_row) = if channels.len() == self.channels {
            (1, pixels.len())
        } else {
            (pixels.len(), 1)
        };
        Runs {
            start: pixels.start * self.channels + channels.start,
            stride: self.channels,
            count,
            len: pixels_per_row * channels.len(),
        }
    }

    /// The runs of some pixels that have the full length.
    #[inline(always)]
    pub(super) fn full_runs(&self, channels: &Range<usize>, pixels: &Range<usize>) -> Runs {
        Runs {
            start: pixels.start * self.channels + channels.start,
            stride: self.pixels_per_run * self.channels,
            count: pixels.len() / self.pixels_per_run,
            len: self.pixels_per_run * channels.len(),
        }
    }

    /// The shorter run at the end of some pixels, if there is one.
    #[inline(always)]
    pub(super) fn last_run(&self, channels: &Range<usize>, pixels: &Range<usize>) -> Runs {
        let rest = pixels.len() % self.pixels_per_run;
        Runs {
            start: (pixels.end - rest) * self.channels + channels.start,
            stride: 0,
            count: usize::from(rest > 0),
            len: rest * channels.len(),
        }
    }
}
