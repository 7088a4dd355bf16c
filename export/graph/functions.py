"""The named nodes of the graphs, as ONNX functions of standard operators.

Any runtime can run the bodies below; one that has a kernel for a name in the domain `healthgpt` runs that on the same
inputs instead. A body is generated for the types that its graph stores. Some bodies are other named nodes and what
stands around these (`FUSED`): who has a kernel for the whole launches one in place of several, others have one for the
part. B batch, S sequence, C channels in, O channels out, R rank, E experts, H heads, K key/value heads, D head size, M
cache capacity.
"""

from __future__ import annotations

from onnx import FunctionProto, TensorProto, parser

from ..quantize import is_quantised
from .builder import DOMAIN, OPSET

# What the text of every body begins with.
HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'
# The nodes whose bodies hold other named nodes.
FUSED = (
    "ResidualLinear",
    "QuickGeluResidualLinear",
    "NormHLoraLinear",
    "ResidualHLoraLinear",
    "SwigluResidualHLoraLinear",
    "PackedCachedAttention",
)


def _stored(name: str, data_type: int, panels: bool = False) -> tuple[str, str]:
    """The statement that converts a stored tensor to float32, and the name of the result."""
    if data_type == TensorProto.FLOAT:
        return "", name
    if is_quantised(data_type):
        attributes = f"axis = {1 if panels else 0}, block_size: int = @block_size"
        scale = f"{name}_factor" if panels else f"{name}_scale"
        widen = f"{scale} = Cast <to = 1> ({name}_scale)" if panels else ""
        statement = f"{widen} {name}_float = DequantizeLinear <{attributes}> ({name}, {scale})"
    else:
        statement = f"{name}_float = Cast <to = 1> ({name})"
    return statement, f"{name}_float"


def _product(name: str, rows: str, matrix: str, panels: bool) -> str:
    """The statements for `name` [B, S, O] = `rows` [B, S, C] times a matrix [C, O], or [O / 128, C, 128] in panels."""
    if not panels:
        return f"{name} = MatMul ({rows}, {matrix})"
    return f"""
        {name}_axis = Constant <value_ints = [1]> ()
        {name}_rows = Unsqueeze ({rows}, {name}_axis)
        {name}_by_panel = MatMul ({name}_rows, {matrix})
        {name}_panels = Transpose <perm = [0, 2, 1, 3]> ({name}_by_panel)
        {name}_shape = Constant <value_ints = [0, 0, -1]> ()
        {name} = Reshape ({name}_panels, {name}_shape)
    """


def linear(data_type: int, bias: bool) -> FunctionProto:
    """`y = x W + b`, a linear without adapters.

    Inputs, in the order every kernel gets them; the scale is left out for float storage, the bias where there is none:
    x [B, S, C] or [S, C]; weight [C, O], weight_scale [C/block, O]; bias [O].
    Attribute: block_size (ignored for float storage).
    """
    to_weight, weight = _stored("weight", data_type)
    product = f"product = MatMul (x, {weight}) y = Add (product, bias)" if bias else f"y = MatMul (x, {weight})"
    return parser.parse_function(f"""
        {HEADER}
        Linear <block_size> (x, weight, weight_scale, bias) => (y) {{
            {to_weight}
            {product}
        }}
    """)


