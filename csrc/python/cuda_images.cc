// The operations between the VQGAN's convolutions on a GPU as Python functions, which check shapes and call a launcher.
#include <pybind11/stl.h>

#include "python/cuda.h"
#include "vq_decode/cuda.h"

namespace py = pybind11;

namespace healthgpt {
namespace {

// The data of an image of this shape.
void* Image(const char* name, const py::object& object, const std::vector<int64_t>& shape, cuda::Storage storage) {
  const Array array = DeviceArray(name, object);
  const int bits = storage == cuda::Storage::kFloat32 ? 32 : 16;
  if (array.shape() != shape || array.bits() != bits) {
    throw py::value_error(std::string(name) + " must be " + Array::Brackets(shape) + " of " + std::to_string(bits) +
                          " bits, got " + Array::Brackets(array.shape()) + " of " + std::to_string(array.bits()));
  }
  return array.data<void>();
}

int64_t GroupNormWorkspaceBytes(int64_t batch, int64_t groups) {
  cuda::GroupNormArguments arguments;
  arguments.batch = batch;
  arguments.groups = groups;
  return cuda::GroupNormWorkspaceBytes(arguments);
}

void GroupNorm(const py::object& x, const py::object& weight, const py::object& bias, const py::object& y,
               const py::object& workspace, int64_t groups, float epsilon, bool swish, const std::string& storage,
               uintptr_t stream) {
  const std::vector<int64_t> shape = DeviceArray("x", x).shape();
  if (shape.size() != 3) throw py::value_error("x must have 3 dimensions");
  cuda::GroupNormArguments arguments;
  arguments.batch = shape[0];
  arguments.positions = shape[1];
  arguments.channels = shape[2];
  arguments.groups = groups;
  arguments.storage = StorageOf(storage);
  arguments.x = Image("x", x, shape, arguments.storage);
  arguments.y = Image("y", y, shape, arguments.storage);
  arguments.weight = Floats("weight", weight, {shape[2]});
  arguments.bias = Floats("bias", bias, {shape[2]});
  arguments.epsilon = epsilon;
  arguments.swish = swish;
  const Array memory = DeviceArray("workspace", workspace);
  arguments.workspace = memory.data<void>();
  arguments.workspace_bytes = memory.bytes();
  Raise(cuda::GroupNorm(arguments, StreamOf(stream)));
}

void PhaseInterleave(const py::object& phases, const py::object& image, const std::string& storage, uintptr_t stream) {
  const std::vector<int64_t> shape = DeviceArray("image", image).shape();
  if (shape.size() != 4 || shape[1] % 2 != 0 || shape[2] % 2 != 0) {
    throw py::value_error("image must be [B, 2 h, 2 w, C], got " + Array::Brackets(shape));
  }
  cuda::PhaseInterleaveArguments arguments;
  arguments.batch = shape[0];
  arguments.height = shape[1] / 2;
  arguments.width = shape[2] / 2;
  arguments.channels = shape[3];
  arguments.storage = StorageOf(storage);
  arguments.phases =
      Image("phases", phases, {shape[0], arguments.height + 1, arguments.width + 1, 2, 2, shape[3]}, arguments.storage);
  arguments.image = Image("image", image, shape, arguments.storage);
  Raise(cuda::PhaseInterleave(arguments, StreamOf(stream)));
}

void ImageLevels(const py::object& x, const py::object& image, const std::string& storage, uintptr_t stream) {
  const Array to = DeviceArray("image", image);
  cuda::ImageLevelsArguments arguments;
  arguments.count = to.elements();
  arguments.storage = StorageOf(storage);
  arguments.x = Image("x", x, to.shape(), arguments.storage);
  arguments.image = DeviceArray("image", image).Expect(to.shape(), Array::kUnsigned, 8).data<uint8_t>();
  Raise(cuda::ImageLevels(arguments, StreamOf(stream)));
}

}  // namespace

void BindImages(py::module_& module) {
  module.def("group_norm_workspace_bytes", &GroupNormWorkspaceBytes, py::arg("batch"), py::arg("groups") = 32,
             "Bytes of workspace; zeros before its first use.");
  module.def("group_norm", &GroupNorm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
             py::arg("workspace"), py::arg("groups") = 32, py::arg("epsilon") = 1e-6f, py::arg("swish") = true,
             py::arg("storage") = "float16", py::arg("stream") = 0,
             "y [B, P, C] = swish(group_norm(x)), channels last; y may be x.");
  module.def("phase_interleave", &PhaseInterleave, py::arg("phases"), py::arg("image"), py::arg("storage") = "float16",
             py::arg("stream") = 0, "image [B, 2 h, 2 w, C] from phases [B, h + 1, w + 1, 2, 2, C].");
  module.def("image_levels", &ImageLevels, py::arg("x"), py::arg("image"), py::arg("storage") = "float16",
             py::arg("stream") = 0, "uint8 levels of x in [-1, 1], truncated as the original does.");
}

}  // namespace healthgpt
