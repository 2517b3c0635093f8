// CUDA devices that do nothing, for fake tensors on a machine without a card.
//
// Three things of torch cannot be replaced from Python and are missing without a card: a device guard (as soon as a fake
// CUDA tensor is written to), CUDA hooks (the autograd engine asks them whether there are streams), and the choice of a
// kernel for scaled_dot_product_attention, which would otherwise fall back to plain products. To be loaded before torch
// is imported, because torch asks for hooks once and remembers the answer. A CUDA build of torch registers its own guard
// and kernel choice when it is imported: there the library is built in two parts, HOOKS before the import and GUARD after.

#include <ATen/SDPBackend.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#ifdef HOOKS
namespace at {
struct NoopHooks : CUDAHooksInterface {
  explicit NoopHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, 0); }
};
// Preferred to the hooks of a CUDA build, which want a card.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, NoopHooks)
}  // namespace at
#endif

#ifdef GUARD
namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);

struct NoopGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
NoopGuard guard;
c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);

// The conditions of torch's sdp_utils.cpp as far as this project's calls meet them, for compute capability 8 and above.
int64_t choose_attention_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    double, bool, std::optional<double>, bool enable_gqa) {
  const bool half = query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf;
  const auto width = query.size(-1);
  const bool same_width = width == value.size(-1);
  if (query.dim() != 4 || query.scalar_type() != key.scalar_type()) {
    return static_cast<int64_t>(at::SDPBackend::math);
  }
  if (half && !mask && same_width && width <= 256) {
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  }
  if (!enable_gqa && query.size(1) == key.size(1)) {
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  }
  return static_cast<int64_t>(at::SDPBackend::math);
}
const bool registered = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention_kernel);
  return true;
}();
}  // namespace
#endif
