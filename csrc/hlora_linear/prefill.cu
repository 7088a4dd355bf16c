// A library computes the three products z = x [A;R], y = x W and y += gated z B. Kernels in between round x, widen
// integer weights to float16, fill y with the bias, and apply the gate.
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/product.h"
#include "hlora_linear/prefill.h"

namespace healthgpt::cuda {
namespace {

constexpr int kThreads = 256;

template <class Number>
__global__ void __launch_bounds__(kThreads, 1) RoundKernel(const float* x, int64_t count, Number* rounded) {
  WaitForPrevious();
  AllowNext();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) rounded[at] = Round(x[at], Number());
}

// One block per channel: multiplies integers by their quantisation block's scales.
__global__ void __launch_bounds__(kThreads, 1) WidenKernel(Matrix matrix, Half* widened) {
  WaitForPrevious();
  AllowNext();
  const int64_t channel = blockIdx.x;
  const float* const scales = matrix.scales + channel / matrix.block_size * matrix.outputs;
  for (int64_t output = threadIdx.x; output < matrix.outputs; output += kThreads) {
    const int64_t at = channel * matrix.stride + output;
    int value = 0;
    if (matrix.storage == Storage::kInt8) {
      value = static_cast<const int8_t*>(matrix.values)[at];
    } else {
      const int nibble = static_cast<const uint8_t*>(matrix.values)[at / 2] >> (at % 2 * 4) & 15;
      value = nibble < 8 ? nibble : nibble - 16;
    }
    widened[channel * matrix.outputs + output] = Round(static_cast<float>(value) * scales[output], Half());
  }
}

__global__ void __launch_bounds__(kThreads, 1) BiasKernel(const float* bias, int64_t outputs, float* y) {
  WaitForPrevious();
  AllowNext();
  for (int64_t output = threadIdx.x; output < outputs; output += kThreads) {
    y[blockIdx.x * outputs + output] = bias[output];
  }
}

// One block per row: the softmax of its routes times its entries of x A.
template <class Number>
__global__ void __launch_bounds__(kThreads, 1)
    GateKernel(const float* low, int64_t rank, int64_t experts, const int32_t* expert_of, const float* route_bias,
               Number* gated) {
  WaitForPrevious();
  AllowNext();
  const float* const row = low + blockIdx.x * (rank + experts);
  const auto route = [&](int64_t expert) {
    return row[rank + expert] + (route_bias == nullptr ? 0.0f : route_bias[expert]);
  };
  float largest = route(0), sum = 0.0f;
  for (int64_t i = 1; i < experts; ++i) largest = fmaxf(largest, route(i));
  for (int64_t i = 0; i < experts; ++i) sum += expf(route(i) - largest);
  for (int64_t i = threadIdx.x; i < rank; i += kThreads) {
    const float gate = expf(route(expert_of == nullptr ? i * experts / rank : expert_of[i]) - largest) / sum;
    gated[blockIdx.x * rank + i] = Round(row[i] * gate, Number());
  }
}

// The workspace's layout, in bytes from its start. Only one matrix is widened at a time.
struct Places {
  int64_t library, x, low, gated, widened, end;
};

Places PlacesOf(const HLoraLinearArguments& given) {
  Places places = {};
  int64_t end = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t at = end;
    end += CeilDivide(bytes, 256) * 256;
    return at;
  };
  const int64_t rank = given.adapter_out.channels;
  places.library = place(kProductWorkspaceBytes);
  places.x = place(2 * given.rows * given.weight.channels);
  places.low = place(4 * given.rows * (rank + given.experts));
  places.gated = place(2 * given.rows * rank);
  int64_t largest = 0;
  for (const Matrix* matrix : {&given.weight, &given.adapter_in, &given.adapter_out}) {
    const int64_t bytes = IsInteger(matrix->storage) ? 2 * matrix->channels * matrix->outputs : 0;
    largest = bytes > largest ? bytes : largest;
  }
  places.widened = place(largest);
  places.end = end;
  return places;
}

// One call, with its memory and its stream.
struct Prefill {
  const HLoraLinearArguments& given;
  Places places;
  Stream stream;

  template <class Type>
  Type* at(int64_t place) const {
    return reinterpret_cast<Type*>(static_cast<char*>(given.workspace) + place);
  }

  // result (rows, outputs) = left (rows, channels) times a stored matrix, added to the old result if `accumulate`.
  template <class Number>
  Status Multiply(const Number* left, const Matrix& matrix, float* result, bool accumulate) const {
    ProductArguments product;
    product.storage = given.weight.storage == Storage::kBFloat16 ? Storage::kBFloat16 : Storage::kFloat16;
    product.rows = given.rows;
    product.channels = matrix.channels;
    product.outputs = matrix.outputs;
    product.left = left;
    product.right = matrix.values;
    product.right_stride = matrix.stride;
    product.result = result;
    product.accumulate = accumulate;
    product.workspace = at<void>(places.library);
    if (IsInteger(matrix.storage)) {
      const Grid grid = {matrix.channels};
      const Status wrong = Launch(WidenKernel, grid, dim3(kThreads), stream, matrix, at<Half>(places.widened));
      if (wrong != nullptr) return wrong;
      product.right = at<Half>(places.widened);
      product.right_stride = matrix.outputs;
    }
    return LargeProduct(product, stream);
  }

  template <class Number>
  Status Run() const {
    const int64_t count = given.rows * given.weight.channels, rank = given.adapter_out.channels;
    const Grid rows = {given.rows}, pieces = {CeilDivide(count, kThreads)};
    const dim3 block(kThreads);
    Number *const x = at<Number>(places.x), *const gated = at<Number>(places.gated);
    float* const low = at<float>(places.low);
    Status wrong = Launch(RoundKernel<Number>, pieces, block, stream, given.x, count, x);
    if (wrong == nullptr && given.experts > 0) wrong = Multiply(x, given.adapter_in, low, false);
    if (wrong == nullptr && given.experts > 0) {
      wrong = Launch(GateKernel<Number>, rows, block, stream, static_cast<const float*>(low), rank, given.experts,
                     given.expert_of, given.route_bias, gated);
    }
    if (wrong == nullptr && given.bias != nullptr) {
      wrong = Launch(BiasKernel, rows, block, stream, given.bias, given.weight.outputs, given.y);
    }
    if (wrong == nullptr) wrong = Multiply(x, given.weight, given.y, given.bias != nullptr);
    if (wrong == nullptr && given.experts > 0) wrong = Multiply(gated, given.adapter_out, given.y, true);
    return wrong;
  }
};

}  // namespace

int64_t HLoraPrefillWorkspaceBytes(const HLoraLinearArguments& given) { return PlacesOf(given).end; }

Status HLoraPrefill(const HLoraLinearArguments& given, Stream stream) {
  if (given.rows < 1) return "[hlora_prefill] there must be rows";
  if (given.normalise || given.pair_input || given.residual != nullptr) {
    return "[hlora_prefill] many rows take no norm, pairing or residual";
  }
  if (const Status wrong = CheckOperands(given)) return wrong;
  if (given.workspace == nullptr || given.workspace_bytes < HLoraPrefillWorkspaceBytes(given)) {
    return "[hlora_prefill] the workspace is too small";
  }
  const Prefill prefill = {given, PlacesOf(given), stream};
  return given.weight.storage == Storage::kBFloat16 ? prefill.Run<BFloat16>() : prefill.Run<Half>();
}

}  // namespace healthgpt::cuda
