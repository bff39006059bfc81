// Every access of a kernel to memory passes through here: checked, counted, carried out.
//
// There are two ways in. The functions of device.cuh for global memory call stand_in_load and stand_in_store. All other
// accesses, to shared memory above all, are reported by the compiler's own instrumentation: kernels are compiled for
// its thread sanitizer, but linked without its runtime, and the __tsan_ functions it would call are those at the end.
#include <algorithm>
#include <cstring>

#include "gang.h"

namespace {

bool aligned(uintptr_t address, size_t bytes) { return (address & (bytes - 1)) == 0; }

// The allocation that holds these bytes, if it was accessed lately.
const AddressRange* recent_range(const Gang& gang, uintptr_t address, size_t bytes) {
  for (const AddressRange& range : gang.recent_ranges) {
    if (range.contains(address, bytes)) return &range;
  }
  return nullptr;
}

// Global memory: inside one live allocation, or the launch ends.
const AddressRange& check_global(Thread& thread, uintptr_t address, size_t bytes, Direction direction, Origin origin) {
  Gang& gang = *thread.gang;
  if (const AddressRange* recent = recent_range(gang, address, bytes)) return *recent;
  const MemoryMap& memory = *gang.launch().memory;
  const AddressRange* range = memory.find(address);
  if (!range || range->freed || !range->contains(address, bytes)) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, origin, "%s of %zu bytes of global memory: %s", verb(direction), bytes,
          memory.explain(address, bytes).c_str());
  }
  gang.recent_ranges[gang.oldest_range++ % Gang::RECENT_RANGES] = *range;
  return *range;
}

void count_global(Thread& thread, uintptr_t address, size_t bytes, Direction direction, const void* instruction) {
  Gang& gang = *thread.gang;
  const bool load = direction == Direction::LOAD;
  (load ? gang.bytes_loaded : gang.bytes_stored) += bytes;
  // What a warp does at once can be put together only while its lanes run in their order.
  if (gang.shuffled) return;
  WarpTraffic& traffic = load ? thread.warp->loads : thread.warp->stores;
  (load ? gang.sectors_loaded : gang.sectors_stored) += traffic.add(thread.lane, instruction, address, unsigned(bytes));
}

void check_alignment(Thread& thread, uintptr_t address, size_t bytes, Direction direction, Origin origin) {
  if (aligned(address, bytes)) return;
  fault(thread, CUDA_ERROR_MISALIGNED_ADDRESS, origin, "misaligned %s of %zu bytes: %zu bytes past a multiple",
        verb(direction), bytes, size_t(address & (bytes - 1)));
}

bool on_own_stack(const Thread& thread, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(thread.stack) < STACK_BYTES;
}

// A kernel with large arrays of its own may need more stack than there is.
bool stack_suffices(const Thread& thread) {
  return on_own_stack(thread, reinterpret_cast<uintptr_t>(__builtin_frame_address(0)));
}

void check_stack(Thread& thread, Origin origin) {
  if (stack_suffices(thread)) return;
  fault(thread, CUDA_ERROR_LAUNCH_FAILED, origin, "the thread needs more than the stand-in's %zu bytes of stack",
        size_t(STACK_BYTES));
}

const AddressRange& __attribute__((noinline)) check_new_global(Thread& thread, uintptr_t address, size_t bytes,
                                                               Direction direction, StandInPlace place) {
  check_stack(thread, at(place));
  check_alignment(thread, address, bytes, direction, at(place));
  return check_global(thread, address, bytes, direction, at(place));
}

// An access by a function of device.cuh. Nearly all go where others went before, and nothing is wrong with them.
inline void access_global(Thread& thread, uintptr_t address, size_t bytes, Direction direction, StandInPlace place,
                          const void* instruction, bool atomic = false) {
  Gang& gang = *thread.gang;
  if (gang.shuffled) gang.maybe_pre_empt(thread);
  const AddressRange* range = recent_range(gang, address, bytes);
  if (!range || !aligned(address, bytes) || !stack_suffices(thread)) {
    range = &check_new_global(thread, address, bytes, direction, place);
  }
  check_global_order(thread, *range, address, bytes, direction, at(place), atomic);
  count_global(thread, address, bytes, direction, instruction);
}

bool in_shared(const Gang& gang, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(gang.shared_begin) < gang.shared_stride * gang.blocks.size();
}

