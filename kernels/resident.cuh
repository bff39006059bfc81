// What resident kernels are made of: a strip held on chip by a team of blocks, so that memory is read once.
//
// A team takes one strip after another. Each of its blocks holds one split of the strip in shared memory, and finds its
// part of the result there; the parts are exchanged, every block joins all of them in the same order, and applies what
// comes out to what it holds. Three sizes of team (TEAM) differ in nothing but the exchange:
//
//   block     a strip fits one block: nothing is exchanged
//   cluster   2 to 16 blocks, through distributed shared memory
//   grid      a share of the blocks of a cooperative launch, through global memory
//
// The grid has the teams in y and their blocks in x. A block has STAGES buffers: with two, the copies of the next strip
// are under way while this one is worked on. They are bulk copies (BULK), one for each row that a block's share
// touches, or copies that each thread makes for itself, which go everywhere: a thread then waits for no one else,
// because it only ever touches what it has copied.
#pragma once
#include "normalise.cuh"
#include "reduce.cuh"

// What TEAM can be.
#define TEAM_BLOCK 0
#define TEAM_CLUSTER 1
#define TEAM_GRID 2

// A block's shared memory: the mbarriers, TENSORS buffers per stage, the block's results for its peers in a cluster,
// the per-channel numbers, and the exchange of reduce.cuh. The host computes the same size.
template <int TENSORS, int ROWS>
struct Chip {
  enum { BARRIERS = 16 };  // bytes

  u8* memory;
  u32 vectors;  // of one tensor
  u32 channels;

  DEVICE Chip(u8* memory, const Tiling& tiling)
      : memory(memory), vectors((u32)tiling.share * (u32)tiling.width), channels((u32)tiling.strip_channels) {}

  DEVICE u64* barrier(u32 stage) const { return (u64*)memory + stage; }
  DEVICE Element* buffer(u32 stage, u32 tensor) const {
    return (Element*)(memory + BARRIERS) + (Index)(stage * TENSORS + tensor) * vectors * VECTOR;
  }
  DEVICE u8* behind_buffers() const {
    const u32 bytes = STAGES * TENSORS * vectors * (u32)sizeof(Pack);
    return memory + BARRIERS + (bytes + 15) / 16 * 16;
  }
  DEVICE u64* peer_weight() const { return (u64*)behind_buffers(); }
  DEVICE Real* peer_first() const { return (Real*)(peer_weight() + channels); }
  DEVICE Real* peer_second() const { return peer_first() + channels; }
  DEVICE Staged staged() const {
    const Staged staged = {TEAM == TEAM_CLUSTER ? peer_second() + channels : (Real*)behind_buffers(), channels};
    return staged;
  }
  DEVICE Exchange exchange() const { return Exchange((u8*)(staged().memory + ROWS * channels)); }
};

// What the thread owns of a vector on chip; the other lanes are zero.
DEVICE Pack take(const Element* buffer, const Span& span) {
  if (owns_any(span)) return load_shared<VECTOR>(buffer + (Index)span.place * VECTOR);
  Pack pack;
#pragma unroll
  for (int e = 0; e < VECTOR; e++) pack.lane[e] = Element();
  return pack;
}

#if BULK

DEVICE void start_barriers(u64* first) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) mbarrier_init(first + stage, 1);
  }
  block_barrier();
}

// The rows that a share touches, each with the piece of it that belongs to the share.
struct Piece {
  Index from;    // in the share, in vectors
  Index offset;  // of its first element
  u32 bytes;     // 0: there is no such row
};

