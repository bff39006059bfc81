// The per-channel numbers that turn x into y: computed once per block, then held by each thread for the channels it
// sees.
//
//   y = (x - mean) * scale + shift,  scale = invstd * weight,  shift = bias - rest * scale
//
// By batch statistics the mean is pivot + mean_offset, both as statistics.cu left them. Rounded, it lies among the
// values of x, so that no digit of theirs is lost; the rest that rounding took from it goes into the shift. By running
// statistics the mean is the running one, without a rest, and invstd comes of the running variance.
#pragma once
#include "tensor.cuh"
#include "welford.cuh"

struct Normalisation {
  const Real* pivot;        // or the running mean
  const Real* mean_offset;  // by running statistics: absent
  const Real* invstd;       // by running statistics: the running variance
  const Real* weight;       // absent: 1
  const Real* bias;         // absent: 0
  double eps;
};

// A mean, rounded, and what rounding took from it (Knuth's TwoSum).
struct Mean {
  Real rounded, rest;

  DEVICE Mean(Real pivot, Real offset) : rounded(pivot + offset) {
    const Real taken = rounded - pivot;
    rest = (pivot - (rounded - taken)) + (offset - taken);
  }
};

// To a term that (x - mean) * factor is added to, with the mean as it was rounded: what makes the sum that of the mean
// before. An infinite factor makes of every x what it will, and nothing of a rest.
DEVICE Real less_rest(Real term, Real rest, Real factor) {
  return is_finite(rest) && is_finite(factor) ? fma_rn(-rest, factor, term) : term;
}

// A strip's numbers in shared memory: rows of them, `stride` channels each. Kernels that have more add rows behind.
struct Staged {
  enum Row { MEAN, INVSTD, SCALE, SHIFT, ROWS };

  Real* memory;
  u32 stride;

  DEVICE Real& at(int row, u32 channel) const { return memory[row * stride + channel]; }

  // One thread per channel; a barrier must follow before others read. Returns the rest of the mean.
  DEVICE Real put(const Normalisation& from, const Task& task, u32 channel) const {
    const Index c = task.channel + channel;
    const Mean mean(load_one(from.pivot + c), from.mean_offset ? load_one(from.mean_offset + c) : Real(0));
    const Real invstd =
        from.mean_offset ? load_one(from.invstd + c) : inverse_deviation(load_one(from.invstd + c), (Real)from.eps);
    const Real weight = from.weight ? load_one(from.weight + c) : Real(1);
    put(channel, mean, invstd, weight, from.bias ? load_one(from.bias + c) : Real(0));
    return mean.rest;
  }

  DEVICE void put(u32 channel, const Mean& mean, Real invstd, Real weight, Real bias) const {
    const Real scale = invstd * weight;
    at(MEAN, channel) = mean.rounded;
    at(INVSTD, channel) = invstd;
    at(SCALE, channel) = scale;
    at(SHIFT, channel) = less_rest(bias, mean.rest, scale);
  }
};

// One row's numbers for the channels that a thread sees.
struct PerLane {
  Real lane[LANES];

  DEVICE PerLane(const Staged& staged, int row, const Tiling& tiling, const Task& task, const Walk& walk) {
#pragma unroll
    for (int e = 0; e < LANES; e++) {
      // Threads beyond the strip's end touch no tensor; they read some channel of the strip.
      const u32 channel = walk.channel(tiling, e);
      lane[e] = staged.at(row, channel < task.channels ? channel : 0);
    }
  }

  DEVICE Real operator[](int e) const { return lane[CHANNEL(e)]; }
};

// What a thread needs of the forward pass, for the channels it sees.
struct Normaliser {
  PerLane mean, scale, shift;

  DEVICE Normaliser(const Staged& staged, const Tiling& tiling, const Task& task, const Walk& walk)
      : mean(staged, Staged::MEAN, tiling, task, walk),
        scale(staged, Staged::SCALE, tiling, task, walk),
        shift(staged, Staged::SHIFT, tiling, task, walk) {}

  DEVICE Real centred(Element x, int e) const { return to_real(x) - mean[e]; }
  DEVICE Real normalised(Element x, int e) const { return fma_rn(centred(x, e), scale[e], shift[e]); }
};
