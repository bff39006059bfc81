// Launches: refused with the error a GPU's driver would give, or run and written down.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "driver.h"

namespace {

const unsigned PORTABLE_CLUSTER = 8;  // blocks that a cluster may have on any device with clusters
const unsigned LARGEST_CLUSTER = 16;
const size_t RECORDS_KEPT = 1 << 16;  // a stream that nobody asks about must not fill the memory

bool within(Extent3 extent, const Device& device, CUdevice_attribute x, CUdevice_attribute y, CUdevice_attribute z) {
  return extent.x >= 1 && extent.y >= 1 && extent.z >= 1 && extent.x <= unsigned(device.attribute(x)) &&
         extent.y <= unsigned(device.attribute(y)) && extent.z <= unsigned(device.attribute(z));
}

CUresult check_cluster(const Function& function, const LaunchRequest& request, Extent3 cluster) {
  const Device& device = function.context->device;
  const uint64_t blocks = cluster.count();
  if (blocks == 0) return CUDA_ERROR_INVALID_VALUE;
  const bool asked_for = request.cluster.count() != 0 || function.kernel->cluster != 0;
  if (!asked_for) return CUDA_SUCCESS;
  if (!device.attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)) return CUDA_ERROR_NOT_SUPPORTED;
  // What the kernel was compiled for, the launch may repeat but not change.
  if (function.kernel->cluster && (cluster.x != function.kernel->cluster || cluster.y != 1 || cluster.z != 1)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (blocks > (function.non_portable_cluster ? LARGEST_CLUSTER : PORTABLE_CLUSTER))
    return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  if (request.grid.x % cluster.x || request.grid.y % cluster.y || request.grid.z % cluster.z)
    return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

CUresult check(const Function& function, const LaunchRequest& request, Extent3 cluster) {
  const Device& device = function.context->device;
  if (!within(request.grid, device, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y,
              CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z) ||
      !within(request.block, device, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y,
              CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const uint64_t threads = request.block.count();
  if (threads > uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)) ||
      threads > function.kernel->threads) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (request.shared_bytes > unsigned(function.max_dynamic_shared)) return CUDA_ERROR_INVALID_VALUE;
  const CUresult status = check_cluster(function, request, cluster);
  if (status != CUDA_SUCCESS) return status;
  if (request.cooperative) {
    if (!device.attribute(CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)) return CUDA_ERROR_NOT_SUPPORTED;
    const uint64_t resident = uint64_t(resident_blocks(function, threads, request.shared_bytes)) *
                              uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
    if (request.grid.count() > resident) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  }
  return CUDA_SUCCESS;
}

void record(Stream& stream, LaunchRecord entry) {
  Activity& activity = stream.activity();
  std::lock_guard<std::mutex> lock(activity.mutex);
  if (activity.launches.size() == RECORDS_KEPT) activity.launches.pop_front();
  activity.launches.push_back(std::move(entry));
}

CUresult run(Stream& stream, const StandInKernel& kernel, const Image& image, const LaunchRequest& request,
             Extent3 cluster, void** arguments) {
  DeviceMemory& memory = stream.context->memory;
  const Schedule& schedule = thread_schedule();
  const KernelOutcome outcome =
      run_kernel({&kernel, &image, request.grid, request.block, cluster, request.shared_bytes, request.cooperative,
                  arguments, memory.map(), memory.next_launch(), schedule.shuffled, schedule.seed});
  if (outcome.status != CUDA_SUCCESS) {
    fprintf(stderr, "stand-in driver: %s\n", outcome.fault.c_str());
    thread_fault() = outcome.fault;
    return outcome.status;
  }
  record(stream, {kernel.name, request.grid, request.block, cluster, request.shared_bytes, request.cooperative,
                  outcome.bytes_loaded, outcome.bytes_stored, outcome.sectors_loaded, outcome.sectors_stored});
  return CUDA_SUCCESS;
}

}  // namespace

int resident_blocks(const Function& function, uint64_t block_threads, size_t shared_bytes) {
  const Device& device = function.context->device;
  const uint64_t warps = (block_threads + WARP_THREADS - 1) / WARP_THREADS;
  const uint64_t threads = warps * WARP_THREADS;
  if (block_threads == 0 || threads > uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK))) return 0;
  if (shared_bytes > size_t(function.max_dynamic_shared)) return 0;
  const uint64_t shared = shared_bytes + size_t(device.attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK));
  uint64_t blocks = uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR));
  blocks = std::min(blocks, uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)) / threads);
  blocks = std::min(blocks, uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)) /
                                (threads * ASSUMED_REGISTERS));
  if (shared)
    blocks =
        std::min(blocks, uint64_t(device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)) / shared);
  return int(blocks);
}

CUresult launch(CUfunction function_handle, CUstream stream_handle, const LaunchRequest& request, void** arguments) {
  Function* function = function_handles.find(function_handle);
  Stream* stream = find_stream(stream_handle);
  if (!function || !stream || function->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
  if (function->context->empty_launches.load(std::memory_order_relaxed)) return CUDA_SUCCESS;

  const StandInKernel& kernel = *function->kernel;
  Extent3 cluster = request.cluster;
  if (cluster.count() == 0) cluster = {std::max(kernel.cluster, 1u), 1, 1};
  const CUresult status = check(*function, request, cluster);
  if (status != CUDA_SUCCESS) return status;
  if (!arguments || !arguments[0]) return CUDA_ERROR_INVALID_VALUE;
  count(Call::LAUNCH, *stream);
  if (!stream->capture) return run(*stream, kernel, *function->image, request, cluster, arguments);

  // The argument's bytes become the graph's own, and so does a share in the image.
  std::vector<unsigned char> argument(kernel.argument_bytes);
  memcpy(argument.data(), arguments[0], argument.size());
  return submit(*stream, [=, image = function->image, &kernel](Stream& on) mutable {
    void* list[] = {argument.data()};
    return run(on, kernel, *image, request, cluster, list);
  });
}
