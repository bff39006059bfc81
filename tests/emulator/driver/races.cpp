// Finds accesses that nothing keeps apart, and loads of what nobody wrote.
//
// What is found does not depend on the order in which the threads happen to run, as long as the last accesses of a
// granule are remembered: only barriers and arrivals count as order.
#include <algorithm>
#include <cstring>

#include "gang.h"

namespace {

const PlaceCode INSTRUCTION = 0x80000000u;
// A stamp of no launch: a bulk copy into this granule is under way.
const Stamp IN_FLIGHT = STAMP_BYTES;

std::string text_of(const Gang& gang, PlaceCode code) {
  if (code == 0) return "";
  if (code & INSTRUCTION) {
    const std::string line = gang.launch().image->line_of_offset(code & ~INSTRUCTION);
    return line.empty() ? "" : " at " + line;
  }
  std::lock_guard<std::mutex> lock(gang.state->mutex);
  const char* file = gang.state->files[code >> 20];
  const char* slash = strrchr(file, '/');
  return " at " + std::string(slash ? slash + 1 : file) + ":" + std::to_string(code & 0xfffff);
}

// "block (1,0,0), thread (5,0,0) stored at file:line".
std::string describe(const Gang& gang, Stamp stamp, const char* did, PlaceCode code) {
  const KernelLaunch& launch = gang.launch();
  const uint32_t threads = uint32_t(launch.block.count());
  const StandInIndex block = gang.block_index(thread_of(stamp) / threads);
  const uint32_t number = thread_of(stamp) % threads;
  char text[120];
  snprintf(text, sizeof text, "block (%u,%u,%u), thread (%u,%u,%u) %s it", block.x, block.y, block.z,
           number % launch.block.x, number / launch.block.x % launch.block.y, number / launch.block.x / launch.block.y,
           did);
  return text + text_of(gang, code);
}

bool knows(const Thread& thread, uint32_t block, uint32_t other, uint32_t clock) {
  const Knowledge& own = thread.acquired;
  const Knowledge& common = thread.block->acquired;
  return (!own.empty() && own.holds(block, other, clock)) || (!common.empty() && common.holds(block, other, clock));
}

// Whether the access behind the stamp, of another thread in this launch, is over for certain.
bool __attribute__((noinline)) ordered(const Thread& thread, Stamp stamp) {
  const Gang& gang = *thread.gang;
  const uint32_t number = thread_of(stamp), clock = clock_of(stamp);
  const uint32_t block_threads = thread.block->threads;
  const uint32_t block_number = number / block_threads;
  const uint64_t at = number - gang.first_block * block_threads;
  if (at < gang.threads.size()) {
    const Thread& other = gang.threads[at];
    if (other.block == thread.block) {
      if (clock < thread.block->barrier_clock) return true;
      const std::vector<uint32_t>& known = thread.warp->known;
      if (other.warp == thread.warp && !known.empty() && clock < known[thread.lane * WARP_LANES + other.lane])
        return true;
    }
    const unsigned waits = std::max(thread.cluster_waits, thread.block->cluster_waits);
    if (other.block->cluster == thread.block->cluster && waits > 0 &&
        clock < other.arrival_clocks[waits % Thread::PHASES]) {
      return true;
    }
    if (clock < gang.grid_clock) return true;
  }
  return knows(thread, block_number, number, clock);
}

// Whether an access now, of the bytes that the own stamp names, could meet the one behind the other stamp.
inline bool conflicts(const Thread& thread, Stamp own, Stamp other) {
  const Stamp difference = own ^ other;
  if (difference >> STAMP_THREAD_BIT == 0) return false;  // the thread's own
  if (difference >> STAMP_LAUNCH_BIT != 0) return false;  // of a launch before
  if ((own & other & STAMP_BYTES) == 0) return false;     // its neighbour
  if ((own & other & STAMP_ATOMIC) != 0) return false;    // atomic operations may meet
  return !ordered(thread, other);
}

[[noreturn]] void __attribute__((noinline)) race(Thread& thread, const char* memory, size_t byte, size_t bytes,
                                                 Direction direction, Origin origin, Stamp other, const char* did,
                                                 PlaceCode place) {
  fault(thread, CUDA_ERROR_LAUNCH_FAILED, origin,
        "race: %s of %zu bytes of %s memory at byte %zu, and %s: nothing orders the two", verb(direction), bytes,
        memory, byte, describe(*thread.gang, other, did, place).c_str());
}

}  // namespace

