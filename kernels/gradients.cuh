// The gradients at weight and bias. The last launch of a backward pass writes them, whichever it is, so that a failure
// before it leaves them as they were: what is added to them would be added again by a second try.
#pragma once
#include "tensor.cuh"

struct ParameterGradients {
  Real* weight;  // absent: not wanted of this launch
  Real* bias;
  u64 accumulate;  // add to them, instead of writing over them

  // One thread per channel: from Σ g, Σ g * (x - mean) and the channel's invstd.
  DEVICE void write(Index channel, Real sum, Real sum_centred, Real invstd) const {
    put(weight + channel, sum_centred * invstd);
    put(bias + channel, sum);
  }

 private:
  DEVICE void put(Real* to, Real value) const { store_one(to, accumulate ? load_one(to) + value : value); }
};
