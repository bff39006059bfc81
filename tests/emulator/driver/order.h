// Which accesses of other threads are over for certain when a thread makes its own.
//
// Every thread has a clock, which moves on where the thread shows others what it did so far: at barriers, and where it
// arrives at a counter. An access is ordered before another one if the second thread knows the first one's clock to
// have moved past it. Barriers of a block, a warp and the grid set the clocks of all who meet to one number, so that
// one number says what all of them know; what goes by a counter or an mbarrier is written down as Knowledge.
#pragma once

#include <cstdint>
#include <unordered_map>

// Clocks of other threads that somebody has learnt of: everything before them is over. Blocks and threads go by their
// numbers in the launch.
struct Knowledge {
  std::unordered_map<uint32_t, uint32_t> blocks;  // of all threads of the block
  std::unordered_map<uint32_t, uint32_t> threads;

  bool empty() const { return blocks.empty() && threads.empty(); }
  void clear() {
    blocks.clear();
    threads.clear();
  }
  void join(const Knowledge& other) {
    for (const auto& entry : other.blocks) learn(blocks, entry.first, entry.second);
    for (const auto& entry : other.threads) learn(threads, entry.first, entry.second);
  }
  bool holds(uint32_t block, uint32_t thread, uint32_t clock) const {
    return after(blocks, block, clock) || after(threads, thread, clock);
  }

  static void learn(std::unordered_map<uint32_t, uint32_t>& clocks, uint32_t who, uint32_t clock) {
    uint32_t& known = clocks[who];
    if (known < clock) known = clock;
  }

 private:
  static bool after(const std::unordered_map<uint32_t, uint32_t>& clocks, uint32_t who, uint32_t clock) {
    const auto found = clocks.find(who);
    return found != clocks.end() && clock < found->second;
  }
};
