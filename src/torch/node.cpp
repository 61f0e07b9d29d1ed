// The autograd node of all fused operations, whose backward is a Rust object.
#include <Python.h>

#include "failure.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

using at::Tensor;
using tllib::check;
using tllib::guarded;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

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

struct FusedLoss;

struct WithoutGil {
  ~WithoutGil() { PyEval_RestoreThread(thread); }
  PyThreadState* const thread = PyEval_SaveThread();
};

// Compiled autograd does not call a node: it keeps a graph of what a pass does, and runs it for each pass that is
// alike, with that pass's tensors. A node of ours has one tensor for it, the number of its ticket, by which the graph
// finds the node that it stands for this time.
class Tickets {
 public:
  int64_t issue(std::weak_ptr<FusedLoss> node) {
    std::lock_guard<std::mutex> lock(mutex_);
    nodes_.emplace(++last_, std::move(node));
    return last_;
  }
  void withdraw(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    nodes_.erase(number);
  }
  std::shared_ptr<FusedLoss> find(int64_t number) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = nodes_.find(number);
    return found == nodes_.end() ? nullptr : found->second.lock();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::weak_ptr<FusedLoss>> nodes_;
  int64_t last_ = 0;
};

Tickets& tickets() {
  static auto* all = new Tickets;  // never destroyed: nodes outlive static objects
  return *all;
}

struct FusedLoss : Node {
  FusedLoss(void* state, const tllib_vtable* vtable, const char* label)
      : state_(state), vtable_(vtable), label_(label) {}
  FusedLoss(const FusedLoss&) = delete;
  FusedLoss& operator=(const FusedLoss&) = delete;
  ~FusedLoss() override {
    if (number_ != 0) tickets().withdraw(number_);
    vtable_->drop(state_);
  }

  std::string name() const override { return label_; }
  void will_release_variables() override { last_ = true; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    // Compiled autograd releases what it has collected before it runs.
    if (collected_) last_ = true;
    else release();
  }

  variable_list apply(variable_list&& incoming) override {
    std::lock_guard<std::mutex> lock(mutex_);
    collected_ = false;
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!incoming[0].defined()) return variable_list(inputs.size());
    return at::GradMode::is_enabled() ? differentiable(incoming[0]) : fused(incoming[0]);
  }

  // For compiled autograd: what tells this node from others of its kind, and the tensor that its graph needs.
  void compiled_args(CompiledNodeArgs& args) const override {
    // torch's signature, though what is asked for here has to outlive the release.
    const_cast<FusedLoss*>(this)->collect();
    args.collect_size(inputs.size());
    args.collect(ticket_);
  }

  // Records a call of `run` with the ticket in compiled autograd's graph.
  variable_list apply_with_saved(const variable_list& incoming, SwapSavedVariables& saved) override {
    using torch::dynamo::autograd::IValuePacker;
    using torch::dynamo::autograd::getPyCompilerInterface;
    saved.before(ticket_);
    const auto& compiler = getPyCompilerInterface();
    const auto run_name =
        compiler->bind_function(saved.get_py_compiler(), name(), run, {at::TensorType::get()},
                                /*is_custom_function=*/true, /*is_traceable=*/false);
    const auto outputs = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        torch::dynamo::autograd::get_input_metadata(next_edges()));
    auto grads =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", run_name, incoming, {ticket_}, outputs);
    saved.after(ticket_);
    return grads;
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
  // The pass of the node whose ticket this is. Python calls it, with the GIL, in the grad mode of the pass.
  static variable_list run(const variable_list& incoming, const std::vector<c10::IValue>& args) {
    const WithoutGil without_gil;
    const auto node = tickets().find(args.at(0).toTensor().item<int64_t>());
    TORCH_CHECK(node, torch::autograd::ERR_BACKWARD_TWICE);
    auto grads = node->apply(variable_list(incoming));
    if (node->last_) node->release_variables();
    return grads;
  }

  void collect() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (number_ == 0) {
      number_ = tickets().issue(std::static_pointer_cast<FusedLoss>(getptr()));
      ticket_ = at::scalar_tensor(number_, at::kLong);
    }
    collected_ = true;
  }

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
  int64_t number_ = 0;  // of the ticket, 0 for none
  Tensor ticket_;
  bool collected_ = false;  // by compiled autograd, which has not run since
};

}  // namespace

extern "C" {

// Makes `loss` the output of a node over `inputs`. Takes `state` over, whatever happens.
char* tllib_attach(const Tensor* loss, Tensor* const* inputs, size_t count, void* state,
                   const tllib_vtable* vtable, const char* label) {
  return guarded([&] {
    std::unique_ptr<void, void (*)(void*)> orphan(state, vtable->drop);
    std::shared_ptr<FusedLoss> node(new FusedLoss(state, vtable, label), torch::autograd::deleteNode);
    orphan.release();
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
