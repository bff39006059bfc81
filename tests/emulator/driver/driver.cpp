// The driver's entry points beside launches and captures. Work is done at once, in the thread that calls: a stream is
// in order by construction, and everything has finished when a call returns.
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

HandleTable<Context, 0x11> context_handles;
HandleTable<Stream, 0x12> stream_handles;
HandleTable<Event, 0x13> event_handles;
HandleTable<Module, 0x14> module_handles;
HandleTable<Function, 0x15> function_handles;
HandleTable<Graph, 0x16> graph_handles;
HandleTable<Graph, 0x17> graph_exec_handles;
Settings settings;

namespace {

std::atomic<bool> initialised{false};
std::atomic<uint64_t> context_serial{0};
thread_local Context* current = nullptr;

// Handles that mean the null stream: none, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD.
bool names_null_stream(CUstream handle) { return reinterpret_cast<uintptr_t>(handle) <= 2; }

std::mutex primary_mutex;
std::map<int, Context*> primary_contexts;

Context* make_context(int ordinal) {
  Context* context = new Context(ordinal, *device_at(ordinal));
  context->handle = context_handles.insert<CUcontext>(context);
  return context;
}

CUresult check_device(CUdevice device) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  return device_at(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult create_stream(CUstream* handle, int priority) {
  if (!handle) return CUDA_ERROR_INVALID_VALUE;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  Stream* stream = new Stream{current, false, priority, nullptr, {}, {}};
  stream->handle = *handle = stream_handles.insert<CUstream>(stream);
  return CUDA_SUCCESS;
}

// The streams and contexts of copies: `stream` is null for the calls without one, which work on the current context.
CUresult copy(Stream* stream, Call kind, const std::function<void(DeviceMemory&)>& carry_out, CUdeviceptr first,
              CUdeviceptr second, size_t bytes) {
  Context* context = stream ? stream->context : current;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  CUresult status = stream ? CUDA_SUCCESS : refuse_while_capturing();
  if (stream && kind == Call::HOST_COPY) status = refuse_in_capture(*stream);
  if (status != CUDA_SUCCESS) return status;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!context->memory.contains(first, bytes) || !context->memory.contains(second, bytes))
    return CUDA_ERROR_INVALID_VALUE;
  if (!stream) {
    count(kind, *context);
    carry_out(context->memory);
    return CUDA_SUCCESS;
  }
  count(kind, *stream);
  return submit(*stream, [carry_out](Stream& on) {
    carry_out(on.context->memory);
    return CUDA_SUCCESS;
  });
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

CUresult copy_to_device(Stream* stream, CUdeviceptr to, const void* from, size_t bytes) {
  if (!from && bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto carry_out = [=](DeviceMemory& memory) {
    memcpy(pointer(to), from, bytes);
    memory.mark_written(to, bytes);
  };
  return copy(stream, Call::HOST_COPY, carry_out, to, to, bytes);
}

CUresult copy_to_host(Stream* stream, void* to, CUdeviceptr from, size_t bytes) {
  if (!to && bytes) return CUDA_ERROR_INVALID_VALUE;
  return copy(stream, Call::HOST_COPY, [=](DeviceMemory&) { memcpy(to, pointer(from), bytes); }, from, from, bytes);
}

CUresult copy_on_device(Stream* stream, CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  const auto carry_out = [=](DeviceMemory& memory) {
    memmove(pointer(to), pointer(from), bytes);
    memory.copy_written(to, memory, from, bytes);
  };
  return copy(stream, Call::DEVICE_COPY, carry_out, from, to, bytes);
}

CUresult fill(Stream* stream, CUdeviceptr to, unsigned char value, size_t bytes) {
  const auto carry_out = [=](DeviceMemory& memory) {
    memset(pointer(to), value, bytes);
    memory.mark_written(to, bytes);
  };
  return copy(stream, Call::MEMSET, carry_out, to, to, bytes);
}

template <class Value>
CUresult fill_words(Stream* stream, CUdeviceptr to, Value value, size_t words) {
  if (to % sizeof(Value)) return CUDA_ERROR_INVALID_VALUE;
  Value* first = static_cast<Value*>(pointer(to));
  const auto carry_out = [=](DeviceMemory& memory) {
    std::fill(first, first + words, value);
    memory.mark_written(to, words * sizeof(Value));
  };
  return copy(stream, Call::MEMSET, carry_out, to, to, words * sizeof(Value));
}

CUresult allocate(CUdeviceptr* address, size_t bytes) {
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const CUresult status = refuse_while_capturing();
  if (status != CUDA_SUCCESS) return status;
  count(Call::ALLOCATION, *current);
  return current->memory.allocate(bytes, address);
}

// A call on a stream, by its handle.
template <class Work>
CUresult on_stream(CUstream handle, Work work) {
  Stream* stream = find_stream(handle);
  return stream ? work(*stream) : CUDA_ERROR_INVALID_HANDLE;
}

struct ErrorText {
  CUresult code;
  const char* name;
  const char* text;
};

const ErrorText ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_UNSUPPORTED_LIMIT, "CUDA_ERROR_UNSUPPORTED_LIMIT", "limit is not supported on this architecture"},
    {CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {CUDA_ERROR_FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM",
     "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {CUDA_ERROR_LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {CUDA_ERROR_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
     "too many blocks in cooperative launch"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {CUDA_ERROR_INVALID_CLUSTER_SIZE, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "cluster configuration is invalid"},
};

const ErrorText* find_error(CUresult code) {
  for (const ErrorText& error : ERRORS) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

Context::Context(int device_ordinal, const Device& described)
    : serial(++context_serial),
      ordinal(device_ordinal),
      device(described),
      memory(described.memory_bytes),
      null_stream{this, true, 0, nullptr, {}, {}} {}

Activity& Stream::activity() {
  if (!is_null) return own_activity;
  thread_local std::unordered_map<uint64_t, std::unique_ptr<Activity>> of_context;
  std::unique_ptr<Activity>& mine = of_context[context->serial];
  if (!mine) mine = std::make_unique<Activity>();
  return *mine;
}

Context* current_context() { return current; }

CallCounts& thread_calls() {
  thread_local CallCounts counts;
  return counts;
}

Schedule& thread_schedule() {
  thread_local Schedule schedule;
  return schedule;
}

std::string& thread_fault() {
  thread_local std::string text;
  return text;
}

Stream* find_stream(CUstream handle) {
  if (names_null_stream(handle)) return current ? &current->null_stream : nullptr;
  return stream_handles.find(handle);
}

void count(Call call, Context& context) {
  context.calls.add(call);
  thread_calls().add(call);
}

void count(Call call, Stream& stream) {
  stream.activity().calls.add(call);
  count(call, *stream.context);
}

extern "C" {

// ---- errors, version, devices --------------------------------------------------------------------------------------

CUresult cuGetErrorName(CUresult code, const char** name) {
  const ErrorText* error = find_error(code);
  *name = error ? error->name : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
  const ErrorText* error = find_error(code);
  *text = error ? error->text : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuInit(unsigned flags) {
  MAY_FAIL();
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (settings.no_device || devices().empty()) return CUDA_ERROR_NO_DEVICE;
  initialised = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  MAY_FAIL();
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = settings.driver_version;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* number) {
  MAY_FAIL();
  if (!number) return CUDA_ERROR_INVALID_VALUE;
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  *number = settings.no_device ? 0 : int(devices().size());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  MAY_FAIL();
  const CUresult status = settings.no_device ? CUDA_ERROR_NO_DEVICE : check_device(ordinal);
  if (status == CUDA_SUCCESS) *device = ordinal;
  return status;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status == CUDA_SUCCESS && length > 0) snprintf(name, size_t(length), "%s", device_at(device)->name.c_str());
  return status;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status != CUDA_SUCCESS) return status;
  memset(uuid->bytes, 0, sizeof uuid->bytes);
  snprintf(uuid->bytes, sizeof uuid->bytes, "stand-in %d", device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status == CUDA_SUCCESS) *bytes = device_at(device)->memory_bytes;
  return status;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status != CUDA_SUCCESS) return status;
  if (!value || attribute < 1 || attribute >= int(DEVICE_ATTRIBUTES)) return CUDA_ERROR_INVALID_VALUE;
  *value = device_at(device)->attribute(CUdevice_attribute(attribute));
  return CUDA_SUCCESS;
}

// ---- contexts ------------------------------------------------------------------------------------------------------

CUresult cuDevicePrimaryCtxRetain(CUcontext* handle, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status != CUDA_SUCCESS) return status;
  std::lock_guard<std::mutex> lock(primary_mutex);
  Context*& context = primary_contexts[device];
  if (!context) context = make_context(device);
  context->retained++;
  *handle = context->handle;
  return CUDA_SUCCESS;
}

// The context outlives its last user, as if there always were another: tests that run side by side share it.
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  MAY_FAIL();
  std::lock_guard<std::mutex> lock(primary_mutex);
  auto entry = primary_contexts.find(device);
  if (entry == primary_contexts.end() || entry->second->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  entry->second->retained--;
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(CUcontext* handle, void*, unsigned, CUdevice device) {
  MAY_FAIL();
  const CUresult status = check_device(device);
  if (status != CUDA_SUCCESS) return status;
  current = make_context(device);
  *handle = current->handle;
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v3(CUcontext* handle, void*, int, unsigned flags, CUdevice device) {
  return cuCtxCreate_v4(handle, nullptr, flags, device);
}

CUresult cuCtxCreate_v2(CUcontext* handle, unsigned flags, CUdevice device) {
  return cuCtxCreate_v4(handle, nullptr, flags, device);
}

CUresult cuCtxDestroy_v2(CUcontext handle) {
  MAY_FAIL();
  Context* context = context_handles.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  {
    std::lock_guard<std::mutex> lock(primary_mutex);
    auto entry = primary_contexts.find(context->ordinal);
    if (entry != primary_contexts.end() && entry->second == context) return CUDA_ERROR_INVALID_CONTEXT;
  }
  context_handles.remove(handle);
  if (current == context) current = nullptr;
  delete context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  MAY_FAIL();
  Context* context = handle ? context_handles.find(handle) : nullptr;
  if (handle && !context) return CUDA_ERROR_INVALID_CONTEXT;
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
  MAY_FAIL();
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  *handle = current ? current->handle : nullptr;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current->ordinal;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  count(Call::SYNCHRONIZATION, *current);
  return refuse_while_capturing();
}

// Settings that change nothing here.
CUresult cuCtxSetFlags(unsigned) {
  MAY_FAIL();
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxSetCacheConfig(int) {
  MAY_FAIL();
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuCtxGetCacheConfig(int* configuration) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *configuration = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(int, size_t) {
  MAY_FAIL();
  return CUDA_ERROR_UNSUPPORTED_LIMIT;
}
CUresult cuCtxGetLimit(size_t*, int) {
  MAY_FAIL();
  return CUDA_ERROR_UNSUPPORTED_LIMIT;
}
CUresult cuProfilerStart() {
  MAY_FAIL();
  return CUDA_SUCCESS;
}
CUresult cuProfilerStop() {
  MAY_FAIL();
  return CUDA_SUCCESS;
}

// ---- streams -------------------------------------------------------------------------------------------------------

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* handle, unsigned) {
  MAY_FAIL();
  return create_stream(handle, 0);
}
CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned, int priority) {
  MAY_FAIL();
  return create_stream(handle, priority);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
  MAY_FAIL();
  Stream* stream = stream_handles.remove(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) stream->capture->invalidated = true;
  delete stream;
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [](Stream& stream) {
    count(Call::SYNCHRONIZATION, stream);
    return refuse_in_capture(stream);
  });
}

CUresult cuStreamQuery(CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, refuse_in_capture);
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) {
    *priority = stream.priority;
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) {
    *context = stream.context->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
  MAY_FAIL();
  Event* event = event_handles.find(event_handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  return on_stream(handle, [=](Stream& stream) {
    count(Call::EVENT, stream);
    return wait_for_event(stream, *event);
  });
}

CUresult cuStreamAttachMemAsync(CUstream handle, CUdeviceptr, size_t, unsigned) {
  MAY_FAIL();
  return on_stream(handle, [](Stream&) { return CUDA_SUCCESS; });
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* user) {
  MAY_FAIL();
  if (!function) return CUDA_ERROR_INVALID_VALUE;
  return on_stream(handle, [=](Stream& stream) {
    return submit(stream, [=](Stream&) {
      function(user);
      return CUDA_SUCCESS;
    });
  });
}

// ---- events --------------------------------------------------------------------------------------------------------

CUresult cuEventCreate(CUevent* handle, unsigned flags) {
  MAY_FAIL();
  if (!handle) return CUDA_ERROR_INVALID_VALUE;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  Event* event = new Event(current, !(flags & CU_EVENT_DISABLE_TIMING));
  *handle = event_handles.insert<CUevent>(event);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent handle) {
  MAY_FAIL();
  Event* event = event_handles.remove(handle);
  delete event;
  return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream stream_handle) {
  MAY_FAIL();
  Event* event = event_handles.find(handle);
  Stream* stream = find_stream(stream_handle);
  if (!event || !stream || event->context != stream->context) return CUDA_ERROR_INVALID_HANDLE;
  count(Call::EVENT, *stream);
  note_captured_event(*stream, *event);
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent handle) {
  MAY_FAIL();
  Event* event = event_handles.find(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  return event->capture ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent handle) {
  MAY_FAIL();
  Event* event = event_handles.find(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  count(Call::SYNCHRONIZATION, *event->context);
  return event->capture ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  MAY_FAIL();
  Event* start = event_handles.find(start_handle);
  Event* end = event_handles.find(end_handle);
  if (!start || !end || !start->timing || !end->timing || !start->recorded || !end->recorded)
    return CUDA_ERROR_INVALID_HANDLE;
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- memory --------------------------------------------------------------------------------------------------------

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  MAY_FAIL();
  return allocate(address, bytes);
}
CUresult cuMemAllocManaged(CUdeviceptr* address, size_t bytes, unsigned) {
  MAY_FAIL();
  return allocate(address, bytes);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const CUresult status = refuse_while_capturing();
  if (status != CUDA_SUCCESS) return status;
  count(Call::FREE, *current);
  return current->memory.release(address);
}

CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream handle) {
  MAY_FAIL();
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  return on_stream(handle, [=](Stream& stream) {
    count(Call::ALLOCATION, stream);
    const CUresult status = refuse_in_capture(stream);
    return status == CUDA_SUCCESS ? stream.context->memory.allocate(bytes, address) : status;
  });
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) {
    count(Call::FREE, stream);
    const CUresult status = refuse_in_capture(stream);
    return status == CUDA_SUCCESS ? stream.context->memory.release(address) : status;
  });
}

CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  MAY_FAIL();
  if (!memory || !bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *memory = malloc(bytes);
  return *memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFreeHost(void* memory) {
  MAY_FAIL();
  free(memory);
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  MAY_FAIL();
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const size_t limit = current->memory.limit();
  const size_t used = current->memory.live_bytes();
  *available = used < limit ? limit - used : 0;
  *total = current->memory.capacity();
  return CUDA_SUCCESS;
}

CUresult cuMemAdvise_v2(CUdeviceptr, size_t, int, CUmemLocation) {
  MAY_FAIL();
  return CUDA_SUCCESS;
}
CUresult cuMemPrefetchAsync_v2(CUdeviceptr, size_t, CUmemLocation, unsigned, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [](Stream&) { return CUDA_SUCCESS; });
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  MAY_FAIL();
  return copy_to_device(nullptr, to, from, bytes);
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  MAY_FAIL();
  return copy_to_host(nullptr, to, from, bytes);
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  MAY_FAIL();
  return copy_on_device(nullptr, to, from, bytes);
}
CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
  MAY_FAIL();
  return fill(nullptr, to, value, bytes);
}
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t words) {
  MAY_FAIL();
  return fill_words(nullptr, to, value, words);
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t words) {
  MAY_FAIL();
  return fill_words(nullptr, to, value, words);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return copy_to_device(&stream, to, from, bytes); });
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return copy_to_host(&stream, to, from, bytes); });
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return copy_on_device(&stream, to, from, bytes); });
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return fill(&stream, to, value, bytes); });
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t words, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return fill_words(&stream, to, value, words); });
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t words, CUstream handle) {
  MAY_FAIL();
  return on_stream(handle, [=](Stream& stream) { return fill_words(&stream, to, value, words); });
}

CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_handle, CUdeviceptr from, CUcontext from_handle, size_t bytes,
                           CUstream handle) {
  MAY_FAIL();
  Context* to_context = context_handles.find(to_handle);
  Context* from_context = context_handles.find(from_handle);
  if (!to_context || !from_context) return CUDA_ERROR_INVALID_CONTEXT;
  return on_stream(handle, [=](Stream& stream) {
    if (!to_context->memory.contains(to, bytes) || !from_context->memory.contains(from, bytes))
      return CUDA_ERROR_INVALID_VALUE;
    count(Call::DEVICE_COPY, stream);
    return submit(stream, [=](Stream&) {
      memmove(pointer(to), pointer(from), bytes);
      if (bytes) to_context->memory.copy_written(to, from_context->memory, from, bytes);
      return CUDA_SUCCESS;
    });
  });
}

// ---- modules and functions -----------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* handle, const void* data) {
  MAY_FAIL();
  if (!handle) return CUDA_ERROR_INVALID_VALUE;
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  count(Call::MODULE_LOAD, *current);
  std::unique_ptr<Image> image;
  const CUresult status = Image::load(data, current->device.compute_capability(), &image);
  if (status != CUDA_SUCCESS) return status;
  Module* module = new Module{current, std::move(image), {}, {}};
  *handle = module_handles.insert<CUmodule>(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* handle, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string content;
  char part[4096];
  for (size_t count; (count = fread(part, 1, sizeof part, file)) > 0;) content.append(part, count);
  fclose(file);
  return cuModuleLoadData(handle, content.c_str());
}