def hlora_linear(linear_type: int, adapter_type: int, bias: bool, panels: bool = False) -> FunctionProto:
    """`y = x W + b + gate(x R) * (x A) B`, the H-LoRA linear (arXiv 2502.09838, section 3.3).

    Inputs, in the order every kernel gets them; scales are left out for float storage, the bias where there is none:
    x [B, S, C]; weight [C, O], weight_scale [C/block, O]; bias [O]; adapter_in [C, R + E] holding A then the router,
    its scale [C/block, R + E]; adapter_out [R, O] with the H-LoRA scaling folded in, its scale [R/block, O].
    In `panels`, weight is [O/128, C, 128], its scale [O/128, C/block, 128] in bfloat16, and so are adapter_out and its
    scale.
    Attributes: experts E; block_size (ignored for float storage). The gate's softmax is in float32.
    """
    to_weight, weight = _stored("weight", linear_type, panels)
    to_in, adapter_in = _stored("adapter_in", adapter_type)
    to_out, adapter_out = _stored("adapter_out", adapter_type, panels)
    add_bias, base = ("biased = Add (product, bias)", "biased") if bias else ("", "product")
    return parser.parse_function(f"""
        {HEADER}
        HLoraLinear <block_size, experts> (
            x, weight, weight_scale, bias, adapter_in, adapter_in_scale, adapter_out, adapter_out_scale
        ) => (y) {{
            experts_scalar = Constant <value_int: int = @experts> ()
            last = Constant <value_ints = [-1]> ()
            zero = Constant <value_ints = [0]> ()
            end = Constant <value_ints = [9223372036854775807]> ()
            experts_vector = Reshape (experts_scalar, last)
            split_at = Neg (experts_vector)
            {to_in}
            low = MatMul (x, {adapter_in})
            reduced = Slice (low, zero, split_at, last)
            routes = Slice (low, split_at, end, last)
            gate = Softmax <axis = -1> (routes)
            keep = Constant <value_ints = [0, 0]> ()
            by_expert = Concat <axis = 0> (keep, experts_vector, last)
            grouped = Reshape (reduced, by_expert)
            gate_column = Unsqueeze (gate, last)
            gated = Mul (grouped, gate_column)
            merge = Constant <value_ints = [0, 0, -1]> ()
            flat = Reshape (gated, merge)
            {to_weight}
            {_product("product", "x", weight, panels)}
            {add_bias}
            {to_out}
            {_product("expansion", "flat", adapter_out, panels)}
            y = Add ({base}, expansion)
        }}
    """)


_ADD_RESIDUAL = "y = Add (residual, product)"


def _residual_linear(name: str, data_type: int, before: str, rows: str) -> FunctionProto:
    """A `Linear` of `rows`, which `before` makes of x, plus residual."""
    matrix = "weight, weight_scale, bias"
    return parser.parse_function(f"""
        {HEADER}
        {name} <block_size> (x, {matrix}, residual) => (y) {{
            {_typed({"weight": data_type})}
            {before}
            product = {DOMAIN}.Linear <block_size: int = @block_size> ({rows}, {matrix})
            {_ADD_RESIDUAL}
        }}
    """)


def residual_linear(data_type: int) -> FunctionProto:
    """`Linear` plus residual, which has the shape of y."""
    return _residual_linear("ResidualLinear", data_type, "", "x")


def quick_gelu_residual_linear(data_type: int) -> FunctionProto:
    """`Linear` of x sigmoid(1.702 x), plus residual, which has the shape of y."""
    quick_gelu = """
        slope = Constant <value_float = 1.702> ()
        steep = Mul (x, slope)
        gate = Sigmoid (steep)
        activated = Mul (x, gate)
    """
    return _residual_linear("QuickGeluResidualLinear", data_type, quick_gelu, "activated")


def _typed(types: dict[str, int]) -> str:
    """What tells the types of inputs that a body only hands on.

    ONNX Runtime takes the type of an input from where it is used first, and calls of functions take no INT4 there. (The
    shapes are not needed, and left out when a session optimises its graph.)
    """
    return " ".join(f"{name}_shape = Shape ({name})" for name, kind in types.items() if kind == TensorProto.INT4)


_HLORA_MATRICES = "weight, weight_scale, bias, adapter_in, adapter_in_scale, adapter_out, adapter_out_scale"


def _around_hlora(
    name: str, linear_type: int, adapter_type: int, before: str, rows: str, after: str = "", **more: str
) -> FunctionProto:
    """An `HLoraLinear` of `rows`, which `before` makes of x, giving `product`, of which `after` makes y.

    more: the inputs and the attributes that the node has besides.
    """
    types = {"weight": linear_type, "adapter_in": adapter_type, "adapter_out": adapter_type}
    return parser.parse_function(f"""
        {HEADER}
        {name} <block_size, experts{more.get("attributes", "")}> (
            x, {_HLORA_MATRICES}{more.get("inputs", "")}
        ) => (y) {{
            {_typed(types)}
            {before}
            {"product" if after else "y"} = {DOMAIN}.HLoraLinear
                <block_size: int = @block_size, experts: int = @experts> ({rows}, {_HLORA_MATRICES})
            {after}
        }}
    """)


