// The autograd node of all fused operations, whose backward is a Rust object.
#include <Python.h>

#include "failure.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <atomic>
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
  // `last` says that the node's tensors are released after this call and may be moved out.
  char* (*backward)(void* state, const Tensor* grad, bool last, Tensor** grads);
  // Recomputes the loss from `inputs`, in operations that autograd can differentiate.
  char* (*composite)(void* state, Tensor* const* inputs, Tensor** loss);
  // Makes float16 gradients float32 from now on.
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

// Compiled autograd does not call nodes: it caches a graph of a backward pass, and runs it for each similar pass with
// the tensors of that pass. A node of ours contributes one tensor, its ticket number, by which the graph finds the
// node of the current pass.
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
    // Compiled autograd releases the nodes it has collected before it runs.
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

  // For compiled autograd: what distinguishes this node from others of its kind, and the tensor that its graph needs.
  void compiled_args(CompiledNodeArgs& args) const override {
    // const is torch's choice, but the node must note that its state has to outlive the release.
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

  // The gradients with respect to the first `count` inputs for an incoming 1, float16 ones as float32. Releases the
  // node, so that no backward pass can follow.
  bool take(const Tensor& one, Tensor** grads, size_t count) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (inputs.size() < count || released_) return false;
    std::vector<Tensor*> all(inputs.size(), nullptr);
    check(vtable_->widen(state_));
    released_ = true;  // as in `fused`
    check(vtable_->backward(state_, &one, /*last=*/true, all.data()));
    for (size_t i = 0; i < all.size(); ++i) {
      if (i < count) grads[i] = all[i];
      else delete all[i];
    }
    release();
    return true;
  }

  std::vector<SavedVariable> inputs;
  // In place of the saved variable, for an input that is an inference tensor and cannot be saved.
  std::vector<Tensor> constants;

 private:
  // Runs the pass of the node that has this ticket. Called from Python, with the GIL, in the grad mode of the pass.
  static variable_list run(const variable_list& incoming, const std::vector<c10::IValue>& args) {
    const WithoutGil without_gil;
    const auto node = tickets().find(args.at(0).toTensor().item<int64_t>());
    TORCH_CHECK(node, torch::autograd::ERR_BACKWARD_TWICE);
    auto grads = node->apply(variable_list(incoming));
    if (node->last_) node->release_variables();
    return grads;
  }

  // With the GIL, which a pass of this node may need while it holds `mutex_`.
  void collect() {
    std::lock_guard<std::mutex> lock(ticket_mutex_);
    if (number_ == 0) {
      number_ = tickets().issue(std::static_pointer_cast<FusedLoss>(getptr()));
      // Not by torch's dispatcher, which might call Python code.
      ticket_ = at::detail::empty_cpu({}, at::TensorOptions(at::kLong));
      *ticket_.mutable_data_ptr<int64_t>() = number_;
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
    // The last pass moves the gradients out. If something fails between here and the release, another pass must
    // report that they are gone.
    const bool last = last_;
    released_ = last;
    check(vtable_->backward(state_, &incoming, last, raw.data()));
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
      // A clone of an inference tensor is an ordinary one, which the composite may save. Others are aliased, because
      // one input may be another or depend on it: the derivative is to be with respect to this argument alone.
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
  std::atomic<bool> last_ = false;
  bool released_ = false;
  std::mutex ticket_mutex_;
  int64_t number_ = 0;  // of the ticket, 0 for none
  Tensor ticket_;
  std::atomic<bool> collected_ = false;  // by compiled autograd, which has not run since
};

}  // namespace

extern "C" {

// Makes `loss` the output of a node over `inputs`. Takes ownership of `state`, even on failure.
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

// The gradients of FusedLoss::take, owned by the caller. `found` is false if the loss has no such node.
char* tllib_gradients(const Tensor* loss, Tensor** grads, size_t count, bool* found) {
  return guarded([&] {
    auto* node = dynamic_cast<FusedLoss*>(loss->grad_fn().get());
    *found = node && node->take(at::ones_like(*loss), grads, count);
  });
}

}  // extern "C"
