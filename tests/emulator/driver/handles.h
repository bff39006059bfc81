// Handles that may be wrong: a driver gets them from C, and answers a stale or invented one with an error, not with a
// crash.
//
// A handle is a slot number with a generation, dressed up as a pointer. Looking one up takes no lock, for launches do
// it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

template <class Object, uint64_t KIND>
class HandleTable {
 public:
  template <class Handle>
  Handle insert(Object* object) {
    std::lock_guard<std::mutex> lock(mutex_);
    uint32_t slot;
    if (free_.empty()) {
      slot = used_++;
      if (slot / CHUNK >= CHUNKS) return nullptr;
      if (slot % CHUNK == 0) chunks_[slot / CHUNK].store(new Entry[CHUNK], std::memory_order_release);
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    Entry& entry = chunks_[slot / CHUNK].load(std::memory_order_relaxed)[slot % CHUNK];
    entry.object.store(object, std::memory_order_relaxed);
    const uint32_t generation = entry.generation.load(std::memory_order_relaxed) + 1;
    entry.generation.store(generation, std::memory_order_release);
    return reinterpret_cast<Handle>(KIND << 56 | static_cast<uint64_t>(generation & GENERATIONS) << 32 | slot);
  }

  template <class Handle>
  Object* find(Handle handle) const {
    const Entry* entry = entry_of(reinterpret_cast<uint64_t>(handle));
    return entry ? entry->object.load(std::memory_order_acquire) : nullptr;
  }

  // Ends the handle; the object comes back to whoever called, or nothing if the handle was not one.
  template <class Handle>
  Object* remove(Handle handle) {
    const uint64_t bits = reinterpret_cast<uint64_t>(handle);
    std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = entry_of(bits);
    if (!entry) return nullptr;
    Object* object = entry->object.exchange(nullptr, std::memory_order_acq_rel);
    if (object) free_.push_back(static_cast<uint32_t>(bits));
    return object;
  }

 private:
  enum : uint32_t { CHUNK = 1024, CHUNKS = 4096, GENERATIONS = 0xffffff };
  struct Entry {
    std::atomic<Object*> object{nullptr};
    std::atomic<uint32_t> generation{0};
  };

  Entry* entry_of(uint64_t bits) const {
    const uint32_t slot = static_cast<uint32_t>(bits);
    if (bits >> 56 != KIND || slot / CHUNK >= CHUNKS) return nullptr;
    Entry* chunk = chunks_[slot / CHUNK].load(std::memory_order_acquire);
    if (!chunk) return nullptr;
    Entry& entry = chunk[slot % CHUNK];
    const uint32_t generation = entry.generation.load(std::memory_order_acquire);
    return (generation & GENERATIONS) == (bits >> 32 & GENERATIONS) ? &entry : nullptr;
  }

  mutable std::mutex mutex_;
  std::atomic<Entry*> chunks_[CHUNKS] = {};
  std::vector<uint32_t> free_;
  uint32_t used_ = 0;
};