def norm_hlora_linear(linear_type: int, adapter_type: int, channels: int) -> FunctionProto:
    """`HLoraLinear` of x / sqrt(mean(x^2) + epsilon), the RMS norm without its weight, which the matrices hold.

    Inputs and attributes are those of `HLoraLinear`, and epsilon.
    """
    norm = f"""
        width = Constant <value_ints = [{channels}]> ()
        ones = ConstantOfShape <value = float[1] {{1}}> (width)
        normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x, ones)
    """
    return _around_hlora("NormHLoraLinear", linear_type, adapter_type, norm, "normed", attributes=", epsilon")


def residual_hlora_linear(linear_type: int, adapter_type: int) -> FunctionProto:
    """`HLoraLinear` plus residual [B, S, O]."""
    return _around_hlora("ResidualHLoraLinear", linear_type, adapter_type, "", "x", _ADD_RESIDUAL, inputs=", residual")


def swiglu_residual_hlora_linear(linear_type: int, adapter_type: int) -> FunctionProto:
    """`HLoraLinear` of silu(gate) * up, plus residual [B, S, O]; x [B, S, 2C] is gate, then up."""
    swiglu = """
        gate, up = Split <axis = -1, num_outputs = 2> (x)
        share = Sigmoid (gate)
        swish = Mul (gate, share)
        activated = Mul (swish, up)
    """
    name = "SwigluResidualHLoraLinear"
    return _around_hlora(name, linear_type, adapter_type, swiglu, "activated", _ADD_RESIDUAL, inputs=", residual")


# The start of every body of CachedAttention: split heads and apply rotary positions.
ROTATED_HEADS = """
    heads_scalar = Constant <value_int: int = @heads> ()
    kv_heads_scalar = Constant <value_int: int = @kv_heads> ()
    last = Constant <value_ints = [-1]> ()
    keep = Constant <value_ints = [0, 0]> ()
    heads_vector = Reshape (heads_scalar, last)
    kv_heads_vector = Reshape (kv_heads_scalar, last)
    query_shape = Concat <axis = 0> (keep, heads_vector, last)
    key_shape = Concat <axis = 0> (keep, kv_heads_vector, last)
    query_split = Reshape (query, query_shape)
    key_split = Reshape (key, key_shape)
    value_split = Reshape (value, key_shape)
    query_heads = Transpose <perm = [0, 2, 1, 3]> (query_split)
    key_heads = Transpose <perm = [0, 2, 1, 3]> (key_split)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_split)
    query_rotated = RotaryEmbedding (query_heads, cosine, sine)
    key_rotated = RotaryEmbedding (key_heads, cosine, sine)
"""


def caches(cache_type: int) -> dict[str, int]:
    """A layer's caches and their types, in the order of its node's inputs: rows, and the scales of INT8 rows."""
    rows = dict.fromkeys(("key", "value"), cache_type)
    return rows | dict.fromkeys(("key_scale", "value_scale"), TensorProto.FLOAT) if is_quantised(cache_type) else rows


def _cached(name: str, rows: str, cache_type: int) -> tuple[str, str]:
    """The statements that append float32 `rows` to a cache, key or value, and the whole cache's name in float32."""
    present = f"present_{name}"

    def append(to: str, new: str) -> str:
        return f"present_{to} = TensorScatter <axis = 2> (past_{to}, {new}, past_length)"

    if cache_type == TensorProto.FLOAT:
        return append(name, rows), present
    widen = f"{present}_float = Cast <to = 1> ({present})"
    if cache_type == TensorProto.FLOAT16:
        return f"{rows}_half = Cast <to = 10> ({rows}) {append(name, f'{rows}_half')} {widen}", f"{present}_float"
    return (
        f"""
            {name}_magnitude = Abs ({rows})
            {name}_range = ReduceMax <keepdims = 1> ({name}_magnitude, last)
            {name}_steps = Constant <value_float = 127.0> ()
            {name}_least = Constant <value_float = 1e-30> ()
            {name}_divisor = Max ({name}_range, {name}_least)
            {name}_inverse = Div ({name}_steps, {name}_divisor)
            {name}_scaled = Mul ({rows}, {name}_inverse)
            {name}_whole = Round ({name}_scaled)
            {name}_bytes = Cast <to = 3> ({name}_whole)
            {name}_scale = Div ({name}_range, {name}_steps)
            {append(name, f"{name}_bytes")}
            {append(f"{name}_scale", f"{name}_scale")}
            {widen}
            {present}_all = Mul ({present}_float, {present}_scale)
        """,
        f"{present}_all",
    )


