//! Instruction sets: which one this machine has, and the few operations that the compiler cannot find by itself.
//!
//! All arithmetic of the CPU backend is written over [`Lanes`], arrays of a fixed length that the compiler keeps in vector
//! registers. Their length, and with it the order of every sum, is the same for all instruction sets, and multiplication
//! and addition are fused only where `mul_add` says so. That is why all of them give the same bits.
//!
//! x86-64 programs are compiled for machines of 2003, without fused multiply-add (`f32::mul_add` becomes a call into libm)
//! and without conversion of half precision. So each kernel is compiled once per [`Level`] and [`Simd::run`] picks one. A
//! value of a level's type is the proof that the machine has its instructions: only [`Simd`] makes them.

use std::any::Any;

use half::{bf16, f16};

use crate::element::{Element, Real};

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

/// Work that is compiled for every instruction set. `run` and all it calls must be `#[inline(always)]`: a function that is
/// not inlined into [`Simd::run`]'s is compiled without the instructions. A closure cannot be told so, and the compiler
/// decides by its size and by how often it is called; hence traits where one would expect closures.
pub(super) trait Kernel {
    /// What the work gives.
    type Output;

    /// Does the work.
    fn run<S: Level>(self, level: S) -> Self::Output;
}

/// An instruction set: what differs beyond the compiler's choice of registers.
pub(super) trait Level: Copy {
    /// Converts exactly.
    fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32>;

