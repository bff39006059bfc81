// Mean and variance of every channel: the first half of a forward pass by batch statistics.
//
// Reads x once: T bytes, and one element per task for the pivot. Writes pivot, mean_offset, invstd and variance per
// channel; with more than one split also one partial result per channel and split, written and read once.
//
// Called by the launcher of forward passes in training, and in evaluation without running statistics. One block of
// THREADS threads per task; shared memory: one pivot per channel of a strip, then the exchange of reduce.cuh.
//
// Every thread takes its vectors UNROLL at a time, so that as many loads are under way. It finds mean and variance of
// such a chunk in registers, in two passes, and joins the chunk to what it has by Welford's rule: exact about the
// chunk, and one division for all of it.
#include "reduce.cuh"
#include "normalise.cuh"

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

// The running result of one thread: one count, and moments for each channel it sees.
struct ThreadStatistics {
  u32 count;
  Moments moments[LANES];

  DEVICE ThreadStatistics() : count(0) {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) moments[lane].mean = moments[lane].variance = Real(0);
  }

  DEVICE void push(const Pack (&x)[UNROLL], const Span (&spans)[UNROLL], const PerLane& pivot) {
    Real difference[UNROLL][VECTOR], sums[VECTOR];
    u32 added = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] = Real(0);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      added += spans[u].last > spans[u].first ? spans[u].last - spans[u].first : 0;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        difference[u][e] = owns(spans[u], e) ? to_real(x[u].lane[e]) - pivot[e] : Real(0);
        sums[e] = sums[e] + difference[u][e];
      }
    }
    added /= LANES;
    if (added == 0) return;
    fold(sums);
    const Real inverse = divide_rn(Real(1), (Real)added);
    Moments chunk[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) chunk[lane].mean = sums[lane] * inverse;

#pragma unroll
    for (int e = 0; e < VECTOR; e++) sums[e] = Real(0);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Real deviation = owns(spans[u], e) ? difference[u][e] - chunk[CHANNEL(e)].mean : Real(0);
        // Divided before they are added up: the sum would overflow before the variance does.
        sums[e] = fma_rn(deviation * inverse, deviation, sums[e]);
      }
    fold(sums);
    const u32 total = count + added;
    const Real weight = divide_rn((Real)count, (Real)total), weight_added = divide_rn((Real)added, (Real)total);
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      chunk[lane].variance = sums[lane];
      moments[lane] = count == 0 ? chunk[lane] : merge(moments[lane], chunk[lane], weight, weight_added);
    }
    count = total;
  }
};

KERNEL(statistics, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged pivots = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  u8* const exchange = (u8*)(pivots.memory + pivots.stride);
  for (Index number = blockIdx.x; number < number_of_tasks(tiling); number += gridDim.x) {
    const Task task(tiling, number);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
      const Index first = (task.channel + channel) * (Index)tiling.inner;
      pivots.at(Staged::PIVOT, channel) = pivot_of(to_real(load_one(arguments.x + first)));
    }
    block_barrier();

    Walk walk(tiling, task, arguments.x);
    const PerLane pivot(pivots, Staged::PIVOT, tiling, task, walk);
    ThreadStatistics found;
    while (!walk.done()) {
      Span spans[UNROLL];
      Pack x[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        spans[u] = walk.next();
        x[u] = load_span<Cached>(arguments.x, spans[u]);
      }
      found.push(x, spans, pivot);
    }

    Welford states[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      states[lane].count = found.count;
      states[lane].moments = found.moments[lane];
    }
    reduce_strip(tiling, task, states, exchange, arguments.partials, [&](u32 channel, const Welford& total) {
      const Index c = task.channel + channel;
      const Real variance = total.moments.variance;
      store_one(arguments.pivot + c, pivots.at(Staged::PIVOT, channel));
      store_one(arguments.mean_offset + c, total.moments.mean);
      store_one(arguments.invstd + c, batch_inverse_deviation(variance, (Real)arguments.eps));
      store_one(arguments.variance + c, variance);
      // The last kernel of the pass counts this batch while other blocks of it need the factor: so it is taken here.
      if (c == 0 && arguments.batches)
        store_one(arguments.momentum, divide_rn(Real(1), (Real)(load_one(arguments.batches) + 1)));
    });
  }
}
