// The kernel of Convolution, compiled once per target (simd/simd.h).
//
// The outputs are divided into tiles of 4x4 pixels (winograd.h). A task computes a band of tile rows for a part of the
// output channels. It shares nothing with other tasks:
//   1. It normalises the input pixels of its band, applies swish, and pads the picture with zeros.
//   2. It transforms its part of the weights into 36 matrices (C, part).
//   3. For some tiles at a time, which fit into the L2 cache, it transforms the inputs, computes the 36 products,
//      transforms the outputs back, and adds bias and residual.
// Tasks repeat steps 1 and 2 for each other; together these take a few hundredths of the time of step 3.
#include "convolution/target_kernels.h"
#include "convolution/winograd.h"
#include "scratch.h"
#include "simd/exponential.h"
#include "simd/simd.h"
#include "simd/sizes.h"

namespace healthgpt {
namespace {

constexpr int64_t kLanes = Simd::kLanes;
// Vectors of outputs, and tiles, whose sums are in registers at once: 24 sums in 32 registers, or 12 in 16.
constexpr int kVectors = 4;
constexpr int kTilesAtOnce = kLanes == 8 ? 3 : 6;
constexpr int64_t kStrip = kVectors * kLanes;  // outputs
constexpr int64_t kTilesPerGroup = 24;         // whose transformed inputs stay in the L2 cache
constexpr int64_t kPad = kLanes;               // between matrices: at powers of two they would share cache sets
constexpr int64_t kOutputsPerTask = 128;
constexpr int64_t kTilesPerTask = 256;  // at least, if the picture has so many
constexpr int64_t kRowsPerSum = 4;      // rows of pixels in a partial sum of the normalisation

// swish(x scale + shift).
SIMD_INLINE Floats NormSwish(Floats x, Floats scale, Floats shift) { return Swish(Simd::MultiplyAdd(x, scale, shift)); }

SIMD_INLINE Floats LoadWeights(const float* from, int count) { return Simd::Load(from, count); }
SIMD_INLINE Floats LoadWeights(const uint16_t* from, int count) { return Simd::LoadHalf(from, count); }

// How a convolution is divided into tasks, by its shape alone.
struct Cut {
  int64_t height, width;            // of y
  int64_t tile_rows, tile_columns;  // of 4x4 outputs
  int64_t rows;                     // tile rows of a band
  int64_t bands, parts, part;       // part: the outputs of a task, in whole vectors
  // Elements from one of a task's 36 matrices to the next, for inputs, weights and products.
  int64_t input_size, weight_size, product_size;
  int64_t input_row;  // elements from one tile of the inputs to the next

  explicit Cut(const ConvolutionArguments& given) {
    height = given.height * given.enlarge;
    width = given.width * given.enlarge;
    tile_rows = CeilDivide(height, kOutputSide);
    tile_columns = CeilDivide(width, kOutputSide);
    rows = Min(tile_rows, Max(1, kTilesPerTask / tile_columns));
    bands = CeilDivide(tile_rows, rows);
    parts = CeilDivide(given.outputs, kOutputsPerTask);
    part = RoundUp(CeilDivide(given.outputs, parts), kLanes);
    parts = CeilDivide(given.outputs, part);
    input_row = RoundUp(given.channels, kLanes) + kPad;
    input_size = kTilesPerGroup * input_row + kPad;
    weight_size = given.channels * RoundUp(part, kStrip) + kPad;
    product_size = kTilesPerGroup * part + kPad;
  }
};

// One call, with its normalisation swish(x scale + shift) per picture and channel.
struct Call {
  const ConvolutionArguments& given;
  Cut cut;
  int64_t channels;  // C, rounded up to vectors
  float* scale = nullptr;
  float* shift = nullptr;

  // --- normalisation ---

