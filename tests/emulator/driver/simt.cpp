// Makes gangs of threads, runs them, and tells of their faults and deadlocks.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>
#include <utility>

#include "gang.h"

__thread Thread* current_thread = nullptr;

namespace {

const size_t SHARED_ALIGNMENT = 16;  // all that shared_memory() promises
const size_t SHARED_MARGIN = 256;    // between the shared memory of two blocks
const unsigned char POISON = 0xff;

std::atomic<bool> portable_fibers{false};

// Gangs are kept for the next launch: their stacks are large.
class GangPool {
 public:
  std::unique_ptr<Gang> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Gang>();
    std::unique_ptr<Gang> gang = std::move(idle_.back());
    idle_.pop_back();
    return gang;
  }
  void put_back(std::unique_ptr<Gang> gang) {
    if (gang->threads.size() > LARGEST_KEPT) return;  // of a large cooperative launch: more memory than it is worth
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() < KEPT) idle_.push_back(std::move(gang));
  }

 private:
  static const size_t KEPT = 16;
  static const size_t LARGEST_KEPT = 16384;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Gang>> idle_;
};

// Never destroyed: a launch may still be running while the process ends.
GangPool& gang_pool() {
  static GangPool* pool = new GangPool;
  return *pool;
}

void fail(LaunchState& state, CUresult status, std::string message) {
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.failed.exchange(true)) return;  // the first fault is the one that counts
  state.outcome.status = status;
  state.outcome.fault = std::move(message);
}

std::string text_of(StandInPlace place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string text_of(StandInIndex index) {
  char text[48];
  snprintf(text, sizeof text, "(%u,%u,%u)", index.x, index.y, index.z);
  return text;
}

const char* text_of(State state) {
  switch (state) {
    case State::READY:
      return "can run";
    case State::AT_WARP_OPERATION:
      return "at a shuffle, ballot or warp barrier";
    case State::AT_BLOCK_BARRIER:
      return "at a block barrier";
    case State::AT_CLUSTER_WAIT:
      return "waiting for the cluster";
    case State::AT_GRID_BARRIER:
      return "at a grid barrier";
    case State::AT_MBARRIER:
      return "waiting for an mbarrier";
    case State::AT_COUNTER:
      return "waiting for arrivals at a counter";
    case State::EXITED:
      return "exited";
  }
  return "";
}

std::string describe(const Thread& thread, Origin origin, const char* what) {
  const KernelLaunch& launch = thread.gang->launch();
  std::string line;
  if (origin.instruction) {
    line = launch.image->line_of(origin.instruction);
  } else if (origin.place.line) {
    line = text_of(origin.place);
  }
  return std::string("kernel ") + launch.kernel->name + (line.empty() ? "" : " at " + line) + ": block " +
         text_of(thread.block->index) + ", thread " + text_of(thread.index) + ": " + what;
}

// The last thread of a block is about to exit, and the block's shared memory with it.
void check_visitors(Thread& thread) {
  const Block& block = *thread.block;
  if (!block.visitor || std::max(block.cluster_waits, thread.cluster_waits) >= block.visitor_leaves) return;
  const StandInIndex visitor = block.visitor->block->index, index = block.visitor->index;
  fault(thread, CUDA_ERROR_LAUNCH_FAILED, at({"", 0}),
        "the block exits without a cluster barrier since block (%u,%u,%u), thread (%u,%u,%u) accessed its shared "
        "memory: it may exit before that",
        visitor.x, visitor.y, visitor.z, index.x, index.y, index.z);
}

// The body of every fiber.
void run_thread(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  Gang& gang = *thread.gang;
  gang.launch().kernel->run(gang.launch().arguments);
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at({"", 0}), "the thread exits between cluster_arrive and cluster_wait");
  }
  thread.state = State::EXITED;
  Block& block = *thread.block;
  if (++block.exited == block.threads) check_visitors(thread);
  gang.leave(thread);
}

// The mixing function of SplitMix64.
uint64_t mix(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return bits ^ bits >> 31;
}

// Which cluster of the grid is the one begun after so many others: in a random schedule, steps through the grid that
// meet every cluster once, because their width and the number of clusters have no common factor.
uint64_t shuffle(const KernelLaunch& launch, uint64_t number) {
  if (!launch.shuffled) return number;
  const uint64_t count = launch.grid.count() / launch.cluster.count();
  uint64_t step = 1 + mix(launch.seed) % count;
  while (std::gcd(step, count) != 1) step = step % count + 1;
  return (number % count * step + mix(launch.seed + 1)) % count;
}

