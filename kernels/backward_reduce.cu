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
// Called by the launcher of backward passes. One block of THREADS threads per task; shared memory: Staged::ROWS numbers
// per channel of a strip, then the exchange of reduce.cuh. dx may lie over dy.
#include "epilogue.cuh"
#include "gradients.cuh"
#include "normalise.cuh"
#include "reduce.cuh"

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

// A sum with the rounding errors of its additions beside it (Møller 1965, Knuth's TwoSum).
struct CompensatedSum {
  Real value, error;

  DEVICE CompensatedSum() : value(Real(0)), error(Real(0)) {}

  DEVICE void add(Real x) {
    const Real sum = value + x;
    const Real taken = sum - value;
    error = error + ((value - (sum - taken)) + (x - taken));
    value = sum;
  }

  // Beside an infinity the error is NaN and says nothing.
  DEVICE Real total() const { return is_finite(value) ? value + error : value; }
};

struct Sums {
  enum { WEIGHTED = 0 };
  Real gradient, centred;

  DEVICE static Sums empty() { return from(0, Real(0), Real(0)); }
  DEVICE static Sums merge(const Sums& a, const Sums& b) {
    return from(0, a.gradient + b.gradient, a.centred + b.centred);
  }
  DEVICE Sums shuffled(int lanes) const { return from(0, shuffle_xor(gradient, lanes), shuffle_xor(centred, lanes)); }
  DEVICE u64 weight() const { return 0; }
  DEVICE Real first() const { return gradient; }
  DEVICE Real second() const { return centred; }
  DEVICE static Sums from(u64, Real first, Real second) {
    const Sums sums = {first, second};
    return sums;
  }
};

KERNEL(backward_reduce, Arguments, THREADS) {
  const Tiling& tiling = arguments.tiling;
  const Staged staged = {(Real*)shared_memory(), (u32)tiling.strip_channels};
  u8* const exchange = (u8*)(staged.memory + Staged::ROWS * staged.stride);
  for (Index number = blockIdx.x; number < number_of_tasks(tiling); number += gridDim.x) {
    const Task task(tiling, number);
    for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
      staged.put(arguments.normalisation, task, channel);
    block_barrier();

    Walk walk(tiling, task, arguments.x);
    const Normaliser normaliser(staged, tiling, task, walk);
    CompensatedSum gradient[LANES], centred[LANES];
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
      Real sums[VECTOR], sums_centred[VECTOR];
#pragma unroll
      for (int e = 0; e < VECTOR; e++) sums[e] = sums_centred[e] = Real(0);
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        Pack dx, dz;
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
          const Element seen =
              HAS_RESIDUAL ? y[u].lane[e] : forward_epilogue(normaliser.normalised(x[u].lane[e], e), Element());
          const Real g = owns(spans[u], e) ? backward_epilogue(to_real(dy[u].lane[e]), seen) : Real(0);
          const Real distance = owns(spans[u], e) ? normaliser.centred(x[u].lane[e], e) : Real(0);
          sums[e] = sums[e] + g;
          sums_centred[e] = fma_rn(g, distance, sums_centred[e]);
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
      fold(sums);
      fold(sums_centred);
#pragma unroll
      for (int lane = 0; lane < LANES; lane++) {
        gradient[lane].add(sums[lane]);
        centred[lane].add(sums_centred[lane]);
      }
    }

    Sums states[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++)
      states[lane] = Sums::from(0, gradient[lane].total(), centred[lane].total());
    reduce_strip(tiling, task, states, exchange, arguments.partials, [&](u32 channel, const Sums& total) {
      const Index c = task.channel + channel;
      store_one(arguments.sum + c, total.gradient);
      store_one(arguments.sum_centred + c, total.centred);
      if (arguments.gradients.weight)
        arguments.gradients.write(c, total.gradient, total.centred, staged.at(Staged::INVSTD, channel));
    });
  }
}
