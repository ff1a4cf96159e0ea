// Torch's operators on the cards.
//
// A CPU kernel runs on views of the cards' own memory, and what it allocates becomes memory of the
// card: nothing is copied, and results have the CPU's bits. Like CUDA, an operator refuses tensors
// of several devices, other than numbers (tensors of no dimension) and indices on the CPU.
#include "card.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <functional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using c10::StorageImpl;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
constexpr c10::DispatchKeySet kHostKeys(c10::DispatchKey::CPU);

bool on_card(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == card::kType;
}

Tensor tensor_over(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  Tensor made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The tensors of one call: on a card for its caller, on the CPU for the kernel that runs it.
class Call {
 public:
  explicit Call(c10::DeviceIndex index) : index_(index) {
    card::begin(index);
  }

  // A tensor on the CPU over the memory of a card's tensor; others are passed through.
  Tensor host(const Tensor& tensor) {
    if (!on_card(tensor)) return tensor;
    auto known = hosts_.find(tensor.unsafeGetTensorImpl());
    if (known != hosts_.end()) return known->second;
    Tensor view = tensor_over(host_storage(tensor.storage()), kHostKeys, tensor);
    hosts_.emplace(tensor.unsafeGetTensorImpl(), view);
    owners_.emplace(view.unsafeGetTensorImpl(), tensor);
    return view;
  }

  OptionalTensor host(const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(host(*tensor)) : tensor;
  }

  // The card's tensor for what a kernel gave: an argument, a view of one, or a new tensor.
  Tensor back(const Tensor& result) {
    if (!result.defined() || result.device().type() != c10::kCPU) return result;
    auto owner = owners_.find(result.unsafeGetTensorImpl());
    if (owner != owners_.end()) return owner->second;
    StorageImpl* key = result.storage().unsafeGetStorageImpl();
    auto known = storages_.find(key);
    if (known == storages_.end()) {
      c10::Storage storage(
          c10::Storage::use_byte_size_t(), result.storage().nbytes(),
          card::adopt(result.storage(), index_), card::allocator(), true);
      known = storages_.emplace(key, std::move(storage)).first;
    }
    return tensor_over(known->second, kKeys, result);
  }

  // Gives arguments that the kernel has resized their new memory and shape.
  void finish() {
    for (auto& [storage, host] : resized_candidates_) {
      if (host.data() == storage.data()) continue;
      storage.set_data_ptr_noswap(card::adopt(host, index_));
      storage.set_nbytes(host.nbytes());
    }
    for (auto& [host, tensor] : owners_) {
      if (host->sizes() != tensor.sizes() || host->strides() != tensor.strides()) {
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
            host->sizes(), host->strides(), host->storage_offset());
      }
    }
  }

 private:
  static void drop(void* context) {
    delete static_cast<c10::Storage*>(context);
  }

  c10::Storage host_storage(const c10::Storage& storage) {
    auto known = host_storages_.find(storage.unsafeGetStorageImpl());
    if (known != host_storages_.end()) return known->second;
    // The context keeps the card's memory alive as long as a kernel holds the view.
    c10::DataPtr data(
        storage.mutable_data(), new c10::Storage(storage), &drop, c10::Device(c10::kCPU));
    c10::Storage host(
        c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
        c10::GetCPUAllocator(), true);
    host_storages_.emplace(storage.unsafeGetStorageImpl(), host);
    storages_.emplace(host.unsafeGetStorageImpl(), storage);
    resized_candidates_.emplace_back(storage, host);
    return host;
  }

  c10::DeviceIndex index_;
  std::unordered_map<c10::TensorImpl*, Tensor> hosts_;   // of the card's tensors
  std::unordered_map<c10::TensorImpl*, Tensor> owners_;  // card's tensors of the host's
  std::unordered_map<StorageImpl*, c10::Storage> host_storages_;
  std::unordered_map<StorageImpl*, c10::Storage> storages_;
  std::vector<std::pair<c10::Storage, c10::Storage>> resized_candidates_;
};

