// A whole backward pass by batch statistics in one launch: the gradients at x, and at the residual, weight and bias.
//
//   dx = weight * invstd * (g - (Σ g + x̂ * Σ g x̂) / n),  x̂ = (x - mean) * invstd,  dz = g,
//
// where g is the gradient at y as far as the epilogue lets it pass.
//
// Reads x and dy once (and y for the residual form) and writes dx once (and dz): 3T bytes, 5T with a residual. Per
// block and strip it reads the per-channel numbers of the forward pass; per channel it writes the gradients at weight
// and bias if they are wanted. A grid team also writes and reads one partial result per channel and block.
//
// Called by the launcher of backward passes. Blocks of THREADS threads, `splits` of them in x and the teams in y;
// shared memory as resident.cuh lays it out: x and dy are held, and behind a relu g takes the place of dy. dx may lie
// over dy.
#include "epilogue.cuh"
#include "resident.cuh"
#include "sums.cuh"

struct Arguments {
  const Element* x;
  const Element* y;
  const Element* dy;
  Element* dx;  // absent: not wanted
  Element* dz;  // absent: not wanted
  Normalisation normalisation;
  Partials partials;
  ParameterGradients gradients;
  u64 values;  // n
  Tiling tiling;
};

enum { REST = Staged::ROWS, MEAN_GRADIENT, SLOPE, ROWS };

typedef Chip<2, ROWS> BackwardChip;

DEVICE void stage_normalisation(const Arguments& arguments, const Task& task, const Staged& staged) {
  for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
    staged.at(REST, channel) = staged.put(arguments.normalisation, task, channel);
  block_barrier();
}

DEVICE void find_sums(const Arguments& arguments, const Task& task, const BackwardChip& chip, u32 stage, u32 lap) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = chip.staged();
  Element* const gradients = chip.buffer(stage, 1);
  Walk walk(tiling, task, arguments.x);
  const Normaliser normaliser(staged, tiling, task, walk);
  ThreadSums found;
  for_each_chunk(walk, [&](bool full) {
    Span spans[UNROLL];
    Pack y[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next(full);
      if (HAS_RESIDUAL) y[u] = load_span<LastUse>(arguments.y, spans[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const Pack x = take(chip.buffer(stage, 0), spans[u]), dy = take(gradients, spans[u]);
      Pack passed;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Element seen =
            HAS_RESIDUAL ? y[u].lane[e] : forward_epilogue(normaliser.normalised(x.lane[e], e), Element());
        const Real g = owns(spans[u], e) ? backward_epilogue(to_real(dy.lane[e]), seen) : Real(0);
        const Real distance = owns(spans[u], e) ? normaliser.centred(x.lane[e], e) : Real(0);
        found.add(e, g, distance);
        from_real(g, passed.lane[e]);
      }
      if (HAS_RELU && owns_any(spans[u])) store_shared<VECTOR>(gradients + (Index)spans[u].place * VECTOR, passed);
    }
    found.end_chunk();
  });

  Sums states[LANES];
  found.put_down(states);
  reduce_over_team(chip, tiling, task, states, arguments.partials, lap, [&](u32 channel, const Sums& total) {
    const Real values = (Real)arguments.values, invstd = staged.at(Staged::INVSTD, channel);
    const Real rest = staged.at(REST, channel), centred = less_rest(total.centred, rest, total.gradient);
    const Real slope = slope_of(centred, invstd, values);
    staged.at(MEAN_GRADIENT, channel) = less_rest(divide_rn(total.gradient, values), rest, slope);
    staged.at(SLOPE, channel) = slope;
    if (task.split == 0 && arguments.gradients.weight)
      arguments.gradients.write(task.channel + channel, total.gradient, centred, invstd);
  });
}

DEVICE void apply_gradient(const Arguments& arguments, const Task& task, const BackwardChip& chip, u32 stage) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = chip.staged();
  Walk walk(tiling, task, arguments.x);
  const PerLane mean(staged, Staged::MEAN, tiling, task, walk);
  const PerLane scale(staged, Staged::SCALE, tiling, task, walk);
  const PerLane mean_gradient(staged, MEAN_GRADIENT, tiling, task, walk);
  const PerLane slope(staged, SLOPE, tiling, task, walk);
  for_each_chunk(walk, [&](bool full) {
    Span spans[UNROLL];
    Pack x[UNROLL], g[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next(full);
      x[u] = take(chip.buffer(stage, 0), spans[u]);
      g[u] = take(chip.buffer(stage, 1), spans[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      Pack dx;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Real shared = fma_rn(to_real(x[u].lane[e]) - mean[e], slope[e], mean_gradient[e]);
        from_real((to_real(g[u].lane[e]) - shared) * scale[e], dx.lane[e]);
      }
      if (arguments.dx) store_span(arguments.dx, spans[u], dx);
      if (HAS_RESIDUAL && arguments.dz) store_span(arguments.dz, spans[u], g[u]);
    }
  });
}

RESIDENT_KERNEL(resident_backward, Arguments) {
  const BackwardChip chip(shared_memory(), arguments.tiling);
  const Element* const tensors[2] = {arguments.x, arguments.dy};
  const auto begin = [&](const Task& task) { stage_normalisation(arguments, task, chip.staged()); };
  const auto work = [&](const Task& task, u32 stage, u32 lap) {
    find_sums(arguments, task, chip, stage, lap);
    if (arguments.dx || arguments.dz) apply_gradient(arguments, task, chip, stage);
  };
  for_each_strip(chip, arguments.tiling, tensors, begin, work);
}
