// The C++ half of src/torch/: what tch does not offer. Four things:
//   describe   everything the checks and kernels ask of tensors, in one call;
//   attach     one autograd node for all fused losses, whose backward is a Rust object;
//   average    torch's operations on lists of tensors;
//   bump/alias version counters and reference counts, for tensors that users may write.
// No exception leaves an extern "C" function: a failure is returned as a malloc'ed message.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

char* message(const char* what) {
  char* copy = static_cast<char*>(std::malloc(std::strlen(what) + 1));
  if (copy) std::strcpy(copy, what);
  return copy;
}

template <typename F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return message(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return message(e.what());
  }
}

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

// The keys by which torch.func sees every operation, those on ordinary tensors too: their results are wrapped.
constexpr c10::DispatchKeySet functorch_keys(
    {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode});

// Whether this thread is inside a transform of torch.func.
bool transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// What is true of all tensors of a call.
struct Surroundings {
  bool in_transform = transformed();
  bool observed = c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing();
  // Without a level no tensor has a tangent, and asking one takes a lock.
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

bool readable(const Tensor& t, const Surroundings& now) {
  return !now.observed && (t.key_set() | ordinary_keys()) == ordinary_keys() && t.has_storage() &&
      !(now.forward_ad && t._fw_grad(/*level=*/0).defined());
}

}  // namespace

extern "C" {

// Mirrored by `Facts` in src/torch/input.rs.
struct tllib_facts {
  void* data;  // null where the tensor is not readable
  const int64_t* sizes;
  const int64_t* strides;
  int64_t ndim;
  int32_t kind;
  int32_t device_type;
  int32_t device_index;
  bool strided;  // where it is not, nothing else is filled in
  bool readable;  // its memory is what it seems to be
  bool plain;     // and operations on it give such tensors
  bool ordinary;  // and kernels may read it
  bool contiguous;  // known of a readable tensor only
  bool wants_grad;  // grad mode is on and the tensor requires it
  bool autocast;    // an autocast region is active for the tensor's device
};

}  // extern "C"

namespace {

void describe(const Tensor& t, const Surroundings& now, tllib_facts& out) {
  TORCH_CHECK(t.defined(), "an undefined tensor");
  out.strided = t.layout() == c10::kStrided && !t.is_nested();
  if (!out.strided) return;
  TORCH_CHECK(!t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(),
              "tensors with symbolic shapes are served under torch.compile only");
  out.readable = readable(t, now);
  out.plain = out.readable && !now.in_transform;
  out.ordinary = out.plain && !composites_only();
  out.sizes = t.sizes().data();
  out.strides = out.readable ? t.strides().data() : nullptr;
  out.ndim = t.dim();
  out.data = out.readable ? t.data_ptr() : nullptr;
  out.kind = static_cast<int32_t>(t.scalar_type());
  const auto device = t.device();
  out.device_type = static_cast<int32_t>(device.type());
  out.device_index = device.index();
  out.contiguous = out.readable && t.is_contiguous();
  out.wants_grad = now.grad_mode && t.requires_grad();
  out.autocast = device.is_cpu() ? now.autocast_cpu
                                 : at::autocast::is_autocast_available(device.type()) &&
          at::autocast::is_autocast_enabled(device.type());
}

}  // namespace

extern "C" {

// The pointers borrow from the tensors: they hold as long as these live and are not resized.
char* tllib_describe(const Tensor* const* tensors, size_t count, tllib_facts* out) {
  return guarded([&] {
    const Surroundings now;
    for (size_t k = 0; k < count; ++k) describe(*tensors[k], now, out[k]);
  });
}

// Mirrored by `Vtable` in src/torch/autograd.rs. `state` is a Rust object owned by the node.
struct tllib_vtable {
  // Gradients with respect to the inputs into grads[0..n], null for an input without one.
  // `last` says that the node's tensors are released after this call and may be given away.
  char* (*backward)(void* state, const Tensor* grad, bool last, Tensor** grads);
  // The loss again from `inputs`, in operations that autograd can differentiate.
  char* (*composite)(void* state, Tensor* const* inputs, Tensor** loss);
  // Gradients in float16 come in float32 from now on.
  char* (*widen)(void* state);
  void (*release)(void* state);
  void (*drop)(void* state);
};

}  // extern "C"

namespace {

void check(char* failure) {
  if (!failure) return;
  std::string text(failure);
  std::free(failure);
  TORCH_CHECK(false, text);
}

struct FusedLoss : Node {
  FusedLoss(void* state, const tllib_vtable* vtable, const char* label)
      : state_(state), vtable_(vtable), label_(label) {}
  FusedLoss(const FusedLoss&) = delete;
  FusedLoss& operator=(const FusedLoss&) = delete;
  ~FusedLoss() override { vtable_->drop(state_); }

  std::string name() const override { return label_; }
  void will_release_variables() override { last_ = true; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

  variable_list apply(variable_list&& incoming) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!incoming[0].defined()) return variable_list(inputs.size());
    return at::GradMode::is_enabled() ? differentiable(incoming[0]) : fused(incoming[0]);
  }

  // The gradients with respect to the first `count` inputs for an incoming 1, in float32 where they are float16.
  // There is no backward pass after it.
  bool take(const Tensor& one, Tensor** grads, size_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (inputs.size() < count || released_) return false;
    std::vector<Tensor*> all(inputs.size(), nullptr);
    check(vtable_->widen(state_));
    check(vtable_->backward(state_, &one, /*last=*/true, all.data()));
    for (size_t i = 0; i < all.size(); ++i) {
      if (i < count) grads[i] = all[i];
      else delete all[i];
    }
    release();
    return true;
  }

