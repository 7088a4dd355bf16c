"""The CUDA H-LoRA linear against the formula in float64, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
from formats import store_matrix

# Relative to the largest result. x is the sum of two numbers of 16 bits, so float32's sums are what differs; with
# bfloat16 those two hold 16 bits of x.
TOLERANCE = {"float16": 3e-6, "bfloat16": 2e-5, "int8": 3e-6, "int4": 3e-6}
# channels, outputs, rank, experts, block size, stride less outputs; and rows. Odd sizes, tails of every tile, channels
# divided among blocks, ranks below a block, int4 rows that start inside a byte, rows as lanes load them and rows that
# they must gather.
SIZES = [
    ((31, 33, 8, 4, 32, 0), 11),
    ((7, 1, 2, 1, 32, 0), 3),
    ((64, 129, 12, 3, 64, 7), 1),
    ((128, 128, 16, 4, 64, 0), 8),
    ((259, 160, 64, 4, 128, 0), 1),
    ((200, 72, 36, 4, 32, 56), 19),
    ((520, 131, 20, 4, 64, 0), 6),
    ((160, 96, 256, 4, 128, 32), 2),
]
COUNTERS = 2 * 1024
each_storage = pytest.mark.parametrize("storage", list(TOLERANCE))


def normal(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def operands(device, storage, size, seed=0):
    """Matrices by name as the kernels and as the formula take them, and a bias."""
    channels, outputs, rank, experts, block_size, padding = size
    random = np.random.default_rng(seed)
    shapes = {
        "weight": (channels, outputs),
        "adapter_in": (channels, rank + experts),
        "adapter_out": (rank, outputs),
    }
    stored, exact = {}, {}
    for name, shape in shapes.items():
        values = normal(random, *shape) / shape[0] ** 0.5
        stored[name], exact[name] = store_matrix(device, values, storage, block_size, shape[1] + padding)
    return stored, exact, normal(random, outputs)


def formula(
    x, exact, experts, bias=None, residual=None, epsilon=None, pair_input=False, expert_of=None, route_bias=None
):
    x = x.astype(np.float64)
    if pair_input:
        gate, up = np.split(x, 2, axis=-1)
        x = gate / (1 + np.exp(-gate)) * up
    if epsilon is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    y = x @ exact["weight"]
    if experts:
        rank = len(exact["adapter_out"])
        low = x @ exact["adapter_in"]
        routes = low[:, rank:] + (0 if route_bias is None else route_bias)
        routes = np.exp(routes - routes.max(-1, keepdims=True))
        gate = routes / routes.sum(-1, keepdims=True)
        if expert_of is None:
            expert_of = np.repeat(np.arange(experts), rank // experts)
        y = y + (gate[:, expert_of] * low[:, :rank]) @ exact["adapter_out"]
    return y + (0 if bias is None else bias) + (0 if residual is None else residual)


def run(device, x, stored, experts, workspace=None, **more):
    """y, from memory that nobody has written; the workspace is used again where one is given."""
    matrices = stored if experts else {"weight": stored["weight"]}
    if workspace is None:
        needed = device.kernels.hlora_linear_workspace_bytes(len(x), experts=experts, **matrices)
        workspace = device.workspace(needed, COUNTERS)
    y = device.poisoned(len(x), more.pop("outputs"))
    given = {name: device.put(value) if isinstance(value, np.ndarray) else value for name, value in more.items()}
    device.kernels.hlora_linear(device.put(x), y=y, workspace=workspace, experts=experts, **matrices, **given)
    return device.get(y)


@each_storage
@pytest.mark.parametrize(("size", "rows"), SIZES, ids=str)
def test_equals_the_formula(device, storage, size, rows):
    stored, exact, bias = operands(device, storage, size)
    x = normal(np.random.default_rng(1), rows, size[0])
    expected = formula(x, exact, size[3], bias)
    found = run(device, x, stored, size[3], bias=bias, outputs=size[1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())
    without = run(device, x, stored, 0, outputs=size[1])
    expected = formula(x, exact, 0)
    np.testing.assert_allclose(without, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


@each_storage
@pytest.mark.parametrize("experts", [0, 4])
def test_norm_pairing_and_residual_on_the_way(device, storage, experts):
    size, rows = (96, 80, 16, 4, 32, 0), 5
    stored, exact, bias = operands(device, storage, size)
    random = np.random.default_rng(1)
    x, residual = normal(random, rows, 2 * size[0]) * 3, normal(random, rows, size[1])
    for more in (
        {"epsilon": 1e-5},
        {"pair_input": True},
        {"residual": residual, "bias": bias},
        {"epsilon": 0.5, "pair_input": True, "residual": residual, "bias": bias},
    ):
        given = x if "pair_input" in more else x[:, : size[0]]
        expected = formula(given, exact, experts, **more)
        found = run(device, given, stored, experts, outputs=size[1], **more)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


def test_the_result_may_replace_the_residual(device):
    size = (64, 72, 8, 4, 32, 0)
    stored, exact, _ = operands(device, "float16", size)
    random = np.random.default_rng(1)
    x, before = normal(random, 2, 64), normal(random, 2, 72)
    y = device.put(before)
    workspace = device.workspace(device.kernels.hlora_linear_workspace_bytes(2, experts=4, **stored), COUNTERS)
    device.kernels.hlora_linear(device.put(x), y=y, residual=y, workspace=workspace, experts=4, **stored)
    np.testing.assert_allclose(device.get(y), formula(x, exact, 4, residual=before), rtol=0, atol=2e-5)


# Two plugins of unequal ranks side by side, as in a TensorRT engine: 2 experts of 4 columns, then 3 of 8.
SHARED = (70, 33, 32, 5, 32, 0)
EXPERT_OF = np.repeat(np.arange(5, dtype=np.int32), [4, 4, 8, 8, 8])
SILENT = {"first": np.array([0, 0, -1e30, -1e30, -1e30]), "second": np.array([-1e30, -1e30, 0, 0, 0])}
ROUTERS = {name: {"expert_of": EXPERT_OF, "route_bias": bias.astype(np.float32)} for name, bias in SILENT.items()}
ROUTERS |= {"both": {"expert_of": EXPERT_OF}, "biased": {"route_bias": np.linspace(-2, 2, 4, dtype=np.float32)}}


def alone(exact, columns, experts):
    """The matrices of one plugin of those that share a router."""
    rank, routes = len(exact["adapter_out"]), [len(exact["adapter_out"]) + expert for expert in experts]
    own = exact["adapter_in"][:, [*range(*columns.indices(rank)), *routes]]
    return exact | {"adapter_in": own, "adapter_out": exact["adapter_out"][columns]}


@each_storage
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_a_router_of_several_plugins(device, storage, name, epsilon):
    size = (70, 33, 32, 4, 32, 0) if name == "biased" else SHARED
    stored, exact, bias = operands(device, storage, size)
    x = normal(np.random.default_rng(1), 11, size[0]) * 2
    expected = formula(x, exact, size[3], bias, epsilon=epsilon, **ROUTERS[name])
    found = run(device, x, stored, size[3], bias=bias, epsilon=epsilon, outputs=size[1], **ROUTERS[name])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())
    parts = {"first": (slice(0, 8), range(2)), "second": (slice(8, 32), range(2, 5))}
    if name in parts:  # what is silent leaves no trace
        columns, experts = parts[name]
        expected = formula(x, alone(exact, columns, experts), len(experts), bias, epsilon=epsilon)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[storage] * np.abs(expected).max())


@each_storage
def test_a_row_depends_on_no_other_row(device, storage):
    """All 32 rows at once, one by one and in pieces give the same bits, in one workspace used again and again."""
    size = (136, 144, 24, 4, 64, 0)
    stored, _, bias = operands(device, storage, size)
    x = normal(np.random.default_rng(1), 32, size[0])
    workspace = device.workspace(device.kernels.hlora_linear_workspace_bytes(32, experts=4, **stored), COUNTERS)
    more = {"bias": bias, "epsilon": 1e-6, "outputs": size[1], "workspace": workspace}
    together = run(device, x, stored, 4, **more)
    for piece in (3, 17):
        parts = [run(device, x[at : at + piece], stored, 4, **more) for at in range(0, 32, piece)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


def test_a_workspace_for_adapters_serves_the_base_alone(device):
    """At M3's size, where adapters leave fewer blocks for the base."""
    shapes = {"weight": (8192, 3072), "adapter_in": (8192, 260), "adapter_out": (256, 3072)}
    stored = {}
    for name, (channels, outputs) in shapes.items():
        values = device.put(np.zeros((channels, outputs // 2), np.uint8))
        scales = device.put(np.zeros((-(-channels // 128), outputs), np.float32))
        stored[name] = device.kernels.Matrix(values, "int4", (channels, outputs), scales, 128, outputs)
    needed = device.kernels.hlora_linear_workspace_bytes
    assert needed(32, weight=stored["weight"], experts=0) <= needed(32, experts=4, **stored)


def test_what_is_not_finite_stays_not_finite(device):
    size = (64, 72, 8, 4, 32, 0)
    stored, _, _ = operands(device, "float16", size)
    x = normal(np.random.default_rng(1), 3, 64)
    x[1, 5] = np.nan
    found = run(device, x, stored, 4, outputs=72)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


def test_wrong_operands_are_named(device):
    size = (64, 72, 8, 4, 32, 0)
    stored, _, bias = operands(device, "float16", size)
    x = np.zeros((2, 64), np.float32)
    for given, message in (
        ({"x": np.zeros((33, 64), np.float32)}, r"\[hlora_linear\] rows must be 1 to 32"),
        ({"x": np.zeros((2, 63), np.float32)}, r"x must be \[2, 64\], got \[2, 63\]"),
        ({"x": np.zeros((2, 64), np.float16)}, "x must hold float32, got float16"),
        ({"bias": bias[:-1]}, r"bias must be \[72\], got \[71\]"),
        ({"experts": 3}, "rank must be a multiple of experts"),
        ({"expert_of": np.zeros(7, np.int32)}, r"expert_of must be \[8\], got \[7\]"),
        ({"expert_of": np.zeros(8, np.int64)}, "expert_of must hold int32, got int64"),
        ({"route_bias": np.zeros(5, np.float32)}, r"route_bias must be \[4\], got \[5\]"),
        ({"experts": 2}, r"adapter_in must be \(C, R \+ E\)"),
        ({"workspace": device.workspace(64, 16)}, "the workspace is too small"),
        ({"workspace": device.workspace(1 << 20, 16)[4:]}, "the workspace must lie at a multiple of 16 bytes"),
        (
            {"adapter_out": store_matrix(device, np.ones((8, 72), np.float32), "bfloat16", 0)[0]},
            "adapters must be stored as the weight is",
        ),
    ):
        more = {"experts": 4, "outputs": 72, "x": x, "stored": stored} | given
        if "adapter_out" in more:
            more["stored"] = stored | {"adapter_out": more.pop("adapter_out")}
        with pytest.raises(ValueError, match=message):
            run(device, **more)


def test_a_matrix_larger_than_any_memory_is_refused(device):
    """Its numbers are as many as none, counted in 64 bits."""
    nothing = device.put(np.zeros(0, np.uint8))
    for channels, stride in ((1 << 10, 1 << 54), (1 << 2, 1 << 58)):
        with pytest.raises(ValueError, match=rf"must fit into memory, got \[{channels}, {stride}\]"):
            device.kernels.Matrix(nothing, "float16", (channels, 64), stride=stride)
