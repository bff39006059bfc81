//! Tensors as several tasks see them at once: each reads and writes its own part.
//!
//! A channel of an NCHW tensor is scattered over the images, so the parts are no slices that could be split off. And in
//! the in-place forms what is read lies under what is written. So tasks hold addresses; that no two tasks touch the same
//! element is the promise of the [geometry](super::geometry), and lengths have been checked by the module.

use std::marker::PhantomData;

use super::reduce::Block;
use super::simd::{LANES, LINE, Lanes, Level, narrow, stream_alignment, widen};
use crate::element::Element;

/// What is read. May lie under a [`Sink`] (in-place forms).
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a, T> {
    start: *const T,
    len: usize,
    borrowed: PhantomData<&'a [T]>,
}

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sink<'a, T> {
    start: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: stands for a `&[T]`, or for reads of a `&mut [T]` that the unsafe methods' callers keep apart from writes.
unsafe impl<T: Sync> Send for Source<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Source<'_, T> {}
// SAFETY: stands for a `&mut [T]` whose elements are handed out to threads by the unsafe methods' callers, each to one.
unsafe impl<T: Send> Send for Sink<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Sink<'_, T> {}

impl<'a, T> From<&'a [T]> for Source<'a, T> {
    fn from(slice: &'a [T]) -> Self {
        Self {
            start: slice.as_ptr(),
            len: slice.len(),
            borrowed: PhantomData,
        }
    }
}

impl<'a, T> From<&'a mut [T]> for Sink<'a, T> {
    fn from(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrowed: PhantomData,
        }
    }
}

impl<'a, T: Element> Source<'a, T> {
    /// The first `count` of the lanes come from the elements from `at` on, the others are zero. `count` is at most
    /// [`LANES`].
    ///
    /// # Safety
    /// The elements are inside, and no thread writes them meanwhile.
    #[inline(always)]
    pub(super) unsafe fn load<S: Level>(self, level: S, at: usize, count: usize) -> Lanes<T::Param> {
        // SAFETY: the caller's promise.
        unsafe { self.load_block(level, Block::new(at, 0, count)) }
    }

    /// A block's elements, in the lanes that it wants them in; those beyond its count are zero.
    ///
    /// # Safety
    /// As [`Source::load`].
    #[inline(always)]
    pub(super) unsafe fn load_block<S: Level>(self, level: S, block: Block) -> Lanes<T::Param> {
        let Block { at, count, lanes, .. } = block;
        debug_assert!(count <= LANES && at + count <= self.len);
        if count == LANES {
            // Where it lies: of a copy, the compiler would make one load where a conversion is quicker with two.
            // SAFETY: the block is inside, an array of T is aligned as T, and nothing writes there meanwhile.
            let block = unsafe { &*self.start.add(at).cast::<[T; LANES]>() };
            widen(level, block, lanes)
        } else {
            // SAFETY: `count` elements are inside.
            let block = unsafe { level.load_first(self.start.add(at), count) };
            widen(level, &block, lanes)
        }
    }

    /// Asks for the memory of the block at `at`, which will be read soon. It need not be inside.
    #[inline(always)]
    pub(super) fn prefetch<S: Level>(self, level: S, at: usize) {
        let block = self.start.wrapping_add(at).cast::<u8>();
        let mut byte = 0;
        while byte < size_of::<[T; LANES]>() {
            level.prefetch(block.wrapping_add(byte));
            byte += LINE;
        }
    }

    /// One element.
    ///
    /// # Safety
    /// As [`Source::load`].
    #[inline(always)]
    pub(super) unsafe fn get(self, at: usize) -> T::Param {
        debug_assert!(at < self.len);
        // SAFETY: the element is inside.
        unsafe { self.start.add(at).read() }.to_param()
    }
}

impl<'a, T: Element> Sink<'a, T> {
    /// For reading what lies there: in-place forms, and results of one phase that the next one needs.
    pub(super) fn source(self) -> Source<'a, T> {
        Source {
            start: self.start,
            len: self.len,
            borrowed: PhantomData,
        }
    }

    /// How many elements from `at` on until a line of memory begins.
    #[inline(always)]
    pub(super) fn until_line(self, at: usize) -> usize {
        (self.address(at).wrapping_neg() % LINE) / size_of::<T>()
    }

    fn address(self, at: usize) -> usize {
        self.start.wrapping_add(at).addr()
    }

    /// How many bytes this lies behind `source`, modulo the size of a page, 4096.
    #[inline(always)]
    pub(super) fn distance_within_page(self, source: Source<'_, T>) -> usize {
        const PAGE: usize = 4096;
        self.start.addr().wrapping_sub(source.start.addr()) % PAGE
    }

    /// Rounds the first `count` lanes and writes them to the elements from `at` on.
    ///
    /// # Safety
    /// The elements are inside, and no other thread accesses them meanwhile.
    #[inline(always)]
    pub(super) unsafe fn store<S: Level>(self, level: S, at: usize, count: usize, lanes: &Lanes<T::Param>) {
        // SAFETY: the caller's promise.
        unsafe { self.store_block(level, Block::new(at, 0, count), lanes) };
    }

    /// Rounds what the lanes have of a block, and writes it there.
    ///
    /// # Safety
    /// As [`Sink::store`].
    #[inline(always)]
    pub(super) unsafe fn store_block<S: Level>(self, level: S, block: Block, values: &Lanes<T::Param>) {
        let Block { at, count, lanes, .. } = block;
        debug_assert!(count <= LANES && at + count <= self.len);
        let block: [T; LANES] = narrow(level, values, lanes);
        if count == LANES {
            // SAFETY: the block is inside; an array of T is aligned as T.
            unsafe { self.start.add(at).cast::<[T; LANES]>().write(block) };
        } else {
            // SAFETY: `count` elements are inside.
            unsafe { level.store_first(self.start.add(at), &block, count) };
        }
    }

    /// As [`Sink::store_block`] of a full block, past the caches; [`Level::fence`] must follow.
    ///
    /// # Safety
    /// As [`Sink::store`], and a whole number of blocks behind the beginning of a line.
    #[inline(always)]
    pub(super) unsafe fn stream<S: Level>(self, level: S, block: Block, values: &Lanes<T::Param>) {
        let Block { at, count, lanes, .. } = block;
        debug_assert!(
            count == LANES && at + count <= self.len && self.address(at).is_multiple_of(stream_alignment::<T>())
        );
        let block: [T; LANES] = narrow(level, values, lanes);
        // SAFETY: the block is inside and aligned.
        unsafe { level.stream(self.start.add(at), &block) };
    }
}
