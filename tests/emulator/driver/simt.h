// Runs a kernel as a GPU would: every CUDA thread on its own, warps, blocks, clusters and grids meeting at their
// barriers.
//
// Each thread is a fiber. The blocks of a cluster (of the whole grid, where the launch is cooperative) live at the same
// time and make a gang, which one thread of the host runs; gangs come one after another, or side by side on several
// threads of the host. A kernel cannot tell, unless it is wrong.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda_api.h"
#include "memory.h"
#include "module.h"
#include "stand_in_abi.h"

struct Extent3 {
  unsigned x, y, z;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct KernelLaunch {
  const StandInKernel* kernel;
  const Image* image;
  Extent3 grid, block, cluster;
  unsigned shared_bytes;
  bool cooperative;
  void** arguments;
  std::shared_ptr<const MemoryMap> memory;
  uint32_t number;  // of the launch in its context: never 0
  bool shuffled;    // by the seed; else threads run in their order
  uint64_t seed;
};

struct KernelOutcome {
  CUresult status = CUDA_SUCCESS;
  std::string fault;  // what the kernel did wrong, where, and which thread did it
  uint64_t bytes_loaded = 0;
  uint64_t bytes_stored = 0;
  uint64_t sectors_loaded = 0;
  uint64_t sectors_stored = 0;
};

KernelOutcome run_kernel(const KernelLaunch& launch);

// Switch fibers by the C library even where there is a faster way; for launches that begin afterwards.
void use_portable_fibers(bool portable);