StandInIndex index_of(uint64_t number, Extent3 extent) {
  return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y), unsigned(number / extent.x / extent.y)};
}

}  // namespace

void use_portable_fibers(bool portable) { portable_fibers = portable; }

void fault(Thread& thread, CUresult status, Origin origin, const char* format, ...) {
  char what[600];
  va_list list;
  va_start(list, format);
  vsnprintf(what, sizeof what, format, list);
  va_end(list);
  fail(*thread.gang->state, status, describe(thread, origin, what));
  thread.gang->leave(thread);  // to run(), for next() offers no thread any more: this one never comes back
  __builtin_unreachable();
}

Gang::~Gang() {
  if (stacks_) munmap(stacks_, stacks_bytes_);
}

bool Gang::prepare(LaunchState& launch_state, unsigned block_count) {
  state = &launch_state;
  const KernelLaunch& launch = launch_state.launch;
  const unsigned block_threads = unsigned(launch.block.count());
  const unsigned warps_per_block = (block_threads + WARP_LANES - 1) / WARP_LANES;
  const unsigned cluster_blocks = unsigned(launch.cluster.count());
  const size_t thread_count = size_t(block_threads) * block_count;

  threads.resize(thread_count);
  warps.resize(size_t(warps_per_block) * block_count);
  blocks.resize(block_count);
  clusters.resize(block_count / cluster_blocks);
  ready_.resize(thread_count);

  const size_t stacks_needed = STACK_SLACK + thread_count * STACK_STRIDE;
  if (stacks_needed > stacks_bytes_) {
    if (stacks_) munmap(stacks_, stacks_bytes_);
    void* mapped =
        mmap(nullptr, stacks_needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks_bytes_ = 0;
    stacks_ = nullptr;
    if (mapped == MAP_FAILED) return false;
    stacks_ = static_cast<char*>(mapped);
    stacks_bytes_ = stacks_needed;
  }
  // Aligned to no more than what is promised, so that a kernel that counts on more is found out; and with a margin, so
  // that what runs over the end of it is seen to have run over the end of it.
  const size_t unit = 2 * SHARED_ALIGNMENT;
  shared_stride = (launch.shared_bytes + SHARED_MARGIN + unit - 1) / unit * unit;
  shared_.resize(shared_stride * block_count + 2 * unit);
  const uintptr_t raw = reinterpret_cast<uintptr_t>(shared_.data());
  shared_begin = shared_.data() + ((raw + unit - 1) / unit * unit - raw) + SHARED_ALIGNMENT;

  for (size_t i = 0; i < thread_count; i++) {
    Thread& thread = threads[i];
    thread.gang = this;
    thread.block = &blocks[i / block_threads];
    thread.number = unsigned(i % block_threads);
    thread.index = index_of(thread.number, launch.block);
    thread.warp = &warps[i / block_threads * warps_per_block + thread.number / WARP_LANES];
    thread.lane = thread.number % WARP_LANES;
    thread.stack = stacks_ + STACK_SLACK + i * STACK_STRIDE;
  }
  for (size_t i = 0; i < warps.size(); i++) {
    const unsigned number = unsigned(i % warps_per_block) * WARP_LANES;
    warps[i].first = &threads[i / warps_per_block * block_threads + number];
    warps[i].lanes = std::min(block_threads - number, unsigned(WARP_LANES));
  }
  for (unsigned i = 0; i < block_count; i++) {
    Block& block = blocks[i];
    block.first = &threads[size_t(i) * block_threads];
    block.threads = block_threads;
    block.shared = shared_begin + i * shared_stride;
    block.cluster = &clusters[i / cluster_blocks];
    block.rank = i % cluster_blocks;
  }
  for (size_t i = 0; i < clusters.size(); i++) {
    clusters[i].first = &threads[i * cluster_blocks * block_threads];
    clusters[i].threads = cluster_blocks * block_threads;
    clusters[i].blocks = cluster_blocks;
  }
  std::fill(std::begin(recent_ranges), std::end(recent_ranges), AddressRange{0, 0, false, nullptr});
  bytes_loaded = bytes_stored = sectors_loaded = sectors_stored = 0;
  shared_cells.resize((shared_stride * block_count + GRANULE - 1) / GRANULE);
  shared_written.resize(shared_cells.size());
  last_file = nullptr;
  shuffled = launch.shuffled;
  for (Warp& warp : warps) {
    warp.loads.clear();
    warp.stores.clear();
  }
  return true;
}

StandInIndex Gang::block_index(uint64_t number) const {
  const KernelLaunch& launch = state->launch;
  const Extent3 clusters_of_grid = {launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                                    launch.grid.z / launch.cluster.z};
  const uint64_t of_cluster = launch.cluster.count();
  const StandInIndex cluster = index_of(shuffle(launch, number / of_cluster), clusters_of_grid);
  const StandInIndex inside = index_of(number % of_cluster, launch.cluster);
  return {cluster.x * launch.cluster.x + inside.x, cluster.y * launch.cluster.y + inside.y,
          cluster.z * launch.cluster.z + inside.z};
}

// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t Gang::random() {
  random_state += 0x9e3779b97f4a7c15u;
  return mix(random_state);
}

