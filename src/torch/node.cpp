// The autograd node of all fused operations, whose backward is a Rust object.
#include "failure.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <string>
#include <vector>

using at::Tensor;
using tllib::check;
using tllib::guarded;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

extern "C" {

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

}  // extern "C"
