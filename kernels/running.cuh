// How a training pass moves the running statistics: once per channel, in the pass's last launch.
#pragma once
#include "welford.cuh"

struct RunningUpdate {
  Real* mean;  // absent: not at all
  Real* variance;
  i64* batches;
  double momentum;  // unless it is a cumulative average
  u64 skip_non_finite;
  u64 values;  // per channel

  // running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch.
  DEVICE void move(Index channel, Real batch_mean, Real batch_variance, Real factor) const {
    if (skip_non_finite && !(is_finite(batch_mean) && is_finite(batch_variance))) return;
    const Real unbiased = batch_variance * divide_rn((Real)values, (Real)(values - 1));
    const Real keep = Real(1) - factor;
    store_one(mean + channel, fma_rn(factor, batch_mean, keep * load_one(mean + channel)));
    store_one(variance + channel, fma_rn(factor, unbiased, keep * load_one(variance + channel)));
  }

  // The factor of a cumulative average, before this batch is counted.
  DEVICE Real cumulative_factor() const { return divide_rn(Real(1), (Real)(load_one(batches) + 1)); }

  DEVICE void count_batch() const { store_one(batches, load_one(batches) + 1); }
};
