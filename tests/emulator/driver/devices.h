// The devices that the stand-in presents: described from outside (src/profiles.rs), so that tests and driver read one
// table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_api.h"

struct Device {
  std::string name;
  size_t memory_bytes;
  std::vector<int> attributes;  // by CUdevice_attribute; what nobody set is 0

  int attribute(CUdevice_attribute which) const { return attributes[which]; }
  int compute_capability() const {
    return attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) * 10 +
           attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  }
};

enum : size_t { DEVICE_ATTRIBUTES = 163 };

// Registered once, before the first call of the driver; the list never changes afterwards.
std::vector<Device>& devices();
const Device* device_at(CUdevice ordinal);
