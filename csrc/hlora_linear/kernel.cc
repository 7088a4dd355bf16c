// The kernels of HLoraLinear, compiled once per target (simd/simd.h).
//
// A matrix is processed in tiles of kTile outputs, eight vectors of sums per row. There are two ways:
//   few rows    Memory is the limit. The file is read in place and in its order. Of a matrix in rows, that is eight
//               channels at a time over all tiles of a run, and the sums of all these tiles wait in a cache. Of one in
//               panels it is one panel after the other, whose sums stay in registers for a whole block.
//   more rows   Arithmetic is the limit. A block of channels of one tile is unpacked once into the L1 cache, and its
//               sums stay in registers for the whole block.
// With few rows of a matrix in rows, or of too few panels, threads share the splits of the channels; otherwise they
// share parts of the outputs. All ways give the same bits: integer sums are exact, and a row's float sums are always
// added block by block in order.
#include "hlora_linear/float_product.h"
#include "hlora_linear/integer_product.h"
#include "hlora_linear/target_kernels.h"
#include "simd/simd.h"

namespace healthgpt {
namespace {

constexpr int64_t kRowsInline = 4;  // up to this many rows are prepared without the thread pool

// Computes the sums of one split, or of several if the part has totals, which they then replace. One split can also be
// `added` to the totals.
void AddProduct(const Matrix& matrix, const Input& input, const Splits& splits, const Part& part, bool added = false) {
  switch (matrix.storage) {
    case Storage::kFloat32:
      return AddFloatProduct<Storage::kFloat32>(matrix, input, splits, part, added);
    case Storage::kFloat16:
      return AddFloatProduct<Storage::kFloat16>(matrix, input, splits, part, added);
    case Storage::kBFloat16:
      return AddFloatProduct<Storage::kBFloat16>(matrix, input, splits, part, added);
    case Storage::kInt8:
      return AddIntegerProduct<Storage::kInt8>(matrix, input, splits, part, added);
    case Storage::kInt4:
      return AddIntegerProduct<Storage::kInt4>(matrix, input, splits, part, added);
  }
}

// Applies the gate to one row `low` (R + E): A x, then the router's logits. Each expert owns R / E neighbouring entries
// of A x, which are multiplied by its share of the softmax.
void ApplyGate(float* low, int64_t rank, int64_t experts) {
  float* routes = low + rank;
  float largest = routes[0], total = 0.0f;
  for (int64_t expert = 1; expert < experts; ++expert) largest = routes[expert] > largest ? routes[expert] : largest;
  for (int64_t expert = 0; expert < experts; ++expert) {
    routes[expert] = __builtin_expf(routes[expert] - largest);
    total += routes[expert];
  }
  const int64_t width = rank / experts;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const float gate = routes[expert] / total;
    for (int64_t i = 0; i < width; ++i) low[expert * width + i] *= gate;
  }
}

// Hands out memory piece by piece. With a null start it only counts bytes.
struct Pieces {
  uintptr_t start;
  size_t used = 0;
  template <class Type>
  Type* Take(size_t bytes) {
    Type* piece = reinterpret_cast<Type*>(start + used);
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
};

// Calls task(row) for all rows, on the thread pool if there are enough.
template <class Function>
void ForRows(int64_t rows, const Parallel& parallel, Function task) {
  if (rows <= kRowsInline) {
    for (int64_t row = 0; row < rows; ++row) task(row);
    return;
  }
  const int64_t groups = CeilDivide(rows, kRowsInline);
  parallel(static_cast<size_t>(groups), [&](size_t group) {
    const int64_t first = static_cast<int64_t>(group) * kRowsInline;
    for (int64_t row = first; row < Min(first + kRowsInline, rows); ++row) task(row);
  });
}

// One call: its arguments and its working memory.
struct Call {
  const HLoraLinearArguments& given;
  const Parallel& parallel;
  int64_t rows, rank, low_size;
  Cut into, weight, out_of;
  float* prepared = nullptr;          // (rows, C), see Prepare; null if the products need only bytes
  Input x = {}, x_into = {}, z = {};  // x for W and for [A;R]; the gated A x for B
  float* low = nullptr;               // (splits of [A;R], rows, R + E); Gate adds them up in the first split
  bool by_panels = false;             // whether few rows go through whole panels of W
  float* partial = nullptr;           // (partials, rows, O), only for few rows

  int64_t threads() const { return static_cast<int64_t>(parallel.threads()); }
  // The sums of a panel are all added at once, those of splits afterwards.
  int64_t partials() const { return by_panels ? 1 : weight.splits; }
  bool has_adapter() const { return given.experts > 0; }
  // Whether the products' rows are not those of x itself.
  bool prepares() const { return given.normalise || given.pair_input || given.quick_gelu; }

