// The state of threads, warps, blocks and clusters that live at the same time, and the scheduler that switches between
// them. simt.cpp makes and runs gangs; access.cpp and barriers.cpp carry out what their threads ask for.
#pragma once

#include <atomic>
#include <cstdarg>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "coalescing.h"
#include "fiber.h"
#include "order.h"
#include "shadow.h"
#include "simt.h"

enum { WARP_LANES = 32 };

enum class State : uint8_t {
  READY,
  AT_WARP_OPERATION,
  AT_BLOCK_BARRIER,
  AT_CLUSTER_WAIT,
  AT_GRID_BARRIER,
  AT_MBARRIER,
  AT_COUNTER,
  EXITED,
};

struct Gang;
struct Thread;

struct WarpRequest {
  StandInWarpOperation operation;
  unsigned mask;
  StandInBits value;
  unsigned operand;
};

struct Warp {
  // Lanes that wait for each other; more than one such group only where the warp has diverged.
  struct Meeting {
    unsigned mask, arrived;
  };
  Thread* first;
  unsigned lanes;
  std::vector<Meeting> meetings;
  // [lane][other]: the other lane's clock when both last met at a warp barrier; empty before any.
  std::vector<uint32_t> known;
  WarpTraffic loads, stores;
};

struct Cluster {
  Thread* first;
  unsigned threads, blocks;
  unsigned arrived;
  unsigned phase;
};

struct Block {
  StandInIndex index;
  unsigned rank;  // in the cluster
  Thread* first;
  unsigned threads;
  unsigned exited;
  unsigned at_barrier;
  StandInPlace barrier_place;
  unsigned char* shared;
  Cluster* cluster;
  uint32_t number;         // in the launch, in the order in which blocks are begun
  uint32_t barrier_clock;  // everybody's at the last block barrier
  unsigned cluster_waits;  // most of any thread before the last block barrier
  Knowledge acquired;      // of any thread before the last block barrier
  // Who of another block accessed this one's shared memory last, and the cluster barrier after which that is over.
  const Thread* visitor;
  unsigned visitor_leaves;
};

// A thread's own copy into shared memory, which ends when the thread waits for its group.
struct ThreadCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  unsigned group;
};

struct Thread {
  Fiber fiber;
  Gang* gang;
  Block* block;
  Warp* warp;
  StandInIndex index;
  unsigned number;  // in the block
  unsigned lane;
  State state;
  StandInPlace place;  // where it waits
  WarpRequest request;
  StandInBits result;
  unsigned cluster_arrivals, cluster_waits;
  unsigned* grid_counter;
  char* stack;
  Stamp stamp;  // of an access made now, without the bytes
  // The clock after arriving at the cluster's barrier, for the last phases: no thread is more than two behind another.
  enum : unsigned { PHASES = 4 };
  uint32_t arrival_clocks[PHASES];
  Knowledge acquired;  // since the last block barrier
  std::vector<ThreadCopy> copies;
  unsigned copy_group;  // of the copies that are started now
  uint32_t bulk_fence;  // clock from which on what it stores is not fenced off from bulk copies
};

// An mbarrier's true state: the eight bytes in shared memory only stand for it.
struct Mbarrier {
  unsigned arrivals, pending;
  int64_t missing_bytes;
  unsigned phase;
  std::vector<Thread*> waiters;
  Knowledge released;  // what those who arrived have done
};

struct BulkCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  uintptr_t barrier;
};

// A place in the source: a line or, for accesses that the compiler reported, an instruction.
struct Origin {
  StandInPlace place;
  const void* instruction;
};

// What the gangs of a launch share.
struct LaunchState {
  const KernelLaunch& launch;
  bool portable_fibers;
  std::atomic<bool> failed{false};
  std::mutex mutex;  // guards outcome, counters, files
  KernelOutcome outcome;
  std::unordered_map<uintptr_t, Knowledge> counters;  // what those have done who arrived at them
  std::vector<const char*> files;                     // of the places below
};

// The source line of an access, or the instruction where the compiler reported it, in four bytes.
PlaceCode code_of(Gang& gang, const Origin& origin);

struct Gang {
  Gang() = default;
  ~Gang();
  Gang(const Gang&) = delete;
  Gang& operator=(const Gang&) = delete;

  // Takes up a launch with so many blocks at a time; false if the host has no memory for them.
  bool prepare(LaunchState& state, unsigned block_count);
  // Runs the blocks from this one on to their end, or to a fault.
  void run(uint64_t first);

  const KernelLaunch& launch() const { return state->launch; }
  void make_ready(Thread& thread);
  // Waits until somebody makes the thread ready again.
  void wait(Thread& thread, State why, StandInPlace place);
  // Leaves the thread for the next one that is ready, or for run() if none is.
  void leave(Thread& thread);

