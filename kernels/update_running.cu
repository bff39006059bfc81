// Moves the running statistics towards those of the batch of all ranks, and counts the batch: as apply.cu does for a
// batch of one device.
//
// Reads and writes both running statistics, reads mean and variance of the batch. Nothing moves where the ranks'
// messages did not belong together, or where all of them together have one value per channel or none.
//
// The last launch of a synchronised forward pass, so that a failure before it leaves the module as it was. One thread
// per channel in blocks of THREADS.
#include "message.cuh"
#include "welford.cuh"

struct Arguments {
  Element* mean;
  Element* variance;
  i64* batches;
  const Element* pivot;
  const Element* mean_offset;
  const Element* batch_variance;
  const Element* cumulative;  // the factor, if the momentum is a cumulative average
  double momentum;            // else
  u64 skip_non_finite;
  const u64* outcome;
  u64 channels;
};

KERNEL(update_running, Arguments, THREADS) {
  const u64 values = load_one(arguments.outcome + 1);
  if (load_one(arguments.outcome) != SOUND || values < 2) return;
  const Element momentum = arguments.cumulative ? load_one(arguments.cumulative) : (Element)arguments.momentum;
  const Element unbias = divide_rn((Element)values, (Element)(values - 1));
  const Element keep = Element(1) - momentum;
  for (u64 c = blockIdx.x * (u64)THREADS + threadIdx.x; c < arguments.channels; c += gridDim.x * (u64)THREADS) {
    const Element mean = load_one(arguments.pivot + c) + load_one(arguments.mean_offset + c);
    const Element variance = load_one(arguments.batch_variance + c);
    if (arguments.skip_non_finite && !(is_finite(mean) && is_finite(variance))) continue;
    store_one(arguments.mean + c, fma_rn(momentum, mean, keep * load_one(arguments.mean + c)));
    store_one(arguments.variance + c, fma_rn(momentum, variance * unbias, keep * load_one(arguments.variance + c)));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) store_one(arguments.batches, load_one(arguments.batches) + 1);
}
