// The C++ half of src/torch/device.rs: torch's current stream on a CUDA device and copies to it, through
// the part of torch that every build has, so that one extension serves CPU and CUDA builds.
#include "failure.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

using tllib::guarded;

extern "C" {

// cudaStream_t of the current stream; null is the default stream.
char* tllib_cuda_stream(int64_t index, void** stream) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
    const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
    *stream = cuda.getStream(device).native_handle();
  });
}

// Whether the user lets products of float32 matrices on CUDA devices be computed in TF32.
bool tllib_allows_tf32() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32;
}

// A copy of a CPU tensor on the device, through pinned memory of our own, so that nothing blocks and the tensor may be
// written to at once. torch's allocator keeps that memory until the copy is done, and for the lifetime of a graph that
// captures the copy.
char* tllib_upload(const at::Tensor* from, int64_t index, at::Tensor** to) {
  return guarded([&] {
    const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
    // torch checks the stream of the current device to find whether a graph is being captured.
    const c10::DeviceGuard guard(device);
    const auto pinned = at::empty(from->sizes(), from->options().pinned_memory(true));
    pinned.copy_(*from);
    *to = new at::Tensor(pinned.to(device, from->scalar_type(), /*non_blocking=*/true));
  });
}

// The path of libc10, or null.
const char* tllib_libc10() {
  Dl_info info;
  const auto* address = reinterpret_cast<const void*>(&c10::get_default_dtype_as_scalartype);
  return dladdr(address, &info) ? info.dli_fname : nullptr;
}

}  // extern "C"