def cached_attention(cache_type: int) -> FunctionProto:
    """Rotary positions, cache append and masked attention over the cache.

    query [B, S, H*D], key and value [B, S, K*D], cosine and sine [B, S, D/2] of the S new positions, past_length
    int64 [B], visible bool [B, 1, S, M], past_key and past_value [B, K, M, D] of `cache_type`, of which the first
    past_length rows are filled. The new rows, rounded to that type, are written at past_length; giving the same buffer
    for past and present makes that a write in place. Attention itself is in float32.
    INT8 caches have scales beside them, past_key_scale and past_value_scale float32 [B, K, M, 1]: each row of D numbers
    is stored as integers in [-127, 127] times its scale.
    Attributes: heads H, kv_heads K, window (the number of earlier positions seen, 0 for all).
    `visible` is implied by past_length and window: the body needs it, a kernel may ignore it.
    """
    append_keys, keys = _cached("key", "key_rotated", cache_type)
    append_values, values = _cached("value", "value_heads", cache_type)
    pasts, presents = (", ".join(f"{time}_{kind}" for kind in caches(cache_type)) for time in ("past", "present"))
    return parser.parse_function(f"""
        {HEADER}
        CachedAttention <heads, kv_heads, window> (
            query, key, value, cosine, sine, past_length, visible, {pasts}
        ) => (output, {presents}) {{
            {ROTATED_HEADS}
            {append_keys}
            {append_values}
            attended = Attention (query_rotated, {keys}, {values}, visible)
            rows = Transpose <perm = [0, 2, 1, 3]> (attended)
            merge = Constant <value_ints = [0, 0, -1]> ()
            output = Reshape (rows, merge)
        }}
    """)


def packed_cached_attention(cache_type: int) -> FunctionProto:
    """`CachedAttention` of packed [B, S, (H + 2K) D]: query, then key, then value.

    Attributes are those of `CachedAttention`, and sizes: of query, key and value, H*D, K*D and K*D.
    """
    pasts, presents = (", ".join(f"{time}_{kind}" for kind in caches(cache_type)) for time in ("past", "present"))
    return parser.parse_function(f"""
        {HEADER}
        PackedCachedAttention <heads, kv_heads, window, sizes> (
            packed, cosine, sine, past_length, visible, {pasts}
        ) => (output, {presents}) {{
            split_at = Constant <value_ints: ints = @sizes> ()
            query, key, value = Split <axis = -1> (packed, split_at)
            output, {presents} = {DOMAIN}.CachedAttention
                <heads: int = @heads, kv_heads: int = @kv_heads, window: int = @window>
                (query, key, value, cosine, sine, past_length, visible, {pasts})
        }}
    """)


def packed_attention() -> FunctionProto:
    """Attention of every token to every token: packed [B, T, 3C], query, key and value side by side, -> [B, T, C].

    Scores are scaled by 1 / sqrt(D). Attribute: heads H, which divides C.
    """
    return parser.parse_function(f"""
        {HEADER}
        PackedAttention <heads> (packed) => (output) {{
            query, key, value = Split <axis = -1, num_outputs = 3> (packed)
            output = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (query, key, value)
        }}
    """)


GROUP_NORM_EPSILON = 1e-6


