// Allocation, poisoning and look-up of device memory.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

const size_t ALIGNMENT = 256;  // what cuMemAlloc promises
const size_t PAGE = 4096;
const size_t MAPPED_FROM = 1 << 20;  // allocations from this size on are mapped, smaller ones come from the heap
const size_t QUARANTINE_BYTES = 32 << 20;
const size_t QUARANTINE_COUNT = 1024;
const unsigned char POISON = 0xff;  // NaN in every floating-point type

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// A file of poison in memory. Mapped privately, it fills an allocation of any size without touching a page of it:
// tensors of many gigabytes cost nothing until somebody writes.
class PoisonFile {
 public:
  static const size_t BYTES = 16 << 20;

  PoisonFile() : descriptor_(memfd_create("poison", MFD_CLOEXEC)) {
    if (descriptor_ < 0) return;
    const std::vector<unsigned char> poison(BYTES, POISON);
    if (write(descriptor_, poison.data(), BYTES) != static_cast<ssize_t>(BYTES)) {
      close(descriptor_);
      descriptor_ = -1;
    }
  }

  // Maps poison over [at, at + bytes), whole pages that belong to the caller.
  bool cover(char* at, size_t bytes) const {
    for (size_t done = 0; done < bytes; done += BYTES) {
      const size_t part = std::min(BYTES, bytes - done);
      void* mapped =
          mmap(at + done, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, descriptor_, 0);
      if (mapped == MAP_FAILED) return false;
    }
    return true;
  }

 private:
  int descriptor_;
};

const PoisonFile& poison_file() {
  static const PoisonFile file;
  return file;
}

}  // namespace

const AddressRange* MemoryMap::find(uintptr_t address) const {
  auto after = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                [](uintptr_t value, const AddressRange& range) { return value < range.begin; });
  if (after == ranges_.begin()) return nullptr;
  const AddressRange& candidate = *(after - 1);
  return address - candidate.begin < candidate.bytes ? &candidate : nullptr;
}

std::string MemoryMap::explain(uintptr_t address, size_t bytes) const {
  char text[200];
  const uintptr_t NEAR = 1 << 20;  // further away than this, an address has nothing to do with an allocation
  if (const AddressRange* range = find(address)) {
    const size_t offset = address - range->begin;
    if (range->freed) {
      snprintf(text, sizeof text, "use after free: bytes %zu..%zu of an allocation of %zu bytes that was freed", offset,
               offset + bytes, range->bytes);
    } else {
      snprintf(text, sizeof text, "out of bounds: bytes %zu..%zu of an allocation of %zu bytes", offset, offset + bytes,
               range->bytes);
    }
    return text;
  }
  const AddressRange* nearest = nullptr;
  uintptr_t distance = NEAR;
  for (const AddressRange& range : ranges_) {
    const uintptr_t gap = address < range.begin ? range.begin - address : address - (range.begin + range.bytes);
    if (gap < distance) {
      distance = gap;
      nearest = &range;
    }
  }
  if (!nearest) {
    snprintf(text, sizeof text, "wild address 0x%" PRIxPTR, address);
  } else if (address < nearest->begin) {
    snprintf(text, sizeof text, "out of bounds: %zu bytes before an allocation of %zu bytes", nearest->begin - address,
             nearest->bytes);
  } else {
    const size_t offset = address - nearest->begin;
    snprintf(text, sizeof text, "out of bounds: bytes %zu..%zu of an allocation of %zu bytes", offset, offset + bytes,
             nearest->bytes);
  }
  return text;
}

DeviceMemory::~DeviceMemory() {
  for (const auto& entry : live_) give_back(entry.second);
  for (const auto& entry : quarantine_) give_back(entry.second);
}

void DeviceMemory::give_back(const Allocation& allocation) {
  delete allocation.shadow;
  if (allocation.block_bytes) {
    munmap(allocation.block, allocation.block_bytes);
  } else {
    free(allocation.block);
  }
}

