// What the checks of order know about memory: who stored and who loaded last, and what was ever written.
//
// Memory is cut into granules of four bytes. For each one the shadow keeps a stamp of the last store and of the last
// load. A stamp names a thread of a launch and that thread's clock; whether the access behind it is over, as the
// accessing thread sees it, is decided by order.h. Old stamps need no clearing: they belong to another launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

// From the lowest bit: 4 bits for the bytes of the granule that were accessed, 1 for an atomic access, 20 for the
// clock, 24 for the thread's number in the launch, 15 for the launch. Zero is nobody's.
typedef uint64_t Stamp;

enum : unsigned {
  STAMP_ATOMIC_BIT = 4,
  STAMP_CLOCK_BIT = 5,
  STAMP_THREAD_BIT = 25,
  STAMP_LAUNCH_BIT = 49,
};
enum : Stamp {
  STAMP_BYTES = 15,
  STAMP_ATOMIC = Stamp(1) << STAMP_ATOMIC_BIT,
  STAMP_CLOCKS = Stamp(1) << (STAMP_THREAD_BIT - STAMP_CLOCK_BIT),
  STAMP_THREADS = Stamp(1) << (STAMP_LAUNCH_BIT - STAMP_THREAD_BIT),
  STAMP_LAUNCHES = Stamp(1) << (64 - STAMP_LAUNCH_BIT),
};

inline uint32_t clock_of(Stamp stamp) { return uint32_t(stamp >> STAMP_CLOCK_BIT & (STAMP_CLOCKS - 1)); }
inline uint32_t thread_of(Stamp stamp) { return uint32_t(stamp >> STAMP_THREAD_BIT & (STAMP_THREADS - 1)); }
inline uint32_t launch_of(Stamp stamp) { return uint32_t(stamp >> STAMP_LAUNCH_BIT); }

// A thread that has met others a million times stays at this clock, and its accesses are not told apart any more: they
// go without stamps.
const uint32_t STAMP_LAST_CLOCK = uint32_t(STAMP_CLOCKS) - 1;

enum : size_t { GRANULE = 4 };

// Where in the kernel's source an access stands, in four bytes: see LaunchState::code_of.
typedef uint32_t PlaceCode;

// The bytes of a granule that an access of [begin, end) touches, as the lowest bits of a stamp.
inline Stamp touched_bytes(size_t granule, size_t begin, size_t end) {
  const size_t first = granule * GRANULE;
  Stamp touched = STAMP_BYTES;
  if (begin > first) touched &= STAMP_BYTES << (begin - first);
  if (end < first + GRANULE) touched &= STAMP_BYTES >> (first + GRANULE - end);
  return touched;
}

// The shadow of one allocation of global memory. Threads of the host work on it side by side, without locks: where two
// of them meet on one granule, either one's stamp may remain.
class Shadow {
 public:
  // None if the host has no memory for it.
  static std::unique_ptr<Shadow> make(size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  Stamp* stores() const { return stores_; }
  Stamp* loads() const { return loads_; }
  PlaceCode* store_places() const { return places_; }

  // Bytes from the beginning of the allocation.
  bool is_written(size_t offset, size_t bytes) const;
  void mark_written(size_t offset, size_t bytes);
  // The first byte of these that nobody wrote.
  size_t first_unwritten(size_t offset, size_t bytes) const;
  // As copying the bytes does.
  void copy_written(size_t offset, const Shadow& from, size_t from_offset, size_t bytes);
  // Forgets who accessed what, because launches are numbered from the beginning again.
  void forget_stamps();

 private:
  Shadow() = default;

  size_t granules_ = 0;
  Stamp* stores_ = nullptr;
  Stamp* loads_ = nullptr;
  PlaceCode* places_ = nullptr;
  unsigned char* written_ = nullptr;  // one bit for each byte
  size_t mapped_bytes_ = 0;           // nonzero where the memory was mapped rather than taken from the heap
};

inline bool Shadow::is_written(size_t offset, size_t bytes) const {
  const unsigned char* flags = written_ + offset / 8;
  // An aligned access of 8 or 16 bytes is whole bytes of flags, and a smaller one lies within one of them.
  if (offset % 8 + bytes <= 8) {
    const unsigned wanted = (1u << bytes) - 1;
    return (__atomic_load_n(flags, __ATOMIC_RELAXED) >> offset % 8 & wanted) == wanted;
  }
  if (bytes == 16 && offset % 8 == 0) {
    return (__atomic_load_n(flags, __ATOMIC_RELAXED) & __atomic_load_n(flags + 1, __ATOMIC_RELAXED)) == 0xff;
  }
  return first_unwritten(offset, bytes) == offset + bytes;
}
