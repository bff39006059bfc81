// From what the threads of a block found to one result per channel of its strip, and from the blocks of a strip to one.
//
// A State is a running result (Welford, or the sums of the backward pass) that stands for {weight, first, second} when
// it is put down. It is put down twice: in shared memory, one per thread and lane, and in global memory, one per
// channel and split. Each time a team of threads (a warp or less) takes a channel: every member joins its share one
// after another, then they join pairwise. The order is fixed, so the result is the same on every run.
#pragma once
#include "tensor.cuh"

// Room in global memory for one state per split and channel, channels adjacent, and one counter per strip, zero between
// launches.
struct Partials {
  u64* weight;
  Real* first;
  Real* second;
  u32* arrived;
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

// Joins the states of a team. Every thread of the warp takes part; the result is that of the whole team in each of its
// threads. The lower lane's state is always the left one.
template <class State>
DEVICE State reduce_team(State state, u32 team) {
  for (u32 lanes = team / 2; lanes > 0; lanes /= 2) {
    const State other = state.shuffled(lanes);
    state = threadIdx.x & lanes ? State::merge(other, state) : State::merge(state, other);
  }
  return state;
}

// Joins what the threads put into the exchange, per channel of the strip, and gives it to `take(channel, state)`, in
// one thread for each channel.
template <class State, class Take>
DEVICE void reduce_block(const Tiling& tiling, const Task& task, const Exchange& exchange, Take take) {
  const u32 team = (u32)tiling.team, member = threadIdx.x % team, teams = THREADS / team;
#if WALK_COLUMNS
  const u32 width = (u32)tiling.width, inner = (u32)tiling.inner, members = THREADS / width * inner;
#else
  const u32 width = 1, inner = 1, members = THREADS;
#endif
  for (u32 round = 0; round < task.channels; round += teams) {
    const u32 channel = round + threadIdx.x / team;
    State state = State::empty();
    for (u32 k = member; k < members && channel < task.channels; k += team) {
      const u32 position = channel * inner + k % inner;  // in the strip's row
      const u32 thread = k / inner * width + position / LANES;
      state = State::merge(state, exchange.get<State>(thread, position % LANES));
    }
    state = reduce_team(state, team);
    if (member == 0 && channel < task.channels) take(channel, state);
  }
}

// Joins the splits' results per channel of the strip.
template <class State, class Take>
DEVICE void reduce_splits(const Tiling& tiling, const Task& task, const Partials& partials, Take take) {
  const u32 team = (u32)tiling.team, member = threadIdx.x % team, teams = THREADS / team;
  const u32 splits = (u32)tiling.splits;
  for (u32 round = 0; round < task.channels; round += teams) {
    const u32 channel = round + threadIdx.x / team;
    State state = State::empty();
    for (u32 split = member; split < splits && channel < task.channels; split += team) {
      const Index at = split * (Index)tiling.channels + task.channel + channel;
      state = State::merge(state, State::from(State::WEIGHTED ? load_coherent<1>(partials.weight + at).lane[0] : 0,
                                              load_coherent<1>(partials.first + at).lane[0],
                                              load_coherent<1>(partials.second + at).lane[0]));
    }
    state = reduce_team(state, team);
    if (member == 0 && channel < task.channels) take(channel, state);
  }
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
    reduce_block<State>(tiling, task, exchange, finish);
    block_barrier();
    return;
  }
  const Index splits = (Index)tiling.splits;
  reduce_block<State>(tiling, task, exchange, [&](u32 channel, const State& state) {
    const Index at = task.split * (Index)tiling.channels + task.channel + channel;
    if (State::WEIGHTED) store_one(partials.weight + at, state.weight());
    store_one(partials.first + at, state.first());
    store_one(partials.second + at, state.second());
  });
  block_barrier();
  u32* const before = exchange.weight;
  if (threadIdx.x == 0) *before = arrive(partials.arrived + task.strip);
  block_barrier();
  if (*before == splits - 1) {
    reduce_splits<State>(tiling, task, partials, finish);
    if (threadIdx.x == 0) store_one(partials.arrived + task.strip, 0u);
  }
  block_barrier();
}
