#include "hlora_linear/rows.h"

#include "hlora_linear/prefill.h"

namespace healthgpt::cuda {

Status HLoraLinearRows(HLoraLinearArguments arguments, Workspaces& workspaces, Stream stream) {
  if (arguments.rows > kMostExactRows) {
    arguments.workspace_bytes = HLoraPrefillWorkspaceBytes(arguments);
    arguments.workspace = workspaces.Reserve(stream, Workspaces::kPrefill, arguments.workspace_bytes);
    return HLoraPrefill(arguments, stream);
  }
  for (int64_t left = arguments.rows; left > 0; left -= arguments.rows) {
    arguments.rows = left < kMostDecodeRows ? left : kMostDecodeRows;
    arguments.workspace_bytes = HLoraLinearWorkspaceBytes(arguments);
    arguments.workspace = workspaces.Reserve(stream, Workspaces::kDecode, arguments.workspace_bytes);
    if (const Status wrong = HLoraLinear(arguments, stream)) return wrong;
    arguments.x += arguments.rows * arguments.weight.channels * (arguments.pair_input ? 2 : 1);
    arguments.y += arguments.rows * arguments.weight.outputs;
    if (arguments.residual != nullptr) arguments.residual += arguments.rows * arguments.weight.outputs;
  }
  return nullptr;
}

}  // namespace healthgpt::cuda