CUresult DeviceMemory::allocate(size_t bytes, CUdeviceptr* address) {
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > limit_ || live_bytes_ > limit_ - bytes) return CUDA_ERROR_OUT_OF_MEMORY;

  // A margin on both sides keeps two allocations from touching: an index that runs over the end meets nothing valid.
  std::unique_ptr<Shadow> shadow = Shadow::make(bytes);
  if (!shadow) return CUDA_ERROR_OUT_OF_MEMORY;
  Allocation allocation = {bytes, nullptr, 0, nullptr};
  uintptr_t begin;
  if (bytes < MAPPED_FROM) {
    allocation.block = aligned_alloc(ALIGNMENT, round_up(bytes, ALIGNMENT) + 2 * ALIGNMENT);
    if (!allocation.block) return CUDA_ERROR_OUT_OF_MEMORY;
    begin = reinterpret_cast<uintptr_t>(allocation.block) + ALIGNMENT;
    memset(reinterpret_cast<void*>(begin), POISON, bytes);
  } else {
    const size_t body = round_up(bytes, PAGE);
    allocation.block_bytes = body + 2 * PAGE;
    char* block = static_cast<char*>(
        mmap(nullptr, allocation.block_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (block == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!poison_file().cover(block + PAGE, body)) {
      munmap(block, allocation.block_bytes);
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    allocation.block = block;
    begin = reinterpret_cast<uintptr_t>(block) + PAGE;
  }
  allocation.shadow = shadow.release();
  live_[begin] = allocation;
  live_bytes_ += bytes;
  map_.reset();
  *address = begin;
  return CUDA_SUCCESS;
}

CUresult DeviceMemory::release(CUdeviceptr address) {
  if (address == 0) return CUDA_SUCCESS;
  std::lock_guard<std::mutex> lock(mutex_);
  auto entry = live_.find(address);
  if (entry == live_.end()) return CUDA_ERROR_INVALID_VALUE;
  Allocation allocation = entry->second;
  live_.erase(entry);
  live_bytes_ -= allocation.bytes;
  map_.reset();
  if (allocation.block_bytes) {
    // Nothing reads it without being checked, and it may be most of the host's memory.
    give_back(allocation);
    return CUDA_SUCCESS;
  }
  delete allocation.shadow;
  allocation.shadow = nullptr;
  quarantine_[address] = allocation;
  quarantine_order_.push_back(address);
  quarantine_bytes_ += allocation.bytes;
  while (quarantine_bytes_ > QUARANTINE_BYTES || quarantine_order_.size() > QUARANTINE_COUNT) {
    auto oldest = quarantine_.find(quarantine_order_.front());
    quarantine_bytes_ -= oldest->second.bytes;
    give_back(oldest->second);
    quarantine_.erase(oldest);
    quarantine_order_.pop_front();
  }
  return CUDA_SUCCESS;
}

bool DeviceMemory::contains(CUdeviceptr address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto after = live_.upper_bound(address);
  if (after == live_.begin()) return false;
  --after;
  return AddressRange{after->first, after->second.bytes, false, nullptr}.contains(address, bytes);
}

DeviceMemory::Part DeviceMemory::part_of(CUdeviceptr address) {
  const auto after = live_.upper_bound(address);
  if (after == live_.begin()) return {nullptr, 0};
  const auto entry = std::prev(after);
  const size_t offset = address - entry->first;
  return {offset < entry->second.bytes ? entry->second.shadow : nullptr, offset};
}

void DeviceMemory::mark_written(CUdeviceptr address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Part part = part_of(address);
  if (part.shadow) part.shadow->mark_written(part.offset, bytes);
}

void DeviceMemory::copy_written(CUdeviceptr to, DeviceMemory& from_memory, CUdeviceptr from, size_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock), other(from_memory.mutex_, std::defer_lock);
  if (this == &from_memory) {
    lock.lock();
  } else {
    std::lock(lock, other);
  }
  const Part source = from_memory.part_of(from), target = part_of(to);
  if (source.shadow && target.shadow) {
    target.shadow->copy_written(target.offset, *source.shadow, source.offset, bytes);
  }
}

uint32_t DeviceMemory::next_launch() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (++last_launch_ == STAMP_LAUNCHES) {
    for (const auto& entry : live_) entry.second.shadow->forget_stamps();
    last_launch_ = 1;
  }
  return last_launch_;
}

std::shared_ptr<const MemoryMap> DeviceMemory::map() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!map_) {
    std::vector<AddressRange> ranges;
    ranges.reserve(live_.size() + quarantine_.size());
    for (const auto& entry : live_) ranges.push_back({entry.first, entry.second.bytes, false, entry.second.shadow});
    for (const auto& entry : quarantine_) ranges.push_back({entry.first, entry.second.bytes, true, nullptr});
    std::sort(ranges.begin(), ranges.end(),
              [](const AddressRange& a, const AddressRange& b) { return a.begin < b.begin; });
    map_ = std::make_shared<const MemoryMap>(std::move(ranges));
  }
  return map_;
}

size_t DeviceMemory::live_allocations() {
  std::lock_guard<std::mutex> lock(mutex_);
  return live_.size();
}

size_t DeviceMemory::live_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return live_bytes_;
}

size_t DeviceMemory::limit() {
  std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

void DeviceMemory::set_limit(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
}