  LaunchState* state = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  unsigned grid_arrived = 0;
  std::unordered_map<uintptr_t, Mbarrier> mbarriers;
  std::deque<BulkCopy> copies;  // the first to start is the first to end, unless schedules are random
  std::unordered_map<uintptr_t, std::vector<Thread*>> counter_waiters;  // by the counter's address
  unsigned char* shared_begin = nullptr;
  size_t shared_stride = 0;
  // Allocations that were accessed lately, in no order: a kernel has few of them.
  enum { RECENT_RANGES = 4 };
  AddressRange recent_ranges[RECENT_RANGES] = {};
  unsigned oldest_range = 0;
  uint64_t bytes_loaded = 0;
  uint64_t bytes_stored = 0;
  uint64_t sectors_loaded = 0;
  uint64_t sectors_stored = 0;

  // What the checks of order know about the shared memory of all blocks.
  struct SharedCell {
    Stamp store, load, other_load;  // the last store, and the last loads of two threads since
    PlaceCode store_place, load_place, other_load_place;
  };
  std::vector<SharedCell> shared_cells;       // one for each granule
  std::vector<unsigned char> shared_written;  // the bytes of each granule that were ever written
  uint64_t first_block = 0;                   // number in the launch of blocks[0]
  uint32_t grid_clock = 0;                    // everybody's at the last grid barrier
  const char* last_file = nullptr;            // that code_of looked up, with its number
  uint32_t last_file_number = 0;

  // Random schedules: whether this is one, and the state of its generator.
  bool shuffled = false;
  uint64_t random_state = 0;
  uint64_t random();
  // Lets another thread run, now and then.
  void maybe_pre_empt(Thread& thread);
  // Index in the grid of the block with this number in the launch.
  StandInIndex block_index(uint64_t number) const;
  void finish_copy(size_t which);

 private:
  Thread* next();
  void start_blocks(uint64_t first);
  void report_deadlock();

  Fiber home_;                  // run()'s own
  std::vector<Thread*> ready_;  // a ring with room for every thread
  size_t ready_first_ = 0, ready_count_ = 0;
  char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  std::vector<unsigned char> shared_;
};

// The CUDA thread that this thread of the host runs, if any. Every access of a kernel asks for it: hence __thread, for
// whose kind of variable the compiler need not suspect an initialiser.
extern __thread Thread* current_thread __attribute__((tls_model("initial-exec")));

enum : size_t {
  STACK_BYTES = 64 << 10,
  // Stacks are an odd number of cache lines apart: their tops would otherwise all fall into one set of the cache.
  STACK_STRIDE = STACK_BYTES + 9 * 64,
  // Below the lowest stack: a thread that needs too much is found out at its next access, on memory that is there.
  STACK_SLACK = 1 << 20,
};

// Ends the launch for what this thread did.
[[noreturn]] void fault(Thread& thread, CUresult status, Origin origin, const char* format, ...)
    __attribute__((format(printf, 4, 5), cold));
inline Origin at(StandInPlace place) { return {place, nullptr}; }

// A new phase of the barrier begins if nothing is missing to the end of this one.
void finish_phase(Gang& gang, Mbarrier& barrier);

// ---- races.cpp -----------------------------------------------------------------------------------------------------

enum class Direction { LOAD, STORE };
inline const char* verb(Direction direction) { return direction == Direction::LOAD ? "load" : "store"; }

// The access must not be able to meet another one, and must not load what nobody wrote. Global memory by its range,
// shared memory by its offset in that of all blocks of the gang.
void check_global_order(Thread& thread, const AddressRange& range, uintptr_t address, size_t bytes, Direction direction,
                        Origin origin, bool atomic = false);
void check_shared_order(Thread& thread, size_t offset, size_t bytes, Direction direction, Origin origin);
// A copy into shared memory begins or ends.
void begin_copy(Thread& thread, size_t offset, size_t bytes, Origin origin);
void end_copy(Gang& gang, size_t offset, size_t bytes);
// What threads stored there must have been fenced off before a bulk copy may come.
void check_bulk_fence(Thread& thread, size_t offset, size_t bytes, Origin origin);

// The thread's clock moves on: what it did so far is told apart from what it does next.
inline uint32_t tick(Thread& thread) {
  if (clock_of(thread.stamp) != STAMP_LAST_CLOCK) thread.stamp += Stamp(1) << STAMP_CLOCK_BIT;
  return clock_of(thread.stamp);
}
// Threads [first, first + count) that the mask names have met. Gives the clock that all of them have now.
uint32_t meet(Thread* first, unsigned count, unsigned mask = ~0u);
// What a thread shows to whoever acquires it later: everything it has done or knows of.
void release(Thread& thread, Knowledge& into);
// Both halves of an arrival at a counter in global memory, with the counting in between.
unsigned arrive_in_order(Thread& thread, unsigned* counter);
// From now on the thread knows what all have done who arrived at the counter.
void acquire_counter(Thread& thread, const unsigned* counter);