  std::vector<SavedVariable> inputs;
  // Instead of the saved variable, where an input comes from inference mode and cannot be saved.
  std::vector<Tensor> constants;

 private:
  void release() {
    released_ = true;
    inputs.clear();
    constants.clear();
    vtable_->release(state_);
  }

  variable_list fused(const Tensor& incoming) {
    std::vector<Tensor*> raw(inputs.size(), nullptr);
    // The last pass gives the gradients away. Should something fail between here and the release, another pass has
    // to say that there are none.
    released_ = last_;
    check(vtable_->backward(state_, &incoming, last_, raw.data()));
    variable_list grads(inputs.size());
    for (size_t i = 0; i < raw.size(); ++i) {
      if (!raw[i]) continue;
      grads[i] = std::move(*raw[i]);
      delete raw[i];
    }
    return grads;
  }

  // create_graph: the stored gradient is a constant to autograd, so the loss is computed again in
  // differentiable operations and autograd derives the gradient, with its own graph.
  variable_list differentiable(const Tensor& incoming) {
    variable_list unpacked;
    std::vector<Tensor*> raw;
    unpacked.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      // A copy of an inference tensor is an ordinary one, which the composite may save. An alias, because one input
      // may be another or come from it: what is asked for is the derivative by this argument alone.
      unpacked.push_back(constants[i].defined() ? constants[i].clone() : inputs[i].unpack().alias());
    }
    for (auto& t : unpacked) raw.push_back(&t);
    Tensor* loss = nullptr;
    check(vtable_->composite(state_, raw.data(), &loss));
    Tensor owned = std::move(*loss);
    delete loss;
    variable_list wanted;
    std::vector<size_t> slots;
    for (size_t i = 0; i < unpacked.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      wanted.push_back(unpacked[i]);
      slots.push_back(i);
    }
    variable_list grads(inputs.size());
    if (wanted.empty()) return grads;
    auto found = torch::autograd::grad({owned}, wanted, {incoming.to(owned.scalar_type())},
                                       /*retain_graph=*/true, /*create_graph=*/true,
                                       /*allow_unused=*/true);
    for (size_t i = 0; i < slots.size(); ++i) grads[slots[i]] = found[i];
    return grads;
  }

  void* state_;
  const tllib_vtable* vtable_;
  std::string label_;
  bool last_ = false;
  bool released_ = false;
};

}  // namespace

extern "C" {

// Makes `loss` the output of a node over `inputs`. Takes `state` over, whatever happens.
char* tllib_attach(const Tensor* loss, Tensor* const* inputs, size_t count, void* state,
                   const tllib_vtable* vtable, const char* label) {
  std::shared_ptr<FusedLoss> node(new FusedLoss(state, vtable, label), torch::autograd::deleteNode);
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      node->add_next_edge(torch::autograd::impl::gradient_edge(*inputs[i]));
      const bool constant = inputs[i]->is_inference();
      node->inputs.push_back(constant ? SavedVariable() : SavedVariable(*inputs[i], /*is_output=*/false));
      node->constants.push_back(constant ? *inputs[i] : Tensor());
    }
    torch::autograd::set_history(*loss, node);
  });
}

// What FusedLoss::take gives, each gradient the caller's. `found` is false where the loss has another node.
char* tllib_gradients(const Tensor* loss, Tensor** grads, size_t count, bool* found) {
  return guarded([&] {
    auto* node = dynamic_cast<FusedLoss*>(loss->grad_fn().get());
    *found = node && node->take(at::ones_like(*loss), grads, count);
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
  const auto& storage = t->storage();
  const bool idle_object = storage.unsafeGetStorageImpl()->pyobj_slot()->has_unique_reference();
  return storage.use_count() > (idle_object ? 2u : 1u);
}

// Whether anybody but the caller, who has one reference, holds the very tensor. Needs the GIL.
bool tllib_held(const Tensor* t) {
  const bool idle_object = t->unsafeGetTensorImpl()->pyobj_slot()->has_unique_reference();
  return t->use_count() > (idle_object ? 2u : 1u);
}

// targets[i] <- keep * targets[i] + take * sources[i], by two operations for all, unseen by autograd. On a device
// each is a few launches where the tensors have one dtype there, and each source the strides of its target.
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

bool tllib_composites_only() { return composites_only(); }

// torch.get_default_dtype()
int32_t tllib_default_dtype() {
  return static_cast<int32_t>(c10::get_default_dtype_as_scalartype());
}

void tllib_free(char* text) { std::free(text); }

// pybind11, which torch's Python headers bring into libtch, calls this private function where it was
// compiled for Python 3.12 or older, and Python 3.13 renamed it. Defined here, hidden, it forwards to
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

// Thread-local: what a guard excludes is included again on the same thread.
void* tllib_without_autocast() {
  return new (std::nothrow) c10::impl::ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset);
}

// Null where there is nothing to exclude.
void* tllib_without_transforms() {
  return transformed() ? new (std::nothrow) c10::impl::ExcludeDispatchKeyGuard(functorch_keys) : nullptr;
}

void tllib_include_again(void* guard) {
  delete static_cast<c10::impl::ExcludeDispatchKeyGuard*>(guard);
}

}  // extern "C"