    /// Rounds to nearest even.
    fn narrow_f16(self, lanes: &Lanes<f32>) -> [f16; LANES];

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

/// What streamed blocks are aligned to: their size, or a cache line where that is less.
pub(super) const fn stream_alignment<T>() -> usize {
    let block = size_of::<[T; LANES]>();
    if block < 64 { block } else { 64 }
}

/// Converts a block to the type of arithmetic.
#[inline(always)]
pub(super) fn widen<S: Level, T: Element>(level: S, block: &[T; LANES]) -> Lanes<T::Param> {
    let block: &dyn Any = block;
    // The casts compare types that are known when this is compiled, so that nothing of them is left in the program.
    if let Some(block) = block.downcast_ref::<[f16; LANES]>() {
        same_type(level.widen_f16(block))
    } else if let Some(block) = block.downcast_ref::<[T; LANES]>() {
        lanes(|i| block[i].to_param())
    } else {
        unreachable!("a block is a block")
    }
}

/// Rounds to the type of the tensor.
#[inline(always)]
pub(super) fn narrow<S: Level, T: Element>(level: S, values: &Lanes<T::Param>) -> [T; LANES] {
    let values: &dyn Any = values;
    if T::DTYPE == crate::Dtype::F16 {
        let values = values.downcast_ref::<Lanes<f32>>().expect("f16 is computed in f32");
        same_type(level.narrow_f16(values))
    } else if T::DTYPE == crate::Dtype::Bf16 {
        let values = values.downcast_ref::<Lanes<f32>>().expect("bf16 is computed in f32");
        same_type(values.map(bf16_from_f32))
    } else {
        let values = values
            .downcast_ref::<Lanes<T::Param>>()
            .expect("values are of the parameter type");
        values.map(T::from_param)
    }
}

/// [`bf16::from_f32`] without a branch, so that it vectorises.
#[inline(always)]
fn bf16_from_f32(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Half a unit in the last place, less one where a tie is already on an even number. NaN gets its quiet bit instead,
    // since the carry could make an infinity of it.
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
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

impl Level for Portable {
    #[inline(always)]
    fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32> {
        lanes(|i| block[i].to_f32())
    }

    #[inline(always)]
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! AVX2 and AVX-512.

    use std::arch::x86_64::*;
    use std::mem::transmute_copy;

    use half::f16;

    use super::{Kernel, LANES, Lanes, Level};
    use crate::element::Element;

    /// The mask of the first `count` lanes.
    #[inline(always)]
    fn first(count: usize) -> u16 {
        debug_assert!(count < LANES);
        !(u16::MAX << count)
    }

    /// AVX2 with fused multiply-add and conversion of half precision.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::cpu) struct Avx2(());

    /// AVX-512 with the extensions that all but the first machines have.
    #[derive(Clone, Copy, Debug)]
    pub(in crate::cpu) struct Avx512(());

    impl Avx2 {
        pub(super) fn detect() -> Option<Self> {
            let present =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            present.then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn compiled_for_avx2<K: Kernel>(level: Avx2, kernel: K) -> K::Output {
                kernel.run(level)
            }
            // SAFETY: a value of this type is made only where the machine has these instructions.
            unsafe { compiled_for_avx2(self, kernel) }
        }
    }

    impl Avx512 {
        pub(super) fn detect() -> Option<Self> {
            let present = Avx2::detect().is_some()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            present.then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn compiled_for_avx512<K: Kernel>(level: Avx512, kernel: K) -> K::Output {
                kernel.run(level)
            }
            // SAFETY: a value of this type is made only where the machine has these instructions.
            unsafe { compiled_for_avx512(self, kernel) }
        }
    }

    impl Level for Avx2 {
        #[inline(always)]
        fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32> {
            // SAFETY: `self` proves AVX and F16C. Both halves of the block are read whole and need no alignment; two
            // vectors of 8 f32 have the size and every bit pattern of the lanes.
            unsafe {
                let low = _mm_loadu_si128(block.as_ptr().cast());
                let high = _mm_loadu_si128(block.as_ptr().add(LANES / 2).cast());
                std::mem::transmute([_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)])
            }
        }

        #[inline(always)]
        fn narrow_f16(self, lanes: &Lanes<f32>) -> [f16; LANES] {
            // SAFETY: as in `widen_f16`.
            unsafe {
                let low = _mm256_loadu_ps(lanes.as_ptr());
                let high = _mm256_loadu_ps(lanes.as_ptr().add(LANES / 2));
                const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
                std::mem::transmute([_mm256_cvtps_ph::<NEAREST>(low), _mm256_cvtps_ph::<NEAREST>(high)])
            }
        }

        #[inline(always)]
        unsafe fn stream<T: Copy>(self, to: *mut T, block: &[T; LANES]) {
            for part in 0..size_of::<[T; LANES]>() / size_of::<__m256i>() {
                // SAFETY: `self` proves AVX; the caller may write the block, which is a multiple of 32 bytes for every
                // element, and its start is aligned to more.
                unsafe {
                    let value = _mm256_loadu_si256(block.as_ptr().cast::<__m256i>().add(part));
                    _mm256_stream_si256(to.cast::<__m256i>().add(part), value);
                }
            }
        }

        #[inline(always)]
        fn prefetch<T>(self, address: *const T) {
            // SAFETY: every x86-64 machine has SSE; a prefetch of an address without memory does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
        }

        #[inline(always)]
        fn fence(self) {
            // SAFETY: every x86-64 machine has SSE.
            unsafe { _mm_sfence() };
        }
    }

    impl Level for Avx512 {
        #[inline(always)]
        unsafe fn load_first<T: Element>(self, from: *const T, count: usize) -> [T; LANES] {
            let mask = first(count);
            // SAFETY: `self` proves AVX-512F, BW and VL; lanes that the mask leaves out are not read; the vectors have the
            // size and, as numbers, every bit pattern of the block.
            unsafe {
                match size_of::<T>() {
                    2 => transmute_copy(&_mm256_maskz_loadu_epi16(mask, from.cast())),
                    4 => transmute_copy(&_mm512_maskz_loadu_epi32(mask, from.cast())),
                    8 => transmute_copy(&[
                        _mm512_maskz_loadu_epi64(mask as u8, from.cast()),
                        _mm512_maskz_loadu_epi64((mask >> 8) as u8, from.wrapping_add(LANES / 2).cast()),
                    ]),
                    _ => unreachable!("elements have 2, 4 or 8 bytes"),
                }
            }
        }

        #[inline(always)]
        unsafe fn store_first<T: Element>(self, to: *mut T, block: &[T; LANES], count: usize) {
            let mask = first(count);
            // SAFETY: as in `load_first`, for writing.
            unsafe {
                match size_of::<T>() {
                    2 => _mm256_mask_storeu_epi16(to.cast(), mask, transmute_copy(block)),
                    4 => _mm512_mask_storeu_epi32(to.cast(), mask, transmute_copy(block)),
                    8 => {
                        let [low, high]: [__m512i; 2] = transmute_copy(block);
                        _mm512_mask_storeu_epi64(to.cast(), mask as u8, low);
                        _mm512_mask_storeu_epi64(to.wrapping_add(LANES / 2).cast(), (mask >> 8) as u8, high);
                    }
                    _ => unreachable!("elements have 2, 4 or 8 bytes"),
                }
            }
        }

        #[inline(always)]
        fn widen_f16(self, block: &[f16; LANES]) -> Lanes<f32> {
            // SAFETY: `self` proves AVX-512F. The block is read whole and needs no alignment; a vector of 16 f32 has the
            // size and every bit pattern of the lanes.
            unsafe {
                let block = _mm256_loadu_si256(block.as_ptr().cast());
                std::mem::transmute(_mm512_cvtph_ps(block))
            }
        }

        #[inline(always)]
        fn narrow_f16(self, lanes: &Lanes<f32>) -> [f16; LANES] {
            // SAFETY: as in `widen_f16`.
            unsafe {
                let lanes = _mm512_loadu_ps(lanes.as_ptr());
                std::mem::transmute(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(lanes))
            }
        }

        #[inline(always)]
        unsafe fn stream<T: Copy>(self, to: *mut T, block: &[T; LANES]) {
            let bytes = size_of::<[T; LANES]>();
            for part in 0..bytes / size_of::<__m512i>() {
                // SAFETY: `self` proves AVX-512F; the caller may write the block, whose start is aligned to 64 bytes.
                unsafe {
                    let value = _mm512_loadu_si512(block.as_ptr().cast::<__m512i>().add(part));
                    _mm512_stream_si512(to.cast::<__m512i>().add(part), value);
                }
            }
            if bytes < size_of::<__m512i>() {
                // SAFETY: as above, for the half vector that a block of 2-byte elements is.
                unsafe {
                    let value = _mm256_loadu_si256(block.as_ptr().cast());
                    _mm256_stream_si256(to.cast(), value);
                }
            }
        }

        #[inline(always)]
        fn prefetch<T>(self, address: *const T) {
            // SAFETY: every x86-64 machine has SSE; a prefetch of an address without memory does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
        }

        #[inline(always)]
        fn fence(self) {
            // SAFETY: every x86-64 machine has SSE.
            unsafe { _mm_sfence() };
        }
    }
}
