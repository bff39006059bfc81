// From what the threads of a block found to one result per channel of its strip, and from the blocks of a strip to one.
//
// A State is a running result (Welford, or the sums of the backward pass) that stands for {weight, first, second} when
// it is put down. It is put down twice: in shared memory, one per thread and lane, and in global memory, one per
// channel and split. Each time a team of threads (a warp or less) takes a channel: every member joins its share one
// after another, then they join pairwise, by the State's own rule (State::Joined). The order is fixed, so the result is
// the same on every run.
#pragma once
#include "tensor.cuh"

// Room in global memory for one state per split and channel, channels adjacent (a grid team puts the total behind those
// of its splits), and two counters per strip, zero between launches: blocks that have put down their results, and, of a
// grid team, the total being there and blocks that have read it.
struct Partials {
  u64* weight;
  Real* first;
  Real* second;
  u32* arrived;
  u32* ready;
};

// Room in shared memory for one state per thread and lane.
struct Exchange {
  Real* first;
  Real* second;
  u32* weight;

  DEVICE explicit Exchange(u8* memory)
      : first((Real*)memory), second(first + LANES * THREADS), weight((u32*)(second + LANES * THREADS)) {}

  template <class State>
  DEVICE void put(const State (&states)[LANES]) const {
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
      first[lane * THREADS + threadIdx.x] = states[lane].first();
      second[lane * THREADS + threadIdx.x] = states[lane].second();
    }
    weight[threadIdx.x] = (u32)states[0].weight();
  }

  template <class State>
  DEVICE State get(u32 thread, u32 lane) const {
    return State::from(weight[thread], first[lane * THREADS + thread], second[lane * THREADS + thread]);
  }
};

// Joins `parts` results per channel of the strip, which `get(part, channel)` finds, and gives what comes out to
// `take(channel, state)`, in one thread for each channel.
template <class State, class Get, class Take>
DEVICE void join(const Tiling& tiling, const Task& task, u32 parts, Get get, Take take) {
  enum { AT_ONCE = 4 };  // so that as many loads are under way
  const u32 team = (u32)tiling.team, member = threadIdx.x % team, teams = THREADS / team;
  for (u32 round = 0; round < task.channels; round += teams) {
    const u32 channel = round + threadIdx.x / team, own_parts = channel < task.channels ? parts : 0;
    typename State::Joined joined;
    u32 begin = member;
    for (; begin + (AT_ONCE - 1) * team < own_parts; begin += AT_ONCE * team) {
      State states[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) states[i] = get(begin + i * team, channel);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) joined.add(states[i]);
    }
    State states[AT_ONCE - 1];
#pragma unroll
    for (int i = 0; i < AT_ONCE - 1; i++)
      states[i] = begin + i * team < own_parts ? get(begin + i * team, channel) : State::empty();
#pragma unroll
    for (int i = 0; i < AT_ONCE - 1; i++) joined.add(states[i]);
    // Every thread of the warp takes part.
    for (u32 lanes = team / 2; lanes > 0; lanes /= 2) joined.add_shuffled(lanes);
    if (member == 0 && own_parts > 0) take(channel, joined.total());
  }
}

// Joins what the threads of the block put into the exchange.
template <class State, class Take>
DEVICE void join_threads(const Tiling& tiling, const Task& task, const Exchange& exchange, Take take) {
#if WALK_COLUMNS
  const u32 width = (u32)tiling.width, inner = (u32)tiling.inner, members = THREADS / width * inner;
#else
  const u32 width = 1, inner = 1, members = THREADS;
#endif
  const auto get = [&](u32 member, u32 channel) {
    const u32 position = channel * inner + member % inner;  // in the strip's row
    const u32 thread = member / inner * width + position / LANES;
    return exchange.get<State>(thread, position % LANES);
  };
  join<State>(tiling, task, members, get, take);
}

// Where the blocks of a strip find each other's results for a channel.
template <class State>
DEVICE void put_split(const Tiling& tiling, const Task& task, const Partials& partials, Index split, u32 channel,
                      const State& state) {
  const Index at = split * (Index)tiling.channels + task.channel + channel;
  if (State::WEIGHTED) store_one(partials.weight + at, state.weight());
  store_one(partials.first + at, state.first());
  store_one(partials.second + at, state.second());
}
template <class State>
DEVICE State get_split(const Tiling& tiling, const Task& task, const Partials& partials, Index split, u32 channel) {
  const Index at = split * (Index)tiling.channels + task.channel + channel;
  return State::from(State::WEIGHTED ? load_coherent<1>(partials.weight + at).lane[0] : 0,
                     load_coherent<1>(partials.first + at).lane[0], load_coherent<1>(partials.second + at).lane[0]);
}

// Joins what the blocks of the strip put into global memory.
template <class State, class Take>
DEVICE void join_splits(const Tiling& tiling, const Task& task, const Partials& partials, Take take) {
  const auto get = [&](u32 split, u32 channel) { return get_split<State>(tiling, task, partials, split, channel); };
  join<State>(tiling, task, (u32)tiling.splits, get, take);
}

// Puts this block's results down. Whether it is the last one of the strip to do so, and sees those of all others: the
// same answer in all threads of the block.
template <class State>
DEVICE bool put_down_last(const Tiling& tiling, const Task& task, const Partials& partials, const Exchange& exchange) {
  join_threads<State>(tiling, task, exchange, [&](u32 channel, const State& state) {
    put_split(tiling, task, partials, task.split, channel, state);
  });
  block_barrier();
  u32* const before = exchange.weight;
  if (threadIdx.x == 0) *before = arrive(partials.arrived + task.strip);
  block_barrier();
  return *before == (u32)tiling.splits - 1;
}

// From the threads' states to `finish(channel of the strip, state)`, called once per channel: by this block if it is
// alone with the strip, else by whichever block of the strip comes last, from the partial results of all in their fixed
// order. All threads of the block call it; afterwards shared memory may be used again.
template <class State, class Finish>
DEVICE void reduce_strip(const Tiling& tiling, const Task& task, const State (&states)[LANES], u8* memory,
                         const Partials& partials, Finish finish) {
  const Exchange exchange(memory);
  exchange.put(states);
  block_barrier();
  if (tiling.splits == 1) {
    join_threads<State>(tiling, task, exchange, finish);
    block_barrier();
    return;
  }
  if (put_down_last<State>(tiling, task, partials, exchange)) {
    join_splits<State>(tiling, task, partials, finish);
    if (threadIdx.x == 0) store_one(partials.arrived + task.strip, 0u);
  }
  block_barrier();
}
