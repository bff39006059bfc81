// A stand-in for NCCL: ranks are threads of this process, and a collective is copies by the driver, done at once. It
// has what this project calls: making and aborting communicators, and the all-gather.
//
// A rank waits for the others in the call itself, where NCCL lets its kernel wait on the stream. Ranks that disagree
// about the length get an error, where NCCL says nothing; and those that wait for a rank which aborts get one too.
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_api.h"

extern "C" CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream);

namespace {

enum Result { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };

struct UniqueId {
  char internal[128];
};

struct Part {
  CUdeviceptr from;
  size_t bytes;
};

// The ranks of one unique id.
struct World {
  std::mutex mutex;
  std::condition_variable changed;
  int ranks = 0;
  int joined = 0;
  bool aborted = false;
  size_t arrived = 0, rounds = 0;
  std::vector<Part> parts;

  // Waits until every rank has called this once more; false if one never will.
  bool meet(std::unique_lock<std::mutex>& lock) {
    const size_t round = rounds;
    if (++arrived == size_t(ranks)) {
      arrived = 0;
      rounds++;
      changed.notify_all();
      return true;
    }
    changed.wait(lock, [&] { return rounds != round || aborted; });
    return rounds != round;
  }
};

struct Communicator {
  std::shared_ptr<World> world;
  int rank;
};

std::mutex worlds_mutex;
std::map<unsigned, std::weak_ptr<World>> worlds;
unsigned last_id = 0;

size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? sizes[type] : 0;
}

}  // namespace

extern "C" {

int ncclGetUniqueId(UniqueId* id) {
  std::lock_guard<std::mutex> lock(worlds_mutex);
  memset(id, 0, sizeof *id);
  last_id++;
  memcpy(id->internal, &last_id, sizeof last_id);
  return SUCCESS;
}

int ncclCommInitRank(Communicator** made, int ranks, UniqueId id, int rank) {
  if (ranks < 1 || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
  unsigned number;
  memcpy(&number, id.internal, sizeof number);
  std::shared_ptr<World> world;
  {
    std::lock_guard<std::mutex> lock(worlds_mutex);
    world = worlds[number].lock();
    if (!world) {
      world = std::make_shared<World>();
      world->ranks = ranks;
      world->parts.resize(size_t(ranks));
      worlds[number] = world;
    }
  }
  std::unique_lock<std::mutex> lock(world->mutex);
  if (world->ranks != ranks || world->joined == ranks) return INVALID_ARGUMENT;
  world->joined++;
  if (!world->meet(lock)) return REMOTE_ERROR;
  *made = new Communicator{world, rank};
  return SUCCESS;
}

int ncclCommAbort(Communicator* communicator) {
  {
    std::lock_guard<std::mutex> lock(communicator->world->mutex);
    communicator->world->aborted = true;
    communicator->world->changed.notify_all();
  }
  delete communicator;
  return SUCCESS;
}

int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* communicator, CUstream stream) {
  World& world = *communicator->world;
  const size_t bytes = count * size_of(type);
  std::unique_lock<std::mutex> lock(world.mutex);
  world.parts[size_t(communicator->rank)] = {CUdeviceptr(from), bytes};
  if (!world.meet(lock)) return REMOTE_ERROR;
  const std::vector<Part> parts = world.parts;
  lock.unlock();
  int result = SUCCESS;
  for (size_t rank = 0; rank < parts.size(); rank++) {
    if (parts[rank].bytes != parts[0].bytes)
      result = INVALID_USAGE;
    else if (result == SUCCESS &&
             cuMemcpyDtoDAsync_v2(CUdeviceptr(to) + rank * bytes, parts[rank].from, bytes, stream) != CUDA_SUCCESS)
      result = UNHANDLED_CUDA_ERROR;
  }
  lock.lock();
  // Nobody goes on before everybody has read.
  if (!world.meet(lock) && result == SUCCESS) return REMOTE_ERROR;
  return result;
}

}  // extern "C"
