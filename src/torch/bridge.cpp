// The C++ half of src/torch/: what tch does not offer, besides the autograd node (node.cpp):
//   describe     everything the checks and kernels ask of tensors, in one call;
//   average      torch's operations on lists of tensors;
//   bump, alias  version counters and reference counts, for tensors that users may write;
//   without      guards that exclude a layer of torch's dispatch, or inference mode;
// and torch's settings that tch does not read.
#include "failure.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/version.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

using at::Tensor;
using tllib::guarded;

namespace {

// Keys of an ordinary dense tensor on a device that has fused kernels. Any other key (functorch
// wrapper, Python subclass, conjugate or negative view, sparse, ...) sends the call to the composite.
c10::DispatchKeySet ordinary_keys() {
  static const c10::DispatchKeySet keys =
      c10::DispatchKeySet(c10::DispatchKey::CPU) |
      c10::DispatchKeySet(c10::DispatchKey::CUDA) |
      c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
      c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
      c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) |
      c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) |
      c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA);
  return keys;
}

// The keys through which torch.func intercepts every operation, even on ordinary tensors, and wraps the results.
constexpr c10::DispatchKeySet functorch_keys(
    {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode});

// Something that acts on this thread until it is deleted.
struct Guard {
  virtual ~Guard() = default;
};

template <class T>
struct Held : Guard {
  template <class A>
  explicit Held(A argument) : guard(argument) {}
  T guard;
};

template <class T, class A>
Guard* held(A argument) {
  return new (std::nothrow) Held<T>(argument);
}

// Whether this thread is inside a transform of torch.func.
bool transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether one of the dispatch modes with which torch traces (make_fx, AOTAutograd) is active in this thread.
bool traces() {
  using c10::impl::TorchDispatchModeKey;
  for (const auto key : {TorchDispatchModeKey::FAKE, TorchDispatchModeKey::PROXY, TorchDispatchModeKey::FUNCTIONAL}) {
    if (c10::impl::TorchDispatchModeTLS::get_mode(key).has_value()) return true;
  }
  return false;
}

// What is true of all tensors of a call.
struct Surroundings {
  bool in_transform = transformed();
  bool in_mode = c10::impl::TorchDispatchModeTLS::any_modes_set();
  // What is traced must be operations: a value that was read would become a constant.
  bool traced = torch::jit::tracer::isTracing() || (in_mode && traces());
  // Without a forward AD level no tensor has a tangent, and asking a tensor for one takes a lock.
  bool forward_ad = torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
  bool grad_mode = at::GradMode::is_enabled();
  bool autocast_cpu = at::autocast::is_autocast_enabled(at::kCPU);
};

// Whether TLLIB_RS_COMPOSITE=1 asks for libtorch's operations in place of all kernels, to compare.
bool composites_only() {
  static const bool asked = [] {
    const char* value = std::getenv("TLLIB_RS_COMPOSITE");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return asked;
}

// Memory that was mapped or passed to torch.frombuffer may hold the elements unaligned.
bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

// Storages can be freed or made smaller under their tensors. Many of torch's operations crash on such tensors.
void check_allocated(const Tensor& t) {
  const bool allocated = t.numel() == 0 ||
      at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset()) <=
          t.storage().nbytes();
  TORCH_CHECK(allocated, "a tensor of shape ", t.sizes(), " has a storage of only ", t.storage().nbytes(), " bytes");
}

bool readable(const Tensor& t, const Surroundings& now) {
  if ((t.key_set() | ordinary_keys()) != ordinary_keys() || !t.has_storage()) return false;
  check_allocated(t);
  return !now.traced && aligned(t) && !(now.forward_ad && t._fw_grad(/*level=*/0).defined());
}

}  // namespace

extern "C" {

// What may be done with a tensor: each kind allows what the previous ones do. Mirrored by `Access` in
// src/torch/facts.rs.
enum : uint8_t {
  tllib_hidden,       // its memory cannot be read
  tllib_observed,     // its memory holds the values as they are, aligned; a dispatch mode intercepts operations on it
  tllib_transformed,  // operations on it return wrappers of torch.func
  tllib_plain,        // operations on it return such tensors
  tllib_ordinary,     // kernels may read it
};

// Mirrored by `Facts` in src/torch/facts.rs.
struct tllib_facts {
  void* data;  // null where the tensor is not readable
  const int64_t* sizes;
  const int64_t* strides;
  int64_t ndim;
  int32_t kind;
  int32_t device_type;
  int32_t device_index;
  bool strided;  // if not, nothing else is filled in
  uint8_t access;
  bool contiguous;  // false unless readable
  bool wants_grad;  // grad mode is on and the tensor requires it
  bool autocast;    // an autocast region is active for the tensor's device
};

}  // extern "C"