  // sums and squares (C) over some rows of pixels. They are of the differences from the picture's first pixel, so that
  // a large mean does not cancel the variance's digits.
  void Sum(int64_t image, int64_t first_row, int64_t end_row, double* sums, double* squares) const {
    const float* picture = given.x + image * given.height * given.width * given.channels;
    float* row_sums = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(2 * channels * 4)));
    float* row_squares = row_sums + channels;
    for (int64_t c = 0; c < given.channels; ++c) sums[c] = squares[c] = 0.0;
    for (int64_t row = first_row; row < end_row; ++row) {
      for (int64_t i = 0; i < 2 * channels; i += kLanes) Simd::Store(row_sums + i, Simd::Repeat(0.0f));
      for (int64_t column = 0; column < given.width; ++column) {
        const float* pixel = picture + (row * given.width + column) * given.channels;
        for (int64_t c = 0; c < given.channels; c += kLanes) {
          const int count = static_cast<int>(Min(kLanes, given.channels - c));
          const Floats difference = AddScaled(-1.0f, Simd::Load(picture + c, count), Simd::Load(pixel + c, count));
          Simd::Store(row_sums + c, Simd::Add(Simd::Load(row_sums + c), difference));
          Simd::Store(row_squares + c, Simd::MultiplyAdd(difference, difference, Simd::Load(row_squares + c)));
        }
      }
      for (int64_t c = 0; c < given.channels; ++c) {
        sums[c] += row_sums[c];
        squares[c] += row_squares[c];
      }
    }
  }

