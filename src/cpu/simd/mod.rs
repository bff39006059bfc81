//! Instruction sets: which one this machine has, and the few operations that the compiler cannot find by itself.
//!
//! All arithmetic of the CPU backend is written over [`Lanes`], arrays of a fixed length. Their length, and with it the order
//! of every sum, is the same for all instruction sets, and multiplication and addition are fused only where `mul_add` says
//! so. That is why all of them give the same bits.
//!
//! What is done for every element goes through the methods of a [`Level`], which move whole vectors. Written as loops over
//! the lanes ([`lanes`]) it would mean the same, and often become the same; but where full and partial blocks meet, the
//! compiler tends to take vectors apart.
//!
//! x86-64 programs are compiled for machines of 2003, without fused multiply-add (`f32::mul_add` becomes a call into libm)
//! and without conversion of half precision. So each kernel is compiled once per [`Level`] and [`Simd::run`] picks one. A
//! value of a level's type is the proof that the machine has its instructions: only [`Simd`] makes them.

use std::any::Any;

use half::{bf16, f16};

use crate::element::{Element, Real};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Values processed together. 16 `f32` are one AVX-512 register, two of AVX2, four of SSE2 or NEON.
pub(super) const LANES: usize = 16;

/// Values processed together.
pub(super) type Lanes<P> = [P; LANES];

/// The lanes that `value` gives for their numbers.
#[inline(always)]
pub(super) fn lanes<P: Real>(value: impl Fn(usize) -> P) -> Lanes<P> {
    let mut lanes = [P::ZERO; LANES];
    for (index, lane) in lanes.iter_mut().enumerate() {
        *lane = value(index);
    }
    lanes
}

/// All lanes of one value.
#[inline(always)]
pub(super) fn splat<P: Real>(value: P) -> Lanes<P> {
    [value; LANES]
}

/// First element and number of elements of each block of `len` elements: full ones, then what is left.
#[inline(always)]
pub(super) fn blocks(len: usize) -> Blocks {
    Blocks { at: 0, len }
}

/// See [`blocks`].
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    at: usize,
    len: usize,
}

impl Iterator for Blocks {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        if self.at == self.len {
            return None;
        }
        let at = self.at;
        let count = (self.len - at).min(LANES);
        self.at += count;
        Some((at, count))
    }
}

/// Which lane has which element of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneOrder {
    /// Each has the one of its number.
    Natural,
    /// What takes the level least when it converts the type of the elements: for work that is the same for all of them.
    Quickest,
}

/// Work that is compiled for every instruction set. `run` and all it calls must be `#[inline(always)]`: a function that is
/// not inlined into [`Simd::run`]'s is compiled without the instructions. A closure cannot be told so, and the compiler
/// decides by its size and by how often it is called; hence traits where one would expect closures.
pub(super) trait Kernel {
    /// What the work gives.
    type Output;

    /// Does the work.
    fn run<S: Level>(self, level: S) -> Self::Output;
}

/// An instruction set.
pub(super) trait Level: Copy {
    /// Lane by lane, `a + b`.
    #[inline(always)]
    fn add<P: Real>(self, a: Lanes<P>, b: Lanes<P>) -> Lanes<P> {
        lanes(|i| a[i] + b[i])
    }

    /// Lane by lane, `a - b`.
    #[inline(always)]
    fn sub<P: Real>(self, a: Lanes<P>, b: Lanes<P>) -> Lanes<P> {
        lanes(|i| a[i] - b[i])
    }

    /// Lane by lane, `a * b`.
    #[inline(always)]
    fn mul<P: Real>(self, a: Lanes<P>, b: Lanes<P>) -> Lanes<P> {
        lanes(|i| a[i] * b[i])
    }

    /// Lane by lane, `a * b + c`, rounded once.
    #[inline(always)]
    fn mul_add<P: Real>(self, a: Lanes<P>, b: Lanes<P>, c: Lanes<P>) -> Lanes<P> {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }

    /// Lane by lane, 0 where `y <= 0`, else the value: so also where y is NaN.
    #[inline(always)]
    fn pass<P: Real>(self, values: Lanes<P>, y: Lanes<P>) -> Lanes<P> {
        lanes(|i| if y[i] <= P::ZERO { P::ZERO } else { values[i] })
    }

    /// The first `count` lanes of `first`, the others of `second`. Fewer than [`LANES`].
    #[inline(always)]
    fn join<P: Real>(self, first: Lanes<P>, second: Lanes<P>, count: usize) -> Lanes<P> {
        lanes(|i| if i < count { first[i] } else { second[i] })
    }

