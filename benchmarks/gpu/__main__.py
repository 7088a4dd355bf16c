"""Check and then time the CUDA kernels. `benchmarks/gpu.sh` calls this.

    python -m benchmarks.gpu MODULE --out FILE [--seconds N]

MODULE is the built _cuda. With the host build _cuda_host everything is rehearsed at small sizes. Results are written
after every part, so that a time limit loses only the rest; the file names the parts that were not reached.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..commit import commit
from .device import Device, WrongResult, check
from .linears import measure, measure_prefill
from .pictures import Picture
from .report import report
from .shapes import DECODERS, TINY
from .steps import STEPS, DecodeStep, OriginalStep

ROWS = [1, 2, 4, 8, 16, 32]
PAST = 700
REHEARSED_PAST = 60  # from here a rehearsed picture's codes, and the room for them, reach the next chunk of 64


def ceilings(device: Device) -> Iterator[dict[str, Any]]:
    """The best bytes per second of several passes over memory, and the operations per second of a float16 product.

    Passes are ordinary launches. In a CUDA graph, a copy reached 2757 GB/s on an H200 whose products read 3600.
    """
    size_bytes = 1 << (16 if device.rehearses else 32)
    source = device.normal(size_bytes // 4)
    target = torch.empty_like(source)
    passes: dict[str, tuple[int, Callable[[], Any]]] = {  # the bytes read and written
        "copy": (2 * size_bytes, lambda: target.copy_(source)),
        "addition": (2 * size_bytes, lambda: torch.add(source, 1, out=target)),
        "sum": (size_bytes, source.sum),
        "maximum": (size_bytes, source.amax),
    }
    rates = {
        name: moved / (device.measure([call], graph=False)["p50_ms"] / 1e3) for name, (moved, call) in passes.items()
    }
    best = max(rates, key=lambda name: rates[name])
    size = 64 if device.rehearses else 8192
    left, right = (device.normal(size, size, dtype=torch.float16) for _ in range(2))
    product = device.measure([lambda: left @ right])
    yield {
        "bytes_per_second": rates[best],
        "bytes_per_second_by": best,
        "bytes_per_second_of": rates,
        "float16_operations_per_second": 2 * size**3 / (product["p50_ms"] / 1e3),
    }


def linears(device: Device, system: str, ranks: list[int], storages: list[str], rows: list[int]) -> Iterator[Any]:
    decoder = TINY if device.rehearses else DECODERS[system]
    for rank in ranks:
        for storage in storages:
            for name, shape in decoder.linears.items():
                peers = storage in ("float16", "bfloat16")
                compiles = peers and system == "m3" and rank == 256
                for result in measure(device, shape, rank, storage, rows, peers, compiles):
                    yield {"system": system, "linear": name, **result}


def prefill(device: Device) -> Iterator[dict[str, Any]]:
    """M3's linears for a prompt of 600 tokens, which has a picture."""
    if not hasattr(device.kernels, "hlora_prefill"):
        yield {"absent": "built without cuBLASLt"}
        return
    decoder = TINY if device.rehearses else DECODERS["m3"]
    for storage in ("float16", "int4"):
        for name, shape in decoder.linears.items():
            yield {"linear": name, **measure_prefill(device, shape, 64, storage, 5 if device.rehearses else 600)}


def step(device: Device, storage: str, rank: int) -> Iterator[dict[str, Any]]:
    """The decode step of M3. For pictures the rank is 256."""
    past, decoder = (REHEARSED_PAST, TINY) if device.rehearses else (PAST, DECODERS["m3"])
    ours = DecodeStep(device, decoder, rank, storage, past)
    expected = ours.expected(0)
    ours.run()
    error = check(f"decode step {storage}", ours.logits, expected, 2e-2)  # the caches round the new keys and values
    result = {"storage": storage, "rank": rank, "error": error, "bytes": ours.size_bytes}
    assert int(ours.token[0]) == int(ours.logits.argmax()) == int(ours.ids[0, 0])
    assert int(ours.step[0]) < STEPS
    result["ours_graph"] = device.measure([ours.run])
    if storage == "float16":
        original = OriginalStep(ours)
        result["original_eager"] = device.measure([original.run], graph=False, samples=10)
        result["original_graph"] = device.measure([original.run])
    yield result


