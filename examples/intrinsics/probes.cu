// One kernel for each thing that kernels/device.cuh can do, and nothing else in it: main.rs runs them on a GPU and on
// the stand-in driver, and the bytes they leave must be equal.
//
// Behind device.cuh, in one text. CLUSTER and BULK say which parts of it there are.

struct Arguments {
  const u8* input;
  u8* output;
  u32* counters;  // zeros
  u64 count;      // results
};

#define FOR_EACH(i) \
  for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < arguments.count; i += (u64)gridDim.x * THREADS)

template <class T>
DEVICE T get(const u8* from, u64 i) {
  return load<1>((const T*)from + i).lane[0];
}
template <class T>
DEVICE void put(u8* to, u64 i, T value) {
  Vector<T, 1> out;
  out.lane[0] = value;
  store<1>((T*)to + i, out);
}

// ---- arithmetic: triples of numbers ----

#define ARITHMETIC(suffix, T)                                                                                         \
  KERNEL(fma_##suffix, Arguments, THREADS) {                                                                          \
    FOR_EACH(i)                                                                                                       \
    put<T>(arguments.output, i,                                                                                       \
           fma_rn(get<T>(arguments.input, 3 * i), get<T>(arguments.input, 3 * i + 1),                                 \
                  get<T>(arguments.input, 3 * i + 2)));                                                               \
  }                                                                                                                   \
  KERNEL(divide_##suffix, Arguments, THREADS) {                                                                       \
    FOR_EACH(i)                                                                                                       \
    put<T>(arguments.output, i, divide_rn(get<T>(arguments.input, 3 * i), get<T>(arguments.input, 3 * i + 1)));       \
  }                                                                                                                   \
  KERNEL(sqrt_##suffix, Arguments, THREADS) {                                                                         \
    FOR_EACH(i) put<T>(arguments.output, i, sqrt_rn(get<T>(arguments.input, 3 * i)));                                 \
  }                                                                                                                   \
  KERNEL(sum_and_product_##suffix, Arguments, THREADS) {                                                              \
    FOR_EACH(i)                                                                                                       \
    put<T>(arguments.output, i,                                                                                       \
           get<T>(arguments.input, 3 * i) * get<T>(arguments.input, 3 * i + 1) + get<T>(arguments.input, 3 * i + 2)); \
  }

// ---- conversion ----

#define CONVERSION(HALF)                                                                 \
  KERNEL(widen_##HALF, Arguments, THREADS) {                                             \
    FOR_EACH(i) put<float>(arguments.output, i, to_real(get<HALF>(arguments.input, i))); \
  }                                                                                      \
  KERNEL(narrow_##HALF, Arguments, THREADS) {                                            \
    FOR_EACH(i) {                                                                        \
      HALF narrow;                                                                       \
      from_real(get<float>(arguments.input, i), narrow);                                 \
      put<HALF>(arguments.output, i, narrow);                                            \
    }                                                                                    \
  }

// ---- memory: vectors of 2, 4, 8 and 16 bytes, copied in every way ----

#define COPY(name, N, from, to)                                                                   \
  KERNEL(name##_##N, Arguments, THREADS) {                                                        \
    FOR_EACH(i) to((u16*)arguments.output + i * N, from<N>((const u16*)arguments.input + i * N)); \
  }
#define COPIES(N)                              \
  COPY(load_store, N, load, store)             \
  COPY(load_last_use, N, load_last_use, store) \
  COPY(load_coherent, N, load_coherent, store) \
  COPY(store_streaming, N, load, store_streaming)

#define SHARED(N)                                                                                                \
  KERNEL(shared_##N, Arguments, THREADS) {                                                                       \
    u16* const shared = (u16*)shared_memory();                                                                   \
    store_shared<N>(shared + threadIdx.x * N, load<N>((const u16*)arguments.input + threadIdx.x * N));           \
    block_barrier();                                                                                             \
    const u32 other = THREADS - 1 - threadIdx.x;                                                                 \
    store((u16*)arguments.output + threadIdx.x * N, load_shared<N>(shared + other * N));                         \
  }                                                                                                              \
  KERNEL(copy_async_##N, Arguments, THREADS) {                                                                   \
    u16* const shared = (u16*)shared_memory();                                                                   \
    const u16* const second = (const u16*)arguments.input + THREADS * N;                                         \
    copy_async<N>(shared + threadIdx.x * N, (const u16*)arguments.input + threadIdx.x * N);                      \
    copy_commit();                                                                                               \
    copy_async<N>(shared + (THREADS + threadIdx.x) * N, second + threadIdx.x * N);                               \
    copy_commit();                                                                                               \
    copy_wait<1>();                                                                                              \
    block_barrier();                                                                                             \
    const u32 other = THREADS - 1 - threadIdx.x;                                                                 \
    store((u16*)arguments.output + threadIdx.x * N, load_shared<N>(shared + other * N));                         \
    copy_wait<0>();                                                                                              \
    block_barrier();                                                                                             \
    store((u16*)arguments.output + (THREADS + threadIdx.x) * N, load_shared<N>(shared + (THREADS + other) * N)); \
  }

