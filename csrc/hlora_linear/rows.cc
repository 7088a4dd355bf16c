#include "hlora_linear/rows.h"

#include "hlora_linear/prefill.h"

namespace healthgpt::cuda {
namespace {

Status Prefill(const HLoraLinearArguments& given, Workspaces& workspaces, Stream stream) {
  HLoraPrefillArguments arguments;
  arguments.rows = given.rows;
  arguments.experts = given.experts;
  arguments.x = given.x;
  arguments.weight = given.weight;
  arguments.bias = given.bias;
  arguments.adapter_in = given.adapter_in;
  arguments.adapter_out = given.adapter_out;
  arguments.expert_of = given.expert_of;
  arguments.route_bias = given.route_bias;
  arguments.y = given.y;
  arguments.workspace_bytes = HLoraPrefillWorkspaceBytes(arguments);
  arguments.workspace = workspaces.Reserve(stream, Workspaces::kPrefill, arguments.workspace_bytes);
  return HLoraPrefill(arguments, stream);
}

}  // namespace

Status HLoraLinearRows(HLoraLinearArguments arguments, Workspaces& workspaces, Stream stream) {
  if (arguments.normalise || arguments.pair_input || arguments.residual != nullptr) {
    return "[hlora_linear] a linear of any number of rows takes no norm, pairing or residual";
  }
  if (arguments.rows > kMostExactRows) return Prefill(arguments, workspaces, stream);
  for (int64_t left = arguments.rows; left > 0; left -= arguments.rows) {
    arguments.rows = left < kMostDecodeRows ? left : kMostDecodeRows;
    arguments.workspace_bytes = HLoraLinearWorkspaceBytes(arguments);
    arguments.workspace = workspaces.Reserve(stream, Workspaces::kDecode, arguments.workspace_bytes);
    if (const Status wrong = HLoraLinear(arguments, stream)) return wrong;
    arguments.x += arguments.rows * arguments.weight.channels;
    arguments.y += arguments.rows * arguments.weight.outputs;
  }
  return nullptr;
}

}  // namespace healthgpt::cuda
