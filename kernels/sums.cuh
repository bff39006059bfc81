// The sums over the gradient that a backward pass needs of a channel, Σ g and Σ g * (x - mean), and the gradients at
// weight and bias that come of them.
#pragma once
#include "welford.cuh"

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

// What one thread learns of them on its way through a task: the plain sums of a chunk of vectors, which are then added
// up with their rounding errors kept.
struct ThreadSums {
  CompensatedSum gradient[LANES], centred[LANES];
  Real chunk[VECTOR], chunk_centred[VECTOR];

  DEVICE void begin_chunk() {
#pragma unroll
    for (int e = 0; e < VECTOR; e++) chunk[e] = chunk_centred[e] = Real(0);
  }

  DEVICE void add(int e, Real g, Real distance) {
    chunk[e] = chunk[e] + g;
    chunk_centred[e] = fma_rn(g, distance, chunk_centred[e]);
  }

  DEVICE void end_chunk() {
    fold(chunk);
    fold(chunk_centred);
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      gradient[lane].add(chunk[lane]);
      centred[lane].add(chunk_centred[lane]);
    }
  }

  DEVICE void put_down(Sums (&states)[LANES]) const {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++)
      states[lane] = Sums::from(0, gradient[lane].total(), centred[lane].total());
  }
};

// x̂ * Σ g x̂ / n = (x - mean) * slope: one invstd of x̂ each, never their product, which may overflow.
DEVICE Real slope_of(Real sum_centred, Real invstd, Real values) {
  return divide_rn(sum_centred * invstd, values) * invstd;
}

// The gradients at weight and bias. The last launch of a pass writes them, whichever it is, so that a failure before it
// leaves them as they were: what is added to them would be added again by a second try.
struct ParameterGradients {
  Real* weight;  // absent: not wanted of this launch
  Real* bias;
  u64 accumulate;  // add to them, instead of writing over them

  // One thread per channel: from Σ g, Σ g * (x - mean) and the channel's invstd.
  DEVICE void write(Index channel, Real sum, Real sum_centred, Real invstd) const {
    put(weight + channel, sum_centred * invstd);
    put(bias + channel, sum);
  }

  DEVICE void put(Real* to, Real value) const { store_one(to, accumulate ? load_one(to) + value : value); }
};