// Shared memory of any block of the gang: inside what the launch asked for.
Block& check_shared(Thread& thread, uintptr_t address, size_t bytes, Direction direction, Origin origin) {
  Gang& gang = *thread.gang;
  const size_t offset = address - reinterpret_cast<uintptr_t>(gang.shared_begin);
  Block& owner = gang.blocks[offset / gang.shared_stride];
  const size_t begin = offset % gang.shared_stride;
  if (begin + bytes > gang.launch().shared_bytes) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, origin,
          "%s of %zu bytes of shared memory out of bounds: bytes %zu..%zu of %u", verb(direction), bytes, begin,
          begin + bytes, gang.launch().shared_bytes);
  }
  return owner;
}

size_t shared_offset(const Gang& gang, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(gang.shared_begin);
}

void check_own_shared(Thread& thread, uintptr_t address, size_t bytes, Direction direction, Origin origin) {
  if (&check_shared(thread, address, bytes, direction, origin) == thread.block) return;
  fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, origin, "%s of shared memory out of bounds: it belongs to another block",
        verb(direction));
}

// Shared memory that a function of device.cuh was given a pointer to.
void expect_own_shared(Thread& thread, const void* pointer, size_t bytes, Direction direction, StandInPlace place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!in_shared(*thread.gang, address)) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place), "%p is no address of shared memory", pointer);
  }
  check_own_shared(thread, address, bytes, direction, at(place));
}

// Shared memory behind an address that stand_in_remote made.
void check_remote(Thread& thread, uintptr_t address, size_t bytes, Direction direction, StandInPlace place) {
  check_alignment(thread, address, bytes, direction, at(place));
  if (!in_shared(*thread.gang, address)) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place), "%s of distributed shared memory out of bounds",
          verb(direction));
  }
  Block& owner = check_shared(thread, address, bytes, direction, at(place));
  if (owner.cluster != thread.block->cluster) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place), "%s of shared memory of another cluster", verb(direction));
  }
  if (&owner == thread.block) return;
  if (thread.cluster_waits == 0) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place),
          "%s of another block's shared memory before any cluster barrier: that block may not have begun",
          verb(direction));
  }
  if (owner.exited == owner.threads) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place),
          "%s of the shared memory of block %u of the cluster, which has exited", verb(direction), owner.rank);
  }
  // Where the owner exits before the next barrier, it is luck that it has not yet done so.
  owner.visitor = &thread;
  owner.visitor_leaves = std::max(owner.visitor_leaves, thread.cluster_arrivals + 1);
}

void access_remote(Thread& thread, uintptr_t address, size_t bytes, Direction direction, StandInPlace place) {
  Gang& gang = *thread.gang;
  if (gang.shuffled) gang.maybe_pre_empt(thread);
  check_remote(thread, address, bytes, direction, place);
  check_shared_order(thread, shared_offset(gang, address), bytes, direction, at(place));
}

void __attribute__((noinline)) access_outside_stack(Thread& thread, uintptr_t address, size_t bytes,
                                                    Direction direction, bool expect_aligned, const void* instruction) {
  Gang& gang = *thread.gang;
  const Origin origin = {{"", 0}, instruction};
  check_stack(thread, origin);
  if (expect_aligned) check_alignment(thread, address, bytes, direction, origin);
  if (gang.shuffled) gang.maybe_pre_empt(thread);
  if (in_shared(gang, address)) {
    check_own_shared(thread, address, bytes, direction, origin);
    return check_shared_order(thread, shared_offset(gang, address), bytes, direction, origin);
  }
  if (direction == Direction::LOAD && gang.launch().image->holds(address)) return;
  const AddressRange& range = check_global(thread, address, bytes, direction, origin);
  check_global_order(thread, range, address, bytes, direction, origin);
  count_global(thread, address, bytes, direction, instruction);
}

// An access that the compiler reported: of memory, or of a variable of the thread's own that has an address.
inline void access_anywhere(const void* pointer, size_t bytes, Direction direction, bool expect_aligned,
                            const void* instruction) {
  Thread* const thread = current_thread;
  if (!thread) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (on_own_stack(*thread, address) && stack_suffices(*thread)) return;
  access_outside_stack(*thread, address, bytes, direction, expect_aligned, instruction);
}

// A copy of as many bytes as one instruction moves: each case is one.
void copy_word(void* to, const void* from, unsigned bytes) {
  switch (bytes) {
    case 2:
      memcpy(to, from, 2);
      return;
    case 4:
      memcpy(to, from, 4);
      return;
    case 8:
      memcpy(to, from, 8);
      return;
    case 16:
      memcpy(to, from, 16);
      return;
    default:
      memcpy(to, from, bytes);
  }
}

StandInBits read_bits(uintptr_t address, unsigned bytes) {
  StandInBits value = {0, 0};
  copy_word(&value, reinterpret_cast<const void*>(address), bytes);
  return value;
}

}  // namespace

