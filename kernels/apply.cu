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

// How the running statistics move.
struct RunningUpdate {
  Real* mean;  // absent: not at all
  Real* variance;
  i64* batches;
  const Real* batch_variance;
  const Real* cumulative;  // the factor, if the momentum is a cumulative average
  double momentum;         // else
  u64 skip_non_finite;
  u64 values;  // per channel
};

struct Arguments {
  const Element* x;
  const Element* z;
  Element* y;
  Normalisation normalisation;
  RunningUpdate update;
  Tiling tiling;
};

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch.
DEVICE void update_running(const RunningUpdate& update, Index channel, Real batch_mean) {
  const Real momentum = update.cumulative ? load_one(update.cumulative) : (Real)update.momentum;
  const Real batch_variance = load_one(update.batch_variance + channel);
  if (update.skip_non_finite && !(is_finite(batch_mean) && is_finite(batch_variance))) return;
  const Real unbiased = batch_variance * divide_rn((Real)update.values, (Real)(update.values - 1));
  const Real keep = Real(1) - momentum;
  store_one(update.mean + channel, fma_rn(momentum, batch_mean, keep * load_one(update.mean + channel)));
  store_one(update.variance + channel, fma_rn(momentum, unbiased, keep * load_one(update.variance + channel)));
}

KERNEL(apply, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  const Index tasks = number_of_tasks(tiling);
  for (Index number = blockIdx.x; number < tasks; number += gridDim.x) {
    const Task task(tiling, tasks - 1 - number);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
      staged.put(arguments.normalisation, task, channel);
    block_barrier();

    Walk walk(tiling, task, arguments.x);
    const Normaliser normaliser(staged, tiling, task, walk);
    while (!walk.done()) {
      Span spans[UNROLL];
      Pack x[UNROLL], z[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        spans[u] = walk.next();
        x[u] = load_span<LastUse>(arguments.x, spans[u]);
        if (HAS_RESIDUAL) z[u] = load_span<LastUse>(arguments.z, spans[u]);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        Pack y;
#pragma unroll
        for (int e = 0; e < VECTOR; e++)
          y.lane[e] = forward_epilogue(normaliser.normalised(x[u].lane[e], e), HAS_RESIDUAL ? z[u].lane[e] : Element());
        store_span(arguments.y, spans[u], y);
      }
    }

    if (arguments.update.mean && task.split == 0) {
      for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
        update_running(arguments.update, task.channel + channel,
                       staged.at(Staged::PIVOT, channel) + staged.at(Staged::MEAN_OFFSET, channel));
      if (task.strip == 0 && threadIdx.x == 0) {
        i64* const batches = arguments.update.batches;
        store_one(batches, load_one(batches) + 1);
      }
    }
    block_barrier();
  }
}
