// Mean and variance of the batch of all ranks from those of each: joined in the order of the ranks, so that every rank
// finds the same bits.
//
// Reads one message per rank, three numbers per channel each; writes pivot, mean_offset, invstd and variance per
// channel, and the outcome.
//
// Called between the two halves of a synchronised forward pass. One thread per channel in blocks of THREADS.
#include "message.cuh"
#include "welford.cuh"

struct Arguments {
  Gathered gathered;
  Element* pivot;  // of the first rank that has values
  Element* mean_offset;
  Element* invstd;
  Element* variance;
  u64* outcome;
  const i64* batches;  // num_batches_tracked before this batch, if the momentum is a cumulative average
  Element* momentum;   // gets 1 / (batches + 1)
  double eps;
};

KERNEL(merge_statistics, Arguments, THREADS) {
  const Gathered& gathered = arguments.gathered;
  for (u64 c = blockIdx.x * (u64)THREADS + threadIdx.x; c < gathered.channels; c += gridDim.x * (u64)THREADS) {
    Welford all = Welford::empty();
    Real pivot = Real(0);
    bool agree = true;
    for (u64 rank = 0; rank < gathered.ranks; rank++) {
      const Message message = gathered.of(rank);
      agree = agree && message.tag() == gathered.tag;
      const Real own_pivot = message.at(0, c);
      if (all.count == 0) pivot = own_pivot;
      const Welford own = {message.count(), {(own_pivot - pivot) + message.at(1, c), message.at(2, c)}};
      all = Welford::merge(all, own);
    }
    // Rounded to a parameter first: with one rank the numbers are then those of statistics.cu.
    const Element variance = (Element)(agree ? all.moments.variance : nothing());
    const Element spread = variance + (Element)arguments.eps;
    store_one(arguments.pivot + c, (Element)pivot);
    store_one(arguments.mean_offset + c, (Element)(agree ? all.moments.mean : nothing()));
    store_one(arguments.variance + c, variance);
    store_one(arguments.invstd + c, spread == Element(0) ? Element(0) : divide_rn(Element(1), sqrt_rn(spread)));
    if (c == 0) {
      store_one(arguments.outcome, (u64)(!agree ? RANKS_DISAGREE : all.count == 1 ? ONE_VALUE : SOUND));
      store_one(arguments.outcome + 1, all.count);
      if (arguments.batches)
        store_one(arguments.momentum, divide_rn(Element(1), (Element)(load_one(arguments.batches) + 1)));
    }
  }
}
