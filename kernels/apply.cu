// y = epilogue((x - mean) * invstd * weight + bias): the second half of a forward pass by batch statistics, and the
// whole of one by running statistics.
//
// Reads x once (and the residual), writes y once: 2T bytes, 3T with a residual; per task the strip's per-channel
// numbers. In training it also moves the running statistics, once per channel, and counts the batch: it is the last
// launch, so that a failure before it leaves the module as it was.
//
// Called by the launcher of forward passes. One block of THREADS threads per task; shared memory: Staged::ROWS numbers
// per channel of a strip. y may lie over x.
//
// Blocks take the tasks from the last to the first: what statistics.cu read last is still in the L2 cache.
#include "epilogue.cuh"
#include "normalise.cuh"
#include "running.cuh"

struct Arguments {
  const Element* x;
  const Element* z;
  Element* y;
  Normalisation normalisation;
  RunningUpdate update;
  const Real* batch_variance;
  const Real* cumulative;  // the factor, if the momentum is a cumulative average
  Tiling tiling;
};

// What a thread has under way.
struct Chunk {
  Span spans[UNROLL];
  Pack x[UNROLL], z[UNROLL];

  DEVICE void load(const Arguments& arguments, Walk& walk) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next();
      x[u] = load_span<LastUse>(arguments.x, spans[u]);
      if (HAS_RESIDUAL) z[u] = load_span<LastUse>(arguments.z, spans[u]);
    }
  }

  DEVICE void finish(const Arguments& arguments, const Normaliser& normaliser) const {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      Pack y;
#pragma unroll
      for (int e = 0; e < VECTOR; e++)
        y.lane[e] = forward_epilogue(normaliser.normalised(x[u].lane[e], e), HAS_RESIDUAL ? z[u].lane[e] : Element());
      store_span(arguments.y, spans[u], y);
    }
  }
};

KERNEL(apply, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  const Index tasks = number_of_tasks(tiling);
  for (Index number = blockIdx.x; number < tasks; number += gridDim.x) {
    const Task task(tiling, tasks - 1 - number);
    Walk walk(tiling, task, arguments.x);
    // Before the strip's numbers, so that one wait is for both.
    Chunk chunk;
    chunk.load(arguments, walk);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
      staged.put(arguments.normalisation, task, channel);
    block_barrier();

    const Normaliser normaliser(staged, tiling, task, walk);
    chunk.finish(arguments, normaliser);
    while (!walk.done()) {
      chunk.load(arguments, walk);
      chunk.finish(arguments, normaliser);
    }

    const RunningUpdate& update = arguments.update;
    if (update.mean && task.split == 0) {
      for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
        const Real momentum = arguments.cumulative ? load_one(arguments.cumulative) : (Real)update.momentum;
        const Index c = task.channel + channel;
        update.move(c, staged.at(Staged::MEAN, channel), load_one(arguments.batch_variance + c), momentum);
      }
      if (task.strip == 0 && threadIdx.x == 0) update.count_batch();
    }
    block_barrier();
  }
}
