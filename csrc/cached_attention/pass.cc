#include "cached_attention/pass.h"

#include "cached_attention/prefill.h"
#include "hlora_linear/rows.h"

namespace healthgpt::cuda {

Status CachedAttentionPass(CachedAttentionArguments arguments, Workspaces& workspaces, Stream stream) {
  if (const Status wrong = CheckOperands(arguments)) return wrong;
  if (arguments.tokens > kMostExactRows && arguments.cache != Storage::kBFloat16) {
    return CachedAttentionPrefill(arguments, stream);
  }
  const int64_t use = Workspaces::kAttention + arguments.batch * arguments.kv_heads;
  arguments.workspace_bytes = CachedAttentionWorkspaceBytes(arguments);
  arguments.workspace = workspaces.Reserve(stream, use, arguments.workspace_bytes);
  return CachedAttention(arguments, stream);
}

}  // namespace healthgpt::cuda
