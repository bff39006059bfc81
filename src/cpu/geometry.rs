//! Which elements a task works on, in which order: the one place that knows the layouts.
//!
//! The tensor is cut by its shape alone, never by the number of threads, so that every sum is taken in the same order
//! whoever computes it:
//!
//! - A **task** is some adjacent channels in one **part** of the values per channel. Tasks touch disjoint elements.
//! - A part is several **chunks**. A chunk stays in the nearest cache, so that it can be read twice.
//! - A chunk is several **runs** of adjacent elements.
//!
//! Planar (NCHW): a task has one channel, a run is (part of) a plane. Interleaved (NHWC): a task has a strip of channels,
//! a run is the strip in one pixel; with few channels, several pixels make one run, so that vectors are full.

use std::ops::Range;

use super::simd::LANES;
use crate::shape::{Layout, Shape};

/// Values of a chunk of one channel in NCHW: 8 KB of `f32`, in the first-level cache with room for two tensors.
const PLANAR_CHUNK: usize = 2048;
/// Chunks of a part in NCHW.
const PLANAR_CHUNKS_PER_PART: usize = 16;
/// Widest run in NHWC.
pub(super) const STRIP: usize = 256;
/// Runs of a chunk in NHWC.
const INTERLEAVED_RUNS_PER_CHUNK: usize = 32;
/// Chunks of a part in NHWC.
const INTERLEAVED_CHUNKS_PER_PART: usize = 8;

/// A tensor cut into tasks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Geometry {
    /// The values of a channel are adjacent.
    Planar(Planar),
    /// The channels of a pixel are adjacent.
    Interleaved(Interleaved),
}

/// Adjacent channels in one part of the values per channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    /// Which channels: one in NCHW, at most [`STRIP`] in NHWC.
    pub(super) channels: Range<usize>,
    /// Which part.
    pub(super) part: usize,
}

/// Adjacent elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first, as an index into the tensor.
    pub(super) start: usize,
    /// How many.
    pub(super) len: usize,
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

    /// Number of parts of the values of each channel.
    pub(super) fn parts(&self) -> usize {
        match self {
            Geometry::Planar(planar) => planar.chunks().div_ceil(PLANAR_CHUNKS_PER_PART),
            Geometry::Interleaved(interleaved) => {
                interleaved.pixels.div_ceil(interleaved.part_pixels())
            }
        }
    }

    /// Number of values of each channel in a part.
    pub(super) fn part_values(&self, part: usize) -> usize {
        match self {
            Geometry::Planar(planar) => planar
                .part(part)
                .map(|chunk| planar.chunk_values(chunk))
                .sum(),
            Geometry::Interleaved(interleaved) => interleaved.part(part).len(),
        }
    }

    /// Number of channels of a group: those of one task.
    fn group_channels(&self) -> usize {
        match self {
            Geometry::Planar(_) => 1,
            Geometry::Interleaved(interleaved) => interleaved.strip,
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

    /// Number of tasks.
    pub(super) fn tasks(&self) -> usize {
        self.parts() * self.groups()
    }

    /// The task of a number below [`Geometry::tasks`], in the order of memory as far as there is one.
    pub(super) fn task(&self, number: usize) -> Task {
        let groups = self.groups();
        Task {
            channels: self.group(number % groups),
            part: number / groups,
        }
    }
}

/// NCHW.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planar {
    batch: usize,
    channels: usize,
    plane: usize,
    /// Images of a chunk; 1 if planes are cut.
    images_per_chunk: usize,
    /// Pieces that a plane is cut into; 1 if a chunk has whole planes.
    pieces: usize,
    /// Values of a piece; the plane's, if it is not cut.
    piece: usize,
}

impl Planar {
    fn new(batch: usize, channels: usize, plane: usize) -> Self {
        let mut planar = Self {
            batch,
            channels,
            plane,
            images_per_chunk: (PLANAR_CHUNK / plane).clamp(1, batch),
            pieces: 1,
            piece: plane,
        };
        if plane > PLANAR_CHUNK {
            // Pieces of nearly one size, and whole vectors but for the last.
            let pieces = plane.div_ceil(PLANAR_CHUNK);
            planar.piece = plane.div_ceil(pieces).next_multiple_of(4 * LANES);
            planar.pieces = plane.div_ceil(planar.piece);
        }
        planar
    }

