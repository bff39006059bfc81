// Shadow memory is as lazy as the memory it stands for: of a large tensor only those pages exist that somebody used.
#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

const size_t MAPPED_FROM = 1 << 20;

}  // namespace

std::unique_ptr<Shadow> Shadow::make(size_t bytes) {
  const size_t granules = (bytes + GRANULE - 1) / GRANULE;
  const size_t flags = bytes / 8 + 2;
  const size_t needed = granules * (2 * sizeof(Stamp) + sizeof(PlaceCode)) + flags;
  std::unique_ptr<Shadow> shadow(new Shadow);
  void* memory;
  if (needed < MAPPED_FROM) {
    memory = calloc(1, needed);
    if (!memory) return nullptr;
  } else {
    memory = mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    shadow->mapped_bytes_ = needed;
  }
  shadow->granules_ = granules;
  shadow->stores_ = static_cast<Stamp*>(memory);
  shadow->loads_ = shadow->stores_ + granules;
  shadow->places_ = reinterpret_cast<PlaceCode*>(shadow->loads_ + granules);
  shadow->written_ = reinterpret_cast<unsigned char*>(shadow->places_ + granules);
  return shadow;
}

Shadow::~Shadow() {
  if (mapped_bytes_) {
    munmap(stores_, mapped_bytes_);
  } else {
    free(stores_);
  }
}

size_t Shadow::first_unwritten(size_t offset, size_t bytes) const {
  size_t at = offset;
  while (at < offset + bytes) {
    const unsigned flags = __atomic_load_n(written_ + at / 8, __ATOMIC_RELAXED);
    if (at % 8 == 0 && flags == 0xff) {
      at += 8;
    } else if (flags >> at % 8 & 1u) {
      at++;
    } else {
      return at;
    }
  }
  return offset + bytes;
}

void Shadow::mark_written(size_t offset, size_t bytes) {
  const size_t end = offset + bytes;
  // Neighbours in one byte of flags may be marked by another thread of the host at the same time.
  while (offset < end && (offset % 8 || end - offset < 8)) {
    const size_t count = std::min(end - offset, 8 - offset % 8);
    __atomic_fetch_or(written_ + offset / 8, static_cast<unsigned char>(((1u << count) - 1) << offset % 8),
                      __ATOMIC_RELAXED);
    offset += count;
  }
  const size_t whole = (end - offset) / 8;
  memset(written_ + offset / 8, 0xff, whole);
  offset += 8 * whole;
  if (offset < end) {
    __atomic_fetch_or(written_ + offset / 8, static_cast<unsigned char>((1u << (end - offset)) - 1), __ATOMIC_RELAXED);
  }
}

void Shadow::copy_written(size_t offset, const Shadow& from, size_t from_offset, size_t bytes) {
  if (from.is_written(from_offset, bytes)) return mark_written(offset, bytes);
  // Both may be the same shadow, and the ranges may overlap.
  std::vector<bool> flags(bytes);
  for (size_t i = 0; i < bytes; i++) flags[i] = from.is_written(from_offset + i, 1);
  for (size_t i = 0; i < bytes; i++) {
    const unsigned char flag = static_cast<unsigned char>(1u << (offset + i) % 8);
    unsigned char* const at = written_ + (offset + i) / 8;
    if (flags[i]) {
      __atomic_fetch_or(at, flag, __ATOMIC_RELAXED);
    } else {
      __atomic_fetch_and(at, static_cast<unsigned char>(~flag), __ATOMIC_RELAXED);
    }
  }
}

void Shadow::forget_stamps() {
  // Pages that nobody used stay unused.
  if (mapped_bytes_) {
    for (size_t i = 0; i < 2 * granules_; i++) {
      if (stores_[i]) stores_[i] = 0;
    }
  } else {
    memset(stores_, 0, 2 * granules_ * sizeof(Stamp));
  }
}