# Pictures are channels-last between nodes, as the kernels need them; the standard Conv needs channels first. ONNX
# Runtime cancels the transposes of neighbouring bodies.
def _convolution(signature: str, data_type: int, before: str, after: str = "y = Identity (rows)") -> FunctionProto:
    """The body of a 3x3 convolution: `before` gives `columns` [B, C, H, W], `after` turns `rows` into y."""
    to_weight, weight = _stored("weight", data_type)
    return parser.parse_function(f"""
        {HEADER}
        {signature} => (y) {{
            {before}
            {to_weight}
            kernel = Transpose <perm = [3, 2, 0, 1]> ({weight})
            convolved = Conv <pads = [1, 1, 1, 1]> (columns, kernel, bias)
            rows = Transpose <perm = [0, 2, 3, 1]> (convolved)
            {after}
        }}
    """)


def norm_swish() -> FunctionProto:
    """swish(group_norm(x)) of x [B, H, W, C]; norm_weight and norm_bias [C]. Attribute: groups, which divides C."""
    # As an instance normalisation of the groups: ONNX Runtime has no CPU kernel for GroupNormalization, and that one's
    # standard body takes 1.7 times as long.
    return parser.parse_function(f"""
        {HEADER}
        NormSwish <groups> (x, norm_weight, norm_bias) => (y) {{
            groups_scalar = Constant <value_int: int = @groups> ()
            keep = Constant <value_ints = [0]> ()
            last = Constant <value_ints = [-1]> ()
            groups_vector = Reshape (groups_scalar, last)
            by_group = Concat <axis = 0> (keep, groups_vector, last)
            one = ConstantOfShape <value = float[1] {{1}}> (groups_vector)
            zero = ConstantOfShape <value = float[1] {{0}}> (groups_vector)
            picture = Transpose <perm = [0, 3, 1, 2]> (x)
            grouped = Reshape (picture, by_group)
            normed_groups = InstanceNormalization <epsilon = {GROUP_NORM_EPSILON:.7f}> (grouped, one, zero)
            picture_shape = Shape (picture)
            normed = Reshape (normed_groups, picture_shape)
            column = Constant <value_ints = [-1, 1, 1]> ()
            scale = Reshape (norm_weight, column)
            shift = Reshape (norm_bias, column)
            scaled = Mul (normed, scale)
            shifted = Add (scaled, shift)
            gate = Sigmoid (shifted)
            swish = Mul (shifted, gate)
            y = Transpose <perm = [0, 2, 3, 1]> (swish)
        }}
    """)


_NORM_SWISH = f"""
    rows_in = {DOMAIN}.NormSwish <groups: int = @groups> (x, norm_weight, norm_bias)
    columns = Transpose <perm = [0, 3, 1, 2]> (rows_in)
"""


def convolution(data_type: int) -> FunctionProto:
    """A 3x3 convolution with zeros around the picture: x [B, H, W, C], weight [3, 3, C, O], bias [O]."""
    return _convolution("Convolution (x, weight, bias)", data_type, "columns = Transpose <perm = [0, 3, 1, 2]> (x)")


def enlarged_convolution(data_type: int) -> FunctionProto:
    """`Convolution` on x with every pixel repeated twice in both directions: y [B, 2H, 2W, O]."""
    enlarge = """
        small = Transpose <perm = [0, 3, 1, 2]> (x)
        scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
        columns = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (small, , scales)
    """
    return _convolution("EnlargedConvolution (x, weight, bias)", data_type, enlarge)


def norm_swish_convolution(data_type: int) -> FunctionProto:
    """`Convolution` of swish(group_norm(x)); norm_weight and norm_bias [C]. Attribute: groups, which divides C."""
    signature = "NormSwishConvolution <groups> (x, weight, bias, norm_weight, norm_bias)"
    return _convolution(signature, data_type, _NORM_SWISH)


def residual_convolution(data_type: int) -> FunctionProto:
    """`NormSwishConvolution` plus residual [B, H, W, O]."""
    signature = "ResidualConvolution <groups> (x, weight, bias, norm_weight, norm_bias, residual)"
    return _convolution(signature, data_type, _NORM_SWISH, "y = Add (rows, residual)")
