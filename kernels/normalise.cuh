// The per-channel numbers that turn x into y: computed once per block, then held by each thread for the channels it
// sees.
//
//   y = ((x - pivot) - mean_offset) * scale + shift,  scale = invstd * weight,  shift = bias
//
// By batch statistics, pivot, mean_offset and invstd are those that statistics.cu left. By running statistics the pivot
// is the running mean, the offset is zero, and invstd comes of the running variance.
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

// A strip's numbers in shared memory: `rows` of them, `stride` channels each.
struct Staged {
  enum Row { PIVOT, MEAN_OFFSET, INVSTD, SCALE, SHIFT, ROWS };

  Real* memory;
  u32 stride;

  DEVICE Real& at(int row, u32 channel) const { return memory[row * stride + channel]; }

  // One thread per channel; a barrier must follow before others read.
  DEVICE void put(const Normalisation& from, const Task& task, u32 channel) const {
    const Index c = task.channel + channel;
    const Real invstd =
        from.mean_offset ? load_one(from.invstd + c) : inverse_deviation(load_one(from.invstd + c), (Real)from.eps);
    at(PIVOT, channel) = load_one(from.pivot + c);
    at(MEAN_OFFSET, channel) = from.mean_offset ? load_one(from.mean_offset + c) : Real(0);
    at(INVSTD, channel) = invstd;
    at(SCALE, channel) = from.weight ? invstd * load_one(from.weight + c) : invstd;
    at(SHIFT, channel) = from.bias ? load_one(from.bias + c) : Real(0);
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
  PerLane pivot, mean_offset, scale, shift;

  DEVICE Normaliser(const Staged& staged, const Tiling& tiling, const Task& task, const Walk& walk)
      : pivot(staged, Staged::PIVOT, tiling, task, walk),
        mean_offset(staged, Staged::MEAN_OFFSET, tiling, task, walk),
        scale(staged, Staged::SCALE, tiling, task, walk),
        shift(staged, Staged::SHIFT, tiling, task, walk) {}

  DEVICE Real centred(Element x, int e) const { return (to_real(x) - pivot[e]) - mean_offset[e]; }
  DEVICE Real normalised(Element x, int e) const { return fma_rn(centred(x, e), scale[e], shift[e]); }
};