namespace {

uint8_t access(const Tensor& t, const Surroundings& now) {
  if (!readable(t, now)) return tllib_hidden;
  if (now.in_mode) return tllib_observed;
  if (now.in_transform) return tllib_transformed;
  return composites_only() ? tllib_plain : tllib_ordinary;
}

void describe(const Tensor& t, const Surroundings& now, tllib_facts& out) {
  TORCH_CHECK(t.defined(), "an undefined tensor");
  out.strided = t.layout() == c10::kStrided && !t.is_nested();
  if (!out.strided) return;
  TORCH_CHECK(!t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(),
              "tensors with symbolic shapes are served under torch.compile only");
  out.access = access(t, now);
  const bool readable = out.access > tllib_hidden;
  out.sizes = t.sizes().data();
  out.strides = readable ? t.strides().data() : nullptr;
  out.ndim = t.dim();
  out.data = readable ? t.data_ptr() : nullptr;
  out.kind = static_cast<int32_t>(t.scalar_type());
  const auto device = t.device();
  out.device_type = static_cast<int32_t>(device.type());
  out.device_index = device.index();
  out.contiguous = readable && t.is_contiguous();
  out.wants_grad = now.grad_mode && t.requires_grad();
  out.autocast = device.is_cpu() ? now.autocast_cpu
                                 : at::autocast::is_autocast_available(device.type()) &&
          at::autocast::is_autocast_enabled(device.type());
}

}  // namespace

extern "C" {

// The pointers borrow from the tensors: they are valid while these are alive and not resized.
char* tllib_describe(const Tensor* const* tensors, size_t count, tllib_facts* out) {
  return guarded([&] {
    const Surroundings now;
    for (size_t k = 0; k < count; ++k) describe(*tensors[k], now, out[k]);
  });
}

// A write that autograd cannot see must still be noticed by graphs that saved the tensor.
void tllib_bump_version(const Tensor* t) {
  if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

int64_t tllib_version(const Tensor* t) { return t->is_inference() ? 0 : t->_version(); }

// Whether another tensor, or a storage object that Python still holds, reaches the tensor's memory.
// Asks Python for a reference count: needs the GIL.
bool tllib_aliased(const Tensor* t) {
  // A wrapper, whose memory is another tensor's.
  if (!t->has_storage()) return true;
  const auto& storage = t->storage();
  // Memory that torch did not allocate: numpy's, a mapped file, memory shared with another process. Whoever else has
  // it holds no reference to the storage.
  if (t->is_cpu() && storage.data_ptr().get_deleter() != c10::GetCPUAllocator()->raw_deleter()) return true;
  const bool idle_object = storage.unsafeGetStorageImpl()->pyobj_slot()->has_unique_reference();
  return storage.use_count() > (idle_object ? 2u : 1u);
}

// Whether both are one tensor, to autograd too.
bool tllib_same(const Tensor* a, const Tensor* b) { return a->is_same(*b); }

// Whether anybody but the caller, who has one reference, holds this very tensor. Needs the GIL.
bool tllib_held(const Tensor* t) {
  const bool idle_object = t->unsafeGetTensorImpl()->pyobj_slot()->has_unique_reference();
  return t->use_count() > (idle_object ? 2u : 1u);
}

// targets[i] <- keep * targets[i] + take * sources[i], in two foreach operations, hidden from autograd. On a device
// each takes a few launches if all tensors there have one dtype, and each source has the strides of its target.
char* tllib_average(const Tensor* const* targets, const Tensor* const* sources, size_t count, double keep,
                    double take) {
  return guarded([&] {
    std::vector<Tensor> into, from;
    into.reserve(count);
    from.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      into.push_back(*targets[i]);
      from.push_back(*sources[i]);
    }
    at::AutoDispatchBelowADInplaceOrView unseen;
    at::_foreach_mul_(into, keep);
    at::_foreach_add_(into, from, take);
  });
}

// The version of the torch that this was compiled against.
const char* tllib_torch_version() { return TORCH_VERSION; }

bool tllib_composites_only() { return composites_only(); }

// torch.get_default_dtype()
int32_t tllib_default_dtype() {
  return static_cast<int32_t>(c10::get_default_dtype_as_scalartype());
}

void tllib_free(char* text) { std::free(text); }

// pybind11, which torch's Python headers bring into libtch, calls this private function when it is
// compiled for Python 3.12 or older, and Python 3.13 renamed it. This hidden definition forwards to
// whichever the running interpreter has, so that one wheel serves them all.
__attribute__((visibility("hidden"))) void* _PyThreadState_UncheckedGet() {
  using Get = void* (*)();
  static const Get get = [] {
    void* found = dlsym(RTLD_DEFAULT, "PyThreadState_GetUnchecked");
    if (!found) found = dlsym(RTLD_DEFAULT, "_PyThreadState_UncheckedGet");
    return reinterpret_cast<Get>(found);
  }();
  return get ? get() : nullptr;
}

// Thread-local: the guard must be deleted on the same thread.
void* tllib_without_autocast() {
  return held<c10::impl::ExcludeDispatchKeyGuard>(c10::autocast_dispatch_keyset);
}

// Null outside inference mode.
void* tllib_without_inference() {
  return c10::InferenceMode::is_enabled() ? held<c10::InferenceMode>(false) : nullptr;
}

// Null where there is nothing to exclude.
void* tllib_without_transforms() {
  return transformed() ? held<c10::impl::ExcludeDispatchKeyGuard>(functorch_keys) : nullptr;
}

void tllib_drop_guard(void* guard) { delete static_cast<Guard*>(guard); }

}  // extern "C"
