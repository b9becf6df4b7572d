// Python object -> Tensor view, through the DLPack C exchange API of its type (torch >= 2.10): no capsule, no
// copy, no libtorch. The only file that knows DLPack. Struct layouts follow the DLPack 1.3 specification.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <unordered_map>

#include "tensor.h"

namespace esokern::python {

namespace dl {
struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeHeader {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeHeader* previous;
};
struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};
enum : int32_t { kCpu = 1, kCuda = 2 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
}  // namespace dl

// The exchange table of a type, looked up once per type. The GIL guards the map.
inline const dl::ExchangeApi* exchange_api(PyTypeObject* type) {
  static auto* known = new std::unordered_map<PyTypeObject*, const dl::ExchangeApi*>();
  auto found = known->find(type);
  if (found != known->end()) return found->second;
  const dl::ExchangeApi* api = nullptr;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    api = static_cast<const dl::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (api != nullptr && (api->header.version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr))
    api = nullptr;
  if (api != nullptr) {
    Py_INCREF(type);  // the key must stay unique for the life of the process
    known->emplace(type, api);
  }
  return api;
}

inline DType dtype_from_dlpack(dl::DataType type) {
  if (type.lanes == 1) {
    if (type.code == dl::kFloat && type.bits == 32) return DType::f32;
    if (type.code == dl::kFloat && type.bits == 16) return DType::f16;
    if (type.code == dl::kFloat && type.bits == 64) return DType::f64;
    if (type.code == dl::kBfloat && type.bits == 16) return DType::bf16;
    if (type.code == dl::kInt && type.bits == 32) return DType::i32;
    if (type.code == dl::kInt && type.bits == 64) return DType::i64;
    if ((type.code == dl::kBool || type.code == dl::kUInt) && type.bits == 8) return DType::u8;
  }
  throw pybind11::type_error(
      "unsupported dtype: kernels take float32, float16, bfloat16, int32, int64, bool");
}

// Views of the tensors of one call, which must all lie on one device of the given type.
class Tensors {
 public:
  explicit Tensors(int32_t device_type) : device_type_(device_type) {}

  // None becomes a Tensor that is not given.
  Tensor operator()(pybind11::handle object) {
    Tensor tensor;
    if (object.is_none()) return tensor;
    const dl::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
    if (api == nullptr)
      throw pybind11::type_error("expected a torch.Tensor (torch >= 2.10), got " +
                                 std::string(Py_TYPE(object.ptr())->tp_name));
    dl::DLTensor view;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &view) != 0) throw pybind11::error_already_set();
    check_device(view.device);
    api_ = api;
    if (view.ndim > Tensor::kMaxDims)
      throw pybind11::value_error("a tensor has more dimensions than any kernel takes");
    tensor.dtype = dtype_from_dlpack(view.dtype);
    tensor.ndim = view.ndim;
    int64_t elements = 1;
    for (int i = 0; i < view.ndim; ++i) elements *= tensor.shape[i] = view.shape[i];
    int64_t dense = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
      tensor.stride[i] = view.strides != nullptr ? view.strides[i] : dense;
      dense *= tensor.shape[i];
    }
    tensor.data = static_cast<char*>(view.data) + view.byte_offset;
    if (view.data == nullptr && elements > 0)
      throw pybind11::value_error("a tensor without memory (fake or meta) reached a kernel");
    return tensor;
  }

  int32_t device_type() const { return device_type_; }
  int32_t device() const { return device_; }

  // The stream on which the framework of the tensors works at present.
  void* stream() const {
    void* stream = nullptr;
    if (device_type_ == dl::kCpu || api_ == nullptr) return stream;
    if (api_->current_work_stream == nullptr ||
        api_->current_work_stream(device_type_, device_, &stream) != 0)
      throw pybind11::error_already_set();
    return stream;
  }

 private:
  void check_device(dl::Device device) {
    if (device.type != device_type_)
      throw pybind11::value_error(device_type_ == dl::kCpu ? "the cpu back end takes CPU tensors"
                                                           : "the cuda back end takes CUDA tensors");
    if (api_ != nullptr && device.id != device_)
      throw pybind11::value_error("all tensors of a call must be on one device");
    device_ = device.id;
  }

  int32_t device_type_, device_ = 0;
  const dl::ExchangeApi* api_ = nullptr;  // of any tensor of the call
};

}  // namespace esokern::python
