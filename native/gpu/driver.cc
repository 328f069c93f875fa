#include "gpu/driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <filesystem>

namespace genie::gpu {
namespace {

// From cuda.h of the driver API.
constexpr int kGpuDirectRdmaSupported = 116;   // CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED
constexpr int kDmaBufSupported = 124;          // CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED
constexpr int kReadOnlyRegisterSupported = 113;  // CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
constexpr unsigned kRegisterPortable = 1;      // CU_MEMHOSTREGISTER_PORTABLE
constexpr unsigned kRegisterReadOnly = 8;      // CU_MEMHOSTREGISTER_READ_ONLY

template <typename Function>
bool look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(::dlsym(library, name));
  return function != nullptr;
}

}  // namespace

const Driver* Driver::get(std::string& why) {
  // Looked up once; the library stays loaded, as its threads do.
  static std::string reason;
  static const Driver* const driver = []() -> const Driver* {
    auto made = std::unique_ptr<Driver>(new Driver());
    return made->load(reason) ? made.release() : nullptr;
  }();
  why = reason;
  return driver;
}

bool Driver::load(std::string& why) {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    why = "no NVIDIA driver: libcuda.so.1 cannot be loaded";
    return false;
  }
  const bool complete =
      look_up(library, "cuInit", init_) && look_up(library, "cuDriverGetVersion", driver_version_) &&
      look_up(library, "cuDeviceGetCount", device_count_) && look_up(library, "cuDeviceGet", device_get_) &&
      look_up(library, "cuDeviceGetAttribute", device_attribute_) &&
      look_up(library, "cuMemHostRegister_v2", host_register_) &&
      look_up(library, "cuMemHostUnregister", host_unregister_) &&
      look_up(library, "cuDevicePrimaryCtxRetain", primary_retain_) &&
      look_up(library, "cuCtxSetCurrent", set_current_) && look_up(library, "cuCtxGetCurrent", get_current_);
  if (!complete) {
    why = "the NVIDIA driver is too old: functions of its API are missing";
    return false;
  }
  if (const int failed = init_(0); failed != 0) {
    why = "the NVIDIA driver does not start: cuInit says " + std::to_string(failed);
    return false;
  }
  if (device_count_(&num_devices_) != 0 || num_devices_ == 0) {
    why = "the NVIDIA driver finds no device";
    return false;
  }
  driver_version_(&version_);
  return true;
}

bool Driver::gpudirect(int device, std::string& why) const {
  Device handle = 0;
  int rdma = 0;
  int dma_buf = 0;
  if (device_get_(&handle, device) != 0) {
    why = "device " + std::to_string(device) + " cannot be opened";
    return false;
  }
  device_attribute_(&rdma, kGpuDirectRdmaSupported, handle);
  device_attribute_(&dma_buf, kDmaBufSupported, handle);
  if (rdma == 0 && dma_buf == 0) {
    why = "device " + std::to_string(device) + " says that other devices cannot reach its memory";
    return false;
  }
  if (dma_buf == 0 && !std::filesystem::exists("/sys/module/nvidia_peermem")) {
    why = "the kernel module nvidia-peermem is not loaded, and the driver exports no dma-buf";
    return false;
  }
  return true;
}

bool Driver::pin(std::byte* data, std::size_t size_bytes, bool writable) const noexcept {
  void* context = nullptr;
  unsigned flags = kRegisterPortable;
  if (!writable) {
    Device device = 0;
    int can = 0;
    if (device_get_(&device, 0) != 0 || device_attribute_(&can, kReadOnlyRegisterSupported, device) != 0 || can == 0) {
      return false;
    }
    flags |= kRegisterReadOnly;
  }
  if (get_current_(&context) != 0) return false;
  if (context == nullptr) {
    // Registration needs a context in this thread: the one that torch uses as well.
    Device device = 0;
    if (device_get_(&device, 0) != 0 || primary_retain_(&context, device) != 0 || set_current_(context) != 0) {
      return false;
    }
  }
  return host_register_(data, size_bytes, flags) == 0;
}

void Driver::unpin(std::byte* data) const noexcept { host_unregister_(data); }

Probe probe_staging() {
  std::string why;
  const Driver* driver = Driver::get(why);
  if (driver == nullptr) return {false, why};
  return {true, std::to_string(driver->num_devices()) + " device(s), driver API " + std::to_string(driver->version())};
}

Probe probe_gpudirect() {
  std::string why;
  const Driver* driver = Driver::get(why);
  if (driver == nullptr || !driver->gpudirect(0, why)) return {false, why};
  std::error_code ignored;
  if (!std::filesystem::exists("/sys/class/infiniband", ignored)) {
    return {false, "the device allows it, but no NIC with RDMA is here (/sys/class/infiniband)"};
  }
  return {true, "device 0 can be reached by a NIC"};
}

}  // namespace genie::gpu