def attention(device: Device) -> Iterator[dict[str, Any]]:
    """The attention of one layer's decode step, on several caches in turn."""
    for system, decoder in {"m3": TINY}.items() if device.rehearses else DECODERS.items():
        for past in [REHEARSED_PAST] if device.rehearses else [PAST, 3000]:
            size, heads, kv_heads = decoder.head_size, decoder.heads, decoder.kv_heads
            capacity = past + 64
            cache_bytes = 4 * kv_heads * (past + 1) * size
            caches = [
                [device.normal(1, kv_heads, capacity, size, dtype=torch.float16) for _ in range(2)]
                for _ in range(device.copies(cache_bytes))
            ]
            packed = device.normal(1, 1, (heads + 2 * kv_heads) * size)
            angles, output = device.normal(1, 1, size // 2), device.poisoned(1, 1, heads * size)
            length = torch.full((1,), past, dtype=torch.int64, device=device.name)
            needed = device.kernels.cached_attention_workspace_bytes(1, 1, heads, kv_heads, size, capacity)
            memory = device.zeros(needed, dtype=torch.uint8)
            cosine, sine = angles.cos(), angles.sin()

            def call(keys: torch.Tensor, values: torch.Tensor, *given: Any) -> None:
                device.kernels.cached_attention(*given[:4], keys, values, *given[4:], stream=device.stream)

            given = packed, cosine, sine, length, output, memory
            query = packed[..., : heads * size].view(heads, 1, size).half()[None]

            def peer(keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor = query, past: int = past) -> Any:
                seen = (one[:, :, : past + 1] for one in (keys, values))
                return torch.nn.functional.scaled_dot_product_attention(query, *seen, enable_gqa=True)

            yield {
                "system": system,
                "past": past,
                "bytes": cache_bytes,
                "ours": device.measure([lambda pair=pair, given=given: call(*pair, *given) for pair in caches]),
                # PyTorch's neither rotates, appends nor widens.
                "torch_attention": device.measure([lambda pair=pair: peer(*pair) for pair in caches]),
            }
            assert torch.isfinite(output).all()


def prompt_attention(device: Device) -> Iterator[dict[str, Any]]:
    """One layer's attention of M3's prompt of 600 tokens, which has a picture."""
    tokens, decoder = (5, TINY) if device.rehearses else (600, DECODERS["m3"])
    size, heads, kv_heads = decoder.head_size, decoder.heads, decoder.kv_heads
    packed = device.normal(1, tokens, (heads + 2 * kv_heads) * size)
    # Angles of 0, so that PyTorch's attention, which rotates nothing, has the same result.
    cosine, sine = torch.ones_like(packed[..., : size // 2]), device.zeros(1, tokens, size // 2)
    caches = [device.zeros(1, kv_heads, tokens, size, dtype=torch.float16) for _ in range(2)]
    output = device.poisoned(1, tokens, heads * size)
    given = packed, cosine, sine, device.zeros(1, dtype=torch.int64), *caches, output
    split = packed.view(1, tokens, -1, size).swapaxes(1, 2).split([heads, kv_heads, kv_heads], dim=1)

    def call() -> None:
        device.kernels.cached_attention_prefill(*given, stream=device.stream)

    def peer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, enable_gqa=True)

    call()
    expected = peer(*(one.double() for one in split)).swapaxes(1, 2).reshape_as(output)
    halves = [one.half() for one in split]
    yield {
        "system": "m3",
        "tokens": tokens,
        "error": check("attention of a prompt", output, expected, 2e-3),
        "ours": device.measure([call]),
        # PyTorch's neither rotates nor appends, and reads and writes float16.
        "torch_attention": device.measure([lambda: peer(*halves)]),
    }


def whole_picture(device: Device) -> Iterator[dict[str, Any]]:
    """All codes of a picture, each chosen and looked up on the GPU without an exchange with the host."""
    count = 8 if device.rehearses else 1024
    past, decoder = (REHEARSED_PAST, TINY) if device.rehearses else (PAST, DECODERS["m3"])
    for storage in ("float16", "int4"):
        one = DecodeStep(device, decoder, 256, storage, past, new_tokens=count + 8)
        replay = device.captured(one.run)
        chosen = int(one.step[0])

        def row_of_codes(replay: Any = replay) -> None:
            for _ in range(count):
                replay()

        seconds = device.seconds(row_of_codes)
        last = int(one.step[0])
        if last != chosen + count or int(one.past[0]) != past + last:
            raise WrongResult(f"{count} steps came to step {last}, context {int(one.past[0])}")
        yield {"storage": storage, "codes": count, "codes_seconds": seconds}


def picture(device: Device) -> Iterator[dict[str, Any]]:
    """The VQGAN's decoder without its four attention blocks: 1024 codes become a picture of 256 x 256."""
    shape = ((32, 32), 1, 3, 64) if device.rehearses else ((512, 256, 128, 128), 3, 32, 8192)
    one = Picture(device, *shape)
    with torch.inference_mode():
        levels, expected = one.ours(), one.plain()
        apart = (levels.int() - expected.int()).abs().float()
        if float(apart.mean()) > 2:
            raise WrongResult(f"the picture is wrong by {float(apart.mean())} levels in the mean")
        yield {
            "mean_levels_apart": float(apart.mean()),
            "ours_graph": device.measure([one.ours]),
            "torch_graph": device.measure([one.original]),
            "torch_eager": device.measure([one.original], graph=False),
        }


def parts(device: Device) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """The parts of the benchmark by name. The most important come first, because time may run out."""
    halves, integers = ["float16"], ["int4", "int8"]
    return {
        "ceilings": lambda: ceilings(device),
        "m3 decode step, float16": lambda: step(device, "float16", 256),
        "m3 decode step, int4": lambda: step(device, "int4", 256),
        "m3 linears, rank 256": lambda: linears(device, "m3", [256], halves + integers, ROWS),
        "attention": lambda: attention(device),
        "attention of a prompt": lambda: prompt_attention(device),
        "picture": lambda: picture(device),
        "whole picture": lambda: whole_picture(device),
        "m3 prefill, rank 64": lambda: prefill(device),
        "m3 linears, ranks 64 and 32": lambda: linears(device, "m3", [64, 32], ["float16", "int4"], ROWS),
        "l14 linears, rank 32": lambda: linears(device, "l14", [32], ["float16", "int4"], ROWS),
        "xl32 linears, rank 32": lambda: linears(device, "xl32", [32], ["float16", "int4"], ROWS),
        "m3 linears, rank 256, bfloat16": lambda: linears(device, "m3", [256], ["bfloat16"], [1, 32]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    end = time.monotonic() + arguments.seconds
    device = Device(arguments.module)
    todo = parts(device)
    results: dict[str, Any] = {"machine": device.description(), "commit": commit()}
    results |= {"not_reached": [], "failed": {}} | {name: [] for name in todo}

    def write() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))

    for name, part in todo.items():
        begin = time.monotonic()
        try:
            for result in part() if begin < end else ():
                results[name].append(result)
                write()
                if time.monotonic() > end:
                    break
        except Exception as error:  # continue with the other parts
            results["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if time.monotonic() > end:
            results["not_reached"].append(name)  # or not completed
        print(f"{name}: {len(results[name])} results, {time.monotonic() - begin:.0f} s", flush=True)
        if not device.rehearses:
            torch.cuda.empty_cache()
    write()
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
