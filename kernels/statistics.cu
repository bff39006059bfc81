// Mean and variance of every channel: the first half of a forward pass by batch statistics.
//
// Reads x once: T bytes, and one element per task for the pivot. Writes pivot, mean_offset, invstd and variance per
// channel; with more than one split also one partial result per channel and split, written and read once.
//
// Called by the launcher of forward passes in training, and in evaluation without running statistics. One block of
// THREADS threads per task; shared memory: one pivot per channel of a strip, then the exchange of reduce.cuh.
#include "reduce.cuh"
#include "thread_statistics.cuh"

struct Arguments {
  const Element* x;
  Real* pivot;
  Real* mean_offset;
  Real* invstd;
  Real* variance;
  Partials partials;
  const i64* batches;  // num_batches_tracked before this batch, if the momentum is a cumulative average
  Real* momentum;      // gets 1 / (batches + 1)
  double eps;
  Tiling tiling;
};

enum { PIVOT };  // the only row that is staged

KERNEL(statistics, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged pivots = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  u8* const exchange = (u8*)(pivots.memory + pivots.stride);
  for (Index number = blockIdx.x; number < number_of_tasks(tiling); number += gridDim.x) {
    const Task task(tiling, number);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
      const Index first = (task.channel + channel) * (Index)tiling.inner;
      pivots.at(PIVOT, channel) = pivot_of(to_real(load_one(arguments.x + first)));
    }
    block_barrier();

    Walk walk(tiling, task, arguments.x);
    ThreadStatistics found(PerLane(pivots, PIVOT, tiling, task, walk));
    for_each_chunk(walk, [&](bool full) {
      Span spans[UNROLL];
      Pack x[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        spans[u] = walk.next(full);
        x[u] = load_span<Cached>(arguments.x, spans[u]);
      }
      found.push(x, spans);
    });

    Welford states[LANES];
    found.put_down(states);
    reduce_strip(tiling, task, states, exchange, arguments.partials, [&](u32 channel, const Welford& total) {
      const Index c = task.channel + channel;
      const Real variance = total.moments.variance;
      store_one(arguments.pivot + c, pivots.at(PIVOT, channel));
      store_one(arguments.mean_offset + c, total.moments.mean);
      store_one(arguments.invstd + c, batch_inverse_deviation(variance, (Real)arguments.eps));
      store_one(arguments.variance + c, variance);
      // The last kernel of the pass counts this batch while other blocks of it need the factor: so it is taken here.
      if (c == 0 && arguments.batches)
        store_one(arguments.momentum, divide_rn(Real(1), (Real)(load_one(arguments.batches) + 1)));
    });
  }
}