void Gang::maybe_pre_empt(Thread& thread) {
  const uint64_t ONE_IN = 32;
  if (random() % ONE_IN) return;
  make_ready(thread);
  leave(thread);
}

void Gang::start_blocks(uint64_t first) {
  const unsigned block_threads = blocks[0].threads;
  const Stamp launch_stamp = Stamp(state->launch.number) << STAMP_LAUNCH_BIT;
  first_block = first;
  grid_clock = 0;
  random_state = mix(state->launch.seed ^ mix(first_block));
  for (size_t i = 0; i < blocks.size(); i++) {
    Block& block = blocks[i];
    block.number = uint32_t(first_block + i);
    block.index = block_index(block.number);
    block.exited = block.at_barrier = 0;
    block.barrier_clock = block.cluster_waits = 0;
    block.acquired.clear();
    block.visitor = nullptr;
    block.visitor_leaves = 0;
  }
  for (Warp& warp : warps) {
    warp.meetings.clear();
    warp.known.clear();
    warp.loads.meet();
    warp.stores.meet();
  }
  for (Cluster& cluster : clusters) cluster.arrived = cluster.phase = 0;
  grid_arrived = 0;
  mbarriers.clear();
  copies.clear();
  counter_waiters.clear();
  memset(shared_begin, POISON, shared_stride * blocks.size());
  std::fill(shared_cells.begin(), shared_cells.end(), SharedCell{});
  std::fill(shared_written.begin(), shared_written.end(), 0);
  ready_first_ = ready_count_ = 0;
  for (Thread& thread : threads) {
    const uint64_t number = uint64_t(thread.block->number) * block_threads + thread.number;
    // Of the largest launches, threads beyond what a stamp can name make accesses without stamps.
    const Stamp clock = number < STAMP_THREADS ? 0 : STAMP_LAST_CLOCK;
    thread.stamp = launch_stamp | (number % STAMP_THREADS) << STAMP_THREAD_BIT | clock << STAMP_CLOCK_BIT;
    thread.cluster_arrivals = thread.cluster_waits = 0;
    std::fill(std::begin(thread.arrival_clocks), std::end(thread.arrival_clocks), 0);
    thread.acquired.clear();
    thread.copies.clear();
    thread.copy_group = 0;
    thread.bulk_fence = 0;
    fiber_start(thread.fiber, thread.stack, STACK_BYTES, run_thread, &thread, state->portable_fibers);
    make_ready(thread);
  }
}

void Gang::make_ready(Thread& thread) {
  thread.state = State::READY;
  size_t slot = ready_first_ + ready_count_++;
  if (slot >= ready_.size()) slot -= ready_.size();
  ready_[slot] = &thread;
}

// The order in which threads run is decided here and nowhere else: first come, first served, or anybody. Where it is
// anybody, a bulk copy may end at any time.
Thread* Gang::next() {
  if (shuffled && !copies.empty()) {
    const uint64_t ONE_IN = 64;
    if (random() % ONE_IN == 0) finish_copy(random() % copies.size());
  }
  if (ready_count_ == 0 || state->failed.load(std::memory_order_relaxed)) return nullptr;
  if (shuffled) {
    size_t chosen = ready_first_ + random() % ready_count_;
    if (chosen >= ready_.size()) chosen -= ready_.size();
    std::swap(ready_[chosen], ready_[ready_first_]);
  }
  Thread* thread = ready_[ready_first_];
  if (++ready_first_ == ready_.size()) ready_first_ = 0;
  ready_count_--;
  return thread;
}

void Gang::wait(Thread& thread, State why, StandInPlace place) {
  thread.state = why;
  thread.place = place;
  leave(thread);
}

void Gang::leave(Thread& thread) {
  Thread* successor = next();
  if (successor == &thread) return;
  current_thread = successor;
  fiber_switch(thread.fiber, successor ? successor->fiber : home_, state->portable_fibers);
}

