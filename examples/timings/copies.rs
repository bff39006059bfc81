//! Copies that a pass is held against.

use batchnorm_cuda::Element;

/// Bytes of a cache line, to which streaming stores are aligned.
const LINE: usize = 64;

/// Copies with all threads of the current pool, each a contiguous share.
pub fn in_parallel<T: Element>(from: &[T], to: &mut [T], copy: impl Fn(&[T], &mut [T]) + Sync) {
    let threads = rayon::current_num_threads();
    let share = from.len().div_ceil(threads).next_multiple_of(LINE);
    rayon::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            let copy = &copy;
            scope.spawn(move |_| copy(from, to));
        }
    });
}

/// Copies without reading the lines that are written.
#[cfg(target_arch = "x86_64")]
pub fn streaming<T: Element>(from: &[T], to: &mut [T]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    let line = LINE / size_of::<T>();
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    to[..head].copy_from_slice(&from[..head]);
    let (from, to) = (&from[head..], &mut to[head..]);
    let whole = to.len() / line * line;
    for (from, to) in from[..whole].chunks_exact(line).zip(to[..whole].chunks_exact_mut(line)) {
        for part in 0..LINE / size_of::<__m128i>() {
            // SAFETY: every x86-64 machine has SSE2; both slices have a whole line, and `to` is aligned to one.
            unsafe {
                let value = _mm_loadu_si128(from.as_ptr().cast::<__m128i>().add(part));
                _mm_stream_si128(to.as_mut_ptr().cast::<__m128i>().add(part), value);
            }
        }
    }
    to[whole..].copy_from_slice(&from[whole..]);
    // SAFETY: as above.
    unsafe { _mm_sfence() };
}

/// Other machines' memcpy is the only copy.
#[cfg(not(target_arch = "x86_64"))]
pub fn streaming<T: Element>(from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}
