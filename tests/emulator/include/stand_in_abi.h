// What a compiled kernel and the stand-in driver say to each other: a C interface, so that the kernels can be built by
// another compiler than the driver.
#pragma once

extern "C" {

struct StandInIndex {
  unsigned x, y, z;
};

// The line of a kernel's source that asked for something.
struct StandInPlace {
  const char* file;
  unsigned line;
};

// A value of at most 16 bytes. It travels in registers, so that the kernel's own copy need not have an address.
struct StandInBits {
  unsigned long long low, high;
};

// Every kernel exports one of these under the name stand_in_kernel_<name>.
struct StandInKernel {
  const char* name;
  void (*run)(void** arguments);
  unsigned threads;         // most threads of a block it was compiled for
  unsigned cluster;         // blocks of a cluster it was compiled for; 0 leaves that to the launch
  unsigned argument_bytes;  // size of its only argument
};

enum StandInCaching { STAND_IN_CACHED, STAND_IN_LAST_USE, STAND_IN_COHERENT, STAND_IN_STREAMING };
enum StandInWarpOperation {
  STAND_IN_WARP_BARRIER,
  STAND_IN_SHUFFLE_XOR,
  STAND_IN_SHUFFLE_DOWN,
  STAND_IN_SHUFFLE_UP,
  STAND_IN_SHUFFLE_FROM,
  STAND_IN_BALLOT
};

// A thread's coordinates never change while it runs: the compiler may ask once.
#define STAND_IN_CONSTANT __attribute__((const, nothrow))
StandInIndex stand_in_thread_index() STAND_IN_CONSTANT;
StandInIndex stand_in_block_index() STAND_IN_CONSTANT;
StandInIndex stand_in_block_size() STAND_IN_CONSTANT;
StandInIndex stand_in_grid_size() STAND_IN_CONSTANT;
unsigned stand_in_cluster_rank() STAND_IN_CONSTANT;
unsigned stand_in_cluster_size() STAND_IN_CONSTANT;
unsigned char* stand_in_shared_memory() STAND_IN_CONSTANT;
#undef STAND_IN_CONSTANT

StandInBits stand_in_load(const void* from, unsigned bytes, StandInCaching caching, StandInPlace place);
void stand_in_store(void* to, StandInBits value, unsigned bytes, StandInCaching caching, StandInPlace place);
unsigned stand_in_arrive(unsigned* counter, StandInPlace place);
void stand_in_await_arrivals(const unsigned* counter, unsigned arrivals, StandInPlace place);

StandInBits stand_in_warp(StandInWarpOperation operation, unsigned mask, StandInBits value, unsigned operand,
                          StandInPlace place);
void stand_in_block_barrier(StandInPlace place);
void stand_in_grid_barrier(unsigned* counter, StandInPlace place);
void stand_in_cluster_arrive(StandInPlace place);
void stand_in_cluster_wait(StandInPlace place);

// Shared memory of another block of the cluster. The result is no pointer that a kernel may use: only the next two may.
const void* stand_in_remote(const void* local, unsigned rank, StandInPlace place);
StandInBits stand_in_load_remote(const void* from, unsigned bytes, StandInPlace place);
void stand_in_store_remote(void* to, StandInBits value, unsigned bytes, StandInPlace place);

void stand_in_mbarrier_init(unsigned long long* barrier, unsigned arrivals, StandInPlace place);
void stand_in_mbarrier_arrive(unsigned long long* barrier, unsigned expected_bytes, StandInPlace place);
void stand_in_mbarrier_wait(unsigned long long* barrier, unsigned parity, StandInPlace place);
void stand_in_bulk_copy(void* shared, const void* global, unsigned bytes, unsigned long long* barrier,
                        StandInPlace place);
void stand_in_bulk_fence();

// Copies of one thread, by groups.
void stand_in_copy_async(void* shared, const void* global, unsigned bytes, StandInPlace place);
void stand_in_copy_commit();
void stand_in_copy_wait(unsigned groups, StandInPlace place);
}