extern "C" {

StandInIndex stand_in_thread_index() { return current_thread->index; }
StandInIndex stand_in_block_index() { return current_thread->block->index; }
StandInIndex stand_in_block_size() {
  const Extent3 size = current_thread->gang->launch().block;
  return {size.x, size.y, size.z};
}
StandInIndex stand_in_grid_size() {
  const Extent3 size = current_thread->gang->launch().grid;
  return {size.x, size.y, size.z};
}
unsigned stand_in_cluster_rank() { return current_thread->block->rank; }
unsigned stand_in_cluster_size() { return current_thread->block->cluster->blocks; }
unsigned char* stand_in_shared_memory() { return current_thread->block->shared; }

StandInBits stand_in_load(const void* from, unsigned bytes, StandInCaching, StandInPlace place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  access_global(*current_thread, address, bytes, Direction::LOAD, place, __builtin_return_address(0));
  return read_bits(address, bytes);
}

void stand_in_store(void* to, StandInBits value, unsigned bytes, StandInCaching, StandInPlace place) {
  access_global(*current_thread, reinterpret_cast<uintptr_t>(to), bytes, Direction::STORE, place,
                __builtin_return_address(0));
  copy_word(to, &value, bytes);
}

unsigned stand_in_arrive(unsigned* counter, StandInPlace place) {
  Thread& thread = *current_thread;
  const uintptr_t address = reinterpret_cast<uintptr_t>(counter);
  const void* const instruction = __builtin_return_address(0);
  access_global(thread, address, sizeof *counter, Direction::LOAD, place, instruction, true);
  access_global(thread, address, sizeof *counter, Direction::STORE, place, instruction, true);
  const unsigned before = arrive_in_order(thread, counter);
  auto waiters = thread.gang->counter_waiters.find(address);
  if (waiters != thread.gang->counter_waiters.end()) {
    for (Thread* waiter : waiters->second) thread.gang->make_ready(*waiter);
    thread.gang->counter_waiters.erase(waiters);
  }
  return before;
}

void stand_in_await_arrivals(const unsigned* counter, unsigned arrivals, StandInPlace place) {
  Thread& thread = *current_thread;
  Gang& gang = *thread.gang;
  const uintptr_t address = reinterpret_cast<uintptr_t>(counter);
  if (!gang.launch().cooperative) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "waiting for other blocks in a launch that is not cooperative");
  }
  // However often a GPU looks at the counter, it is counted once: nearly all looks end in a cache.
  access_global(thread, address, sizeof *counter, Direction::LOAD, place, __builtin_return_address(0), true);
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < arrivals) {
    gang.counter_waiters[address].push_back(&thread);
    gang.wait(thread, State::AT_COUNTER, place);
  }
  acquire_counter(thread, counter);
}

const void* stand_in_remote(const void* local, unsigned rank, StandInPlace place) {
  Thread& thread = *current_thread;
  expect_own_shared(thread, local, 0, Direction::LOAD, place);
  const Cluster& cluster = *thread.block->cluster;
  if (rank >= cluster.blocks) {
    fault(thread, CUDA_ERROR_ILLEGAL_ADDRESS, at(place), "there is no block %u in a cluster of %u", rank,
          cluster.blocks);
  }
  const ptrdiff_t blocks_away = ptrdiff_t(rank) - ptrdiff_t(thread.block->rank);
  return static_cast<const unsigned char*>(local) + blocks_away * ptrdiff_t(thread.gang->shared_stride);
}

StandInBits stand_in_load_remote(const void* from, unsigned bytes, StandInPlace place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  access_remote(*current_thread, address, bytes, Direction::LOAD, place);
  return read_bits(address, bytes);
}

void stand_in_store_remote(void* to, StandInBits value, unsigned bytes, StandInPlace place) {
  access_remote(*current_thread, reinterpret_cast<uintptr_t>(to), bytes, Direction::STORE, place);
  copy_word(to, &value, bytes);
}

