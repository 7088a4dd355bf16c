"""Bodies of the named nodes for TensorRT: matrix products in the GPU's type, everything between them in float32.

Inputs and meaning are those of the bodies in `graph/functions.py`, with the same letters: B batch, S sequence, C
channels in, O channels out, R rank, E experts, D head size. Products read and write `compute`; the residual stream,
norms, gates and sums are float32, which costs nothing beside reading the weights and confines overflow to products.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import FunctionProto, parser

from ..graph.functions import GROUP_NORM_EPSILON, HEADER, ROTATED_HEADS
from ..quantize import is_quantised


def _matrix(name: str, stored: int, compute: int, block_size: str = "block_size") -> tuple[str, str]:
    """The statements that convert a stored tensor to `compute`, and the name of the result.

    The scales of integers are cast inside the graph: TensorRT's parser refuses constant ones that are not positive,
    and ours carry the sign of a block's largest entry.
    """
    if is_quantised(stored):
        return (
            f"{name}_factor = Cast <to = {compute}> ({name}_scale)\n"
            f"{name}_matrix = DequantizeLinear <axis = 0, block_size: int = @{block_size}> ({name}, {name}_factor)"
        ), f"{name}_matrix"
    if stored == compute:
        return "", name
    return f"{name}_matrix = Cast <to = {compute}> ({name})", f"{name}_matrix"


def linear(types: dict[str, int], compute: int) -> FunctionProto:
    """`Linear`: y = x W + b."""
    to_weight, weight = _matrix("weight", types["weight"], compute)
    add = "y = Add (product, bias)" if "bias" in types else "y = Identity (product)"
    return parser.parse_function(f"""
        {HEADER}
        Linear <block_size> (x, weight, weight_scale, bias) => (y) {{
            rows = Cast <to = {compute}> (x)
            {to_weight}
            rounded = MatMul (rows, {weight})
            product = Cast <to = 1> (rounded)
            {add}
        }}
    """)


def hlora_linear(types: dict[str, int], compute: int) -> FunctionProto:
    """`HLoraLinear`: y = x W + b + gate(x R) * (x A) B, as one router over the experts of one or several plugins.

    After the inputs of the bundle's node come expert_of int64 [R], the expert that column r of A belongs to, and
    silence float [E], added to the router's logits: 0, or a large negative number for the experts of other tasks.
    rank_block_size is the block size of B, which has fewer rows than the other matrices.
    """
    to_weight, weight = _matrix("weight", types["weight"], compute)
    to_in, adapter_in = _matrix("adapter_in", types["adapter_in"], compute)
    to_out, adapter_out = _matrix("adapter_out", types["adapter_out"], compute, "rank_block_size")
    routes = "routes = Add (choices, silence)" if "silence" in types else "routes = Identity (choices)"
    base, bias = ("sum", "y = Add (sum, bias)") if "bias" in types else ("y", "")
    return parser.parse_function(f"""
        {HEADER}
        HLoraLinear <block_size, rank_block_size, experts> (
            x, weight, weight_scale, bias, adapter_in, adapter_in_scale, adapter_out, adapter_out_scale,
            expert_of, silence
        ) => (y) {{
            experts_scalar = Constant <value_int: int = @experts> ()
            last = Constant <value_ints = [-1]> ()
            zero = Constant <value_ints = [0]> ()
            end = Constant <value_ints = [9223372036854775807]> ()
            experts_vector = Reshape (experts_scalar, last)
            split_at = Neg (experts_vector)
            rows = Cast <to = {compute}> (x)
            {to_in}
            rounded_low = MatMul (rows, {adapter_in})
            low = Cast <to = 1> (rounded_low)
            reduced = Slice (low, zero, split_at, last)
            choices = Slice (low, split_at, end, last)
            {routes}
            gate = Softmax <axis = -1> (routes)
            gate_columns = Gather <axis = -1> (gate, expert_of)
            gated = Mul (reduced, gate_columns)
            narrow = Cast <to = {compute}> (gated)
            {to_weight}
            rounded_base = MatMul (rows, {weight})
            {to_out}
            rounded_expansion = MatMul (narrow, {adapter_out})
            product = Cast <to = 1> (rounded_base)
            expansion = Cast <to = 1> (rounded_expansion)
            {base} = Add (product, expansion)
            {bias}
        }}
    """)


def cached_attention(types: dict[str, int], compute: int) -> FunctionProto:
    """`CachedAttention`: rotary positions in float32, then cache append and masked attention in `compute`.

    The caches have that type, too. The mask is additive: TensorRT-RTX 1.7 cannot compile a boolean one for many layers.
    """
    return parser.parse_function(f"""
        {HEADER}
        CachedAttention <heads, kv_heads, window> (
            query, key, value, cosine, sine, past_length, visible, past_key, past_value
        ) => (output, present_key, present_value) {{
            {ROTATED_HEADS}
            query_rows = Cast <to = {compute}> (query_rotated)
            key_rows = Cast <to = {compute}> (key_rotated)
            value_rows = Cast <to = {compute}> (value_heads)
            present_key = TensorScatter <axis = 2> (past_key, key_rows, past_length)
            present_value = TensorScatter <axis = 2> (past_value, value_rows, past_length)
            seen = Constant <value_float = 0.0> ()
            unseen = Constant <value_float = -30000.0> ()
            bias_wide = Where (visible, seen, unseen)
            bias = Cast <to = {compute}> (bias_wide)
            attended = Attention (query_rows, present_key, present_value, bias)
            attended_rows = Transpose <perm = [0, 2, 1, 3]> (attended)
            merge = Constant <value_ints = [0, 0, -1]> ()
            merged = Reshape (attended_rows, merge)
            output = Cast <to = 1> (merged)
        }}
    """)


_NORM_SWISH = f"""
    columns_wide = Transpose <perm = [0, 3, 1, 2]> (x)
    normed = GroupNormalization <epsilon = {GROUP_NORM_EPSILON:.7f}, num_groups: int = @groups> (
        columns_wide, norm_weight, norm_bias)
    gate = Sigmoid (normed)
    picture = Mul (normed, gate)