#if CLUSTER == 1 && !BULK

ARITHMETIC(float, float)
ARITHMETIC(double, double)
CONVERSION(f16)
CONVERSION(bf16)
COPIES(1)
COPIES(2)
COPIES(4)
COPIES(8)
SHARED(1)
SHARED(2)
SHARED(4)
SHARED(8)

// The identities: what is already of the type of statistics.
KERNEL(real_to_real, Arguments, THREADS) {
  FOR_EACH(i) {
    double wide;
    from_real(to_real(get<double>(arguments.input, i)), wide);
    float narrow;
    from_real(to_real((float)wide), narrow);
    put<double>(arguments.output, i, wide - (double)narrow);
  }
}

// ---- threads ----

// Four and eight bytes, over every distance.
KERNEL(shuffle_xor, Arguments, THREADS) {
  const u32 value = get<u32>(arguments.input, threadIdx.x);
  for (u32 step = 0; step < 5; step++) {
    const u32 word = shuffle_xor(value, 1 << step);
    const u64 both = shuffle_xor((u64)value << 32 | threadIdx.x, 1 << step);
    put<u64>(arguments.output, step * THREADS + threadIdx.x, both ^ word);
  }
}

// The last block to arrive sees what all others wrote.
KERNEL(arrive, Arguments, THREADS) {
  u8* const partial = (u8*)(arguments.counters + 64);
  if (threadIdx.x == 0) put<u32>(partial, blockIdx.x, get<u32>(arguments.input, blockIdx.x) + 1);
  block_barrier();
  u32* const last = (u32*)shared_memory();
  if (threadIdx.x == 0) *last = arrive(arguments.counters) == gridDim.x - 1;
  block_barrier();
  if (!*last) return;
  for (u32 i = threadIdx.x; i < gridDim.x; i += THREADS)
    put<u32>(arguments.output, i, load_coherent<1>((const u32*)partial + i).lane[0]);
}

// All blocks of a cooperative launch see what all others wrote.
KERNEL(await_arrivals, Arguments, THREADS) {
  u8* const partial = (u8*)(arguments.counters + 64);
  if (threadIdx.x == 0) {
    put<u32>(partial, blockIdx.x, get<u32>(arguments.input, blockIdx.x) * 3);
    arrive(arguments.counters);
    await_arrivals(arguments.counters, gridDim.x);
    u32 sum = 0;
    for (u32 i = 0; i < gridDim.x; i++) sum = sum * 31 + load_coherent<1>((const u32*)partial + i).lane[0];
    put<u32>(arguments.output, blockIdx.x, sum + blockIdx.x);
  }
}

#endif

#if CLUSTER > 1

// Each block reads the next one's shared memory, by one and by two registers.
RESIDENT_KERNEL(cluster_exchange, Arguments) {
  u32* const shared = (u32*)shared_memory();
  const u32 at = blockIdx.x * THREADS + threadIdx.x;
  shared[threadIdx.x] = get<u32>(arguments.input, at);
  cluster_barrier();
  const u32 next = (blockIdx.x + 1) % CLUSTER;
  const u32 one = load_remote<1>(remote(shared, next), threadIdx.x).lane[0];
  const Vector<u32, 2> two = load_remote<2>(remote(shared, next), threadIdx.x / 2 * 2);
  cluster_arrive();
  put<u64>(arguments.output, at, (u64)one << 32 | (two.lane[0] ^ two.lane[1]));
  cluster_wait();
}

#endif

#if BULK

// Two copies into the same place, one after the other, each waited for by its phase.
RESIDENT_KERNEL(bulk_copy, Arguments) {
  u64* const barrier = (u64*)shared_memory();
  u32* const shared = (u32*)(shared_memory() + 16);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  block_barrier();
  for (u32 phase = 0; phase < 2; phase++) {
    if (threadIdx.x == 0) {
      mbarrier_arrive(barrier, THREADS * 4);
      bulk_copy(shared, (const u32*)arguments.input + phase * THREADS, THREADS * 4, barrier);
    }
    mbarrier_wait(barrier, phase % 2);
    put<u32>(arguments.output, phase * THREADS + threadIdx.x, shared[THREADS - 1 - threadIdx.x]);
    bulk_fence();
    block_barrier();
  }
}

#endif