void stand_in_bulk_copy(void* shared, const void* global, unsigned bytes, unsigned long long* barrier,
                        StandInPlace place) {
  Thread& thread = *current_thread;
  Gang& gang = *thread.gang;
  const uintptr_t from = reinterpret_cast<uintptr_t>(global);
  const size_t UNIT = 16;
  if (bytes % UNIT || !aligned(from, UNIT) || !aligned(reinterpret_cast<uintptr_t>(shared), UNIT)) {
    fault(thread, CUDA_ERROR_MISALIGNED_ADDRESS, at(place),
          "bulk_copy of %u bytes: size and both addresses must be multiples of 16", bytes);
  }
  const uintptr_t key = reinterpret_cast<uintptr_t>(barrier);
  expect_own_shared(thread, shared, bytes, Direction::STORE, place);
  if (!gang.mbarriers.count(key)) {
    fault(thread, CUDA_ERROR_LAUNCH_FAILED, at(place), "bulk_copy with an mbarrier that was not initialised");
  }
  if (bytes == 0) return;
  const AddressRange& range = check_global(thread, from, bytes, Direction::LOAD, at(place));
  check_global_order(thread, range, from, bytes, Direction::LOAD, at(place));
  const size_t offset = shared_offset(gang, reinterpret_cast<uintptr_t>(shared));
  check_bulk_fence(thread, offset, bytes, at(place));
  begin_copy(thread, offset, bytes, at(place));
  // No instruction of a warp: the copy moves every sector once.
  gang.bytes_loaded += bytes;
  if (!gang.shuffled) gang.sectors_loaded += (from + bytes + 31) / 32 - from / 32;
  memset(shared, 0xff, bytes);  // until the copy ends there is nothing to be read
  gang.copies.push_back({static_cast<unsigned char*>(shared), global, bytes, key});
}

void stand_in_bulk_fence() {
  Thread& thread = *current_thread;
  thread.bulk_fence = tick(thread);
}

void stand_in_copy_async(void* shared, const void* global, unsigned bytes, StandInPlace place) {
  Thread& thread = *current_thread;
  access_global(thread, reinterpret_cast<uintptr_t>(global), bytes, Direction::LOAD, place,
                __builtin_return_address(0));
  check_alignment(thread, reinterpret_cast<uintptr_t>(shared), bytes, Direction::STORE, at(place));
  expect_own_shared(thread, shared, bytes, Direction::STORE, place);
  const size_t offset = shared_offset(*thread.gang, reinterpret_cast<uintptr_t>(shared));
  if (bytes % GRANULE) {  // no such instruction: an ordinary load and store
    check_shared_order(thread, offset, bytes, Direction::STORE, at(place));
    copy_word(shared, global, bytes);
    return;
  }
  begin_copy(thread, offset, bytes, at(place));
  memset(shared, 0xff, bytes);  // until the copy ends there is nothing to be read
  thread.copies.push_back({static_cast<unsigned char*>(shared), global, bytes, thread.copy_group});
}

void stand_in_copy_commit() { current_thread->copy_group++; }

// The thread's copies end here, as late as they may.
void stand_in_copy_wait(unsigned groups, StandInPlace place) {
  Thread& thread = *current_thread;
  Gang& gang = *thread.gang;
  size_t kept = 0;
  for (const ThreadCopy& copy : thread.copies) {
    if (copy.group + groups >= thread.copy_group) {
      thread.copies[kept++] = copy;
      continue;
    }
    const size_t offset = shared_offset(gang, reinterpret_cast<uintptr_t>(copy.to));
    copy_word(copy.to, copy.from, copy.bytes);
    end_copy(gang, offset, copy.bytes);
    check_shared_order(thread, offset, copy.bytes, Direction::STORE, at(place));
  }
  thread.copies.resize(kept);
}

#define INSTRUMENTED(BYTES)                                                                \
  void __tsan_read##BYTES(void* pointer) {                                                 \
    access_anywhere(pointer, BYTES, Direction::LOAD, true, __builtin_return_address(0));   \
  }                                                                                        \
  void __tsan_write##BYTES(void* pointer) {                                                \
    access_anywhere(pointer, BYTES, Direction::STORE, true, __builtin_return_address(0));  \
  }                                                                                        \
  void __tsan_unaligned_read##BYTES(void* pointer) {                                       \
    access_anywhere(pointer, BYTES, Direction::LOAD, false, __builtin_return_address(0));  \
  }                                                                                        \
  void __tsan_unaligned_write##BYTES(void* pointer) {                                      \
    access_anywhere(pointer, BYTES, Direction::STORE, false, __builtin_return_address(0)); \
  }                                                                                        \
  void __tsan_volatile_read##BYTES(void* pointer) {                                        \
    access_anywhere(pointer, BYTES, Direction::LOAD, true, __builtin_return_address(0));   \
  }                                                                                        \
  void __tsan_volatile_write##BYTES(void* pointer) {                                       \
    access_anywhere(pointer, BYTES, Direction::STORE, true, __builtin_return_address(0));  \
  }
INSTRUMENTED(1)
INSTRUMENTED(2)
INSTRUMENTED(4)
INSTRUMENTED(8)
INSTRUMENTED(16)
void __tsan_read_range(void* pointer, size_t bytes) {
  access_anywhere(pointer, bytes, Direction::LOAD, false, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, size_t bytes) {
  access_anywhere(pointer, bytes, Direction::STORE, false, __builtin_return_address(0));
}
// The instrumentation calls these too; they tell nothing about memory.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
}
