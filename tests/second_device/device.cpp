// A device "second" whose memory is the host's. Its ops run on the CPU, and refuse tensors of several devices,
// as those of a GPU do; a backward pass has a thread of its own there. `second::reads` counts copies to the CPU.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using c10::Device;
using std::optional;
using Sizes = c10::SymIntArrayRef;

const Device SECOND(c10::DeviceType::PrivateUse1, 0);
std::atomic<int64_t> reads{0};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes ? std::malloc(bytes) : nullptr;
    return {start, start, &std::free, SECOND};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return SECOND.type(); }
  Device exchangeDevice(Device) const override { return SECOND; }
  Device getDevice() const override { return SECOND; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(const c10::Storage& storage, size_t bytes) {
  auto fresh = memory.allocate(bytes);
  if (storage.nbytes()) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};

// The same memory as a tensor of the CPU.
Tensor host(const Tensor& t) {
  if (!t.device().is_privateuseone()) return t;
  const int64_t entries = t.storage().nbytes() / t.element_size();
  const auto flat = at::from_blob(t.storage().mutable_data(), {entries}, t.options().device(at::kCPU));
  auto found = flat.as_strided(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) found = at::conj(found);
  return t.is_neg() ? at::_neg_view(found) : found;
}

optional<Tensor> host(const optional<Tensor>& t) {
  return t && t->defined() ? optional<Tensor>(host(*t)) : std::nullopt;
}

Tensor empty(c10::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, optional<at::ScalarType> dtype,
                     optional<at::Layout>, optional<Device>, optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor lifted(const Tensor& t) {
  if (!t.defined()) return t;
  auto found = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, {}, {});
  host(found).copy_(t);
  return found;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const at::NoGradGuard guard;
  if (to.is_cpu()) ++reads;
  host(to).copy_(host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize_(const Tensor& t, Sizes size, optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (t.sizes() == sizes) return t;
  const size_t bytes = (c10::multiply_integers(sizes) + t.storage_offset()) * t.element_size();
  if (t.storage().nbytes() < bytes) grow(t.storage(), bytes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

Tensor as_strided(const Tensor& t, Sizes size, Sizes stride, optional<c10::SymInt> offset) {
  const auto start = offset ? optional<int64_t>(offset->expect_int()) : std::nullopt;
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::native::as_strided_tensorimpl(t, sizes, strides, start);
}

Tensor view(const Tensor& t, Sizes size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& t, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar local_scalar_dense(const Tensor& t) {
  ++reads;
  return host(t).item();
}

Tensor& set_(Tensor& t, at::Storage source, c10::SymInt offset, Sizes size, Sizes stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}

Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>& b, Sizes stride, Sizes padding,
                   Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups) {
  TORCH_CHECK(x.device() == w.device(), "convolution of tensors on ", x.device(), " and ", w.device());
  return lifted(at::convolution_symint(host(x), host(w), host(b), stride, padding, dilation, transposed,
                                       output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& c, const Tensor& x, const Tensor& w, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  TORCH_CHECK(x.device() == w.device() && c.device() == x.device(), "convolution on several devices");
  const std::vector<c10::SymInt> channels{transposed ? w.sym_size(1) * groups : w.sym_size(0)};
  const auto [dx, dw, db] = at::convolution_backward_symint(
      host(c), host(x), host(w), Sizes(channels), stride, padding, dilation, transposed, output_padding, groups,
      mask);
  return {lifted(dx), lifted(dw), lifted(db)};
}

// As on CUDA, contiguous whatever the input's memory format is.
std::tuple<Tensor, Tensor, Tensor> group_norm(
    const Tensor& x, const optional<Tensor>& weight, const optional<Tensor>& bias, c10::SymInt n,
    c10::SymInt channels, c10::SymInt size, int64_t groups, double eps) {
  const auto [out, mean, rstd] = at::native_group_norm_symint(
      host(x).contiguous(), host(weight), host(bias), n, channels, size, groups, eps);
  return {lifted(out), lifted(mean), lifted(rstd)};
}

// Scalars of the CPU may meet any tensor, and indices may lie there.
void refuse_several(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& schema = op.schema();
  const bool indexes = schema.name().find("index") != std::string::npos;
  optional<Device> first;
  const auto see = [&](const Tensor& t) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;
    if (indexes && t.is_cpu() && !t.is_floating_point()) return;
    TORCH_CHECK(!first || *first == t.device(), schema.name(), " of tensors on ", *first, " and ", t.device());
    first = t.device();
  };
  for (auto place = stack.end() - schema.arguments().size(); place != stack.end(); ++place) {
    if (place->isTensor()) see(place->toTensor());
    if (place->isTensorList())
      for (const Tensor& t : place->toTensorList()) see(t);
    if (place->isOptionalTensorList())
      for (const optional<Tensor>& t : place->toOptionalTensorList())
        if (t) see(*t);
  }
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse_several(op, *stack);
  const auto before = reads.load();
  at::native::cpu_fallback(op, stack);
  reads = before;  // without those of this function
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("as_strided", as_strided);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("convolution_overrideable", convolution);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("native_group_norm", group_norm);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("unfold", at::native::unfold);
  m.impl("view", view);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("view_as_real", at::native::view_as_real);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

// The casts of CUDA's autocast.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_FEW_DIGITS(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_FEW_DIGITS)
  AT_FORALL_FP32(IN_FLOAT32)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
}

TORCH_LIBRARY(second, m) {
  m.def("start() -> ()", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("reads() -> int", [] { return reads.load(); });
}
