// A library computes the three products z = x [A;R], y = x W and y += gated z B. Kernels in between normalise or pair
// and round x, widen integer weights to float16, begin y with bias and residual, and apply the gate.
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/product.h"
#include "hlora_linear/inputs.cuh"
#include "hlora_linear/prefill.h"

namespace healthgpt::cuda {
namespace {

constexpr int kThreads = 256;

constexpr int kEach = 4;  // neighbouring numbers of a thread

// The sum over a block. All threads must call it; `shared` has room for a number of each warp.
__device__ inline float BlockSum(float value, float* shared) {
  value = WarpSum(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  SyncThreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += shared[warp];
  return sum;
}

// One block per row: what the products multiply, rounded.
template <class Number>
__global__ void __launch_bounds__(kThreads, 1)
    RoundKernel(PlainInput input, bool normalise, float epsilon, Number* rounded) {
  auto& shared = Shared<float[kThreads / kWarpSize]>();
  WaitForPrevious();
  AllowNext();
  const int row = static_cast<int>(blockIdx.x);
  const auto each = [&](const auto& use) {
    for (int channel = kEach * static_cast<int>(threadIdx.x); channel < input.channels; channel += kEach * kThreads) {
      float values[kEach];
      input.Values(input.Load(row, channel), row, channel, values);
      use(channel, values);
    }
  };
  float factor = 1.0f;
  if (normalise) {
    float squares = 0.0f;
    each([&](int, const float (&values)[kEach]) {
      for (int i = 0; i < kEach; ++i) squares += values[i] * values[i];
    });
    factor = 1.0f / sqrtf(BlockSum(squares, shared) / static_cast<float>(input.channels) + epsilon);
  }
  each([&](int channel, const float (&values)[kEach]) {
    Number* const to = rounded + static_cast<int64_t>(row) * input.channels + channel;
    if (input.is_aligned) {
      *reinterpret_cast<uint2*>(to) = {Pack(Round(values[0] * factor, Number()), Round(values[1] * factor, Number())),
                                       Pack(Round(values[2] * factor, Number()), Round(values[3] * factor, Number()))};
      return;
    }
    for (int i = 0; i < Least(kEach, input.channels - channel); ++i) to[i] = Round(values[i] * factor, Number());
  });
}

constexpr int kWidened = 8;  // neighbouring integers of a thread

__device__ inline int SignedNibble(uint32_t word, int index) {
  return static_cast<int>(word << (28 - 4 * index)) >> 28;
}
__device__ inline int SignedByte(uint32_t word, int index) { return static_cast<int>(word << (24 - 8 * index)) >> 24; }

// One block per channel: multiplies integers by their quantisation block's scales. If `is_wide`, whole words can be
// read, and written.
__global__ void __launch_bounds__(kThreads, 1) WidenKernel(Matrix matrix, bool is_wide, Half* widened) {
  WaitForPrevious();
  AllowNext();
  const int64_t channel = blockIdx.x;
  const float* const scales = matrix.scales + channel / matrix.block_size * matrix.outputs;
  Half* const to = widened + channel * matrix.outputs;
  const int64_t row = channel * matrix.stride;
  if (is_wide) {
    for (int64_t output = kWidened * threadIdx.x; output < matrix.outputs; output += kWidened * kThreads) {
      int values[kWidened];
      if (matrix.storage == Storage::kInt8) {
        const uint2 words = LoadOnce<uint2>(static_cast<const int8_t*>(matrix.values) + row + output);
        for (int i = 0; i < kWidened; ++i) values[i] = SignedByte(i < 4 ? words.x : words.y, i % 4);
      } else {
        const uint32_t word = LoadOnce<uint32_t>(static_cast<const uint8_t*>(matrix.values) + (row + output) / 2);
        for (int i = 0; i < kWidened; ++i) values[i] = SignedNibble(word, i);
      }
      uint32_t words[kWidened / 2];
      for (int i = 0; i < kWidened; i += 4) {
        const float4 four = LoadOnce<float4>(scales + output + i);
        words[i / 2] = Pack(Round(static_cast<float>(values[i]) * four.x, Half()),
                            Round(static_cast<float>(values[i + 1]) * four.y, Half()));
        words[i / 2 + 1] = Pack(Round(static_cast<float>(values[i + 2]) * four.z, Half()),
                                Round(static_cast<float>(values[i + 3]) * four.w, Half()));
      }
      *reinterpret_cast<uint4*>(to + output) = {words[0], words[1], words[2], words[3]};
    }
    return;
  }
  for (int64_t output = threadIdx.x; output < matrix.outputs; output += kThreads) {
    const int64_t at = row + output;
    const int value = matrix.storage == Storage::kInt8
                          ? static_cast<const int8_t*>(matrix.values)[at]
                          : SignedNibble(static_cast<const uint8_t*>(matrix.values)[at / 2], at % 2);
    to[output] = Round(static_cast<float>(value) * scales[output], Half());
  }
}

// Whether WidenKernel can read whole words of a matrix. Working memory is aligned.
bool IsWide(const Matrix& matrix) {
  return matrix.outputs % kWidened == 0 && matrix.stride % kWidened == 0 &&
         reinterpret_cast<uintptr_t>(matrix.values) % 8 == 0 && reinterpret_cast<uintptr_t>(matrix.scales) % 16 == 0;
}

// One block per row: what the products are added to, the bias (O) and the residual (S, O), either of which may be null.
__global__ void __launch_bounds__(kThreads, 1)
    BeginKernel(const float* bias, const float* residual, int64_t outputs, float* y) {
  WaitForPrevious();
  AllowNext();
  for (int64_t output = threadIdx.x; output < outputs; output += kThreads) {
    const int64_t at = blockIdx.x * outputs + output;
    y[at] = (bias == nullptr ? 0.0f : bias[output]) + (residual == nullptr ? 0.0f : residual[at]);
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
      const Status wrong =
          Launch(WidenKernel, grid, dim3(kThreads), stream, matrix, IsWide(matrix), at<Half>(places.widened));
      if (wrong != nullptr) return wrong;
      product.right = at<Half>(places.widened);
      product.right_stride = matrix.outputs;
    }
    return LargeProduct(product, stream);
  }

  template <class Number>
  Status Run() const {
    const int64_t channels = given.weight.channels, rank = given.adapter_out.channels;
    const Grid rows = {given.rows};
    const dim3 block(kThreads);
    PlainInput input;
    input.x = given.x;
    input.rows = static_cast<int>(given.rows);
    input.channels = static_cast<int>(channels);
    input.stride = static_cast<int>(given.pair_input ? 2 * channels : channels);
    input.is_pair = given.pair_input;
    input.is_aligned = channels % kEach == 0 && reinterpret_cast<uintptr_t>(given.x) % 16 == 0;
    Number *const x = at<Number>(places.x), *const gated = at<Number>(places.gated);
    float* const low = at<float>(places.low);
    Status wrong = Launch(RoundKernel<Number>, rows, block, stream, input, given.normalise, given.epsilon, x);
    if (wrong == nullptr && given.experts > 0) wrong = Multiply(x, given.adapter_in, low, false);
    if (wrong == nullptr && given.experts > 0) {
      wrong = Launch(GateKernel<Number>, rows, block, stream, static_cast<const float*>(low), rank, given.experts,
                     given.expert_of, given.route_bias, gated);
    }
    const bool begins = given.bias != nullptr || given.residual != nullptr;
    if (wrong == nullptr && begins) {
      wrong = Launch(BeginKernel, rows, block, stream, given.bias, given.residual, given.weight.outputs, given.y);
    }
    if (wrong == nullptr) wrong = Multiply(x, given.weight, given.y, begins);
    if (wrong == nullptr && given.experts > 0) wrong = Multiply(gated, given.adapter_out, given.y, true);
    return wrong;
  }
};

}  // namespace

int64_t HLoraPrefillWorkspaceBytes(const HLoraLinearArguments& given) { return PlacesOf(given).end; }

Status HLoraPrefill(const HLoraLinearArguments& given, Stream stream) {
  if (given.rows < 1) return "[hlora_prefill] there must be rows";
  const int64_t width = given.weight.channels * (given.pair_input ? 2 : 1);
  // Places in x are counted in 32 bits (inputs.cuh).
  if (width < 1 || given.rows > INT32_MAX / width) return "[hlora_prefill] x must have fewer than 2^31 numbers";
  if (const Status wrong = CheckOperands(given)) return wrong;
  if (given.workspace == nullptr || given.workspace_bytes < HLoraPrefillWorkspaceBytes(given)) {
    return "[hlora_prefill] the workspace is too small";
  }
  const Prefill prefill = {given, PlacesOf(given), stream};
  return given.weight.storage == Storage::kBFloat16 ? prefill.Run<BFloat16>() : prefill.Run<Half>();
}

}  // namespace healthgpt::cuda
