// The state of threads, warps, blocks and clusters that live at the same time, and the scheduler that switches between
// them. simt.cpp makes and runs gangs; access.cpp and barriers.cpp carry out what their threads ask for.
#pragma once

#include <atomic>
#include <cstdarg>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "simt.h"

enum { WARP_LANES = 32 };

enum class State : uint8_t {
  READY,
  AT_WARP_OPERATION,
  AT_BLOCK_BARRIER,
  AT_CLUSTER_WAIT,
  AT_GRID_BARRIER,
  AT_MBARRIER,
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
};

// An mbarrier's true state: the eight bytes in shared memory only stand for it.
struct Mbarrier {
  unsigned arrivals, pending;
  int64_t missing_bytes;
  unsigned phase;
  std::vector<Thread*> waiters;
};

struct BulkCopy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  uintptr_t barrier;
};

// What the gangs of a launch share.
struct LaunchState {
  const KernelLaunch& launch;
  bool portable_fibers;
  std::atomic<bool> failed{false};
  std::mutex mutex;  // guards outcome
  KernelOutcome outcome;
};

struct Gang {
  Gang() = default;
  ~Gang();
  Gang(const Gang&) = delete;
  Gang& operator=(const Gang&) = delete;

  // Takes up a launch with so many blocks at a time; false if the host has no memory for them.
  bool prepare(LaunchState& state, unsigned block_count);
  // Runs the blocks from this one on to their end, or to a fault.
  void run(uint64_t first_block);

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
  std::vector<BulkCopy> copies;
  unsigned char* shared_begin = nullptr;
  size_t shared_stride = 0;
  // Allocations that were accessed lately, in no order: a kernel has few of them.
  enum { RECENT_RANGES = 4 };
  AddressRange recent_ranges[RECENT_RANGES] = {};
  unsigned oldest_range = 0;
  uint64_t bytes_loaded = 0;
  uint64_t bytes_stored = 0;

 private:
  Thread* next();
  void start_blocks(uint64_t first_block);
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

// Ends the launch for what this thread did. The place is a source line or, for instrumented accesses, an instruction.
struct Origin {
  StandInPlace place;
  const void* instruction;
};
[[noreturn]] void fault(Thread& thread, CUresult status, Origin origin, const char* format, ...)
    __attribute__((format(printf, 4, 5), cold));
inline Origin at(StandInPlace place) { return {place, nullptr}; }

// A new phase of the barrier begins if nothing is missing to the end of this one.
void finish_phase(Gang& gang, Mbarrier& barrier);
