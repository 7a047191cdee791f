// A CUDA and an Apple device that hold nothing: what torch asks of an accelerator before it runs a model there, and
// above all before it runs a backward, answered without one. FAKE_DEVICE says which of the two is present.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <string>

namespace at {
bool is_present(const char* name) {
  const char* chosen = std::getenv("FAKE_DEVICE");
  return chosen != nullptr && std::string(chosen) == name;
}

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return is_present("cuda"); }
  bool isBuilt() const override { return is_present("cuda"); }
  bool isAvailable() const override { return is_present("cuda"); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

struct MPSHooks final : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return is_present("mps"); }
  bool isBuilt() const override { return is_present("mps"); }
  bool isAvailable() const override { return is_present("mps"); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_MPS_HOOKS(MPSHooks);
}  // namespace at

namespace {
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType kind;
  explicit Guard(c10::DeviceType kind) : kind(kind) {}
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device) const override { return {kind, 0}; }
  c10::Device getDevice() const override { return {kind, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, {kind, 0}); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
const Guard cuda(c10::DeviceType::CUDA), mps(c10::DeviceType::MPS);
const c10::impl::DeviceGuardImplRegistrar of_cuda(c10::DeviceType::CUDA, &cuda), of_mps(c10::DeviceType::MPS, &mps);
}  // namespace
