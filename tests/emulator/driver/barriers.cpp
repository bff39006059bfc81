// Where threads meet: warps, blocks, clusters, the grid, and mbarriers.
#include <algorithm>
#include <cstring>

#include "gang.h"

namespace {

unsigned bit(unsigned lane) { return 1u << lane; }

// The lane whose value the given lane gets.
unsigned source_lane(const Thread& thread) {
  const WarpRequest& request = thread.request;
  switch (request.operation) {
    case STAND_IN_SHUFFLE_XOR:
      return (thread.lane ^ request.operand) % WARP_LANES;
    case STAND_IN_SHUFFLE_DOWN:
      return thread.lane + request.operand < WARP_LANES ? thread.lane + request.operand : thread.lane;
    case STAND_IN_SHUFFLE_UP:
      return thread.lane >= request.operand ? thread.lane - request.operand : thread.lane;
    case STAND_IN_SHUFFLE_FROM:
      return request.operand % WARP_LANES;
    case STAND_IN_WARP_BARRIER:
    case STAND_IN_BALLOT:
      break;
  }
  return thread.lane;
}

// The lanes of the mask know of each other what they did so far, and of others what any of them knew.
void meet_in_warp(Warp& warp, unsigned mask) {
  if (warp.known.empty()) warp.known.resize(WARP_LANES * WARP_LANES);
  const uint32_t clock = meet(warp.first, warp.lanes, mask);
  Knowledge acquired;
  for (unsigned lane = 0; lane < warp.lanes; lane++) {
    if (!(mask & bit(lane))) continue;
    acquired.join(warp.first[lane].acquired);
    for (unsigned other = 0; other < warp.lanes; other++) {
      if (mask & bit(other)) warp.known[lane * WARP_LANES + other] = clock;
    }
  }
  if (acquired.empty()) return;
  for (unsigned lane = 0; lane < warp.lanes; lane++) {
    if (mask & bit(lane)) warp.first[lane].acquired.join(acquired);
  }
}

// All threads of the block have come: each knows what any of them did and knew.
void meet_in_block(Block& block) {
  block.barrier_clock = meet(block.first, block.threads);
  for (unsigned i = 0; i < block.threads; i++) {
    Thread& thread = block.first[i];
    block.cluster_waits = std::max(block.cluster_waits, thread.cluster_waits);
    if (thread.acquired.empty()) continue;
    block.acquired.join(thread.acquired);
    thread.acquired.clear();
  }
  if (block.first->gang->shuffled) return;
  for (unsigned i = 0; i < block.threads; i += WARP_LANES) {
    block.first[i].warp->loads.meet();
    block.first[i].warp->stores.meet();
  }
}

// All lanes of the mask have come, `last` among them: exchanges their values.
void exchange(Warp& warp, unsigned mask, Thread& last, StandInPlace place) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < warp.lanes; lane++) {
    if (!(mask & bit(lane))) continue;
    const Thread& thread = warp.first[lane];
    if (thread.request.operation != last.request.operation) {
      fault(last, CUDA_ERROR_LAUNCH_FAILED, at(place), "lane %u of the warp is at another operation (%s:%u)", lane,
            thread.place.file, thread.place.line);
    }
    if (thread.request.value.low) ballot |= bit(lane);
  }
  // Of the operations of a warp only its barrier orders memory.
  if (last.request.operation == STAND_IN_WARP_BARRIER) meet_in_warp(warp, mask);
  for (unsigned lane = 0; lane < warp.lanes; lane++) {
    if (!(mask & bit(lane))) continue;
    Thread& thread = warp.first[lane];
    if (thread.request.operation == STAND_IN_BALLOT) {
      thread.result = {ballot, 0};
      continue;
    }
    const unsigned source = source_lane(thread);
    if (!(mask & bit(source))) {
      fault(thread.number == last.number ? thread : last, CUDA_ERROR_LAUNCH_FAILED, at(place),
            "lane %u asks for the value of lane %u, which does not take part", lane, source);
    }
    thread.result = warp.first[source].request.value;
  }
}

Mbarrier& find_mbarrier(Thread& thread, const void* barrier, StandInPlace place) {
  auto found = thread.gang->mbarriers.find(reinterpret_cast<uintptr_t>(barrier));
  if (found == thread.gang->mbarriers.end()) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "the mbarrier was not initialised");
  }
  // Whoever uses it must have been shown that it was initialised.
  const Gang& gang = *thread.gang;
  const size_t offset = size_t(static_cast<const unsigned char*>(barrier) - gang.shared_begin);
  check_shared_order(thread, offset, sizeof(uint64_t), Direction::LOAD, at(place));
  return found->second;
}

}  // namespace

void finish_phase(Gang& gang, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.missing_bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  for (Thread* waiter : barrier.waiters) gang.make_ready(*waiter);
  barrier.waiters.clear();
}

