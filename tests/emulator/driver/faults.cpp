// Faults on demand: a call of the calling thread fails before it does anything, as if the machine had refused it.
//
// Every entry point that can fail for reasons of the machine begins with MAY_FAIL: those of the driver and, through
// stand_in_next_fault, those of NVRTC. The calls of a thread are numbered from where a test began to watch, so that the
// test can let each of them fail once; other threads notice nothing.
#include <string>
#include <utility>
#include <vector>

#include "driver.h"

namespace {

struct Faults {
  bool watching = false;
  std::vector<const char*> calls;  // since the watching began
  uint64_t number = 0;             // of the call that is to fail, from 0
  unsigned code = CUDA_SUCCESS;    // with which; success: none fails
};

Faults& thread_faults() {
  thread_local Faults faults;
  return faults;
}

}  // namespace

CUresult next_fault(const char* call) { return CUresult(stand_in_next_fault(call)); }

extern "C" {

// Notes a call of the calling thread. What comes back is the error that it is to give, or 0.
unsigned stand_in_next_fault(const char* call) {
  Faults& faults = thread_faults();
  if (!faults.watching) return CUDA_SUCCESS;
  faults.calls.push_back(call);
  return faults.calls.size() == faults.number + 1 ? faults.code : unsigned(CUDA_SUCCESS);
}

// Numbers the calling thread's calls from 0 on. The one of this number fails with the code, if that is none of success.
void stand_in_watch_calls(uint64_t number, unsigned code) { thread_faults() = {true, {}, number, code}; }

// Ends the watching, and names every call that was made meanwhile, in their order.
void stand_in_end_watching(void (*each)(const char*, void*), void* user) {
  const Faults faults = std::exchange(thread_faults(), {});
  for (const char* call : faults.calls) each(call, user);
}
}