PlaceCode code_of(Gang& gang, const Origin& origin) {
  if (origin.instruction) {
    return INSTRUCTION | PlaceCode(gang.launch().image->offset_of(origin.instruction) & ~INSTRUCTION);
  }
  if (origin.place.file != gang.last_file) {
    std::lock_guard<std::mutex> lock(gang.state->mutex);
    std::vector<const char*>& files = gang.state->files;
    const auto found = std::find(files.begin(), files.end(), origin.place.file);
    gang.last_file_number = uint32_t(found - files.begin());
    if (found == files.end()) files.push_back(origin.place.file);
    gang.last_file = origin.place.file;
  }
  return gang.last_file_number << 20 | origin.place.line;
}

void check_global_order(Thread& thread, const AddressRange& range, uintptr_t address, size_t bytes, Direction direction,
                        Origin origin, bool atomic) {
  const size_t begin = address - range.begin, end = begin + bytes;
  Shadow& shadow = *range.shadow;
  if (direction == Direction::LOAD && !shadow.is_written(begin, bytes)) {
    fault(
        thread, CUDA_ERROR_LAUNCH_FAILED, origin,
        "uninitialised: load of %zu bytes of global memory, of which byte %zu of an allocation of %zu bytes was never "
        "written",
        bytes, shadow.first_unwritten(begin, bytes), range.bytes);
  }
  if (direction == Direction::STORE && !shadow.is_written(begin, bytes)) shadow.mark_written(begin, bytes);
  if (clock_of(thread.stamp) == STAMP_LAST_CLOCK) return;
  const Stamp own = thread.stamp | (atomic ? Stamp(STAMP_ATOMIC) : Stamp(0));
  const PlaceCode place = direction == Direction::STORE ? code_of(*thread.gang, origin) : 0;
  for (size_t granule = begin / GRANULE; granule * GRANULE < end; granule++) {
    const Stamp mine = own | touched_bytes(granule, begin, end);
    const Stamp store = __atomic_load_n(shadow.stores() + granule, __ATOMIC_RELAXED);
    if (conflicts(thread, mine, store)) {
      race(thread, "global", begin, bytes, direction, origin, store, "stored",
           __atomic_load_n(shadow.store_places() + granule, __ATOMIC_RELAXED));
    }
    if (direction == Direction::LOAD) {
      __atomic_store_n(shadow.loads() + granule, mine, __ATOMIC_RELAXED);
      continue;
    }
    const Stamp load = __atomic_load_n(shadow.loads() + granule, __ATOMIC_RELAXED);
    if (conflicts(thread, mine, load)) race(thread, "global", begin, bytes, direction, origin, load, "loaded", 0);
    __atomic_store_n(shadow.stores() + granule, mine, __ATOMIC_RELAXED);
    __atomic_store_n(shadow.store_places() + granule, place, __ATOMIC_RELAXED);
  }
}

void check_shared_order(Thread& thread, size_t offset, size_t bytes, Direction direction, Origin origin) {
  Gang& gang = *thread.gang;
  const size_t end = offset + bytes, in_block = offset % gang.shared_stride;
  const PlaceCode place = code_of(gang, origin);
  const bool stamps = clock_of(thread.stamp) != STAMP_LAST_CLOCK;
  for (size_t granule = offset / GRANULE; granule * GRANULE < end; granule++) {
    Gang::SharedCell& cell = gang.shared_cells[granule];
    unsigned char& written = gang.shared_written[granule];
    const Stamp touched = touched_bytes(granule, offset, end);
    const Stamp mine = thread.stamp | touched;
    if (cell.store == IN_FLIGHT) {
      fault(thread, CUDA_ERROR_LAUNCH_FAILED, origin,
            "%s of shared memory at byte %zu while a copy into it is in flight: it must be waited for", verb(direction),
            in_block);
    }
    if (conflicts(thread, mine, cell.store)) {
      race(thread, "shared", in_block, bytes, direction, origin, cell.store, "stored", cell.store_place);
    }
    if (direction == Direction::LOAD) {
      if ((written & touched) != touched) {
        fault(thread, CUDA_ERROR_LAUNCH_FAILED, origin,
              "uninitialised: load of %zu bytes of shared memory at byte %zu, which nobody wrote", bytes, in_block);
      }
      if (!stamps) continue;
      if ((cell.load ^ mine) >> STAMP_THREAD_BIT != 0) {
        cell.other_load = cell.load;
        cell.other_load_place = cell.load_place;
      }
      cell.load = mine;
      cell.load_place = place;
      continue;
    }
    if (conflicts(thread, mine, cell.load)) {
      race(thread, "shared", in_block, bytes, direction, origin, cell.load, "loaded", cell.load_place);
    }
    if (conflicts(thread, mine, cell.other_load)) {
      race(thread, "shared", in_block, bytes, direction, origin, cell.other_load, "loaded", cell.other_load_place);
    }
    written |= static_cast<unsigned char>(touched);
    if (stamps) cell = {mine, 0, 0, place, 0, 0};
  }
}

