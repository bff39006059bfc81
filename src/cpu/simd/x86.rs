//! AVX2 and AVX-512.

use std::arch::x86_64::*;
use std::mem::{transmute_copy, zeroed};

use half::{bf16, f16};

use super::{Kernel, LANES, LaneOrder, Lanes, Level, lanes};
use crate::element::{Element, Real};

/// A method of a [`Level`] that applies an intrinsic to each vector of its operands: `$single` to those of `f32`, `$double`
/// to those of `f64`.
macro_rules! lane_by_lane {
    ($name:ident, $vector32:ty, $vector64:ty, $single:expr, $double:expr, $($operand:ident),+) => {
        #[inline(always)]
        fn $name<P: Real>(self, $($operand: Lanes<P>),+) -> Lanes<P> {
            const SINGLES: usize = size_of::<Lanes<f32>>() / size_of::<$vector32>();
            const DOUBLES: usize = size_of::<Lanes<f64>>() / size_of::<$vector64>();
            // SAFETY: `self` proves the instructions. The parameter type is f32 or f64, which its size tells; its lanes have
            // the size of the vectors that they are taken for, and every bit pattern is a number.
            unsafe {
                if size_of::<P>() == size_of::<f32>() {
                    $(let $operand: [$vector32; SINGLES] = transmute_copy(&$operand);)+
                    let mut result: [$vector32; SINGLES] = zeroed();
                    for (vector, result) in result.iter_mut().enumerate() {
                        *result = $single($($operand[vector]),+);
                    }
                    transmute_copy(&result)
                } else {
                    $(let $operand: [$vector64; DOUBLES] = transmute_copy(&$operand);)+
                    let mut result: [$vector64; DOUBLES] = zeroed();
                    for (vector, result) in result.iter_mut().enumerate() {
                        *result = $double($($operand[vector]),+);
                    }
                    transmute_copy(&result)
                }
            }
        }
    };
}

/// The mask of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> u16 {
    debug_assert!(count < LANES);
    !(u16::MAX << count)
}

/// As many words with all bits as there are lanes, then as many without.
static MASKS: [u64; 2 * LANES] = {
    let mut masks = [0; 2 * LANES];
    let mut lane = 0;
    while lane < LANES {
        masks[lane] = u64::MAX;
        lane += 1;
    }
    masks
};

/// The masks of the first `count` lanes, for `V` vectors of numbers of type `P`.
#[inline]
#[target_feature(enable = "avx2")]
fn first_256<P, const V: usize>(count: usize) -> [__m256i; V] {
    debug_assert!(count < LANES);
    // Both sides of the border are uniform, so that smaller numbers than words may be counted from there.
    let border = MASKS.as_ptr().wrapping_add(LANES).cast::<P>();
    let mut masks = [_mm256_setzero_si256(); V];
    for (vector, mask) in masks.iter_mut().enumerate() {
        let from = border.wrapping_add(vector * (LANES / V)).wrapping_sub(count);
        // SAFETY: from LANES numbers before the border to LANES behind it all are inside, up to words.
        *mask = unsafe { _mm256_loadu_si256(from.cast()) };
    }
    masks
}

/// The first `count` of [`LANES`] numbers of 2 bytes, the others zero. In registers: what is written to memory in pieces
/// cannot be read as a whole before all of it has arrived there.
///
/// # Safety
/// `count` numbers may be read there.
#[inline(always)]
unsafe fn load_first_u16(from: *const u16, count: usize) -> [u16; LANES] {
    debug_assert!(count < LANES);
    // The first numbers, and the last without those that are among the first.
    // SAFETY: each match arm reads as many numbers as there are at least, from the start or up to the end.
    let halves: [u128; 2] = unsafe {
        match count {
            8.. => {
                let last = from.add(count - 8).cast::<u128>().read_unaligned();
                let rest = last.checked_shr(16 * (16 - count as u32)).unwrap_or(0);
                [from.cast::<u128>().read_unaligned(), rest]
            }
            4.. => {
                let last = from.add(count - 4).cast::<u64>().read_unaligned();
                let rest = last.checked_shr(16 * (8 - count as u32)).unwrap_or(0);
                [
                    u128::from(from.cast::<u64>().read_unaligned()) | u128::from(rest) << 64,
                    0,
                ]
            }
            2.. => {
                let last = from.add(count - 2).cast::<u32>().read_unaligned();
                let rest = last.checked_shr(16 * (4 - count as u32)).unwrap_or(0);
                [
                    u128::from(from.cast::<u32>().read_unaligned()) | u128::from(rest) << 32,
                    0,
                ]
            }
            1 => [u128::from(from.read()), 0],
            0 => [0, 0],
        }
    };
    // SAFETY: the same size, and every bit pattern is a number; x86-64 has the first number in the lowest bits.
    unsafe { std::mem::transmute(halves) }
}

