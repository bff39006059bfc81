// The means over the batch of all ranks of g and g * (x - mean) from each rank's sums, g being the gradient at y: what
// backward_apply.cu needs. Added up in the order of the ranks, so that every rank finds the same bits.
//
// Reads one message per rank, two numbers per channel each; writes two numbers per channel, and the outcome where the
// messages do not belong together.
//
// Called between the two halves of a synchronised backward pass. One thread per channel in blocks of THREADS.
#include "message.cuh"

struct Arguments {
  Gathered gathered;
  Element* mean;          // Σ g / n per channel
  Element* mean_centred;  // Σ g * (x - mean) / n per channel
  u64* outcome;
};

KERNEL(merge_sums, Arguments, THREADS) {
  const Gathered& gathered = arguments.gathered;
  for (u64 c = blockIdx.x * (u64)THREADS + threadIdx.x; c < gathered.channels; c += gridDim.x * (u64)THREADS) {
    Real sum = Real(0), sum_centred = Real(0);
    u64 values = 0;
    bool agree = true;
    for (u64 rank = 0; rank < gathered.ranks; rank++) {
      const Message message = gathered.of(rank);
      agree = agree && message.tag() == gathered.tag;
      values += message.count();
      sum = sum + message.at(0, c);
      sum_centred = sum_centred + message.at(1, c);
    }
    const Real n = (Real)(values == 0 ? 1 : values);
    store_one(arguments.mean + c, (Element)(agree ? divide_rn(sum, n) : nothing()));
    store_one(arguments.mean_centred + c, (Element)(agree ? divide_rn(sum_centred, n) : nothing()));
    if (c == 0 && !agree) store_one(arguments.outcome, (u64)RANKS_DISAGREE);
  }
}