extern "C" {

StandInBits stand_in_warp(StandInWarpOperation operation, unsigned mask, StandInBits value, unsigned operand,
                          StandInPlace place) {
  Thread& thread = *current_thread;
  Warp& warp = *thread.warp;
  const unsigned existing = warp.lanes == WARP_LANES ? ~0u : bit(warp.lanes) - 1;
  if (!(mask & bit(thread.lane))) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "lane %u is not in its own mask 0x%08x", thread.lane, mask);
  }
  if (mask & ~existing) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "mask 0x%08x names lanes that a warp of %u threads lacks", mask,
          warp.lanes);
  }
  thread.request = {operation, mask, value, operand};
  thread.place = place;

  size_t group = 0;
  while (group < warp.meetings.size() && warp.meetings[group].mask != mask) group++;
  if (group == warp.meetings.size()) warp.meetings.push_back({mask, 0});
  warp.meetings[group].arrived |= bit(thread.lane);
  if (warp.meetings[group].arrived != mask) {
    thread.gang->wait(thread, State::AT_WARP_OPERATION, place);
    return thread.result;
  }
  warp.meetings.erase(warp.meetings.begin() + ptrdiff_t(group));
  exchange(warp, mask, thread, place);
  for (unsigned lane = 0; lane < warp.lanes; lane++) {
    if ((mask & bit(lane)) && lane != thread.lane) thread.gang->make_ready(warp.first[lane]);
  }
  return thread.result;
}

void stand_in_block_barrier(StandInPlace place) {
  Thread& thread = *current_thread;
  Block& block = *thread.block;
  if (block.at_barrier == 0) {
    block.barrier_place = place;
  } else if (block.barrier_place.line != place.line || strcmp(block.barrier_place.file, place.file) != 0) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place),
          "barrier in divergent code: %u threads of the block wait at another barrier (%s:%u)", block.at_barrier,
          block.barrier_place.file, block.barrier_place.line);
  }
  // Threads that have exited are missed for ever: the kernel is wrong, and the deadlock is reported.
  if (++block.at_barrier < block.threads) return thread.gang->wait(thread, State::AT_BLOCK_BARRIER, place);
  block.at_barrier = 0;
  meet_in_block(block);
  for (unsigned i = 0; i < block.threads; i++) {
    if (&block.first[i] != &thread) thread.gang->make_ready(block.first[i]);
  }
}

void stand_in_grid_barrier(unsigned* counter, StandInPlace place) {
  Thread& thread = *current_thread;
  Gang& gang = *thread.gang;
  if (!gang.launch().cooperative) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "grid barrier in a launch that is not cooperative");
  }
  if (thread.number == 0) stand_in_arrive(counter, place);
  thread.grid_counter = counter;
  if (gang.grid_arrived > 0 && gang.threads[0].grid_counter != counter &&
      gang.threads[0].state == State::AT_GRID_BARRIER) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "the blocks meet at different counters");
  }
  if (++gang.grid_arrived < gang.threads.size()) return gang.wait(thread, State::AT_GRID_BARRIER, place);
  gang.grid_arrived = 0;
  gang.grid_clock = meet(gang.threads.data(), unsigned(gang.threads.size()));
  for (Thread& other : gang.threads) {
    if (&other != &thread) gang.make_ready(other);
  }
}

void stand_in_cluster_arrive(StandInPlace place) {
  Thread& thread = *current_thread;
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "cluster_arrive twice without cluster_wait");
  }
  thread.cluster_arrivals++;
  thread.arrival_clocks[thread.cluster_arrivals % Thread::PHASES] = tick(thread);
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  cluster.phase++;
  for (unsigned i = 0; i < cluster.threads; i++) {
    if (cluster.first[i].state == State::AT_CLUSTER_WAIT) thread.gang->make_ready(cluster.first[i]);
  }
}

void stand_in_cluster_wait(StandInPlace place) {
  Thread& thread = *current_thread;
  if (thread.cluster_arrivals == thread.cluster_waits) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "cluster_wait without cluster_arrive");
  }
  if (thread.block->cluster->phase < thread.cluster_arrivals) thread.gang->wait(thread, State::AT_CLUSTER_WAIT, place);
  thread.cluster_waits++;
}

void stand_in_mbarrier_init(unsigned long long* barrier, unsigned arrivals, StandInPlace place) {
  Thread& thread = *current_thread;
  // The store tells the checks of shared memory what the barrier occupies.
  stand_in_store_remote(barrier, {0, 0}, sizeof *barrier, place);
  thread.gang->mbarriers[reinterpret_cast<uintptr_t>(barrier)] = {arrivals, arrivals, 0, 0, {}, {}};
}

void stand_in_mbarrier_arrive(unsigned long long* barrier, unsigned expected_bytes, StandInPlace place) {
  Thread& thread = *current_thread;
  Mbarrier& found = find_mbarrier(thread, barrier, place);
  if (found.pending == 0) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "more arrivals at the mbarrier than the %u it was made for",
          found.arrivals);
  }
  release(thread, found.released);
  found.pending--;
  found.missing_bytes += expected_bytes;
  finish_phase(*thread.gang, found);
}

void stand_in_mbarrier_wait(unsigned long long* barrier, unsigned parity, StandInPlace place) {
  Thread& thread = *current_thread;
  Mbarrier& found = find_mbarrier(thread, barrier, place);
  while ((found.phase & 1) == parity) {
    found.waiters.push_back(&thread);
    thread.gang->wait(thread, State::AT_MBARRIER, place);
  }
  thread.acquired.join(found.released);
}
}