  // A row for the products: of x, or what is made of it.
  const float* Prepare(int64_t row) const {
    const int64_t channels = given.weight.channels;
    if (!prepares()) return given.x + row * channels;
    float* to = prepared != nullptr
                    ? prepared + row * channels
                    : static_cast<float*>(ScratchMemory(Scratch::kTask, static_cast<size_t>(channels) * sizeof(float)));
    if (given.normalise) {
      NormaliseRow(given.x + row * channels, channels, given.epsilon, to);
    } else if (given.quick_gelu) {
      QuickGeluRow(given.x + row * channels, channels, to);
    } else {
      const float* pair = given.x + 2 * row * channels;
      SwigluRow(pair, pair + channels, channels, to);
    }
    return to;
  }

  // Computes the sums of one split of [A;R] for `count` rows.
  void Reduce(int64_t split, int64_t row, int64_t count) const {
    const Matrix& matrix = given.adapter_in;
    const Part part = TaskPart(row, count, 0, low_size, UnpackedBytes(matrix, count, low_size));
    AddProduct(matrix, x_into, {into, split, split + 1}, part);
    for (int64_t r = 0; r < count; ++r) {
      float* to = low + (split * rows + row + r) * low_size;
      for (int64_t i = 0; i < low_size; ++i) to[i] = part.sums[r * part.stride + i];
    }
  }

  // Adds the splits of [A;R], applies the gate, and quantises the result for B.
  void Gate(int64_t row) const {
    float* total = low + row * low_size;
    for (int64_t split = 1; split < into.splits; ++split) {
      const float* more = low + (split * rows + row) * low_size;
      for (int64_t i = 0; i < low_size; ++i) total[i] += more[i];
    }
    ApplyGate(total, rank, given.experts);
    float* gated = const_cast<float*>(z.values) + row * rank;
    for (int64_t i = 0; i < rank; ++i) gated[i] = total[i];
    RoundRow(z, given.adapter_out, row, gated);
  }

  // y = sums(row, output of the part, outputs left) + bias + residual.
  template <class Function>
  void Finish(const Part& part, const Function& sums) const {
    const int64_t outputs = given.weight.outputs;
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t at = (part.row + r) * outputs + part.column;
      for (int64_t i = 0; i < part.columns; i += Simd::kLanes) {
        const int left = static_cast<int>(Min(Simd::kLanes, part.columns - i));
        Floats sum = sums(r, i, left);
        if (given.bias != nullptr) sum = Simd::Add(sum, Simd::Load(given.bias + part.column + i, left));
        if (given.residual != nullptr) sum = Simd::Add(sum, Simd::Load(given.residual + at + i, left));
        Simd::Store(given.y + at + i, sum, left);
      }
    }
  }

  // W and [A;R] together, panel by panel or split by split and run by run; then B is added.
  void FewRows() const {
    const Matrix& matrix = given.weight;
    const int64_t outputs = matrix.outputs, reductions = has_adapter() ? into.splits : 0;
    const int64_t run_columns = by_panels ? matrix.panel : RunColumns(outputs, rows, weight.splits, threads());
    const int64_t runs = CeilDivide(outputs, run_columns), splits_at_once = weight.splits / partials();
    parallel(static_cast<size_t>(reductions + partials() * runs), [&](size_t task) {
      const int64_t index = static_cast<int64_t>(task) - reductions;
      if (index < 0) return Reduce(static_cast<int64_t>(task), 0, rows);
      const int64_t at = index / runs, column = index % runs * run_columns;
      const int64_t columns = Min(run_columns, outputs - column);
      const Part part = TaskPart(0, rows, column, columns, UnpackedBytes(matrix, rows, columns), by_panels);
      AddProduct(matrix, x, {weight, at, at + splits_at_once}, part);
      const float* from = by_panels ? part.totals : part.sums;
      for (int64_t r = 0; r < rows; ++r) {
        float* to = partial + (at * rows + r) * outputs + column;
        for (int64_t i = 0; i < columns; i += Simd::kLanes) {
          Simd::Store(to + i, Simd::Load(from + r * part.stride + i), static_cast<int>(Min(Simd::kLanes, columns - i)));
        }
      }
    });
    if (has_adapter()) {
      for (int64_t row = 0; row < rows; ++row) Gate(row);
    }
    const int64_t width = RoundUp(CeilDivide(outputs, SharedParts(kParts, threads())), kTile);
    parallel(static_cast<size_t>(CeilDivide(outputs, width)), [&](size_t index) {
      const int64_t column = static_cast<int64_t>(index) * width, columns = Min(width, outputs - column);
      const Part part = TaskPart(0, rows, column, columns, UnpackedBytes(given.adapter_out, rows, columns));
      if (has_adapter()) AddProduct(given.adapter_out, z, {out_of, 0, 1}, part);
      Finish(part, [&](int64_t row, int64_t i, int left) {
        Floats sum = Simd::Load(partial + row * outputs + column + i, left);
        for (int64_t at = 1; at < partials(); ++at) {
          sum = Simd::Add(sum, Simd::Load(partial + (at * rows + row) * outputs + column + i, left));
        }
        if (has_adapter()) sum = Simd::Add(sum, Simd::Load(part.sums + row * part.stride + i));
        return sum;
      });
    });
  }