    fn chunks(&self) -> usize {
        self.batch.div_ceil(self.images_per_chunk) * self.pieces
    }

    /// The chunks of a part.
    pub(super) fn part(&self, part: usize) -> Range<usize> {
        part * PLANAR_CHUNKS_PER_PART..self.chunks().min((part + 1) * PLANAR_CHUNKS_PER_PART)
    }

    /// Number of values of a chunk.
    pub(super) fn chunk_values(&self, chunk: usize) -> usize {
        let (images, within) = self.chunk(chunk);
        images.len() * within.len()
    }

    /// The images of a chunk, and which elements of their planes.
    fn chunk(&self, chunk: usize) -> (Range<usize>, Range<usize>) {
        let first = chunk / self.pieces * self.images_per_chunk;
        let start = chunk % self.pieces * self.piece;
        (
            first..self.batch.min(first + self.images_per_chunk),
            start..self.plane.min(start + self.piece),
        )
    }

    /// Calls `visit` for every run of a chunk.
    #[inline(always)]
    pub(super) fn runs(&self, channel: usize, chunk: usize, mut visit: impl FnMut(Run)) {
        let (images, within) = self.chunk(chunk);
        for image in images {
            visit(Run {
                start: (image * self.channels + channel) * self.plane + within.start,
                len: within.len(),
            });
        }
    }
}

/// NHWC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interleaved {
    /// N · H · W.
    pixels: usize,
    channels: usize,
    /// Channels of a task, but for the last.
    strip: usize,
    /// Pixels of a run: more than 1 only with few channels.
    pixels_per_run: usize,
}

impl Interleaved {
    fn new(pixels: usize, channels: usize) -> Self {
        Self {
            pixels,
            channels,
            strip: channels
                .div_ceil(channels.div_ceil(STRIP))
                .next_multiple_of(LANES),
            pixels_per_run: Self::pixels_per_run(channels),
        }
    }

    /// As many as keep a run within a strip, and its vectors full if that can be.
    fn pixels_per_run(channels: usize) -> usize {
        let most = (STRIP / channels).max(1);
        let full = LANES >> channels.trailing_zeros().min(LANES.trailing_zeros());
        if most >= full {
            most / full * full
        } else {
            most
        }
    }

    fn part_pixels(&self) -> usize {
        self.pixels_per_run * INTERLEAVED_RUNS_PER_CHUNK * INTERLEAVED_CHUNKS_PER_PART
    }

    /// The pixels of a part.
    pub(super) fn part(&self, part: usize) -> Range<usize> {
        part * self.part_pixels()..self.pixels.min((part + 1) * self.part_pixels())
    }

    /// Calls `visit` with the pixels of every chunk of a part.
    #[inline(always)]
    pub(super) fn chunks(&self, part: usize, mut visit: impl FnMut(Range<usize>)) {
        let pixels = self.part(part);
        let chunk = self.pixels_per_run * INTERLEAVED_RUNS_PER_CHUNK;
        for start in pixels.clone().step_by(chunk) {
            visit(start..pixels.end.min(start + chunk));
        }
    }

    /// How many times the channels of a task follow each other in a run.
    pub(super) fn repeats(&self) -> usize {
        self.pixels_per_run
    }

    /// The runs of some pixels that have the full length.
    #[inline(always)]
    pub(super) fn full_runs(&self, channels: &Range<usize>, pixels: &Range<usize>) -> FullRuns {
        FullRuns {
            start: pixels.start * self.channels + channels.start,
            stride: self.pixels_per_run * self.channels,
            count: pixels.len() / self.pixels_per_run,
            len: self.pixels_per_run * channels.len(),
        }
    }

    /// The shorter run at the end of some pixels. May be empty.
    #[inline(always)]
    pub(super) fn last_run(&self, channels: &Range<usize>, pixels: &Range<usize>) -> Run {
        let rest = pixels.len() % self.pixels_per_run;
        Run {
            start: (pixels.end - rest) * self.channels + channels.start,
            len: rest * channels.len(),
        }
    }
}

/// Runs of one length at equal distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct FullRuns {
    start: usize,
    stride: usize,
    /// How many.
    pub(super) count: usize,
    /// Elements of each.
    pub(super) len: usize,
}

impl FullRuns {
    /// Where a run starts.
    #[inline(always)]
    pub(super) fn start(&self, run: usize) -> usize {
        self.start + run * self.stride
    }
}
