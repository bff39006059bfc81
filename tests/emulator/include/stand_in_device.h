// The host half of kernels/device.cuh: the same names with the same meaning, for kernels that run in the stand-in
// driver. device.cuh includes it after its types (u8 .. i64, f16, bf16, Vector, WARP); every kernel is then ordinary
// C++17.
#pragma once

#include "stand_in_abi.h"

// Inlined as on a GPU: the driver takes accesses of a warp for one instruction where they come from one place in the
// code.
#define DEVICE inline __attribute__((always_inline))

// The built-in variables of a CUDA thread.
#define threadIdx (stand_in_thread_index())
#define blockIdx (stand_in_block_index())
#define blockDim (stand_in_block_size())
#define gridDim (stand_in_grid_size())

// The last parameters of a function that tells the driver where it was called from: both have the call as their
// default.
#define STAND_IN_CALLER const char *file = __builtin_FILE(), u32 line = __builtin_LINE()

// The argument is copied to the thread's own stack, as a GPU gives every thread the launch's own copy. The copying
// itself is no access of the kernel's, hence not instrumented.
#define STAND_IN_KERNEL(name, Arguments, THREADS, CLUSTER)                                                        \
  static void name(const Arguments arguments);                                                                    \
  __attribute__((no_sanitize("thread"))) static void stand_in_run_##name(void** list) {                           \
    name(*(const Arguments*)list[0]);                                                                             \
  }                                                                                                               \
  extern "C" __attribute__((visibility("default")))                                                               \
  const StandInKernel stand_in_kernel_##name = {#name, stand_in_run_##name, THREADS, CLUSTER, sizeof(Arguments)}; \
  static void name(const Arguments arguments)

#define KERNEL(name, Arguments, THREADS) STAND_IN_KERNEL(name, Arguments, THREADS, 0)

// As KERNEL, in clusters of CLUSTER blocks along x without the launch saying so.
#define CLUSTER_KERNEL(name, Arguments, THREADS, CLUSTER) STAND_IN_KERNEL(name, Arguments, THREADS, CLUSTER)

// A resident kernel, with the constants of its compilation.
#define RESIDENT_KERNEL(name, Arguments) STAND_IN_KERNEL(name, Arguments, THREADS, (CLUSTER > 1 ? CLUSTER : 0))

DEVICE u8* shared_memory() { return stand_in_shared_memory(); }

// ---- bits ----------------------------------------------------------------------------------------------------------