  // Computes scale and shift of one group of one picture from the partial sums (pieces, 2, C).
  void Norm(int64_t image, int64_t group, const double* partial, int64_t pieces) const {
    const int64_t size = given.channels / given.groups, from = group * size;
    const float* first = given.x + image * given.height * given.width * given.channels;
    const double pixels = static_cast<double>(given.height * given.width);
    double mean = 0.0, square = 0.0;  // of the group
    for (int64_t c = from; c < from + size; ++c) {
      double sum = 0.0, squares = 0.0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        sum += partial[piece * 2 * given.channels + c];
        squares += partial[(piece * 2 + 1) * given.channels + c];
      }
      // From the difference to the first pixel's channel c to the difference to its channel `from`.
      const double offset = static_cast<double>(first[c]) - first[from], average = sum / pixels;
      mean += (average + offset) / static_cast<double>(size);
      square += (squares / pixels + 2.0 * offset * average + offset * offset) / static_cast<double>(size);
    }
    const double variance = square - mean * mean;
    const double inverse = 1.0 / __builtin_sqrt((variance > 0.0 || variance != variance ? variance : 0.0) +
                                                static_cast<double>(kGroupNormEpsilon));
    mean += first[from];
    for (int64_t c = from; c < from + size; ++c) {
      const double factor = inverse * given.norm_weight[c];
      scale[image * channels + c] = static_cast<float>(factor);
      shift[image * channels + c] = static_cast<float>(given.norm_bias[c] - mean * factor);
    }
  }

  // --- a task ---

  // to (4 rows + 2, 4 tile_columns + 2, channels): the activations that `rows` tile rows from `first` on need.
  __attribute__((noinline)) void Activate(int64_t image, int64_t first, int64_t rows, float* to) const {
    const float* picture = given.x + image * given.height * given.width * given.channels;
    const int64_t across = cut.tile_columns * kOutputSide + 2;
    for (int64_t i = 0; i < rows * kOutputSide + 2; ++i) {
      const int64_t row = first * kOutputSide + i - 1;
      for (int64_t j = 0; j < across; ++j, to += channels) {
        const int64_t column = j - 1;
        const bool inside = row >= 0 && row < cut.height && column >= 0 && column < cut.width;
        const int64_t pixel = inside ? row / given.enlarge * given.width + column / given.enlarge : 0;
        const float* from = picture + pixel * given.channels;
        for (int64_t c = 0; c < channels; c += kLanes) {
          const int count = static_cast<int>(Min(kLanes, given.channels - c));
          Floats values = Simd::Repeat(0.0f);
          if (inside) {
            values = Simd::Load(from + c, count);
            if (given.groups > 0) {
              values =
                  NormSwish(values, Simd::Load(scale + image * channels + c), Simd::Load(shift + image * channels + c));
            }
          }
          Simd::Store(to + c, values);
        }
      }
    }
  }

  // to (36, part / kStrip rounded up, C, kStrip): the weights of outputs from `first` on, with zeros past the last.
  template <class Number>
  __attribute__((noinline)) void TransformWeights(int64_t first, float* to) const {
    const int64_t strips = CeilDivide(cut.part, kStrip), tap = given.channels * given.outputs;
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t c = 0; c < given.channels; ++c) {
        for (int64_t i = 0; i < kStrip; i += kLanes) {
          const int64_t output = first + strip * kStrip + i;
          const int count = static_cast<int>(Max(0, Min(kLanes, given.outputs - output)));
          const Number* from =
              static_cast<const Number*>(given.weight) + c * given.outputs + Min(output, given.outputs);
          TransformBothSides<kKernelSide, kInputSide>(
              [](const Floats(&g)[3], Floats(&done)[6]) SIMD_INLINE_LAMBDA { TransformKernel(g, done); },
              [&](auto row, auto column)
                  SIMD_INLINE_LAMBDA { return LoadWeights(from + (row * kKernelSide + column) * tap, count); },
              [&](auto row, auto column, Floats done) SIMD_INLINE_LAMBDA {
                float* matrix = to + (row * kInputSide + column) * cut.weight_size;
                Simd::Store(matrix + (strip * given.channels + c) * kStrip + i, done);
              });
        }
      }
    }
  }

  // to (36, kTilesPerGroup, channels), with zeros past the last tile up to a multiple of kTilesAtOnce.
  __attribute__((noinline)) void TransformInputs(const float* activations, int64_t first, int64_t tiles,
                                                 float* to) const {
    const int64_t across = (cut.tile_columns * kOutputSide + 2) * channels;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = (first + tile) / cut.tile_columns, column = (first + tile) % cut.tile_columns;
      const float* corner = activations + row * kOutputSide * across + column * kOutputSide * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        TransformBothSides<kInputSide, kInputSide>(
            [](const Floats(&d)[6], Floats(&done)[6]) SIMD_INLINE_LAMBDA { TransformInput(d, done); },
            [&](auto i, auto j) SIMD_INLINE_LAMBDA { return Simd::Load(corner + i * across + j * channels + c); },
            [&](auto i, auto j, Floats done) SIMD_INLINE_LAMBDA {
              Simd::Store(to + (i * kInputSide + j) * cut.input_size + tile * cut.input_row + c, done);
            });
      }
    }
    for (int64_t tile = tiles; tile < RoundUp(tiles, kTilesAtOnce); ++tile) {
      for (int64_t product = 0; product < kProducts; ++product) {
        float* row = to + product * cut.input_size + tile * cut.input_row;
        for (int64_t c = 0; c < channels; c += kLanes) Simd::Store(row + c, Simd::Repeat(0.0f));
      }
    }
  }

  // sums (kTilesAtOnce, part) = x (kTilesAtOnce, channels) times `count` vectors of a strip of weights (C, kStrip).
  template <int count>
  static void Multiply(const float* x, int64_t x_stride, const float* weights, int64_t channels, float* sums,
                       int64_t sums_stride) {
    Floats totals[kTilesAtOnce][count];
    Unroll<kTilesAtOnce>([&](auto t) SIMD_INLINE_LAMBDA {
      Unroll<count>([&](auto i) SIMD_INLINE_LAMBDA { totals[t][i] = Simd::Repeat(0.0f); });
    });
    for (int64_t c = 0; c < channels; ++c) {
      Floats strip[count];
      Unroll<count>([&](auto i) SIMD_INLINE_LAMBDA { strip[i] = Simd::Load(weights + c * kStrip + i * kLanes); });
      Unroll<kTilesAtOnce>([&](auto t) SIMD_INLINE_LAMBDA {
        const Floats factor = Simd::Repeat(x[t * x_stride + c]);
        Unroll<count>([&](auto i) SIMD_INLINE_LAMBDA {
          totals[t][i] = Simd::MultiplyAdd(factor, strip[i], totals[t][i]);
          SIMD_KEEP(totals[t][i]);
        });
      });
    }
    Unroll<kTilesAtOnce>([&](auto t) SIMD_INLINE_LAMBDA {
      Unroll<count>([&](auto i) SIMD_INLINE_LAMBDA { Simd::Store(sums + t * sums_stride + i * kLanes, totals[t][i]); });
    });
  }

  // to (36, kTilesPerGroup, part) = x (36, kTilesPerGroup, channels) times the transformed weights.
  void Products(const float* x, const float* weights, int64_t tiles, float* to) const {
    for (int64_t product = 0; product < kProducts; ++product) {
      for (int64_t output = 0; output < cut.part; output += kStrip) {
        const auto multiply = Pick((cut.part - output) / kLanes, Multiply<1>, Multiply<2>, Multiply<3>, Multiply<4>);
        const float* strip = weights + product * cut.weight_size + output * given.channels;
        for (int64_t tile = 0; tile < tiles; tile += kTilesAtOnce) {
          multiply(x + product * cut.input_size + tile * cut.input_row, cut.input_row, strip, given.channels,
                   to + product * cut.product_size + tile * cut.part + output, cut.part);
        }
      }
    }
  }

  // Computes y from the products, for `tiles` tiles from `first` on and outputs from `first_output` on.
  __attribute__((noinline)) void TransformOutputs(const float* products, int64_t image, int64_t first, int64_t tiles,
                                                  int64_t first_output) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = (first + tile) / cut.tile_columns * kOutputSide;
      const int64_t column = (first + tile) % cut.tile_columns * kOutputSide;
      for (int64_t i = 0; i < cut.part && first_output + i < given.outputs; i += kLanes) {
        const int64_t output = first_output + i;
        const int count = static_cast<int>(Min(kLanes, given.outputs - output));
        const Floats bias = Simd::Load(given.bias + output, count);
        TransformBothSides<kInputSide, kOutputSide>(
            [](const Floats(&m)[6], Floats(&done)[4]) SIMD_INLINE_LAMBDA { TransformOutput(m, done); },
            [&](auto p, auto q) SIMD_INLINE_LAMBDA {
              return Simd::Load(products + (p * kInputSide + q) * cut.product_size + tile * cut.part + i);
            },
            [&](auto p, auto q, Floats done) SIMD_INLINE_LAMBDA {
              if (row + p >= cut.height || column + q >= cut.width) return;
              const int64_t at = ((image * cut.height + row + p) * cut.width + column + q) * given.outputs + output;
              Floats sum = Simd::Add(done, bias);
              if (given.residual != nullptr) sum = Simd::Add(sum, Simd::Load(given.residual + at, count));
              Simd::Store(given.y + at, sum, count);
            });
      }
    }
  }

  void Task(int64_t index) const {
    const int64_t part = index % cut.parts, band = index / cut.parts % cut.bands, image = index / cut.parts / cut.bands;
    const int64_t first = band * cut.rows, rows = Min(cut.rows, cut.tile_rows - first);
    const int64_t activations_size = (cut.rows * kOutputSide + 2) * (cut.tile_columns * kOutputSide + 2) * channels;
    const int64_t size = activations_size + kProducts * (cut.weight_size + cut.input_size + cut.product_size);
    float* activations = static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(size * 4)));
    float* weights = activations + activations_size;
    float* inputs = weights + kProducts * cut.weight_size;
    float* products = inputs + kProducts * cut.input_size;
    Activate(image, first, rows, activations);
    if (given.half) {
      TransformWeights<uint16_t>(part * cut.part, weights);
    } else {
      TransformWeights<float>(part * cut.part, weights);
    }
    const int64_t tiles = rows * cut.tile_columns;
    for (int64_t tile = 0; tile < tiles; tile += kTilesPerGroup) {
      const int64_t count = Min(kTilesPerGroup, tiles - tile);
      TransformInputs(activations, tile, count, inputs);
      Products(inputs, weights, count, products);
      TransformOutputs(products, image, first * cut.tile_columns + tile, count, part * cut.part);
    }
  }
};

}  // namespace

