// A loaded image: the shared object that the stand-in NVRTC made from kernel sources.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda_api.h"
#include "stand_in_abi.h"

class Image {
 public:
  // Loads a private copy of the image for a device of this compute capability (90 for 9.0).
  static CUresult load(const void* data, int compute_capability, std::unique_ptr<Image>* image);
  ~Image();
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  const StandInKernel* kernel(const char* name) const;
  // Constants of the kernels lie in the image: they may be read.
  bool holds(uintptr_t address) const { return address - begin_ < size_; }
  // "file:line" of an instruction, or an empty text where there is no such knowledge.
  std::string line_of(const void* instruction) const { return line_of_offset(offset_of(instruction)); }
  // The same by the instruction's distance from the image's beginning.
  std::string line_of_offset(uintptr_t offset) const;
  uintptr_t offset_of(const void* instruction) const { return reinterpret_cast<uintptr_t>(instruction) - begin_; }

 private:
  Image(int descriptor, void* library) : descriptor_(descriptor), library_(library) {}

  int descriptor_;  // the file in memory; stays open, for line_of reads its debugging information
  void* library_;
  uintptr_t begin_ = 0;
  size_t size_ = 0;
};
