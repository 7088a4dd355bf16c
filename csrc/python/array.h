// Arrays from Python through DLPack, the protocol that NumPy, PyTorch, CuPy and JAX share. Objects without it can have
// NumPy's (version 3) or CUDA's array interface, which names an address.
//
// The structures are those of dlpack.h 0.8, whose authors keep them unchanged. They are declared here so that building
// needs no download. An array is borrowed for a call: the capsule, or the caller, keeps its owner alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace healthgpt {

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dimensions;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // null for a contiguous row-major array
  uint64_t byte_offset;
};

class Array {
 public:
  enum Code : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBFloat = 4 };
  static constexpr int32_t kCpu = 1, kCuda = 2;

  // Throws ValueError unless the array is on `device` and contiguous.
  Array(const char* name, const pybind11::handle& object, int32_t device) : name_(name) {
    namespace py = pybind11;
    const char* interface = device == kCuda ? "__cuda_array_interface__" : "__array_interface__";
    if (!py::hasattr(object, "__dlpack__")) {
      if (!py::hasattr(object, interface)) throw py::value_error(Text("must be an array with __dlpack__"));
      ReadInterface(object.attr(interface).cast<py::dict>());
      return;
    }
    const auto found = object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
    if (found != device) throw py::value_error(Text(device == kCuda ? "must lie on the GPU" : "must lie on the CPU"));
    // -1: no synchronisation. The caller passes a stream in which the work on the array is ordered.
    capsule_ = device == kCuda ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
    tensor_ = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (tensor_ == nullptr) throw py::error_already_set();
    int64_t stride = 1;
    for (int i = tensor_->dimensions - 1; i >= 0; --i) {
      const bool is_next = tensor_->strides == nullptr || tensor_->strides[i] == stride || tensor_->shape[i] <= 1;
      if (!is_next) throw py::value_error(Text("must be without gaps, row by row"));
      stride *= tensor_->shape[i];
    }
    elements_ = stride;
  }

  Array(const Array&) = delete;  // tensor_ may point to own_
  Array& operator=(const Array&) = delete;

  std::vector<int64_t> shape() const { return {tensor_->shape, tensor_->shape + tensor_->dimensions}; }
  int64_t elements() const { return elements_; }
  int64_t bytes() const { return elements_ * tensor_->type_bits / 8; }
  int bits() const { return tensor_->type_bits; }
  bool is(Code code, int bits) const { return tensor_->type_code == code && tensor_->type_bits == bits; }

  template <class Type>
  Type* data() const {
    return reinterpret_cast<Type*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }

  // Throws ValueError unless the array has this shape and type.
  const Array& Expect(const std::vector<int64_t>& expected, Code code, int bits) const {
    if (shape() != expected) {
      throw pybind11::value_error(Text("must be " + Brackets(expected) + ", got " + Brackets(shape())));
    }
    if (!is(code, bits)) {
      static constexpr const char* kNames[] = {"int", "uint", "float", "handle", "bfloat"};
      throw pybind11::value_error(Text("must hold " + std::string(kNames[code]) + std::to_string(bits) + ", got " +
                                       kNames[tensor_->type_code > 4 ? 3 : tensor_->type_code] +
                                       std::to_string(tensor_->type_bits)));
    }
    return *this;
  }

  static std::string Brackets(const std::vector<int64_t>& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }

 private:
  void ReadInterface(const pybind11::dict& interface) {
    namespace py = pybind11;
    if (interface.contains("strides") && !interface["strides"].is_none()) {
      throw py::value_error(Text("must be without gaps, row by row"));
    }
    // Byte order, kind and number of bytes, such as "<f4".
    const auto type = interface["typestr"].cast<std::string>();
    static const std::string kKinds = "iuf";
    const size_t code = type.size() == 3 && type[0] != '>' ? kKinds.find(type[1]) : std::string::npos;
    if (code == std::string::npos) throw py::value_error(Text("must hold numbers of this machine, got " + type));
    shape_ = interface["shape"].cast<std::vector<int64_t>>();
    elements_ = 1;
    for (const int64_t size : shape_) elements_ *= size;
    own_.data = reinterpret_cast<void*>(interface["data"].cast<py::tuple>()[0].cast<uintptr_t>());
    own_.dimensions = static_cast<int32_t>(shape_.size());
    own_.type_code = static_cast<uint8_t>(code);
    own_.type_bits = static_cast<uint8_t>(8 * (type[2] - '0'));
    own_.shape = shape_.data();
    tensor_ = &own_;
  }

  std::string Text(const std::string& what) const { return name_ + " " + what; }

  std::string name_;
  pybind11::object capsule_;
  const DLTensor* tensor_;
  std::vector<int64_t> shape_;  // of own_, which describes an array interface
  DLTensor own_ = {};
  int64_t elements_ = 0;
};

}  // namespace healthgpt