DEVICE Piece piece_of_row(const Tiling& tiling, const Task& task, const Share& share, Index number) {
  Piece piece = {0, 0, 0};
#if WALK_COLUMNS
  const Index row = share.begin + number, width = (Index)tiling.width, left = (Index)tiling.slots - task.strip * width;
  if (row >= share.end) return piece;
  piece.from = number * width;
  piece.offset = row * (Index)tiling.stride + task.strip * width * VECTOR;
  piece.bytes = (u32)((left < width ? left : width) * sizeof(Pack));
#else
  const Index slots = (Index)tiling.slots, row = share.begin / slots + number;
  const Index begin = row * slots > share.begin ? row * slots : share.begin;
  const Index end = (row + 1) * slots < share.end ? (row + 1) * slots : share.end;
  if (begin >= end) return piece;
  piece.from = begin - share.begin;
  piece.offset = row * (Index)tiling.stride + task.channel * (Index)tiling.inner + (begin - row * slots) * VECTOR;
  piece.bytes = (u32)((end - begin) * sizeof(Pack));
#endif
  return piece;
}

// Bytes of one tensor's share.
DEVICE u32 share_bytes(const Tiling& tiling, const Task& task, const Share& share) {
#if WALK_COLUMNS
  const Index width = (Index)tiling.width, left = (Index)tiling.slots - task.strip * width;
  return (u32)((share.end - share.begin) * (left < width ? left : width) * sizeof(Pack));
#else
  return (u32)((share.end - share.begin) * sizeof(Pack));
#endif
}

// Starts the copies of a task into a stage that nobody uses any more. All threads of the block call it.
template <int TENSORS, int ROWS>
DEVICE void start_copies(const Chip<TENSORS, ROWS>& chip, const Tiling& tiling, const Task& task,
                         const Element* const (&tensors)[TENSORS], u32 stage) {
  const Share share(tiling, task);
  u64* const barrier = chip.barrier(stage);
  if (threadIdx.x == 0) mbarrier_arrive(barrier, TENSORS * share_bytes(tiling, task, share));
  // A warp starts its copies one after another, so all warps share them.
  for (Index number = threadIdx.x / WARP + threadIdx.x % WARP * (THREADS / WARP);; number += THREADS) {
    const Piece piece = piece_of_row(tiling, task, share, number);
    if (piece.bytes == 0) break;
#pragma unroll
    for (int tensor = 0; tensor < TENSORS; tensor++)
      bulk_copy(chip.buffer(stage, tensor) + piece.from * VECTOR, tensors[tensor] + piece.offset, piece.bytes, barrier);
  }
}
DEVICE void start_no_copies() {}
template <int TENSORS, int ROWS>
DEVICE void await_copies(const Chip<TENSORS, ROWS>& chip, u32 stage, u32 lap) {
  mbarrier_wait(chip.barrier(stage), lap / STAGES % 2);
}
// What the threads wrote to a stage lies before the copies that come there next.
DEVICE void release_stage() { bulk_fence(); }

#else

DEVICE void start_barriers(u64*) {}

template <int TENSORS, int ROWS>
DEVICE void start_copies(const Chip<TENSORS, ROWS>& chip, const Tiling& tiling, const Task& task,
                         const Element* const (&tensors)[TENSORS], u32 stage) {
  Walk walk(tiling, task, tensors[0]);
  while (!walk.done()) {
    const Span span = walk.next();
    if (!owns_any(span)) continue;
#pragma unroll
    for (int tensor = 0; tensor < TENSORS; tensor++) {
      Element* const to = chip.buffer(stage, tensor) + (Index)span.place * VECTOR;
      if (owns_all(span))
        copy_async<VECTOR>(to, tensors[tensor] + span.offset);
      else
        store_shared<VECTOR>(to, load_span<LastUse>(tensors[tensor], span));
    }
  }
  copy_commit();
}
// Keeps the count of groups where there is no further strip.
DEVICE void start_no_copies() { copy_commit(); }
template <int TENSORS, int ROWS>
DEVICE void await_copies(const Chip<TENSORS, ROWS>&, u32, u32) {
  copy_wait<STAGES - 1>();
}
DEVICE void release_stage() {}

#endif

