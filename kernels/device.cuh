// Everything that only a GPU understands: intrinsics, inline PTX, cache hints, number conversion, barriers.
//
// The kernels use nothing device-specific beside this file and the built-in threadIdx, blockIdx, blockDim and gridDim.
// So a second implementation of the same names is enough to run them on a host: under BATCHNORM_STAND_IN the stand-in
// driver of tests/emulator supplies it. Each name below must mean the same in both.
//
// Arithmetic is IEEE round-to-nearest without contraction (--fmad=false): a fused multiply-add is written fma_rn. That
// is why a GPU and the stand-in agree bit for bit.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Half-precision numbers are storage only: they are converted before any arithmetic.
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// N adjacent elements, moved by one instruction: N * sizeof(T) is 1, 2, 4, 8 or 16 bytes, and so is the alignment.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T lane[N];
};

enum { WARP = 32 };  // threads that run in step

#ifdef BATCHNORM_STAND_IN
#include "stand_in_device.h"
#else

#define DEVICE __device__ __forceinline__

// A kernel takes one structure by value, whose fields are all eight bytes wide: the host's layout is the same by
// construction. THREADS is the block size the kernel was compiled for.
#define KERNEL(name, Arguments, THREADS) \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const __grid_constant__ Arguments arguments)

// Dynamic shared memory, 16-byte aligned; its size comes with the launch.
DEVICE u8* shared_memory() {
  extern __shared__ __align__(16) u8 dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
DEVICE double divide_rn(double a, double b) { return __ddiv_rn(a, b); }
DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }

// ---- conversion ----------------------------------------------------------------------------------------------------

// To the type of parameters and statistics: exact.
DEVICE float to_real(float x) { return x; }
DEVICE double to_real(double x) { return x; }
DEVICE float to_real(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
DEVICE float to_real(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// From it: rounded once, to nearest even. NaN stays NaN, what is too large becomes infinite, subnormals are kept.
DEVICE void from_real(float x, float& out) { out = x; }
DEVICE void from_real(double x, double& out) { out = x; }
DEVICE void from_real(float x, f16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
DEVICE void from_real(float x, bf16& out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  // No instruction before compute capability 8.0: add half a unit in the last place, minus one for a tie on an even
  // number.
  const u32 bits = __float_as_uint(x);
  out.bits = x != x ? (u16)0x7fff : (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

// ---- global memory -------------------------------------------------------------------------------------------------

// Every access to global memory goes through these. The pointer is aligned to the whole vector.
//   load            cached as usual: somebody will read it again soon
//   load_last_use   nobody will: leave the caches to others
//   load_coherent   written by another block of this launch: from L2, never from this multiprocessor's own cache
//   store           somebody will read it soon
//   store_streaming nobody will soon
// Loads never take the non-coherent path, so that an output may lie over its input (in-place forms).

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  typedef u16 type;
};
template <>
struct Word<4> {
  typedef u32 type;
};
template <>
struct Word<8> {
  typedef uint2 type;
};
template <>
struct Word<16> {
  typedef uint4 type;
};

template <class T, int N>
union Transfer {
  typename Word<(int)sizeof(T) * N>::type word;
  Vector<T, N> vector;
  __device__ __forceinline__ Transfer() {}
};

template <int N, class T>
DEVICE Vector<T, N> load(const T* from) {
  Transfer<T, N> transfer;
  transfer.word = *(const typename Word<(int)sizeof(T) * N>::type*)from;
  return transfer.vector;
}
template <int N, class T>
DEVICE Vector<T, N> load_last_use(const T* from) {
  Transfer<T, N> transfer;
  transfer.word = __ldcs((const typename Word<(int)sizeof(T) * N>::type*)from);
  return transfer.vector;
}
template <int N, class T>
DEVICE Vector<T, N> load_coherent(const T* from) {
  Transfer<T, N> transfer;
  transfer.word = __ldcg((const typename Word<(int)sizeof(T) * N>::type*)from);
  return transfer.vector;
}
template <int N, class T>
DEVICE void store(T* to, const Vector<T, N>& value) {
  Transfer<T, N> transfer;
  transfer.vector = value;
  *(typename Word<(int)sizeof(T) * N>::type*)to = transfer.word;
}
template <int N, class T>
DEVICE void store_streaming(T* to, const Vector<T, N>& value) {
  Transfer<T, N> transfer;
  transfer.vector = value;
  __stcs((typename Word<(int)sizeof(T) * N>::type*)to, transfer.word);
}

// ---- threads of a warp, a block, the grid --------------------------------------------------------------------------

// What the lane whose number differs in the bits of `lanes` holds. All 32 lanes take part.
template <class T>
DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// All threads of the block have arrived, and what they wrote to shared memory is seen.
DEVICE void block_barrier() { __syncthreads(); }

// Counts an arrival at a counter in global memory and returns how many there were before. What this thread (and, after
// a block_barrier, its block) wrote before is seen by whoever counts later: release, then acquire, in the whole GPU.
DEVICE u32 arrive(u32* counter) {
  u32 before;
  asm volatile("{ fence.acq_rel.gpu; atom.add.acq_rel.gpu.global.u32 %0, [%1], 1; fence.acq_rel.gpu; }"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

#endif