"""


def _convolution(
    signature: str, prepare: str, finish: str = "y = Identity (rows)"
) -> Callable[[dict[str, int], int], FunctionProto]:
    """The body of a 3x3 convolution: `prepare` gives `picture` [B, C, H, W], `finish` turns `rows` into y."""

    def body(types: dict[str, int], compute: int) -> FunctionProto:
        return parser.parse_function(f"""
            {HEADER}
            {signature} => (y) {{
                {prepare}
                narrow = Cast <to = {compute}> (picture)
                kernel_wide = Transpose <perm = [3, 2, 0, 1]> (weight)
                kernel = Cast <to = {compute}> (kernel_wide)
                offset = Cast <to = {compute}> (bias)
                convolved = Conv <pads = [1, 1, 1, 1]> (narrow, kernel, offset)
                wide = Cast <to = 1> (convolved)
                rows = Transpose <perm = [0, 2, 3, 1]> (wide)
                {finish}
            }}
        """)

    return body


_ENLARGE = """
    small = Transpose <perm = [0, 3, 1, 2]> (x)
    scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
    picture = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (small, , scales)
"""

# By name: body(types of the node's inputs, type of its products). Nodes of other names keep their bodies.
BODIES: dict[str, Callable[[dict[str, int], int], FunctionProto]] = {
    "Linear": linear,
    "HLoraLinear": hlora_linear,
    "CachedAttention": cached_attention,
    "Convolution": _convolution("Convolution (x, weight, bias)", "picture = Transpose <perm = [0, 3, 1, 2]> (x)"),
    "EnlargedConvolution": _convolution("EnlargedConvolution (x, weight, bias)", _ENLARGE),
    "NormSwishConvolution": _convolution(
        "NormSwishConvolution <groups> (x, weight, bias, norm_weight, norm_bias)", _NORM_SWISH
    ),
    "ResidualConvolution": _convolution(
        "ResidualConvolution <groups> (x, weight, bias, norm_weight, norm_bias, residual)",
        _NORM_SWISH,
        "y = Add (rows, residual)",
    ),
}