void SIMD_KERNEL(Convolution)(const ConvolutionArguments& given, const Parallel& parallel) {
  if (given.batch * given.height * given.width * given.outputs == 0) return;
  Call call = {given, Cut(given), RoundUp(given.channels, kLanes)};
  if (given.groups > 0) {
    const int64_t pieces = CeilDivide(given.height, kRowsPerSum), sums = 2 * given.channels;
    const int64_t norms = given.batch * call.channels;
    const int64_t bytes = given.batch * pieces * sums * 8 + 2 * norms * 4;
    auto* partial = static_cast<double*>(ScratchMemory(Scratch::kCall, static_cast<size_t>(bytes)));
    call.scale = reinterpret_cast<float*>(partial + given.batch * pieces * sums);
    call.shift = call.scale + norms;
    for (int64_t i = 0; i < 2 * norms; i += kLanes) Simd::Store(call.scale + i, Simd::Repeat(0.0f));
    parallel(static_cast<size_t>(given.batch * pieces), [&](size_t index) {
      const int64_t row = static_cast<int64_t>(index) % pieces * kRowsPerSum;
      double* to = partial + static_cast<int64_t>(index) * sums;
      call.Sum(static_cast<int64_t>(index) / pieces, row, Min(row + kRowsPerSum, given.height), to,
               to + given.channels);
    });
    for (int64_t image = 0; image < given.batch; ++image) {
      for (int64_t group = 0; group < given.groups; ++group) {
        call.Norm(image, group, partial + image * pieces * sums, pieces);
      }
    }
  }
  parallel(static_cast<size_t>(given.batch * call.cut.bands * call.cut.parts),
           [&](size_t index) { call.Task(static_cast<int64_t>(index)); });
}

}  // namespace healthgpt
