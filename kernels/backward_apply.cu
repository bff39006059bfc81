// The gradient at x, and at the residual: the second half of a backward pass by batch statistics,
//
//   dx = weight * invstd * (g - (Σ g + x̂ * Σ g x̂) / n),  x̂ = (x - mean) * invstd,  dz = g,
//
// and the whole of one by running statistics without parameter gradients, dx = weight * invstd * g. There g is the
// gradient at y as far as the epilogue lets it pass.
//
// By batch statistics it reads x and dy once (and y for the residual form) and writes dx once (and dz): 3T bytes, 5T
// with a residual. By running statistics x is read only for the mask of a relu: 2T, 3T with relu, 4T with a residual.
// Per task the strip's per-channel numbers. It is the last launch, so it writes the gradients at weight and bias too,
// where they are wanted.
//
// In a synchronised pass merge_sums.cu has made the means over the batch of all ranks, while weight and bias get the
// gradients of this rank's batch alone.
//
// Called by the launcher of backward passes. One block of THREADS threads per task; shared memory: ROWS numbers per
// channel of a strip. dx may lie over dy. Tasks are taken from the last to the first, as in apply.cu.
#include "epilogue.cuh"
#include "normalise.cuh"
#include "sums.cuh"

struct Arguments {
  const Element* x;
  const Element* y;
  const Element* dy;
  Element* dx;  // absent: not wanted
  Element* dz;  // absent: not wanted
  Normalisation normalisation;
  const Real* sum;           // Σ g per channel, of this device's batch
  const Real* sum_centred;   // Σ g * (x - mean) per channel
  const Real* mean;          // Σ g / n over the batch of all ranks; absent: the sums above say it all
  const Real* mean_centred;  // Σ g * (x - mean) / n
  u64 values;                // n of this device
  ParameterGradients gradients;
  Tiling tiling;
};

enum { MEAN_GRADIENT = Staged::ROWS, SLOPE, ROWS };

enum { READS_X = BATCH_STATISTICS || EPILOGUE == 1 };

// What a thread has under way.
struct Chunk {
  Span spans[UNROLL];
  Pack x[UNROLL], y[UNROLL], dy[UNROLL];

  DEVICE void load(const Arguments& arguments, Walk& walk) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      spans[u] = walk.next();
      if (READS_X) x[u] = load_span<LastUse>(arguments.x, spans[u]);
      dy[u] = load_span<LastUse>(arguments.dy, spans[u]);
      if (HAS_RESIDUAL) y[u] = load_span<LastUse>(arguments.y, spans[u]);
    }
  }

  DEVICE void finish(const Arguments& arguments, const Normaliser& normaliser, const PerLane& mean_gradient,
                     const PerLane& slope) const {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      Pack dx, dz;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const Element value = READS_X ? x[u].lane[e] : Element();
        const Element seen = HAS_RESIDUAL ? y[u].lane[e] : forward_epilogue(normaliser.normalised(value, e), Element());
        const Real g = backward_epilogue(to_real(dy[u].lane[e]), seen);
        const Real shared =
            BATCH_STATISTICS ? fma_rn(normaliser.centred(value, e), slope[e], mean_gradient[e]) : Real(0);
        from_real((g - shared) * normaliser.scale[e], dx.lane[e]);
        from_real(g, dz.lane[e]);
      }
      if (arguments.dx) store_span(arguments.dx, spans[u], dx);
      if (HAS_RESIDUAL && arguments.dz) store_span(arguments.dz, spans[u], dz);
    }
  }
};

KERNEL(backward_apply, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  const Index tasks = number_of_tasks(tiling);
  for (Index number = blockIdx.x; number < tasks; number += gridDim.x) {
    const Task task(tiling, tasks - 1 - number);
    Walk walk(tiling, task, arguments.x);
    // Before the strip's numbers, so that one wait is for both.
    Chunk chunk;
    chunk.load(arguments, walk);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS) {
      const Real rest = staged.put(arguments.normalisation, task, channel);
      const Real invstd = staged.at(Staged::INVSTD, channel);
      const Index c = task.channel + channel;
      const bool writes = arguments.gradients.weight && task.split == 0;
      const bool alone = BATCH_STATISTICS && !arguments.mean;
      Real sum = Real(0), sum_centred = Real(0);
      if (alone || writes) {
        sum = load_one(arguments.sum + c);
        sum_centred = load_one(arguments.sum_centred + c);
      }
      if (BATCH_STATISTICS) {
        const Real values = (Real)arguments.values;
        const Real mean = alone ? divide_rn(sum, values) : load_one(arguments.mean + c);
        const Real slope = alone ? slope_of(sum_centred, invstd, values)
                                 : slope_of(load_one(arguments.mean_centred + c), invstd, Real(1));
        staged.at(MEAN_GRADIENT, channel) = less_rest(mean, rest, slope);
        staged.at(SLOPE, channel) = slope;
      }
      if (writes) arguments.gradients.write(c, sum, sum_centred, invstd);
    }
    block_barrier();

    const Normaliser normaliser(staged, tiling, task, walk);
    const PerLane mean_gradient(staged, BATCH_STATISTICS ? MEAN_GRADIENT : Staged::SHIFT, tiling, task, walk);
    const PerLane slope(staged, BATCH_STATISTICS ? SLOPE : Staged::SHIFT, tiling, task, walk);
    chunk.finish(arguments, normaliser, mean_gradient, slope);
    while (!walk.done()) {
      chunk.load(arguments, walk);
      chunk.finish(arguments, normaliser, mean_gradient, slope);
    }
    block_barrier();
  }
}