template <class T>
DEVICE StandInBits to_bits(const T& value) {
  static_assert(sizeof(T) <= sizeof(StandInBits), "a value of more than 16 bytes does not fit one instruction");
  StandInBits bits = {0, 0};
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
DEVICE T from_bits(StandInBits bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
DEVICE u32 float_as_bits(float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
DEVICE float bits_as_float(u32 bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE double fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
DEVICE float divide_rn(float a, float b) { return a / b; }
DEVICE double divide_rn(double a, double b) { return a / b; }
DEVICE float sqrt_rn(float a) { return __builtin_sqrtf(a); }
DEVICE double sqrt_rn(double a) { return __builtin_sqrt(a); }

// ---- conversion ----------------------------------------------------------------------------------------------------

DEVICE float to_real(float x) { return x; }
DEVICE double to_real(double x) { return x; }
DEVICE float to_real(f16 x) {
  const u32 sign = (u32)(x.bits & 0x8000u) << 16;
  const u32 exponent = x.bits >> 10 & 0x1fu;
  const u32 fraction = x.bits & 0x3ffu;
  if (exponent == 0x1fu) return bits_as_float(sign | 0x7f800000u | fraction << 13);  // infinity, NaN
  if (exponent != 0) return bits_as_float(sign | (exponent + 127 - 15) << 23 | fraction << 13);
  const float magnitude = (float)fraction * 0x1p-24f;  // zero, subnormal: exact
  return sign ? -magnitude : magnitude;
}
DEVICE float to_real(bf16 x) { return bits_as_float((u32)x.bits << 16); }

// Drops the lowest `bits` bits of a significand: to nearest, ties to even. A carry out of the fraction goes on into the
// exponent, which is what rounding up to the next power of two, or to infinity, means.
DEVICE u32 round_off(u32 value, u32 bits) {
  const u32 half = 1u << (bits - 1);
  return (value + (half - 1) + (value >> bits & 1u)) >> bits;
}

DEVICE void from_real(float x, float& out) { out = x; }
DEVICE void from_real(double x, double& out) { out = x; }
DEVICE void from_real(float x, f16& out) {
  const u32 bits = float_as_bits(x);
  const u32 sign = bits >> 16 & 0x8000u;
  const u32 magnitude = bits & 0x7fffffffu;
  u32 rounded;
  if (magnitude > 0x7f800000u) {
    out.bits = 0x7fff;  // NaN: the one that a GPU makes
    return;
  } else if (magnitude >= 0x477ff000u) {
    rounded = 0x7c00u;  // 65520 and above are nearer to infinity than to the largest number
  } else if (magnitude >= 0x38800000u) {
    rounded = round_off(magnitude - ((127u - 15u) << 23), 13);
  } else if (magnitude >= 0x33000000u) {  // subnormal: a multiple of 2^-24
    const u32 exponent = magnitude >> 23;
    rounded = round_off((magnitude & 0x7fffffu) | 0x800000u, 126u - exponent);
  } else {
    rounded = 0;
  }
  out.bits = (u16)(sign | rounded);
}
DEVICE void from_real(float x, bf16& out) { out.bits = x != x ? (u16)0x7fff : (u16)round_off(float_as_bits(x), 16); }

// ---- global memory -------------------------------------------------------------------------------------------------

template <int N, class T>
DEVICE Vector<T, N> load(const T* from, STAND_IN_CALLER) {
  return from_bits<Vector<T, N>>(stand_in_load(from, N * sizeof(T), STAND_IN_CACHED, {file, line}));
}
template <int N, class T>
DEVICE Vector<T, N> load_last_use(const T* from, STAND_IN_CALLER) {
  return from_bits<Vector<T, N>>(stand_in_load(from, N * sizeof(T), STAND_IN_LAST_USE, {file, line}));
}
template <int N, class T>
DEVICE Vector<T, N> load_coherent(const T* from, STAND_IN_CALLER) {
  return from_bits<Vector<T, N>>(stand_in_load(from, N * sizeof(T), STAND_IN_COHERENT, {file, line}));
}
template <int N, class T>
DEVICE void store(T* to, const Vector<T, N>& value, STAND_IN_CALLER) {
  stand_in_store(to, to_bits(value), N * sizeof(T), STAND_IN_CACHED, {file, line});
}
template <int N, class T>
DEVICE void store_streaming(T* to, const Vector<T, N>& value, STAND_IN_CALLER) {
  stand_in_store(to, to_bits(value), N * sizeof(T), STAND_IN_STREAMING, {file, line});
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// Whole vectors of this block's shared memory.
template <int N, class T>
DEVICE Vector<T, N> load_shared(const T* from) {
  return *(const Vector<T, N>*)from;
}
template <int N, class T>
DEVICE void store_shared(T* to, const Vector<T, N>& value) {
  *(Vector<T, N>*)to = value;
}

// ---- threads of a warp, a block, the grid --------------------------------------------------------------------------

enum : u32 { ALL_LANES = 0xffffffffu };

// Shuffles move what one register pair holds, as on the device: 4 or 8 bytes.
template <class T>
DEVICE T shuffle(StandInWarpOperation operation, T value, u32 operand, u32 mask, StandInPlace place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  return from_bits<T>(stand_in_warp(operation, mask, to_bits(value), operand, place));
}
// What the lane whose number differs in the bits of `lanes` holds.
template <class T>
DEVICE T shuffle_xor(T value, int lanes, u32 mask = ALL_LANES, STAND_IN_CALLER) {
  return shuffle(STAND_IN_SHUFFLE_XOR, value, (u32)lanes, mask, {file, line});
}
// What the lane `distance` above holds; the topmost lanes keep their own value.
template <class T>
DEVICE T shuffle_down(T value, int distance, u32 mask = ALL_LANES, STAND_IN_CALLER) {
  return shuffle(STAND_IN_SHUFFLE_DOWN, value, (u32)distance, mask, {file, line});
}
// What the lane `distance` below holds; the lowest lanes keep their own value.
template <class T>
DEVICE T shuffle_up(T value, int distance, u32 mask = ALL_LANES, STAND_IN_CALLER) {
  return shuffle(STAND_IN_SHUFFLE_UP, value, (u32)distance, mask, {file, line});
}
// What the given lane holds.
template <class T>
DEVICE T shuffle_from(T value, int lane, u32 mask = ALL_LANES, STAND_IN_CALLER) {
  return shuffle(STAND_IN_SHUFFLE_FROM, value, (u32)lane, mask, {file, line});
}
// One bit per lane for which the predicate holds.
DEVICE u32 ballot(bool predicate, u32 mask = ALL_LANES, STAND_IN_CALLER) {
  return (u32)stand_in_warp(STAND_IN_BALLOT, mask, {predicate, 0}, 0, {file, line}).low;
}
// The lanes of the mask have arrived, and what they wrote to memory is seen by each other.
DEVICE void warp_barrier(u32 mask = ALL_LANES, STAND_IN_CALLER) {
  stand_in_warp(STAND_IN_WARP_BARRIER, mask, {0, 0}, 0, {file, line});
}

DEVICE void block_barrier(STAND_IN_CALLER) { stand_in_block_barrier({file, line}); }

DEVICE u32 arrive(u32* counter, STAND_IN_CALLER) { return stand_in_arrive(counter, {file, line}); }

// Waits until so many have arrived at the counter, in a cooperative launch, and sees what they wrote before.
DEVICE void await_arrivals(const u32* counter, u32 arrivals, STAND_IN_CALLER) {
  stand_in_await_arrivals(counter, arrivals, {file, line});
}

// All threads of a cooperative launch have arrived, and what they wrote to global memory is seen. The counter is one of
// global memory that begins at zero and serves this launch alone; every block adds one to it at each barrier.
DEVICE void grid_barrier(u32* counter, STAND_IN_CALLER) { stand_in_grid_barrier(counter, {file, line}); }

// ---- clusters ------------------------------------------------------------------------------------------------------

DEVICE u32 cluster_rank() { return stand_in_cluster_rank(); }
DEVICE u32 cluster_size() { return stand_in_cluster_size(); }

// A barrier of all threads of the cluster in two halves: what was written before arriving is seen after waiting.
DEVICE void cluster_arrive(STAND_IN_CALLER) { stand_in_cluster_arrive({file, line}); }
DEVICE void cluster_wait(STAND_IN_CALLER) { stand_in_cluster_wait({file, line}); }
DEVICE void cluster_barrier(STAND_IN_CALLER) {
  stand_in_cluster_arrive({file, line});
  stand_in_cluster_wait({file, line});
}

// Where an object of shared memory lies in another block of the cluster: an address of the cluster's address space on a
// GPU, so it is no pointer here either.
template <class T>
struct Remote {
  const T* address;
};
template <class T>
DEVICE Remote<T> remote(const T* local, u32 rank, STAND_IN_CALLER) {
  return {(const T*)stand_in_remote(local, rank, {file, line})};
}
template <int N, class T>
DEVICE Vector<T, N> load_remote(Remote<T> from, u32 index, STAND_IN_CALLER) {
  return from_bits<Vector<T, N>>(stand_in_load_remote(from.address + index, N * sizeof(T), {file, line}));
}
template <int N, class T>
DEVICE void store_remote(Remote<T> to, u32 index, const Vector<T, N>& value, STAND_IN_CALLER) {
  stand_in_store_remote((void*)(to.address + index), to_bits(value), N * sizeof(T), {file, line});
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

// An mbarrier lies in shared memory. A phase of it ends when all arrivals have come and all bytes announced with them
// have been copied. One thread initialises it, and a block_barrier shows it to the others.
DEVICE void mbarrier_init(u64* barrier, u32 arrivals, STAND_IN_CALLER) {
  stand_in_mbarrier_init(barrier, arrivals, {file, line});
}
DEVICE void mbarrier_arrive(u64* barrier, u32 expected_bytes, STAND_IN_CALLER) {
  stand_in_mbarrier_arrive(barrier, expected_bytes, {file, line});
}
// Waits for the end of the phase with this parity; the first phase has parity 0.
DEVICE void mbarrier_wait(u64* barrier, u32 parity, STAND_IN_CALLER) {
  stand_in_mbarrier_wait(barrier, parity, {file, line});
}
// Starts a copy from global to shared memory; 16-byte aligned at both ends and in size. Its bytes count at the barrier.
DEVICE void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier, STAND_IN_CALLER) {
  stand_in_bulk_copy(shared, global, bytes, barrier, {file, line});
}
// What this thread did to shared memory comes before the bulk copies that are started behind the next barrier.
DEVICE void bulk_fence() { stand_in_bulk_fence(); }

// Starts this thread's copy of N elements from global to shared memory. They are there once the thread has waited, and
// for other threads after a barrier behind that.
template <int N, class T>
DEVICE void copy_async(T* shared, const T* global, STAND_IN_CALLER) {
  stand_in_copy_async(shared, global, N * sizeof(T), {file, line});
}
// Closes a group: the copies that the thread started since the last one.
DEVICE void copy_commit() { stand_in_copy_commit(); }
// Waits for all groups of the thread but the newest GROUPS.
template <int GROUPS>
DEVICE void copy_wait(STAND_IN_CALLER) {
  stand_in_copy_wait(GROUPS, {file, line});
}
