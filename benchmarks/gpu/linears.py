"""One H-LoRA linear: our kernel and its alternatives, for several shapes, ranks, rows and stored types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .device import Device, check
from .matrices import Matrix, random_matrix

EXPERTS = 4
TOLERANCE = 1e-3  # for sums of float32 products against float64


@dataclass
class Linear:
    """W, [A;R] and B of one linear."""

    weight: Matrix
    adapter_in: Matrix
    adapter_out: Matrix

    @classmethod
    def random(cls, device: Device, channels: int, outputs: int, rank: int, storage: str) -> Linear:
        shapes = (channels, outputs), (channels, rank + EXPERTS), (rank, outputs)
        return cls(*(random_matrix(device, *shape, storage) for shape in shapes))

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in (self.weight, self.adapter_in, self.adapter_out))

    def kernels(self) -> dict[str, Any]:
        return {
            "weight": self.weight.kernel,
            "adapter_in": self.adapter_in.kernel,
            "adapter_out": self.adapter_out.kernel,
            "experts": EXPERTS,
        }


class Original:
    """The original's arithmetic in 16 bits, launch by launch, with weights [O, C], [R, C], [O, R] and [E, C]."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        rank = linear.adapter_out.floats().shape[0]
        low = linear.adapter_in.floats()
        self.weight = linear.weight.floats().T.contiguous().to(dtype)
        self.lora_a = low[:, :rank].T.contiguous().to(dtype)
        self.route = low[:, rank:].T.contiguous().to(dtype)
        self.lora_b = linear.adapter_out.floats().T.contiguous().to(dtype)
        self.repeats = rank // EXPERTS

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return self.weight, self.lora_a, self.route, self.lora_b, self.repeats

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return original_linear(x, *self.operands())


def original_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    route: torch.Tensor,
    lora_b: torch.Tensor,
    repeats: int,
) -> torch.Tensor:
    gates = functional.softmax(functional.linear(x, route), dim=-1, dtype=torch.float32).to(x.dtype)
    low = gates.repeat_interleave(repeats, dim=-1) * functional.linear(x, lora_a)
    # The original multiplies by the scaling, which is part of B here: 1.0 costs the same.
    return functional.linear(x, weight) + functional.linear(low, lora_b) * 1.0


def formula(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """The expected result in float64, computed on the device."""
    rank = linear.adapter_out.floats().shape[0]
    low = x.double() @ linear.adapter_in.floats().double()
    gates = low[:, rank:].softmax(-1).repeat_interleave(rank // EXPERTS, dim=-1)
    adapted = (gates * low[:, :rank]) @ linear.adapter_out.floats().double()
    return x.double() @ linear.weight.floats().double() + adapted


def workspace(device: Device, linear: Linear, rows: int) -> torch.Tensor:
    needed = device.kernels.hlora_linear_workspace_bytes(rows, **linear.kernels())
    return device.zeros(needed, dtype=torch.uint8)


def measure_compiled(device: Device, originals: list[Original], x: torch.Tensor) -> dict[str, Any]:
    """The original's arithmetic with torch.compile, or the reason why it fails: it needs a compiler on the machine."""
    compiled = original_linear if device.rehearses else torch.compile(original_linear)
    try:
        return device.measure([lambda one=one: compiled(x, *one.operands()) for one in originals])
    except Exception as error:
        return {"absent": (str(error).splitlines() or [type(error).__name__])[0]}


def measure(
    device: Device, shape: tuple[int, int], rank: int, storage: str, rows_list: list[int], peers: bool, compiles: bool
) -> Iterator[dict[str, Any]]:
    """One result for each number of rows. `compiles` also times the compiled peer, which takes seconds to compile."""
    channels, outputs = shape
    first = Linear.random(device, channels, outputs, rank, storage)
    sets = [first] + [
        Linear.random(device, channels, outputs, rank, storage)
        for _ in range(1, device.copies(first.weight.size_bytes))
    ]
    memory = workspace(device, first, max(rows_list))
    dtype = torch.bfloat16 if storage == "bfloat16" else torch.float16
    originals = [Original(one, dtype) for one in sets] if peers else []
    for rows in rows_list:
        x, y = device.normal(rows, channels), device.poisoned(rows, outputs)

        def call(one: Linear, adapters: bool, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            given = one.kernels() if adapters else {"weight": one.weight.kernel}
            device.kernels.hlora_linear(x=x, y=y, workspace=memory, stream=device.stream, **given)

        call(first, True)
        result: dict[str, Any] = {
            "channels": channels,
            "outputs": outputs,
            "rank": rank,
            "storage": storage,
            "rows": rows,
            "error": check(f"hlora_linear {shape} {storage}", y, formula(x, first), TOLERANCE),
            "bytes": first.size_bytes,
            "base_bytes": first.weight.size_bytes,
        }
        for name, adapters in (("ours", True), ("ours_base", False)):
            result[name] = device.measure([lambda one=one, a=adapters: call(one, a) for one in sets])
        if peers:
            x16 = x.to(dtype)
            result["cublas_base"] = device.measure(
                [lambda one=one, x16=x16: functional.linear(x16, one.weight) for one in originals]
            )
            calls = [lambda one=one, x16=x16: one(x16) for one in originals]
            result["original_eager"] = device.measure(calls, graph=False)
            result["original_graph"] = device.measure(calls)
            if rows == 1 and compiles:
                result["original_compiled_graph"] = measure_compiled(device, originals, x16)
        yield result


def measure_prefill(device: Device, shape: tuple[int, int], rank: int, storage: str, rows: int) -> dict[str, Any]:
    """One linear of many rows: ours with cuBLASLt, and the original's arithmetic, which uses the same library."""
    linear = Linear.random(device, *shape, rank, storage)
    x, y = device.normal(rows, shape[0]), device.poisoned(rows, shape[1])
    needed = device.kernels.hlora_prefill_workspace_bytes(rows, **linear.kernels())
    memory = device.zeros(needed, dtype=torch.uint8)

    def call() -> None:
        device.kernels.hlora_prefill(x=x, y=y, workspace=memory, stream=device.stream, **linear.kernels())

    call()
    original, x16 = Original(linear, torch.float16), x.half()
    return {
        "rows": rows,
        "rank": rank,
        "storage": storage,
        "error": check(f"hlora_prefill {shape} {storage}", y, formula(x, linear), 5e-3),
        "operations": 2 * rows * (shape[0] * (shape[1] + rank + EXPERTS) + rank * shape[1]),
        "ours": device.measure([call]),
        "original_eager": device.measure([lambda: original(x16)], graph=False),
        "original_graph": device.measure([lambda: original(x16)]),
    }
