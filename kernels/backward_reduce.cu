// Per channel, the sums over the gradient that the backward pass needs: Σ g and Σ g * (x - mean), where g is the
// gradient at y as far as the epilogue lets it pass.
//
// Reads x and dy once (and y for the residual form): 2T bytes, 3T with a residual; per task the strip's per-channel
// numbers. Writes both sums per channel, and, if it is the pass's last launch, the gradients at weight and bias; with
// more than one split also one partial result per channel and split, written and read once.
//
// In evaluation the gradient at x does not depend on the sums: where both are wanted, this kernel alone writes dx = g *
// invstd * weight, and dz = g, beside them (STORES_GRADIENT): T bytes more for each.
//
// Called by the launcher of backward passes. One block of THREADS threads per task; shared memory: ROWS numbers per
// channel of a strip, then the exchange of reduce.cuh. dx may lie over dy.
#include "epilogue.cuh"
#include "normalise.cuh"
#include "reduce.cuh"
#include "sums.cuh"

struct Arguments {
  const Element* x;
  const Element* y;
  const Element* dy;
  Element* dx;
  Element* dz;
  Normalisation normalisation;
  Partials partials;
  Real* sum;          // Σ g per channel
  Real* sum_centred;  // Σ g * (x - mean) per channel
  ParameterGradients gradients;
  Tiling tiling;
};

enum { REST = Staged::ROWS, ROWS };

KERNEL(backward_reduce, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  u8* const exchange = (u8*)(staged.memory + ROWS * staged.stride);
  for (Index number = blockIdx.x; number < number_of_tasks(tiling); number += gridDim.x) {
    const Task task(tiling, number);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
      staged.at(REST, channel) = staged.put(arguments.normalisation, task, channel);
    block_barrier();

    Walk walk(tiling, task, arguments.x);
    const Normaliser normaliser(staged, tiling, task, walk);
    ThreadSums found;
    while (!walk.done()) {
      Span spans[UNROLL];
      Pack x[UNROLL], y[UNROLL], dy[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        spans[u] = walk.next();
        x[u] = load_span<Cached>(arguments.x, spans[u]);
        dy[u] = load_span<Cached>(arguments.dy, spans[u]);
        if (HAS_RESIDUAL) y[u] = load_span<Cached>(arguments.y, spans[u]);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        Pack dx, dz;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
          const Element seen =
              HAS_RESIDUAL ? y[u].lane[e] : forward_epilogue(normaliser.normalised(x[u].lane[e], e), Element());
          const Real g = owns(spans[u], e) ? backward_epilogue(to_real(dy[u].lane[e]), seen) : Real(0);
          const Real distance = owns(spans[u], e) ? normaliser.centred(x[u].lane[e], e) : Real(0);
          found.add(e, g, distance);
          if (STORES_GRADIENT) {
            from_real(g * normaliser.scale[e], dx.lane[e]);
            from_real(g, dz.lane[e]);
          }
        }
        if (STORES_GRADIENT) {
          if (arguments.dx) store_span(arguments.dx, spans[u], dx);
          if (HAS_RESIDUAL && arguments.dz) store_span(arguments.dz, spans[u], dz);
        }
      }
      found.end_chunk();
    }

    Sums states[LANES];
    found.put_down(states);
    reduce_strip(tiling, task, states, exchange, arguments.partials, [&](u32 channel, const Sums& total) {
      const Index c = task.channel + channel;
      const Real centred = less_rest(total.centred, staged.at(REST, channel), total.gradient);
      store_one(arguments.sum + c, total.gradient);
      store_one(arguments.sum_centred + c, centred);
      if (arguments.gradients.weight)
        arguments.gradients.write(c, total.gradient, centred, staged.at(Staged::INVSTD, channel));
    });
  }
}
