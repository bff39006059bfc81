// What the stand-in NVRTC calls a cubin: a shared object with a trailer, by which the driver recognises its own images
// and notices damaged ones.
#pragma once

#include <cstddef>
#include <cstdint>

struct ImageTrailer {
  char magic[16];
  uint64_t architecture;  // that it was compiled for: 90 is 9.0
  uint64_t bytes;         // of the shared object before it
  uint64_t hash;          // of the architecture and those bytes
};

const char IMAGE_MAGIC[16] = "stand-in cubin";
// How PTX text from the stand-in NVRTC begins. There is nothing in it to run: the driver knows it only to refuse it.
const char PTX_MAGIC[] = "//\n// PTX of the stand-in NVRTC\n";

// FNV-1a.
inline uint64_t hash_bytes(const void* data, size_t bytes, uint64_t hash = 0xcbf29ce484222325u) {
  const unsigned char* byte = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ byte[i]) * 0x100000001b3u;
  return hash;
}

inline uint64_t hash_image(uint64_t architecture, const void* object, size_t bytes) {
  return hash_bytes(object, bytes, hash_bytes(&architecture, sizeof architecture));
}
