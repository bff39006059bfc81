// How many 32-byte sectors the accesses of a warp touch: what one instruction of all lanes moves at least.
//
// Lanes run one after another, so what a warp would do at once comes in pieces. Pieces belong together if they are the
// same instruction and each lane's n-th pass over it since the block last met.
#pragma once

#include <cstdint>
#include <vector>

class WarpTraffic {
 public:
  // An access by one lane; gives the sectors that no lane before it has touched with this instruction.
  unsigned add(unsigned lane, const void* instruction, uintptr_t address, unsigned bytes) {
    Site& site = find(instruction);
    const unsigned pass = site.passes[lane]++;
    if (pass == site.accesses.size()) site.accesses.push_back({});
    Access& access = site.accesses[pass];
    const uintptr_t last = (address + bytes - 1) / SECTOR_BYTES;
    unsigned added = 0;
    for (uintptr_t sector = address / SECTOR_BYTES; sector <= last; sector++) {
      const uint32_t name = uint32_t(sector) + 1;  // never 0, which stands for none
      bool known = false;
      for (const uint32_t other : access.sectors) known |= other == name;
      if (known) continue;
      const uint32_t at = access.added++;
      access.sectors[at == 0 ? 0 : 1 + (at - 1) % (REMEMBERED - 1)] = name;
      added++;
    }
    return added;
  }

  // The block has met: whatever its lanes did before, they begin anew together.
  void meet() {
    for (Site& site : sites_) {
      site.accesses.clear();
      for (unsigned& pass : site.passes) pass = 0;
    }
  }

  void clear() { sites_.clear(); }

 private:
  // Lanes come in their order and neighbours touch neighbouring sectors: the last few are enough to know them again,
  // and the first, for behind a barrier the lane that came to it last goes on first.
  enum : unsigned { SECTOR_BYTES = 32, REMEMBERED = 4, LANES = 32 };
  struct Access {
    uint32_t sectors[REMEMBERED] = {};
    uint32_t added = 0;
  };
  struct Site {
    const void* instruction;
    std::vector<Access> accesses;
    unsigned passes[LANES] = {};
  };

  // Instructions follow each other in much the same order again and again.
  Site& find(const void* instruction) {
    const size_t count = sites_.size();
    for (size_t i = 1; i <= count; i++) {
      const size_t at = (last_ + i) % count;
      if (sites_[at].instruction != instruction) continue;
      last_ = at;
      return sites_[at];
    }
    sites_.emplace_back();
    sites_.back().instruction = instruction;
    last_ = count;
    return sites_.back();
  }

  std::vector<Site> sites_;
  size_t last_ = 0;
};
