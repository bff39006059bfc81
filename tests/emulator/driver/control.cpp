// What tests ask of the stand-in beside CUDA: settings, records, counters. src/lib.rs is the other side.
#include "driver.h"

std::vector<Device>& devices() {
  static std::vector<Device> list;
  return list;
}

const Device* device_at(CUdevice ordinal) {
  return ordinal >= 0 && size_t(ordinal) < devices().size() ? &devices()[size_t(ordinal)] : nullptr;
}

namespace {

struct AttributeValue {
  int attribute;
  int value;
};

// LaunchRecord as C sees it.
struct LaunchView {
  const char* kernel;
  Extent3 grid, block, cluster;
  unsigned shared_bytes;
  unsigned cooperative;
  uint64_t bytes_loaded, bytes_stored;
  uint64_t sectors_loaded, sectors_stored;
};

void read(const CallCounts& counts, uint64_t* into) {
  for (size_t kind = 0; kind < CALL_KINDS; kind++) into[kind] = counts.of[kind].load(std::memory_order_relaxed);
}

}  // namespace

extern "C" {

void stand_in_add_device(const char* name, size_t memory_bytes, const AttributeValue* values, size_t count) {
  Device device = {name, memory_bytes, std::vector<int>(DEVICE_ATTRIBUTES, 0)};
  for (size_t i = 0; i < count; i++) device.attributes[size_t(values[i].attribute)] = values[i].value;
  devices().push_back(std::move(device));
}

void stand_in_set_driver_version(int version) { settings.driver_version = version; }
int stand_in_driver_version() { return settings.driver_version; }
void stand_in_set_no_device(bool none) { settings.no_device = none; }
void stand_in_use_portable_fibers(bool portable) { use_portable_fibers(portable); }

// Hands over the launches since the last time, oldest first, and forgets them.
CUresult stand_in_take_launches(CUstream handle, void (*each)(const LaunchView*, void*), void* user) {
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::deque<LaunchRecord> taken;
  {
    Activity& activity = stream->activity();
    std::lock_guard<std::mutex> lock(activity.mutex);
    taken.swap(activity.launches);
  }
  for (const LaunchRecord& launch : taken) {
    const LaunchView view = {launch.kernel.c_str(), launch.grid,          launch.block,        launch.cluster,
                             launch.shared_bytes,   launch.cooperative,   launch.bytes_loaded, launch.bytes_stored,
                             launch.sectors_loaded, launch.sectors_stored};
    each(&view, user);
  }
  return CUDA_SUCCESS;
}

CUresult stand_in_stream_calls(CUstream handle, uint64_t* counts) {
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  read(stream->activity().calls, counts);
  return CUDA_SUCCESS;
}

CUresult stand_in_context_calls(CUcontext handle, uint64_t* counts) {
  Context* context = context_handles.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  read(context->calls, counts);
  return CUDA_SUCCESS;
}

void stand_in_thread_calls(uint64_t* counts) { read(thread_calls(), counts); }

CUresult stand_in_live_memory(CUcontext handle, size_t* allocations, size_t* bytes) {
  Context* context = context_handles.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  *allocations = context->memory.live_allocations();
  *bytes = context->memory.live_bytes();
  return CUDA_SUCCESS;
}

CUresult stand_in_set_memory_limit(CUcontext handle, size_t bytes) {
  Context* context = context_handles.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  context->memory.set_limit(bytes);
  return CUDA_SUCCESS;
}

CUresult stand_in_set_empty_launches(CUcontext handle, bool empty) {
  Context* context = context_handles.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  context->empty_launches = empty;
  return CUDA_SUCCESS;
}

// For the launches of the calling thread: a random schedule that belongs to the seed, or the usual one.
void stand_in_set_schedule(bool shuffled, uint64_t seed) { thread_schedule() = {shuffled, seed}; }

// Calls back with the last fault of a kernel that the calling thread launched, if any, and forgets it.
void stand_in_take_fault(void (*each)(const char*, void*), void* user) {
  std::string fault;
  fault.swap(thread_fault());
  if (!fault.empty()) each(fault.c_str(), user);
}
}