// From the states of the threads of all blocks of a team to `finish(channel of the strip, state)`, which every block
// calls once per channel, with the same state. All threads of the team call it; what finish wrote is seen afterwards.
template <class State, int TENSORS, int ROWS, class Finish>
DEVICE void reduce_over_team(const Chip<TENSORS, ROWS>& chip, const Tiling& tiling, const Task& task,
                             const State (&states)[LANES], const Partials& partials, u32 lap, Finish finish) {
  const Exchange exchange = chip.exchange();
  exchange.put(states);
  block_barrier();
#if TEAM == TEAM_BLOCK
  join_threads<State>(tiling, task, exchange, finish);
#elif TEAM == TEAM_CLUSTER
  u64* const weight = chip.peer_weight();
  Real *const first = chip.peer_first(), *const second = chip.peer_second();
  // The peers have read what this block left for them of the strip before.
  if (lap > 0) cluster_wait();
  join_threads<State>(tiling, task, exchange, [&](u32 channel, const State& state) {
    weight[channel] = state.weight();
    first[channel] = state.first();
    second[channel] = state.second();
  });
  cluster_barrier();
  const auto get = [&](u32 rank, u32 channel) {
    return State::from(load_remote<1>(remote(weight, rank), channel).lane[0],
                       load_remote<1>(remote(first, rank), channel).lane[0],
                       load_remote<1>(remote(second, rank), channel).lane[0]);
  };
  join<State>(tiling, task, CLUSTER, get, finish);
  cluster_arrive();
#else
  const Index total = (Index)tiling.splits;  // the place behind those of the splits
  u32* const ready = partials.ready + task.strip;
  if (put_down_last<State>(tiling, task, partials, exchange)) {
    join_splits<State>(tiling, task, partials, [&](u32 channel, const State& state) {
      put_split(tiling, task, partials, total, channel, state);
    });
    block_barrier();
    if (threadIdx.x == 0) {
      store_one(partials.arrived + task.strip, 0u);
      arrive(ready);
    }
  }
  if (threadIdx.x == 0) await_arrivals(ready, 1);
  block_barrier();
  for (u32 channel = threadIdx.x; channel < task.channels; channel += THREADS)
    finish(channel, get_split<State>(tiling, task, partials, total, channel));
  block_barrier();
  // The total and every block have been counted: the last one makes the counter ready for the next launch.
  if (threadIdx.x == 0 && arrive(ready) == (u32)tiling.splits) store_one(ready, 0u);
#endif
  block_barrier();
}

// A block stays until its peers have read what it left for them.
DEVICE void leave_team(u32 laps) {
#if TEAM == TEAM_CLUSTER
  if (laps > 0) cluster_wait();
#endif
}

// Takes a team through its strips: `begin(task)` before the strip's values have come, `work(task, stage, lap)` once
// they have.
template <int TENSORS, int ROWS, class Begin, class Work>
DEVICE void for_each_strip(const Chip<TENSORS, ROWS>& chip, const Tiling& tiling,
                           const Element* const (&tensors)[TENSORS], Begin begin, Work work) {
  const Index strips = (Index)tiling.strips, teams = gridDim.y, split = TEAM == TEAM_BLOCK ? 0 : blockIdx.x;
  Index strip = blockIdx.y;
  start_barriers(chip.barrier(0));
  if (strip < strips) start_copies(chip, tiling, Task(tiling, strip, split), tensors, 0);
  u32 lap = 0;
  for (; strip < strips; strip += teams, lap++) {
    const Task task(tiling, strip, split);
    const u32 stage = lap % STAGES;
    const bool more = strip + teams < strips;
    if (STAGES == 2 && more) start_copies(chip, tiling, Task(tiling, strip + teams, split), tensors, 1 - stage);
    if (STAGES == 2 && !more) start_no_copies();
    begin(task);
    await_copies(chip, stage, lap);
    work(task, stage, lap);
    release_stage();
    block_barrier();
    if (STAGES == 1 && more) start_copies(chip, tiling, Task(tiling, strip + teams, split), tensors, 0);
  }
  leave_team(lap);
}
