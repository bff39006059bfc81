// Device memory: host memory with a table of what is allocated, against which every access of a kernel is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_api.h"
#include "shadow.h"

struct AddressRange {
  uintptr_t begin;
  size_t bytes;
  bool freed;
  Shadow* shadow;

  bool contains(uintptr_t address, size_t count) const {
    const uintptr_t offset = address - begin;
    return offset < bytes && count <= bytes - offset;
  }
};

// What was allocated, and what was freed lately, when a kernel was launched; in the order of addresses.
class MemoryMap {
 public:
  explicit MemoryMap(std::vector<AddressRange> ranges) : ranges_(std::move(ranges)) {}

  // The range that holds the address, or none.
  const AddressRange* find(uintptr_t address) const;
  // In words: why an access to these bytes is wrong, judged by what lies around them.
  std::string explain(uintptr_t address, size_t bytes) const;

 private:
  std::vector<AddressRange> ranges_;
};

// The memory of one context.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t limit) : limit_(limit), capacity_(limit) {}
  ~DeviceMemory();

  CUresult allocate(size_t bytes, CUdeviceptr* address);
  CUresult release(CUdeviceptr address);
  bool contains(CUdeviceptr address, size_t bytes);
  std::shared_ptr<const MemoryMap> map();

  // What a copy to the device, a memset or a copy within it writes: kernels may read it afterwards.
  void mark_written(CUdeviceptr address, size_t bytes);
  void copy_written(CUdeviceptr to, DeviceMemory& from_memory, CUdeviceptr from, size_t bytes);
  // The number of a new launch: never 0, and never one that stamps in the shadows still bear.
  uint32_t next_launch();

  size_t live_allocations();
  size_t live_bytes();
  size_t limit();
  size_t capacity() const { return capacity_; }
  void set_limit(size_t bytes);

 private:
  struct Allocation {
    size_t bytes;
    void* block;         // what the operating system or the heap gave
    size_t block_bytes;  // nonzero where it was mapped rather than taken from the heap
    Shadow* shadow;
  };
  // An address of live memory with its shadow: none where a graph outlives the memory that it copies to.
  struct Part {
    Shadow* shadow;
    size_t offset;
  };
  static void give_back(const Allocation& allocation);
  Part part_of(CUdeviceptr address);

  std::mutex mutex_;
  std::map<uintptr_t, Allocation> live_;
  // Freed memory waits a while before it is reused, so that a late access is seen.
  std::map<uintptr_t, Allocation> quarantine_;
  std::deque<uintptr_t> quarantine_order_;
  size_t quarantine_bytes_ = 0;
  size_t live_bytes_ = 0;
  uint32_t last_launch_ = 0;
  size_t limit_;
  size_t capacity_;
  std::shared_ptr<const MemoryMap> map_;  // empty when the table changed since it was made
};