/// The bits of `first` where the masks have ones, those of `second` elsewhere, vector by vector.
#[inline]
#[target_feature(enable = "avx2")]
fn blend_256<const V: usize>(first: [__m256i; V], second: [__m256i; V], masks: [__m256i; V]) -> [__m256i; V] {
    let mut result = second;
    for (result, (first, mask)) in result.iter_mut().zip(first.into_iter().zip(masks)) {
        // Not as one instruction, which would be more than one where either is zero.
        let first = _mm256_and_si256(mask, first);
        *result = _mm256_or_si256(first, _mm256_andnot_si256(mask, *result));
    }
    result
}

/// 0 where `y <= 0`, else the value.
#[inline]
#[target_feature(enable = "avx2")]
fn pass_256_ps(values: __m256, y: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(y, _mm256_setzero_ps()), values)
}

/// 0 where `y <= 0`, else the value.
#[inline]
#[target_feature(enable = "avx2")]
fn pass_256_pd(values: __m256d, y: __m256d) -> __m256d {
    _mm256_andnot_pd(_mm256_cmp_pd::<_CMP_LE_OQ>(y, _mm256_setzero_pd()), values)
}

/// 0 where `y <= 0`, else the value.
#[inline]
#[target_feature(enable = "avx512f")]
fn pass_512_ps(values: __m512, y: __m512) -> __m512 {
    _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(y, _mm512_setzero_ps()), values)
}

/// 0 where `y <= 0`, else the value.
#[inline]
#[target_feature(enable = "avx512f")]
fn pass_512_pd(values: __m512d, y: __m512d) -> __m512d {
    _mm512_maskz_mov_pd(_mm512_cmp_pd_mask::<_CMP_NLE_UQ>(y, _mm512_setzero_pd()), values)
}

/// Eight numbers of 2 bytes, which are there twice, as the upper halves of numbers of 4 bytes. In one instruction, which moves
/// bytes within each half of the vector.
#[inline]
#[target_feature(enable = "avx2")]
fn upper_halves_256(twice: __m256i) -> __m256i {
    const ZERO: i8 = -1;
    const FROM: [i8; 32] = {
        let mut from = [ZERO; 32];
        let mut byte = 0;
        while byte < 16 {
            from[byte / 2 * 4 + 2 + byte % 2] = byte as i8;
            byte += 1;
        }
        from
    };
    // SAFETY: both are 32 bytes, of which every pattern is a vector.
    _mm256_shuffle_epi8(twice, unsafe { std::mem::transmute::<[i8; 32], __m256i>(FROM) })
}

/// The bits of values rounded to `bf16`, to nearest even, in the upper halves; what the lower ones have means nothing.
#[inline]
#[target_feature(enable = "avx2")]
fn nearest_bf16_256(values: __m256) -> __m256i {
    // As `bf16_from_f32`, which says why.
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
}