void begin_copy(Thread& thread, size_t offset, size_t bytes, Origin origin) {
  Gang& gang = *thread.gang;
  check_shared_order(thread, offset, bytes, Direction::STORE, origin);
  for (size_t granule = offset / GRANULE; granule < (offset + bytes) / GRANULE; granule++) {
    gang.shared_cells[granule].store = IN_FLIGHT;
  }
}

void end_copy(Gang& gang, size_t offset, size_t bytes) {
  // Nobody's store: who loads from now on has waited, or was found out before.
  for (size_t granule = offset / GRANULE; granule < (offset + bytes) / GRANULE; granule++) {
    gang.shared_cells[granule] = {};
  }
}

void check_bulk_fence(Thread& thread, size_t offset, size_t bytes, Origin origin) {
  const Gang& gang = *thread.gang;
  for (size_t granule = offset / GRANULE; granule < (offset + bytes) / GRANULE; granule++) {
    const Gang::SharedCell& cell = gang.shared_cells[granule];
    if (cell.store == 0 || cell.store == IN_FLIGHT) continue;
    const Thread& writer = gang.threads[thread_of(cell.store) - gang.first_block * thread.block->threads];
    if (clock_of(cell.store) < writer.bulk_fence) continue;
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, origin,
          "bulk_copy over shared memory at byte %zu, and %s without a bulk_fence since: the copy may come before the "
          "store",
          granule * GRANULE % gang.shared_stride, describe(gang, cell.store, "stored", cell.store_place).c_str());
  }
}

uint32_t meet(Thread* first, unsigned count, unsigned mask) {
  const auto takes_part = [&](unsigned i) { return mask == ~0u || (mask >> i & 1u); };
  uint32_t latest = 0;
  for (unsigned i = 0; i < count; i++) {
    if (takes_part(i)) latest = std::max(latest, clock_of(first[i].stamp));
  }
  const uint32_t clock = std::min(latest + 1, STAMP_LAST_CLOCK);
  for (unsigned i = 0; i < count; i++) {
    if (!takes_part(i)) continue;
    first[i].stamp += Stamp(clock - clock_of(first[i].stamp)) << STAMP_CLOCK_BIT;
  }
  return clock;
}

void release(Thread& thread, Knowledge& into) {
  const Gang& gang = *thread.gang;
  const Block& block = *thread.block;
  const uint32_t clock = tick(thread);
  Knowledge::learn(into.threads, thread_of(thread.stamp), clock);
  if (block.barrier_clock) Knowledge::learn(into.blocks, block.number, block.barrier_clock);
  into.join(thread.acquired);
  into.join(block.acquired);
  const unsigned waits = std::max(thread.cluster_waits, block.cluster_waits);
  if (waits > 0) {
    const Cluster& cluster = *block.cluster;
    for (unsigned i = 0; i < cluster.threads; i++) {
      const Thread& other = cluster.first[i];
      Knowledge::learn(into.threads, thread_of(other.stamp), other.arrival_clocks[waits % Thread::PHASES]);
    }
  }
  if (gang.grid_clock) {
    for (const Block& other : gang.blocks) Knowledge::learn(into.blocks, other.number, gang.grid_clock);
  }
}

unsigned arrive_in_order(Thread& thread, unsigned* counter) {
  LaunchState& state = *thread.gang->state;
  // Counting and telling are one step, so that whoever counts later also knows more.
  std::lock_guard<std::mutex> lock(state.mutex);
  Knowledge& known = state.counters[reinterpret_cast<uintptr_t>(counter)];
  thread.acquired.join(known);
  release(thread, known);
  return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
}

void acquire_counter(Thread& thread, const unsigned* counter) {
  LaunchState& state = *thread.gang->state;
  std::lock_guard<std::mutex> lock(state.mutex);
  thread.acquired.join(state.counters[reinterpret_cast<uintptr_t>(counter)]);
}
