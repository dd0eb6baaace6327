// torch's header of this name, but for the device guard: on the host there is no device to guard.
#pragma once

#define DeviceGuard TorchDeviceGuard
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
  ~DeviceGuard() {}
};

}  // namespace torch::stable::accelerator