// Operators that make the host wait on CUDA, as the size of what they give is not known before.
const std::set<std::string> kWaiting = {
    "aten::nonzero",           "aten::masked_select", "aten::equal",   "aten::_unique2",
    "aten::unique_consecutive", "aten::unique_dim",    "aten::bincount"};
const std::string kWriting = "aten::_index_put_impl_";
// Operators that take indices from the CPU.
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put", kWriting};

void visit(const c10::IValue& value, const std::function<void(const Tensor&)>& action) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) action(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector()) action(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const OptionalTensor& tensor : value.toOptionalTensorVector()) {
      if (tensor.has_value() && tensor->defined()) action(*tensor);
    }
  }
}

c10::IValue map(const c10::IValue& value, const std::function<Tensor(const Tensor&)>& action) {
  if (value.isTensor()) return action(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& tensor : value.toTensorVector()) made.push_back(action(tensor));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<OptionalTensor> made;
    for (const OptionalTensor& tensor : value.toOptionalTensorVector()) {
      made.push_back(tensor.has_value() ? OptionalTensor(action(*tensor)) : tensor);
    }
    return made;
  }
  if (value.isDevice() && value.toDevice().type() == card::kType) return c10::Device(c10::kCPU);
  return value;
}

// The card that a call runs on; refuses tensors of several devices.
c10::Device device_of(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments) {
  std::optional<c10::Device> found;
  for (const c10::IValue& argument : arguments) {
    visit(argument, [&](const Tensor& tensor) {
      if (!found && on_card(tensor)) found = tensor.device();
    });
    if (!found && argument.isDevice() && argument.toDevice().type() == card::kType) {
      found = card::with_index(argument.toDevice());
    }
  }
  if (!found) return card::current();
  const bool indexing = kIndexing.count(schema.name()) > 0;
  for (size_t place = 0; place < arguments.size(); ++place) {
    const c10::Argument& argument = schema.arguments()[place];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    visit(arguments[place], [&](const Tensor& tensor) {
      const bool number = !on_card(tensor) && tensor.dim() == 0 && !written;
      const bool index = indexing && place == 1;
      TORCH_CHECK(
          tensor.device() == *found || number || index,
          "Expected all tensors to be on the same device, but found at least two devices, ",
          *found, " and ", tensor.device(), "! (when checking argument for argument ",
          argument.name(), " in method ", schema.name(), ")");
    });
  }
  return *found;
}

// Whether the host waits for the size of a result, or for that of a selection to be written. A
// number that is written where a mask is true needs no size.
bool waits(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments) {
  if (kWaiting.count(schema.name()) > 0) return true;
  bool masked = false;
  if (schema.name() == kWriting && arguments[2].toTensor().numel() > 1) {
    visit(arguments[1], [&](const Tensor& tensor) {
      masked = masked || tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
    });
  }
  return masked;
}

// Any operator: by its CPU kernel.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  const auto arguments = at::ArrayRef<c10::IValue>(*stack).slice(first);
  const c10::Device device = device_of(schema, arguments);
  const c10::DeviceGuard guard(device);
  Call call(device.index());
  if (waits(schema, arguments)) ++card::counters(device.index()).synchronisations;
  for (size_t place = first; place < stack->size(); ++place) {
    (*stack)[place] =
        map((*stack)[place], [&](const Tensor& tensor) { return call.host(tensor); });
  }
  op.redispatchBoxed(kHostKeys, stack);
  call.finish();
  for (size_t place = stack->size() - schema.returns().size(); place < stack->size(); ++place) {
    (*stack)[place] =
        map((*stack)[place], [&](const Tensor& tensor) { return call.back(tensor); });
  }
}

Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(
      size, card::allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      size, stride, card::allocator(), kKeys, c10::dtype_or_default(dtype));
}