/// The bits of values rounded to `bf16`, to nearest even, in the lower halves. Not by the conversion of AVX512-BF16, which
/// takes subnormal numbers for 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn bf16_bits_512(values: __m512) -> __m512i {
    // As `bf16_from_f32`, which says why.
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm512_srli_epi32::<16>(nearest)
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
    lane_by_lane!(add, __m256, __m256d, _mm256_add_ps, _mm256_add_pd, a, b);
    lane_by_lane!(sub, __m256, __m256d, _mm256_sub_ps, _mm256_sub_pd, a, b);
    lane_by_lane!(mul, __m256, __m256d, _mm256_mul_ps, _mm256_mul_pd, a, b);
    lane_by_lane!(mul_add, __m256, __m256d, _mm256_fmadd_ps, _mm256_fmadd_pd, a, b, c);
    lane_by_lane!(pass, __m256, __m256d, pass_256_ps, pass_256_pd, values, y);

    #[inline(always)]
    fn join<P: Real>(self, first: Lanes<P>, second: Lanes<P>, count: usize) -> Lanes<P> {
        // SAFETY: as for the operations above.
        unsafe {
            if size_of::<P>() == size_of::<f32>() {
                let masks = first_256::<f32, 2>(count);
                transmute_copy(&blend_256::<2>(transmute_copy(&first), transmute_copy(&second), masks))
            } else {
                let masks = first_256::<f64, 4>(count);
                transmute_copy(&blend_256::<4>(transmute_copy(&first), transmute_copy(&second), masks))
            }
        }
    }

    #[inline(always)]
    fn join_bf16<P: Real>(self, first: Lanes<P>, second: Lanes<P>, count: usize) -> Lanes<P> {
        assert_eq!(size_of::<P>(), size_of::<f32>(), "bf16 is computed in f32");
        // SAFETY: as for the operations above.
        unsafe {
            // As `widen_bf16` has them: those at even places, of which there is one more if the count is odd, and those
            // at odd ones.
            let [even, _] = first_256::<f32, 2>(count.div_ceil(2));
            let [odd, _] = first_256::<f32, 2>(count / 2);
            transmute_copy(&blend_256::<2>(
                transmute_copy(&first),
                transmute_copy(&second),
                [even, odd],
            ))
        }
    }

    #[inline(always)]
    fn lanes_of_bf16<P: Real>(self, values: Lanes<P>) -> Lanes<P> {
        lanes(|lane| values[2 * lane % LANES + 2 * lane / LANES])
    }

    #[inline(always)]
    unsafe fn load_first<T: Element>(self, from: *const T, count: usize) -> [T; LANES] {
        // SAFETY: `self` proves AVX2; lanes that the masks leave out are not read; the vectors have the size and, as
        // numbers, every bit pattern of the block.
        unsafe {
            match size_of::<T>() {
                2 => transmute_copy(&load_first_u16(from.cast(), count)),
                4 => {
                    let [low, high] = first_256::<f32, 2>(count);
                    let from = from.cast::<f32>();
                    transmute_copy(&[
                        _mm256_maskload_ps(from, low),
                        _mm256_maskload_ps(from.wrapping_add(LANES / 2), high),
                    ])
                }
                8 => {
                    let from = from.cast::<f64>();
                    let mut vectors = [_mm256_setzero_pd(); 4];
                    for (vector, mask) in first_256::<f64, 4>(count).into_iter().enumerate() {
                        vectors[vector] = _mm256_maskload_pd(from.wrapping_add(vector * (LANES / 4)), mask);
                    }
                    transmute_copy(&vectors)
                }
                _ => unreachable!("elements have 2, 4 or 8 bytes"),
            }
        }
    }

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
    fn widen_bf16(self, block: &[bf16; LANES], order: LaneOrder) -> Lanes<f32> {
        // SAFETY: as in `widen_f16`, with AVX2 instead of F16C.
        unsafe {
            if order == LaneOrder::Quickest {
                // Those at even places, then those at odd ones, which are upper halves as they are.
                let block = _mm256_loadu_si256(block.as_ptr().cast());
                let odd = _mm256_and_si256(block, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                return std::mem::transmute::<[__m256i; 2], Lanes<f32>>([_mm256_slli_epi32::<16>(block), odd]);
            }
            let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(block.as_ptr().cast()));
            let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(block.as_ptr().add(LANES / 2).cast()));
            std::mem::transmute([upper_halves_256(low), upper_halves_256(high)])
        }
    }

    #[inline(always)]
    fn narrow_bf16(self, lanes: &Lanes<f32>, order: LaneOrder) -> [bf16; LANES] {
        // SAFETY: as in `widen_bf16`.
        unsafe {
            let low = nearest_bf16_256(_mm256_loadu_ps(lanes.as_ptr()));
            let high = nearest_bf16_256(_mm256_loadu_ps(lanes.as_ptr().add(LANES / 2)));
            let low = _mm256_srli_epi32::<16>(low);
            if order == LaneOrder::Quickest {
                const ODD: i32 = 0b1010_1010;
                return std::mem::transmute::<__m256i, [bf16; LANES]>(_mm256_blend_epi16::<ODD>(low, high));
            }
            let high = _mm256_srli_epi32::<16>(high);
            // Packs the 128-bit halves apart from each other, so the two middle quarters must change places.
            std::mem::transmute(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(
                low, high,
            )))
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
    lane_by_lane!(add, __m512, __m512d, _mm512_add_ps, _mm512_add_pd, a, b);
    lane_by_lane!(sub, __m512, __m512d, _mm512_sub_ps, _mm512_sub_pd, a, b);
    lane_by_lane!(mul, __m512, __m512d, _mm512_mul_ps, _mm512_mul_pd, a, b);
    lane_by_lane!(mul_add, __m512, __m512d, _mm512_fmadd_ps, _mm512_fmadd_pd, a, b, c);
    lane_by_lane!(pass, __m512, __m512d, pass_512_ps, pass_512_pd, values, y);

    #[inline(always)]
    fn join<P: Real>(self, first_lanes: Lanes<P>, second: Lanes<P>, count: usize) -> Lanes<P> {
        let mask = first(count);
        // SAFETY: as for the operations above.
        unsafe {
            if size_of::<P>() == size_of::<f32>() {
                let (first_lanes, second) = (transmute_copy(&first_lanes), transmute_copy(&second));
                transmute_copy(&_mm512_mask_mov_ps(second, mask, first_lanes))
            } else {
                let first_lanes: [__m512d; 2] = transmute_copy(&first_lanes);
                let second: [__m512d; 2] = transmute_copy(&second);
                transmute_copy(&[
                    _mm512_mask_mov_pd(second[0], mask as u8, first_lanes[0]),
                    _mm512_mask_mov_pd(second[1], (mask >> 8) as u8, first_lanes[1]),
                ])
            }
        }
    }

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
    fn widen_bf16(self, block: &[bf16; LANES], _order: LaneOrder) -> Lanes<f32> {
        // SAFETY: as in `widen_f16`.
        unsafe {
            let block = _mm512_cvtepu16_epi32(_mm256_loadu_si256(block.as_ptr().cast()));
            std::mem::transmute(_mm512_slli_epi32::<16>(block))
        }
    }

    #[inline(always)]
    fn narrow_bf16(self, lanes: &Lanes<f32>, _order: LaneOrder) -> [bf16; LANES] {
        // SAFETY: as in `widen_f16`.
        unsafe {
            let bits = bf16_bits_512(_mm512_loadu_ps(lanes.as_ptr()));
            std::mem::transmute(_mm512_cvtepi32_epi16(bits))
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