  // [A;R] for all rows; then W and B together, by parts of the outputs.
  void ManyRows() const {
    const Matrix& matrix = given.weight;
    const int64_t row_parts = CeilDivide(rows, kRowsPerTask), per_part = CeilDivide(rows, row_parts);
    if (has_adapter()) {
      parallel(static_cast<size_t>(row_parts * into.splits), [&](size_t task) {
        const int64_t row = static_cast<int64_t>(task) / into.splits * per_part;
        if (row < rows) Reduce(static_cast<int64_t>(task) % into.splits, row, Min(per_part, rows - row));
      });
      ForRows(rows, parallel, [&](int64_t row) { Gate(row); });
    }
    const int64_t by_cache = Max(1, kTaskBytes / (8 * per_part) / kTile);
    const int64_t by_share = CeilDivide(CeilDivide(matrix.outputs, kTile), SharedParts(kParts, threads()));
    int64_t width = Min(by_cache, by_share) * kTile;
    if (matrix.panel != 0) width = rows <= kRowsByPanel ? matrix.panel : RoundUp(width, matrix.panel);
    const int64_t parts = CeilDivide(matrix.outputs, width);
    const int64_t unpacked = Max(UnpackedBytes(matrix, per_part, width),
                                 has_adapter() ? UnpackedBytes(given.adapter_out, per_part, width) : 0);
    parallel(static_cast<size_t>(row_parts * parts), [&](size_t task) {
      const int64_t row = static_cast<int64_t>(task) / parts * per_part, count = Min(per_part, rows - row);
      const int64_t column = static_cast<int64_t>(task) % parts * width;
      if (count <= 0) return;
      const Part part = TaskPart(row, count, column, Min(width, matrix.outputs - column), unpacked, true);
      const Part fetching = part.Fetching(given.y + row * matrix.outputs + column, matrix.outputs);
      AddProduct(matrix, x, {weight, 0, weight.splits}, fetching);
      if (has_adapter()) AddProduct(given.adapter_out, z, {out_of, 0, 1}, part, true);
      Finish(part, [&](int64_t r, int64_t i, int) { return Simd::Load(part.totals + r * part.stride + i); });
    });
  }
};

}  // namespace

void SIMD_KERNEL(HLoraLinear)(const HLoraLinearArguments& given, const Parallel& parallel) {
  const int64_t rows = given.rows;
  if (rows == 0) return;
  const bool adapter = given.experts > 0;
  const int64_t rank = adapter ? given.adapter_out.channels : 0, low_size = adapter ? given.adapter_in.outputs : 0;
  const Cut weight(given.weight), into = adapter ? Cut(given.adapter_in) : weight;
  Call call = {given, parallel, rows, rank, low_size, into, weight, adapter ? Cut(given.adapter_out, 1) : weight};
  // x is quantised only once if [A;R] has the same blocks as W.
  const bool shared = adapter && IsInteger(given.weight.storage) && IsInteger(given.adapter_in.storage) &&
                      given.weight.block_size == given.adapter_in.block_size;
  call.by_panels = rows <= kRowsInPanel && ByPanels(given.weight, call.threads());
  const bool few = rows <= kRowsBySplit || call.by_panels;
  const bool of_floats = !IsInteger(given.weight.storage) || (adapter && !IsInteger(given.adapter_in.storage));
  const bool of_bytes = IsInteger(given.weight.storage) || (adapter && IsInteger(given.adapter_in.storage));
  const auto place = [&](void* start) {
    Pieces pieces = {reinterpret_cast<uintptr_t>(start)};
    if (call.prepares() && of_floats) {
      call.prepared = pieces.Take<float>(static_cast<size_t>(rows * given.weight.channels) * sizeof(float));
    }
    const float* x = call.prepares() ? call.prepared : given.x;
    call.x = PlaceInput(x, rows, given.weight, pieces.Take<void>(RoundedBytes(rows, given.weight)));
    if (adapter) {
      call.x_into =
          shared ? call.x
                 : PlaceInput(x, rows, given.adapter_in, pieces.Take<void>(RoundedBytes(rows, given.adapter_in)));
      call.low = pieces.Take<float>(static_cast<size_t>(call.into.splits * rows * low_size) * sizeof(float));
      const float* gated = pieces.Take<float>(static_cast<size_t>(rows * rank) * sizeof(float));
      call.z = PlaceInput(gated, rows, given.adapter_out, pieces.Take<void>(RoundedBytes(rows, given.adapter_out)));
    }
    if (few) {
      call.partial =
          pieces.Take<float>(static_cast<size_t>(call.partials() * rows * given.weight.outputs) * sizeof(float));
    }
    return pieces.used;
  };
  place(ScratchMemory(Scratch::kCall, place(nullptr)));
  if (of_bytes || call.prepares()) {
    ForRows(rows, parallel, [&](int64_t row) {
      const float* values = call.Prepare(row);
      RoundRow(call.x, given.weight, row, values);
      if (adapter && !shared) RoundRow(call.x_into, given.adapter_in, row, values);
    });
  }
  few ? call.FewRows() : call.ManyRows();
}

bool SIMD_KERNEL(MultipliesTiles)() { return TilesWork<Simd>(); }

}  // namespace healthgpt
