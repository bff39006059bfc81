// Makes gangs of threads, runs them, and tells of their faults and deadlocks.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <thread>

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

// The body of every fiber.
void run_thread(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  Gang& gang = *thread.gang;
  gang.launch().kernel->run(gang.launch().arguments);
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at({"", 0}), "the thread exits between cluster_arrive and cluster_wait");
  }
  thread.state = State::EXITED;
  thread.block->exited++;
  gang.leave(thread);
}

StandInIndex index_of(uint64_t number, Extent3 extent) {
  return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y), unsigned(number / extent.x / extent.y)};
}

}  // namespace

void use_portable_fibers(bool portable) { portable_fibers = portable; }

void fault(Thread& thread, CUresult status, Origin origin, const char* format, ...) {
  char what[400];
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
  std::fill(std::begin(recent_ranges), std::end(recent_ranges), AddressRange{0, 0, false});
  bytes_loaded = bytes_stored = 0;
  return true;
}

void Gang::start_blocks(uint64_t first_block) {
  const KernelLaunch& launch = state->launch;
  const Extent3 clusters_of_grid = {launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                                    launch.grid.z / launch.cluster.z};
  for (size_t i = 0; i < blocks.size(); i++) {
    Block& block = blocks[i];
    const StandInIndex cluster = index_of((first_block + i) / block.cluster->blocks, clusters_of_grid);
    const StandInIndex inside = index_of(block.rank, launch.cluster);
    block.index = {cluster.x * launch.cluster.x + inside.x, cluster.y * launch.cluster.y + inside.y,
                   cluster.z * launch.cluster.z + inside.z};
    block.exited = block.at_barrier = 0;
  }
  for (Warp& warp : warps) warp.meetings.clear();
  for (Cluster& cluster : clusters) cluster.arrived = cluster.phase = 0;
  grid_arrived = 0;
  mbarriers.clear();
  copies.clear();
  memset(shared_begin, POISON, shared_stride * blocks.size());
  ready_first_ = ready_count_ = 0;
  for (Thread& thread : threads) {
    thread.cluster_arrivals = thread.cluster_waits = 0;
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

// The order in which threads run is decided here and nowhere else: first come, first served.
Thread* Gang::next() {
  if (ready_count_ == 0 || state->failed.load(std::memory_order_relaxed)) return nullptr;
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

void Gang::run(uint64_t first_block) {
  start_blocks(first_block);
  for (;;) {
    if (Thread* thread = next()) {
      current_thread = thread;
      fiber_switch(home_, thread->fiber, state->portable_fibers);
      continue;
    }
    if (state->failed) return;
    // Nobody can go on. A bulk copy ends now, as late as it may: who did not wait for it has read poison by then.
    if (copies.empty()) break;
    const BulkCopy copy = copies.front();
    copies.erase(copies.begin());
    memcpy(copy.to, copy.from, copy.bytes);
    Mbarrier& barrier = mbarriers.at(copy.barrier);
    barrier.missing_bytes -= copy.bytes;
    finish_phase(*this, barrier);
  }
  const bool finished = std::all_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.exited == b.threads; });
  if (!finished) report_deadlock();
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
  LaunchState state{launch, portable_fibers || !HAVE_NATIVE_FIBERS, {}, {}, {}};
  const uint64_t block_count = launch.grid.count();
  const uint64_t gang_blocks = launch.cooperative ? block_count : launch.cluster.count();
  const uint64_t gang_count = block_count / gang_blocks;
  std::atomic<uint64_t> next_gang{0};

  const auto work = [&] {
    std::unique_ptr<Gang> gang = gang_pool().take();
    if (!gang->prepare(state, unsigned(gang_blocks))) {
      fail(state, CUDA_ERROR_OUT_OF_MEMORY, "the host has no memory for the stacks of this launch");
      return;
    }
    for (uint64_t i; (i = next_gang++) < gang_count && !state.failed;) gang->run(i * gang_blocks);
    current_thread = nullptr;
    {
      std::lock_guard<std::mutex> lock(state.mutex);
      state.outcome.bytes_loaded += gang->bytes_loaded;
      state.outcome.bytes_stored += gang->bytes_stored;
    }
    gang_pool().put_back(std::move(gang));
  };

  // Starting a thread of the host costs about as much as running a small block.
  const uint64_t THREADS_WORTH_A_HELPER = 4096;
  const uint64_t helpers = std::min({uint64_t(std::max(1u, std::thread::hardware_concurrency())) - 1, gang_count - 1,
                                     block_count * launch.block.count() / THREADS_WORTH_A_HELPER});
  std::vector<std::thread> team;
  for (uint64_t i = 0; i < helpers; i++) team.emplace_back(work);
  work();
  for (std::thread& helper : team) helper.join();
  return std::move(state.outcome);
}