CUresult cuModuleUnload(CUmodule handle) {
  MAY_FAIL();
  Module* module = module_handles.remove(handle);
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  for (const auto& function : module->functions) delete function_handles.remove(function.second);
  delete module;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module_handle, const char* name) {
  MAY_FAIL();
  Module* module = module_handles.find(module_handle);
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  if (!handle || !name) return CUDA_ERROR_INVALID_VALUE;
  const StandInKernel* kernel = module->image->kernel(name);
  if (!kernel) return CUDA_ERROR_NOT_FOUND;
  std::lock_guard<std::mutex> lock(module->mutex);
  CUfunction& known = module->functions[name];
  if (!known) {
    const int without_asking = module->context->device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
    known = function_handles.insert<CUfunction>(
        new Function{module->context, module->image, kernel, {without_asking}, {-1}, {false}});
  }
  *handle = known;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule module, const char*) {
  MAY_FAIL();
  return module_handles.find(module) ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = int(function->kernel->threads);
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = ASSUMED_REGISTERS;
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *value = function->context->device.compute_capability();
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = function->max_dynamic_shared;
      break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      *value = function->carveout;
      break;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET:
      *value = function->kernel->cluster != 0;
      break;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
      *value = int(function->kernel->cluster);
      break;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
      *value = function->kernel->cluster != 0;
      break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      *value = function->non_portable_cluster;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
      *value = 0;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (value < 0 ||
          value > function->context->device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)) {
        return CUDA_ERROR_INVALID_VALUE;
      }
      function->max_dynamic_shared = value;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      if (value < -1 || value > 100) return CUDA_ERROR_INVALID_VALUE;
      function->carveout = value;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      function->non_portable_cluster = value != 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuFuncSetCacheConfig(CUfunction handle, int) {
  MAY_FAIL();
  return function_handles.find(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

// ---- occupancy -----------------------------------------------------------------------------------------------------

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int block_threads,
                                                              size_t shared_bytes, unsigned) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (!blocks || block_threads <= 0) return CUDA_ERROR_INVALID_VALUE;
  *blocks = resident_blocks(*function, uint64_t(block_threads), shared_bytes);
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int block_threads,
                                                     size_t shared_bytes) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, block_threads, shared_bytes, 0);
}

CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction handle, int blocks, int block_threads) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (!bytes || blocks <= 0 || block_threads <= 0) return CUDA_ERROR_INVALID_VALUE;
  const Device& device = function->context->device;
  const int share = device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) / blocks -
                    device.attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK);
  const int most = device.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  *bytes = size_t(share < 0 ? 0 : share < most ? share : most);
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction handle,
                                                   CUoccupancyB2DSize shared_of_block, size_t shared_bytes,
                                                   int block_limit, unsigned) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  const Device& device = function->context->device;
  int largest = int(function->kernel->threads);
  if (block_limit > 0 && block_limit < largest) largest = block_limit;
  int best = 0;
  for (int threads = largest / WARP_THREADS * WARP_THREADS; threads > 0; threads -= WARP_THREADS) {
    const size_t shared = shared_of_block ? shared_of_block(threads) : shared_bytes;
    const int resident = resident_blocks(*function, uint64_t(threads), shared) * threads;
    if (resident <= best) continue;
    best = resident;
    *block = threads;
    *grid = resident / threads * device.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  }
  return best ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction handle, CUoccupancyB2DSize shared_of_block,
                                          size_t shared_bytes, int block_limit) {
  return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, handle, shared_of_block, shared_bytes, block_limit, 0);
}

// ---- launches ------------------------------------------------------------------------------------------------------

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** arguments,
                        void**) {
  MAY_FAIL();
  return launch(function, stream,
                {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, {0, 0, 0}, shared_bytes, false}, arguments);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                   CUstream stream, void** arguments) {
  MAY_FAIL();
  return launch(function, stream,
                {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, {0, 0, 0}, shared_bytes, true}, arguments);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction function, void** arguments, void**) {
  MAY_FAIL();
  if (!configuration) return CUDA_ERROR_INVALID_VALUE;
  const CUlaunchConfig& c = *configuration;
  LaunchRequest request = {
      {c.grid_x, c.grid_y, c.grid_z}, {c.block_x, c.block_y, c.block_z}, {0, 0, 0}, c.shared_bytes, false};
  for (unsigned i = 0; i < c.attribute_count; i++) {
    const CUlaunchAttribute& attribute = c.attributes[i];
    switch (attribute.id) {
      case CU_LAUNCH_ATTRIBUTE_IGNORE:
        break;
      case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
        request.cooperative = attribute.value.cooperative != 0;
        break;
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        request.cluster = {attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z};
        if (request.cluster.count() == 0) return CUDA_ERROR_INVALID_VALUE;
        break;
      default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  return launch(function, c.stream, request, arguments);
}

// Clusters that fit on the device at the same time, as if every multiprocessor could take part in any of them.
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction handle, const CUlaunchConfig* configuration) {
  MAY_FAIL();
  Function* function = function_handles.find(handle);
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  if (!clusters || !configuration) return CUDA_ERROR_INVALID_VALUE;
  uint64_t blocks = function->kernel->cluster ? function->kernel->cluster : 1;
  for (unsigned i = 0; i < configuration->attribute_count; i++) {
    const CUlaunchAttribute& attribute = configuration->attributes[i];
    if (attribute.id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    blocks = Extent3{attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z}.count();
  }
  const uint64_t limit = function->non_portable_cluster ? 16 : 8;
  if (blocks == 0 || blocks > limit) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  const uint64_t threads = Extent3{configuration->block_x, configuration->block_y, configuration->block_z}.count();
  const uint64_t resident = uint64_t(resident_blocks(*function, threads, configuration->shared_bytes)) *
                            uint64_t(function->context->device.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
  *clusters = int(resident / blocks);
  return CUDA_SUCCESS;
}
}
