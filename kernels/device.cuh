// Everything that only a GPU understands: intrinsics, inline PTX, cache hints, number conversion, barriers, clusters,
// asynchronous copies.
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

enum { WARP = 32 };  // threads of a warp

#ifdef BATCHNORM_STAND_IN
#include "stand_in_device.h"
#else

#define DEVICE __device__ __forceinline__

// A kernel takes one structure by value, whose fields are all eight bytes wide: the host's layout is the same by
// construction. THREADS is the block size the kernel was compiled for.
#define KERNEL(name, Arguments, THREADS) \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) name(const __grid_constant__ Arguments arguments)

// A resident kernel: of its blocks, BLOCKS share a multiprocessor, and CLUSTER form a cluster (1: none).
#if CLUSTER > 1
#define CLUSTER_SHAPE __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_SHAPE
#endif
#define RESIDENT_KERNEL(name, Arguments)                                      \
  extern "C" __global__ void CLUSTER_SHAPE __launch_bounds__(THREADS, BLOCKS) \
      name(const __grid_constant__ Arguments arguments)

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

// ---- shared memory -------------------------------------------------------------------------------------------------

// Whole vectors of this block's shared memory, by one instruction each.
template <int N, class T>
DEVICE Vector<T, N> load_shared(const T* from) {
  Transfer<T, N> transfer;
  transfer.word = *(const typename Word<(int)sizeof(T) * N>::type*)from;
  return transfer.vector;
}
template <int N, class T>
DEVICE void store_shared(T* to, const Vector<T, N>& value) {
  Transfer<T, N> transfer;
  transfer.vector = value;
  *(typename Word<(int)sizeof(T) * N>::type*)to = transfer.word;
}

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

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
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Waits until so many have arrived at the counter, and sees what they wrote before. Blocks that wait for each other
// must all be running: a cooperative launch sees to it.
DEVICE void await_arrivals(const u32* counter, u32 arrivals) {
  u32 seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < arrivals);
}

// ---- clusters ------------------------------------------------------------------------------------------------------

#if CLUSTER > 1

// A barrier of all threads of the cluster in two halves: what was written before arriving is seen after waiting.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Where an object of shared memory lies in another block of the cluster: an address in the cluster's window.
template <class T>
struct Remote {
  u32 address;
};
template <class T>
DEVICE Remote<T> remote(const T* local, u32 rank) {
  Remote<T> there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there.address) : "r"(shared_address(local)), "r"(rank));
  return there;
}
template <int N, class T>
DEVICE Vector<T, N> load_remote(Remote<T> from, u32 index) {
  static_assert(sizeof(T) * N == 4 || sizeof(T) * N == 8, "as much as one or two registers hold");
  Transfer<T, N> transfer;
  const u32 address = from.address + index * (u32)sizeof(T);
  if constexpr (sizeof(T) * N == 4) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(transfer.word) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(transfer.word.x), "=r"(transfer.word.y)
                 : "r"(address)
                 : "memory");
  }
  return transfer.vector;
}

#endif

// ---- asynchronous copies -------------------------------------------------------------------------------------------

// Starts this thread's copy of N elements from global to shared memory. They are there once the thread has waited, and
// for other threads after a barrier behind that. Before compute capability 8.0, and for 2 bytes, it is an ordinary
// copy.
template <int N, class T>
DEVICE void copy_async(T* shared, const T* global) {
  enum { BYTES = sizeof(T) * N };
#if __CUDA_ARCH__ >= 800
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
    return;
  }
  if (BYTES == 4 || BYTES == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(BYTES == 8 ? 8 : 4)
                 : "memory");
    return;
  }
#endif
  store_shared<N>(shared, load_last_use<N>(global));
}
// Closes a group: the copies that the thread started since the last one.
DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups of the thread but the newest GROUPS.
template <int GROUPS>
DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

#if BULK

// An mbarrier lies in shared memory. A phase of it ends when all arrivals have come and all bytes announced with them
// have been copied. One thread initialises it, and a block_barrier shows it to the others.
DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  // The copies that count at it are of the asynchronous proxy, which must see it too.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive(u64* barrier, u32 expected_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(expected_bytes)
               : "memory");
}
// Waits for the end of the phase with this parity; the first phase has parity 0.
DEVICE void mbarrier_wait(u64* barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
// Starts a copy from global to shared memory; 16-byte aligned at both ends and in size. Its bytes count at the barrier.
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// What this thread did to shared memory comes before the bulk copies that are started behind the next barrier.
DEVICE void bulk_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

#endif
