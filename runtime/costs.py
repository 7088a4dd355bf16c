"""What the language model costs at least, by the manifest: bytes a token must read, operations a prefill must do.

The denominators of a benchmark's shares. What is small beside the matrices is left out: norms, biases, the embedding
row, the activations, and the sliding window, which no usual prompt fills.
"""

from __future__ import annotations

from .manifest import Manifest

_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
_SCALE_BYTES, _SCALE_BYTES_IN_PANELS = 4, 2


def token_bytes(manifest: Manifest, task: str, context: int) -> int:
    """Bytes read for one token after `context` others: every matrix once, and the caches so far."""
    before, after = _matrices_around_attention(manifest, task)
    plugin = manifest.tasks[task]
    linears = 0
    for inputs, outputs in before + after:
        in_panels = manifest.in_panels and outputs != plugin.rank + plugin.experts  # [A;R] never are
        linears += matrix_bytes(manifest, manifest.precision, inputs, outputs, in_panels)
    # The head keeps 8 bits in an int4 bundle.
    head_precision = "int8" if manifest.precision == "int4" else manifest.precision
    head = matrix_bytes(manifest, head_precision, *_head(manifest, task))
    return manifest.language.layers * linears + head + context * cache_bytes(manifest)


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of keys and values that one token leaves in all layers."""
    language = manifest.language
    scale_bytes = _SCALE_BYTES if manifest.cache_precision == "int8" else 0
    row_bytes = language.head_dim * _BITS[manifest.cache_precision] // 8 + scale_bytes
    return 2 * language.layers * language.kv_heads * row_bytes


def prefill_operations(manifest: Manifest, task: str, tokens: int) -> int:
    """Operations to prefill `tokens`, a multiplication and an addition counted as two; logits of the last one only."""
    language = manifest.language
    before, after = (
        sum(inputs * outputs for inputs, outputs in matrices) for matrices in _matrices_around_attention(manifest, task)
    )
    seen = tokens * (tokens + 1) // 2  # by causal attention
    attention = 2 * language.heads * language.head_dim * seen  # scores, then the sum of values
    inputs, outputs = _head(manifest, task)
    others = (language.layers - 1) * tokens + 1  # the last layer goes on with the last token alone
    return 2 * (language.layers * (before * tokens + attention) + others * after + inputs * outputs)


def matrix_bytes(manifest: Manifest, precision: str, inputs: int, outputs: int, in_panels: bool = False) -> int:
    """Bytes of a stored matrix, the scales of its blocks included."""
    values = inputs * outputs * _BITS[precision] // 8
    blocks = -(-inputs // manifest.block_size) if precision.startswith("int") else 0
    return values + blocks * outputs * (_SCALE_BYTES_IN_PANELS if in_panels else _SCALE_BYTES)


def _matrices_around_attention(manifest: Manifest, task: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inputs, outputs) of one layer's matrices before attention and behind it: each linear, its A with the router, its
    B."""
    language, plugin = manifest.language, manifest.tasks[task]
    hidden, intermediate = language.hidden, language.intermediate
    query, key = language.heads * language.head_dim, language.kv_heads * language.head_dim
    if language.architecture == "phi3":  # q, k, v are one linear, gate and up another
        before, up = [(hidden, query + 2 * key)], [(hidden, 2 * intermediate)]
    else:
        before, up = [(hidden, query), (hidden, key), (hidden, key)], [(hidden, intermediate)] * 2
    after = [(query, hidden), *up, (intermediate, hidden)]

    def with_adapters(linears: list[tuple[int, int]]) -> list[tuple[int, int]]:
        adapters_in = [(inputs, plugin.rank + plugin.experts) for inputs, _ in linears]
        return linears + adapters_in + [(plugin.rank, outputs) for _, outputs in linears]

    return with_adapters(before), with_adapters(after)


def _head(manifest: Manifest, task: str) -> tuple[int, int]:
    return manifest.language.hidden, manifest.language.vocab - manifest.tasks[task].first_logit
