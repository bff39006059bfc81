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

  // Any number of them, added up in double precision.
  struct Joined {
    double gradient, centred;

    DEVICE Joined() : gradient(0.0), centred(0.0) {}
    DEVICE void add(const Sums& sums) {
      gradient = gradient + (double)sums.gradient;
      centred = centred + (double)sums.centred;
    }
    DEVICE void add_shuffled(int lanes) {
      gradient = gradient + shuffle_xor(gradient, lanes);
      centred = centred + shuffle_xor(centred, lanes);
    }
    DEVICE Sums total() const { return from(0, (Real)gradient, (Real)centred); }
  };

  DEVICE u64 weight() const { return 0; }
  DEVICE Real first() const { return gradient; }
  DEVICE Real second() const { return centred; }
  DEVICE static Sums from(u64, Real first, Real second) {
    const Sums sums = {first, second};
    return sums;
  }
};

// What one thread learns of them on its way through a task: plain sums of a few vectors, which are then added up with
// their rounding errors kept.
struct ThreadSums {
  // Chunks of UNROLL vectors that go into a plain sum: 8 or 16 values. (A kernel that stores gradients too has no
  // registers for sums that outlive a chunk.)
  enum { CHUNKS = STORES_GRADIENT ? 1 : 8 };

  CompensatedSum gradient[LANES], centred[LANES];
  Real plain[VECTOR], plain_centred[VECTOR];
  u32 chunks;

  DEVICE ThreadSums() : chunks(0) { clear(); }

  DEVICE void add(int e, Real g, Real distance) {
    plain[e] = plain[e] + g;
    plain_centred[e] = fma_rn(g, distance, plain_centred[e]);
  }

  DEVICE void end_chunk() {
    chunks++;
    if (chunks % CHUNKS == 0) gather();
  }

  DEVICE void gather() {
    fold(plain);
    fold(plain_centred);
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      gradient[lane].add(plain[lane]);
      centred[lane].add(plain_centred[lane]);
    }
    clear();
  }

  DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < VECTOR; e++) plain[e] = plain_centred[e] = Real(0);
  }

  DEVICE void put_down(Sums (&states)[LANES]) {
    if (CHUNKS > 1) gather();
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
