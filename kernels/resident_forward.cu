// A whole forward pass by batch statistics in one launch: y = epilogue((x - mean) * invstd * weight + bias), with the
// statistics, and in training the running ones.
//
// Reads x once (and the residual), writes y once: 2T bytes, 3T with a residual. Per block and strip it reads the
// channels' first elements, weights and biases; per channel it writes pivot, mean_offset and invstd, and moves the
// running statistics. A grid team also writes and reads one partial result per channel and block.
//
// Called by the launcher of forward passes. Blocks of THREADS threads, `splits` of them in x and the teams in y; shared
// memory as resident.cuh lays it out. y may lie over x.
#include "epilogue.cuh"
#include "resident.cuh"
#include "running.cuh"
#include "thread_statistics.cuh"

struct Arguments {
  const Element* x;
  const Element* z;
  Element* y;
  Real* pivot;
  Real* mean_offset;
  Real* invstd;
  const Real* weight;  // absent: 1
  const Real* bias;    // absent: 0
  RunningUpdate update;
  u64 cumulative;  // whether the momentum is a cumulative average
  u32* finished;   // strips that are done, if it is one; zero between launches
  Partials partials;
  double eps;
  Tiling tiling;
};

enum { PIVOT = Staged::ROWS, MEAN_OFFSET, VARIANCE, ROWS };

typedef Chip<1, ROWS> ForwardChip;

// Before the strip's values have come: the pivots, and weight and bias where scale and shift will be.
DEVICE void stage_parameters(const Arguments& arguments, const Task& task, const Staged& staged) {
  for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
    const Index c = task.channel + channel;
    staged.at(PIVOT, channel) = pivot_of(to_real(load_one(arguments.x + c * (Index)arguments.tiling.inner)));
    staged.at(Staged::SCALE, channel) = arguments.weight ? load_one(arguments.weight + c) : Real(1);
    staged.at(Staged::SHIFT, channel) = arguments.bias ? load_one(arguments.bias + c) : Real(0);
  }
  block_barrier();
}

DEVICE void find_statistics(const Arguments& arguments, const Task& task, const ForwardChip& chip, u32 stage, u32 lap) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = chip.staged();
  Walk walk(tiling, task, arguments.x);
  ThreadStatistics found(PerLane(staged, PIVOT, tiling, task, walk));
  for_each_chunk(walk, [&](bool full) {
    Span spans[UNROLL];
    Pack x[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next(full);
      x[u] = take(chip.buffer(stage, 0), spans[u]);
    }
    found.push(x, spans);
  });

  Welford states[LANES];
  found.put_down(states);
  reduce_over_team(chip, tiling, task, states, arguments.partials, lap, [&](u32 channel, const Welford& total) {
    const Moments moments = total.moments;
    const Real invstd = batch_inverse_deviation(moments.variance, (Real)arguments.eps);
    staged.at(MEAN_OFFSET, channel) = moments.mean;
    staged.at(VARIANCE, channel) = moments.variance;
    staged.put(channel, Mean(staged.at(PIVOT, channel), moments.mean), invstd, staged.at(Staged::SCALE, channel),
               staged.at(Staged::SHIFT, channel));
  });
}

// What one block of a team leaves behind of a strip. It waits for memory: so it comes after the strip's results have
// been applied, not before.
DEVICE void publish(const Arguments& arguments, const Task& task, const Staged& staged) {
  const RunningUpdate& update = arguments.update;
  for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
    const Index c = task.channel + channel;
    store_one(arguments.pivot + c, staged.at(PIVOT, channel));
    store_one(arguments.mean_offset + c, staged.at(MEAN_OFFSET, channel));
    store_one(arguments.invstd + c, staged.at(Staged::INVSTD, channel));
    if (update.mean) {
      const Real momentum = arguments.cumulative ? update.cumulative_factor() : (Real)update.momentum;
      update.move(c, staged.at(Staged::MEAN, channel), staged.at(VARIANCE, channel), momentum);
    }
  }
  if (!update.mean) return;
  // Where channels take their factor from the count of batches, the last strip that is done counts this one.
  if (!arguments.cumulative) {
    if (task.strip == 0 && threadIdx.x == 0) update.count_batch();
    return;
  }
  block_barrier();
  if (threadIdx.x == 0 && arrive(arguments.finished) == (u32)arguments.tiling.strips - 1) {
    update.count_batch();
    store_one(arguments.finished, 0u);
  }
}

DEVICE void normalise(const Arguments& arguments, const Task& task, const ForwardChip& chip, u32 stage) {
  Walk walk(arguments.tiling, task, arguments.x);
  const Normaliser normaliser(chip.staged(), arguments.tiling, task, walk);
  for_each_chunk(walk, [&](bool full) {
    Span spans[UNROLL];
    Pack z[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next(full);
      if (HAS_RESIDUAL) z[u] = load_span<LastUse>(arguments.z, spans[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const Pack x = take(chip.buffer(stage, 0), spans[u]);
      Pack y;
#pragma unroll
      for (int e = 0; e < VECTOR; e++)
        y.lane[e] = forward_epilogue(normaliser.normalised(x.lane[e], e), HAS_RESIDUAL ? z[u].lane[e] : Element());
      store_span(arguments.y, spans[u], y);
    }
  });
}

RESIDENT_KERNEL(resident_forward, Arguments) {
  const ForwardChip chip(shared_memory(), arguments.tiling);
  const Element* const tensors[1] = {arguments.x};
  const auto begin = [&](const Task& task) { stage_parameters(arguments, task, chip.staged()); };
  const auto work = [&](const Task& task, u32 stage, u32 lap) {
    find_statistics(arguments, task, chip, stage, lap);
    normalise(arguments, task, chip, stage);
    if (task.split == 0) publish(arguments, task, chip.staged());
  };
  for_each_strip(chip, arguments.tiling, tensors, begin, work);
}
