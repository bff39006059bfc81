// Stream capture: work is noted in a graph instead of being done, and calls that a graph cannot hold end the capture.
#include "driver.h"

namespace {

// Captures that this thread began and that forbid it to synchronise or allocate.
thread_local std::vector<std::shared_ptr<Capture>> strict_captures;

CUresult invalidate(Capture& capture, CUresult why) {
  capture.invalidated = true;
  return why;
}

void forget(const std::shared_ptr<Capture>& capture) {
  for (size_t i = 0; i < strict_captures.size(); i++) {
    if (strict_captures[i] != capture) continue;
    strict_captures.erase(strict_captures.begin() + ptrdiff_t(i));
    return;
  }
}

}  // namespace

CUresult submit(Stream& stream, GraphNode work) {
  if (!stream.capture) return work(stream);
  Capture& capture = *stream.capture;
  if (capture.invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  capture.nodes.push_back(std::move(work));
  auto fork = capture.forks.find(&stream);
  if (fork != capture.forks.end()) fork->second = false;
  return CUDA_SUCCESS;
}

CUresult refuse_in_capture(Stream& stream) {
  return stream.capture ? invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) : CUDA_SUCCESS;
}

CUresult refuse_while_capturing() {
  for (const auto& capture : strict_captures) invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  return strict_captures.empty() ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

void note_captured_event(Stream& stream, Event& event) {
  event.capture = stream.capture;
  event.captured_stream = &stream;
}

CUresult wait_for_event(Stream& stream, Event& event) {
  if (!event.capture) {
    // Work outside a capture cannot order work inside one.
    return stream.capture ? invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION) : CUDA_SUCCESS;
  }
  if (stream.capture && stream.capture != event.capture) {
    invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    return invalidate(*event.capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
  }
  if (stream.is_null) return invalidate(*event.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  Capture& capture = *event.capture;
  if (!stream.capture) {
    stream.capture = event.capture;
    capture.forks[&stream] = false;
  }
  auto joined = capture.forks.find(event.captured_stream);
  if (joined != capture.forks.end() && &stream == capture.origin) joined->second = true;
  return CUDA_SUCCESS;
}

extern "C" {

CUresult cuStreamBeginCapture_v2(CUstream handle, unsigned mode) {
  MAY_FAIL();
  Stream* stream = find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->is_null) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture || mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->thread = std::this_thread::get_id();
  capture->relaxed = mode == CU_STREAM_CAPTURE_MODE_RELAXED;
  stream->capture = capture;
  if (!capture->relaxed) strict_captures.push_back(capture);
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  MAY_FAIL();
  Stream* stream = find_stream(handle);
  if (!stream || !graph) return CUDA_ERROR_INVALID_VALUE;
  const std::shared_ptr<Capture> capture = stream->capture;
  *graph = nullptr;
  if (!capture) return CUDA_ERROR_INVALID_VALUE;
  if (capture->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  if (!capture->relaxed && capture->thread != std::this_thread::get_id()) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  forget(capture);
  bool joined = true;
  for (const auto& fork : capture->forks) {
    fork.first->capture.reset();
    joined &= fork.second;
  }
  stream->capture.reset();
  if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *graph = graph_handles.insert<CUgraph>(new Graph{std::move(capture->nodes)});
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, unsigned* status) {
  MAY_FAIL();
  Stream* stream = find_stream(handle);
  if (!stream || !status) return CUDA_ERROR_INVALID_VALUE;
  *status = !stream->capture               ? CU_STREAM_CAPTURE_STATUS_NONE
            : stream->capture->invalidated ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                           : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph handle, unsigned long long) {
  MAY_FAIL();
  Graph* graph = graph_handles.find(handle);
  if (!graph || !executable) return CUDA_ERROR_INVALID_VALUE;
  *executable = graph_exec_handles.insert<CUgraphExec>(new Graph(*graph));
  return CUDA_SUCCESS;
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream stream) {
  MAY_FAIL();
  return graph_exec_handles.find(handle) && find_stream(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  MAY_FAIL();
  Graph* graph = graph_exec_handles.find(handle);
  Stream* stream = find_stream(stream_handle);
  if (!graph || !stream) return CUDA_ERROR_INVALID_HANDLE;
  for (const GraphNode& node : graph->nodes) {
    const CUresult status = submit(*stream, node);
    if (status != CUDA_SUCCESS) return status;
  }
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph handle) {
  MAY_FAIL();
  Graph* graph = graph_handles.remove(handle);
  delete graph;
  return graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
  MAY_FAIL();
  Graph* graph = graph_exec_handles.remove(handle);
  delete graph;
  return graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
}