// Copies between cards and the host. The host waits for what comes back, unless it asked not to
// and the target is pinned.
Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  const c10::Device device = on_card(target) ? target.device() : self.device();
  Call call(device.index());
  card::Counters& counted = card::counters(device.index());
  if (!on_card(self)) counted.host_to_device += static_cast<int64_t>(self.nbytes());
  if (!on_card(target)) {
    counted.device_to_host += static_cast<int64_t>(target.nbytes());
    if (!non_blocking || !card::is_pinned(target.data_ptr())) ++counted.synchronisations;
  } else if (on_card(self) && self.device() != device) {
    card::begin(self.device().index());
  }
  Tensor written = call.host(target);
  written.copy_(call.host(self));
  return target;
}

at::Scalar local_scalar(const Tensor& self) {
  Call call(self.device().index());
  card::Counters& counted = card::counters(self.device().index());
  counted.device_to_host += static_cast<int64_t>(self.itemsize());
  ++counted.synchronisations;
  return at::_local_scalar_dense(call.host(self));
}

// Views of memory, which run nothing.
Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor reshape_alias(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  return at::cpu::set_(self, std::move(source));
}

Tensor& set_storage_shape(
    Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride) {
  return at::cpu::set_(
      self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride));
}

void record_stream(Tensor&, at::Stream) {}

// Lets `Module.to` change parameters in place, as it does for CUDA: ties survive.
bool has_compatible_shallow_copy_type(const Tensor&, const Tensor&) {
  return true;
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups) {
  Call call(input.device().index());
  return call.back(at::convolution(
      call.host(input), call.host(weight), call.host(bias), stride, padding, dilation,
      transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  Call call(gradient.device().index());
  const int64_t channels = gradient.size(1);
  const auto bias = mask[2] ? at::OptionalIntArrayRef(channels) : at::OptionalIntArrayRef();
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      call.host(gradient), call.host(input), call.host(weight), bias, stride, padding, dilation,
      transposed, output_padding, groups, mask);
  return {call.back(of_input), call.back(of_weight), call.back(of_bias)};
}

// Attention takes the kernel that the CPU would take, so that bits are the CPU's.
int64_t choose_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
    double dropout, bool causal, std::optional<double> scale, bool grouped) {
  Call call(query.device().index());
  const int64_t choice = at::_fused_sdp_choice(
      call.host(query), call.host(key), call.host(value), call.host(mask), dropout, causal,
      scale, grouped);
  return static_cast<int64_t>(
      choice == static_cast<int64_t>(at::SDPBackend::math) ? at::SDPBackend::math
                                                           : at::SDPBackend::overrideable);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>
attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    double dropout, bool causal, bool, std::optional<double> scale) {
  Call call(query.device().index());
  auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      call.host(query), call.host(key), call.host(value), dropout, causal, call.host(bias),
      scale);
  return {call.back(output), call.back(sums), Tensor(), Tensor(), query.sym_size(2),
          key.sym_size(2), Tensor(), Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& bias, std::array<bool, 4>, const Tensor& output, const Tensor& sums,
    const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
  Call call(query.device().index());
  const OptionalTensor mask = bias.defined() ? OptionalTensor(call.host(bias)) : std::nullopt;
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      call.host(gradient), call.host(query), call.host(key), call.host(value),
      call.host(output), call.host(sums), dropout, causal, mask, scale);
  return {call.back(of_query), call.back(of_key), call.back(of_value), Tensor()};
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("view", &view);
  library.impl("as_strided", &as_strided);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", &unfold);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage_shape);
  library.impl("record_stream", &record_stream);
  library.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  // These have a formula of simpler operators for devices without a kernel, of other bits.
  for (const char* name : {"native_layer_norm", "native_group_norm", "_fused_rms_norm",
                           "silu_backward", "mish_backward"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  library.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  library.impl(
      "_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
}