void Gang::run(uint64_t first) {
  start_blocks(first);
  for (;;) {
    if (Thread* thread = next()) {
      current_thread = thread;
      fiber_switch(home_, thread->fiber, state->portable_fibers);
      continue;
    }
    if (state->failed) return;
    // Nobody can go on. A bulk copy ends now, as late as it may: who did not wait for it has read poison by then.
    if (copies.empty()) break;
    finish_copy(shuffled ? random() % copies.size() : 0);
  }
  const bool finished = std::all_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.exited == b.threads; });
  if (!finished) report_deadlock();
}

void Gang::finish_copy(size_t which) {
  const BulkCopy copy = copies[which];
  copies.erase(copies.begin() + ptrdiff_t(which));
  memcpy(copy.to, copy.from, copy.bytes);
  end_copy(*this, size_t(copy.to - shared_begin), copy.bytes);
  Mbarrier& barrier = mbarriers.at(copy.barrier);
  barrier.missing_bytes -= copy.bytes;
  finish_phase(*this, barrier);
}

void Gang::report_deadlock() {
  const Block* stuck = nullptr;
  std::map<std::string, unsigned> counts;
  for (const Thread& thread : threads) {
    if (thread.state != State::EXITED && !stuck) stuck = thread.block;
  }
  for (const Thread& thread : threads) {
    if (thread.block->cluster != stuck->cluster && !launch().cooperative) continue;
    std::string what = text_of(thread.state);
    if (thread.state != State::EXITED) what += " (" + text_of(thread.place) + ")";
    counts[what]++;
  }
  std::string message =
      std::string("kernel ") + launch().kernel->name + ": deadlock in block " + text_of(stuck->index) + ":";
  const char* separator = " ";
  for (const auto& entry : counts) {
    message += separator + std::to_string(entry.second) + " threads " + entry.first;
    separator = ", ";
  }
  fail(*state, CUDA_ERROR_LAUNCH_TIMEOUT, std::move(message));
}

KernelOutcome run_kernel(const KernelLaunch& launch) {
  LaunchState state{launch, portable_fibers || !HAVE_NATIVE_FIBERS, {}, {}, {}, {}, {}};
  const uint64_t block_count = launch.grid.count();
  const uint64_t cluster_blocks = launch.cluster.count();
  // In a random schedule several clusters run at the same time, in each other's midst.
  const uint64_t clusters_at_once =
      launch.shuffled ? std::min(1 + mix(launch.seed + 2) % 4, block_count / cluster_blocks) : 1;
  const uint64_t gang_blocks = launch.cooperative ? block_count : cluster_blocks * clusters_at_once;
  const uint64_t gang_count = (block_count + gang_blocks - 1) / gang_blocks;
  std::atomic<uint64_t> next_gang{0};

  const auto work = [&] {
    std::unique_ptr<Gang> gang = gang_pool().take();
    uint64_t prepared = 0;  // blocks: the last gang may have fewer than the others
    for (uint64_t i; (i = next_gang++) < gang_count && !state.failed;) {
      const uint64_t blocks = std::min(gang_blocks, block_count - i * gang_blocks);
      if (blocks != prepared && !gang->prepare(state, unsigned(blocks))) {
        fail(state, CUDA_ERROR_OUT_OF_MEMORY, "the host has no memory for the stacks of this launch");
        break;
      }
      prepared = blocks;
      gang->run(i * gang_blocks);
      current_thread = nullptr;
      std::lock_guard<std::mutex> lock(state.mutex);
      state.outcome.bytes_loaded += std::exchange(gang->bytes_loaded, 0);
      state.outcome.bytes_stored += std::exchange(gang->bytes_stored, 0);
      state.outcome.sectors_loaded += std::exchange(gang->sectors_loaded, 0);
      state.outcome.sectors_stored += std::exchange(gang->sectors_stored, 0);
    }
    gang_pool().put_back(std::move(gang));
  };

  // Starting a thread of the host costs about as much as running a small block. A random schedule is one that comes
  // again with its seed: on one thread.
  const uint64_t THREADS_WORTH_A_HELPER = 4096;
  const uint64_t most_helpers = launch.shuffled ? 0 : std::max(1u, std::thread::hardware_concurrency()) - 1;
  const uint64_t helpers =
      std::min({most_helpers, gang_count - 1, block_count * launch.block.count() / THREADS_WORTH_A_HELPER});
  std::vector<std::thread> team;
  for (uint64_t i = 0; i < helpers; i++) team.emplace_back(work);
  work();
  for (std::thread& helper : team) helper.join();
  return std::move(state.outcome);
}
