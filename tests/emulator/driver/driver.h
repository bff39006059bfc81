// What the driver's handles stand for: contexts, streams, events, modules, functions, graphs.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda_api.h"
#include "devices.h"
#include "handles.h"
#include "memory.h"
#include "module.h"
#include "simt.h"

struct Context;
struct Stream;

// Calls of one kind that a test may want to rule out on a hot path. src/lib.rs has the same order.
enum class Call { ALLOCATION, FREE, SYNCHRONIZATION, HOST_COPY, DEVICE_COPY, MEMSET, EVENT, MODULE_LOAD, LAUNCH };
enum : size_t { CALL_KINDS = 9 };

struct CallCounts {
  std::atomic<uint64_t> of[CALL_KINDS] = {};
  void add(Call call) { of[size_t(call)].fetch_add(1, std::memory_order_relaxed); }
};

struct LaunchRecord {
  std::string kernel;
  Extent3 grid, block, cluster;
  unsigned shared_bytes;
  bool cooperative;
  uint64_t bytes_loaded, bytes_stored;
  uint64_t sectors_loaded, sectors_stored;
};

// What happened on a stream.
struct Activity {
  CallCounts calls;
  std::mutex mutex;  // guards launches
  std::deque<LaunchRecord> launches;
};

typedef std::function<CUresult(Stream&)> GraphNode;
typedef std::vector<GraphNode> GraphNodes;

// A capture in progress: of one stream, and of those that wait for its events.
struct Capture {
  Stream* origin;
  std::thread::id thread;
  bool relaxed;
  bool invalidated = false;
  GraphNodes nodes;
  std::map<Stream*, bool> forks;  // and whether the origin has waited for them since
};

struct Stream {
  Context* context;
  bool is_null;
  int priority;
  CUstream handle;
  Activity own_activity;
  std::shared_ptr<Capture> capture;

  // All users of a device share its null stream, so there each thread of the host has its own account.
  Activity& activity();
};

struct Event {
  Event(Context* of, bool with_timing) : context(of), timing(with_timing) {}

  Context* context;
  bool timing;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Capture> capture;  // in which it was recorded last
  Stream* captured_stream = nullptr;
};

struct Function;

struct Module {
  Context* context;
  std::shared_ptr<Image> image;
  std::mutex mutex;  // guards functions
  std::map<std::string, CUfunction> functions;
};

struct Function {
  Context* context;
  std::shared_ptr<Image> image;
  const StandInKernel* kernel;
  std::atomic<int> max_dynamic_shared;
  std::atomic<int> carveout{-1};
  std::atomic<bool> non_portable_cluster{false};
};

struct Graph {
  GraphNodes nodes;
};

struct Context {
  Context(int ordinal, const Device& device);

  const uint64_t serial;  // never reused
  const int ordinal;
  const Device& device;
  CUcontext handle = nullptr;
  std::atomic<int> retained{0};
  std::atomic<bool> empty_launches{false};
  DeviceMemory memory;
  CallCounts calls;
  Stream null_stream;
};

extern HandleTable<Context, 0x11> context_handles;
extern HandleTable<Stream, 0x12> stream_handles;
extern HandleTable<Event, 0x13> event_handles;
extern HandleTable<Module, 0x14> module_handles;
extern HandleTable<Function, 0x15> function_handles;
extern HandleTable<Graph, 0x16> graph_handles;
extern HandleTable<Graph, 0x17> graph_exec_handles;

// The calling thread's.
Context* current_context();
CallCounts& thread_calls();
std::string& thread_fault();

// In which order the launches of the calling thread run their threads.
struct Schedule {
  bool shuffled = false;
  uint64_t seed = 0;
};
Schedule& thread_schedule();

// A null handle means the null stream of the current context.
Stream* find_stream(CUstream handle);
void count(Call call, Context& context);
void count(Call call, Stream& stream);

// ---- faults.cpp ----

// The error with which a test wants this call of the calling thread to fail, or success.
extern "C" unsigned stand_in_next_fault(const char* call);
CUresult next_fault(const char* call);

#define MAY_FAIL()                               \
  do {                                           \
    const CUresult fault = next_fault(__func__); \
    if (fault != CUDA_SUCCESS) return fault;     \
  } while (0)

// ---- launch.cpp ----

struct LaunchRequest {
  Extent3 grid, block;
  Extent3 cluster;  // of no blocks where the launch says nothing
  unsigned shared_bytes;
  bool cooperative;
};

CUresult launch(CUfunction function, CUstream stream, const LaunchRequest& request, void** arguments);
// How many blocks fit on a multiprocessor. Registers are a guess: the host knows nothing of a GPU's.
enum : unsigned { WARP_THREADS = 32, ASSUMED_REGISTERS = 32 };
int resident_blocks(const Function& function, uint64_t block_threads, size_t shared_bytes);

// ---- capture.cpp ----

// Carries the work out, or notes it where the stream is being captured.
CUresult submit(Stream& stream, GraphNode work);
// Ends the capture of this stream, if any, as a call does that a capture cannot hold.
CUresult refuse_in_capture(Stream& stream);
// The same for calls without a stream, where this thread captures.
CUresult refuse_while_capturing();
CUresult wait_for_event(Stream& stream, Event& event);
void note_captured_event(Stream& stream, Event& event);

// ---- process-wide settings ----

struct Settings {
  std::atomic<int> driver_version{13000};
  std::atomic<bool> no_device{false};
};
extern Settings settings;