    /// As [`Level::join`], where lanes lie as [`LaneOrder::Quickest`] has the elements of a block of `bf16`.
    #[inline(always)]
    fn join_bf16<P: Real>(self, first: Lanes<P>, second: Lanes<P>, count: usize) -> Lanes<P> {
        self.join(first, second, count)
    }

    /// Values of elements, in the lanes that [`LaneOrder::Quickest`] has the elements of a block of `bf16` in.
    #[inline(always)]
    fn lanes_of_bf16<P: Real>(self, values: Lanes<P>) -> Lanes<P> {
        values
    }

    /// Converts exactly.
    fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32>;

    /// Rounds to nearest even.
    fn narrow_f16(self, lanes: &Lanes<f32>) -> [f16; LANES];

    /// Converts exactly.
    #[inline(always)]
    fn widen_bf16(self, block: &[bf16; LANES], _order: LaneOrder) -> Lanes<f32> {
        lanes(|i| block[i].to_f32())
    }

    /// Rounds to nearest even. The lower half of a NaN must be zero, as in those that arithmetic makes of nothing or of `bf16`: so
    /// it need not be told from numbers.
    #[inline(always)]
    fn narrow_bf16(self, lanes: &Lanes<f32>, _order: LaneOrder) -> [bf16; LANES] {
        lanes.map(bf16_from_f32)
    }

    /// The first `count` elements of a block from `from` on, the others zero. Fewer than [`LANES`].
    ///
    /// # Safety
    /// `count` elements may be read there.
    #[inline(always)]
    unsafe fn load_first<T: Element>(self, from: *const T, count: usize) -> [T; LANES] {
        let mut block = [T::default(); LANES];
        // SAFETY: `count` elements may be read, and fit the block.
        unsafe { copy_few(from, block.as_mut_ptr(), count) };
        block
    }

    /// Writes the first `count` elements of a block. Fewer than [`LANES`].
    ///
    /// # Safety
    /// `count` elements may be written there.
    #[inline(always)]
    unsafe fn store_first<T: Element>(self, to: *mut T, block: &[T; LANES], count: usize) {
        // SAFETY: `count` elements may be written, and are in the block.
        unsafe { copy_few(block.as_ptr(), to, count) };
    }

    /// Asks for a line of memory, which will be read soon, if there is one at this address.
    fn prefetch<T>(self, _address: *const T) {}

    /// Writes a block past the caches, so that its lines need not be read first. The write is ordered with other threads'
    /// accesses only by [`Level::fence`].
    ///
    /// # Safety
    /// `to` may be written for the whole block and is a multiple of [`stream_alignment`].
    unsafe fn stream<T: Copy>(self, to: *mut T, block: &[T; LANES]);

    /// Ends a run of [`Level::stream`]: after it, other threads may be told of the writes as of any other.
    fn fence(self);
}

/// Copies fewer than [`LANES`] elements, by overlapping moves of a fixed size. A call of memcpy would take longer.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[inline(always)]
unsafe fn copy_few<T>(from: *const T, to: *mut T, count: usize) {
    /// Copies the first and the last `N` elements.
    #[inline(always)]
    unsafe fn both_ends<T, const N: usize>(from: *const T, to: *mut T, count: usize) {
        // SAFETY: the caller has at least N elements, so that both ends are inside; an array of T is aligned as T.
        unsafe {
            let first = from.cast::<[T; N]>().read();
            let last = from.add(count - N).cast::<[T; N]>().read();
            to.cast::<[T; N]>().write(first);
            to.add(count - N).cast::<[T; N]>().write(last);
        }
    }
    debug_assert!(count < LANES);
    // SAFETY: the caller's promise, and the count is at least the number of elements that each moves.
    unsafe {
        match count {
            8.. => both_ends::<T, 8>(from, to, count),
            4.. => both_ends::<T, 4>(from, to, count),
            2.. => both_ends::<T, 2>(from, to, count),
            1 => both_ends::<T, 1>(from, to, count),
            0 => {}
        }
    }
}

/// Bytes of a line of memory, on all machines that are streamed on.
pub(super) const LINE: usize = 64;

/// What streamed blocks are aligned to: their size, or a line where that is less.
pub(super) const fn stream_alignment<T>() -> usize {
    let block = size_of::<[T; LANES]>();
    if block < LINE { block } else { LINE }
}

/// Blocks that a line consists of; 1 if a block is a line or several.
pub(super) const fn blocks_per_line<T>() -> usize {
    LINE / stream_alignment::<T>()
}

