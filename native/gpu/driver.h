// The CUDA driver, looked up when it is asked for (dlopen): nothing here links it, and no torch is needed.
//
// Written after the driver API's manual. It was never run on a GPU: what uses it says hardware_verified = false.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "lane/lane.h"

namespace genie::gpu {

// The functions of libcuda.so.1 that lanes need; null where it is not there or does not start, and `why` says so.
class Driver {
 public:
  [[nodiscard]] static const Driver* get(std::string& why);

  [[nodiscard]] int num_devices() const noexcept { return num_devices_; }
  [[nodiscard]] int version() const noexcept { return version_; }
  // 1 where the device says that other devices (NICs) can reach its memory through nvidia-peermem or dma-buf.
  [[nodiscard]] bool gpudirect(int device, std::string& why) const;

  // Page-lock memory, so that the device copies from and to it on its own while the processor goes on. False where the
  // driver refuses; memory that this process may only read needs a device that can register such.
  [[nodiscard]] bool pin(std::byte* data, std::size_t size_bytes, bool writable) const noexcept;
  void unpin(std::byte* data) const noexcept;

 private:
  Driver() = default;
  [[nodiscard]] bool load(std::string& why);

  using Device = int;
  int (*init_)(unsigned) = nullptr;
  int (*driver_version_)(int*) = nullptr;
  int (*device_count_)(int*) = nullptr;
  int (*device_get_)(Device*, int) = nullptr;
  int (*device_attribute_)(int*, int, Device) = nullptr;
  int (*host_register_)(void*, std::size_t, unsigned) = nullptr;
  int (*host_unregister_)(void*) = nullptr;
  int (*primary_retain_)(void**, Device) = nullptr;
  int (*set_current_)(void*) = nullptr;
  int (*get_current_)(void**) = nullptr;
  int num_devices_ = 0;
  int version_ = 0;
};

// Staging: pinned host memory between a lane and a device.
[[nodiscard]] Probe probe_staging();
// GPUDirect: a NIC that reads and writes device memory itself.
[[nodiscard]] Probe probe_gpudirect();

}  // namespace genie::gpu