/// Converts a block to the type of arithmetic.
#[inline(always)]
pub(super) fn widen<S: Level, T: Element>(level: S, block: &[T; LANES], order: LaneOrder) -> Lanes<T::Param> {
    let block: &dyn Any = block;
    // The casts compare types that are known when this is compiled, so that nothing of them is left in the program.
    if let Some(block) = block.downcast_ref::<[f16; LANES]>() {
        same_type(level.widen_f16(block))
    } else if let Some(block) = block.downcast_ref::<[bf16; LANES]>() {
        same_type(level.widen_bf16(block, order))
    } else if let Some(block) = block.downcast_ref::<Lanes<T::Param>>() {
        *block
    } else {
        unreachable!("other elements are their own parameter type")
    }
}

/// Rounds to the type of the tensor.
#[inline(always)]
pub(super) fn narrow<S: Level, T: Element>(level: S, values: &Lanes<T::Param>, order: LaneOrder) -> [T; LANES] {
    let values: &dyn Any = values;
    if T::DTYPE == crate::Dtype::F16 {
        let values = values.downcast_ref::<Lanes<f32>>().expect("f16 is computed in f32");
        same_type(level.narrow_f16(values))
    } else if T::DTYPE == crate::Dtype::Bf16 {
        let values = values.downcast_ref::<Lanes<f32>>().expect("bf16 is computed in f32");
        same_type(level.narrow_bf16(values, order))
    } else {
        *values
            .downcast_ref::<[T; LANES]>()
            .expect("other elements are their own parameter type")
    }
}

/// [`bf16::from_f32`] of a number, or of a NaN that a `bf16` can be: see [`Level::narrow_bf16`].
#[inline(always)]
fn bf16_from_f32(value: f32) -> bf16 {
    let bits = value.to_bits();
    debug_assert!(
        !value.is_nan() || bits & 0xffff == 0,
        "this NaN could become an infinity, or 0"
    );
    // Half a unit in the last place, less one where a tie is already on an even number.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    bf16::from_bits((rounded >> 16) as u16)
}

/// A value under another name of its type.
#[inline(always)]
fn same_type<A: Copy + 'static, B: Copy + 'static>(value: A) -> B {
    *(&value as &dyn Any)
        .downcast_ref::<B>()
        .expect("both names are of one type")
}

/// What every machine has: no streaming, conversion in software.
#[derive(Clone, Copy, Debug)]
pub(super) struct Portable(());

/// What takes a processor many instructions is compiled once, not wherever it is used: it would be most of the library.
impl Level for Portable {
    #[inline(always)]
    fn mul_add<P: Real>(self, a: Lanes<P>, b: Lanes<P>, c: Lanes<P>) -> Lanes<P> {
        #[inline(never)]
        fn in_software<P: Real>(a: &Lanes<P>, b: &Lanes<P>, c: &Lanes<P>) -> Lanes<P> {
            lanes(|i| a[i].mul_add(b[i], c[i]))
        }
        if cfg!(all(target_arch = "x86_64", not(target_feature = "fma"))) {
            in_software(&a, &b, &c)
        } else {
            lanes(|i| a[i].mul_add(b[i], c[i]))
        }
    }

    #[inline(never)]
    fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32> {
        lanes(|i| block[i].to_f32())
    }

    #[inline(never)]
    fn narrow_f16(self, lanes: &Lanes<f32>) -> [f16; LANES] {
        lanes.map(f16::from_f32)
    }

    #[inline(always)]
    unsafe fn stream<T: Copy>(self, to: *mut T, block: &[T; LANES]) {
        // SAFETY: the caller may write a block there; a block of T has T's alignment.
        unsafe { to.cast::<[T; LANES]>().write(*block) }
    }

    #[inline(always)]
    fn fence(self) {}
}

/// Ends a thread's run of streamed writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fence;

impl Kernel for Fence {
    type Output = ();

    #[inline(always)]
    fn run<S: Level>(self, level: S) {
        level.fence();
    }
}

/// The best instruction set of this machine.
#[derive(Clone, Copy, Debug)]
pub(super) enum Simd {
    /// Any machine.
    Portable(Portable),
    /// x86-64 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    /// x86-64 with 512-bit registers.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
}

impl Simd {
    /// Asks the machine. The answer is remembered by the standard library.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(level) = x86::Avx512::detect() {
                return Simd::Avx512(level);
            }
            if let Some(level) = x86::Avx2::detect() {
                return Simd::Avx2(level);
            }
        }
        Simd::Portable(Portable(()))
    }

    /// Every instruction set that this machine has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Simd::Portable(Portable(()))];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(x86::Avx2::detect().map(Simd::Avx2));
            all.extend(x86::Avx512::detect().map(Simd::Avx512));
        }
        all
    }

    /// Does the work with these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Simd::Portable(level) => kernel.run(level),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2(level) => level.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512(level) => level.run(kernel),
        }
    }
}
