"""Random GGUF files of a system's sizes: a model as llama.cpp's quantiser stores it, and plain LoRA adapters.

Blocks have random bytes and fixed scales that give weights of the usual spread. Times do not depend on more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from ..systems import System

ARCHITECTURE = "phi3"
NAMES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPREAD = 0.02
# For each type the values per block, and the fields of a block with a fixed number, or None for random bytes.
_BLOCKS: dict[Type, tuple[int, list[tuple[str, str, float | None]]]] = {
    Type.Q4_0: (32, [("d", "<f2", SPREAD / 4.6), ("qs", "16u1", None)]),
    Type.Q4_K: (
        256,
        [("d", "<f2", SPREAD / 150), ("dmin", "<f2", SPREAD / 20), ("scales", "12u1", None), ("qs", "128u1", None)],
    ),
    Type.Q6_K: (
        256,
        [("ql", "128u1", None), ("qh", "64u1", None), ("scales", "16u1", None), ("d", "<f2", SPREAD / 1400)],
    ),
}


def write_model(path: Path, system: System, linear: Type) -> None:
    """Write a model: linears and embedding in `linear`, head in Q6_K, norms in float32, as llama-quantize does."""
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_context_length(4096)
    writer.add_embedding_length(system.hidden)
    writer.add_block_count(system.layers)
    writer.add_feed_forward_length(system.intermediate)
    writer.add_head_count(system.heads)
    writer.add_head_count_kv(system.heads)
    writer.add_rope_dimension_count(system.hidden // system.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(system.vocab)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, tuple[int, int], Type]]:
        yield "token_embd.weight", (system.vocab, system.hidden), linear
        yield "output.weight", (system.vocab, system.hidden), Type.Q6_K
        yield "output_norm.weight", (1, system.hidden), Type.F32
        for layer in range(system.layers):
            for norm in ("attn_norm", "ffn_norm"):
                yield f"blk.{layer}.{norm}.weight", (1, system.hidden), Type.F32
            for name, shape in system.linears.items():
                yield f"blk.{layer}.{NAMES[name]}.weight", shape, linear

    def values(shape: tuple[int, int], kind: Type) -> np.ndarray:
        return np.ones(shape[1], np.float32) if kind == Type.F32 else _blocks(random, shape, kind)

    _write(writer, list(tensors()), values)


def write_adapter(path: Path, system: System, rank: int) -> None:
    """Write a plain LoRA of this rank on all linears, in float16 as from llama.cpp's converter."""
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(2 * rank))
    random = np.random.default_rng(rank)
    tensors = []
    for layer in range(system.layers):
        for name, (outputs, inputs) in system.linears.items():
            weight = f"blk.{layer}.{NAMES[name]}.weight"
            tensors += [(f"{weight}.lora_a", (rank, inputs), Type.F16), (f"{weight}.lora_b", (outputs, rank), Type.F16)]

    def values(shape: tuple[int, int], kind: Type) -> np.ndarray:
        return (random.random(shape, np.float32) - 0.5).astype(np.float16) * np.float16(SPREAD)

    _write(writer, tensors, values)


def _write(
    writer: GGUFWriter,
    tensors: list[tuple[str, tuple[int, int], Type]],
    values: Callable[[tuple[int, int], Type], np.ndarray],
) -> None:
    """Write one tensor after another, so that a file of gigabytes takes little memory."""
    for name, shape, kind in tensors:
        if kind in _BLOCKS:
            rows, columns = shape
            size, fields = _BLOCKS[kind]
            stored = (rows, columns // size * _block_type(fields).itemsize)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
        else:
            stored = shape if kind == Type.F16 else shape[1:]
            dtype = np.dtype(np.float16 if kind == Type.F16 else np.float32)
            writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in tensors:
        writer.write_tensor_data(values(shape, kind))
    writer.close()


def _block_type(fields: list[tuple[str, str, float | None]]) -> np.dtype:
    return np.dtype([(name, layout) for name, layout, _ in fields])


def _blocks(random: np.random.Generator, shape: tuple[int, int], kind: Type) -> np.ndarray:
    rows, columns = shape
    size, fields = _BLOCKS[kind]
    block = _block_type(fields)
    blocks = np.frombuffer(bytearray(random.bytes(rows * (columns // size) * block.itemsize)), block)
    for name, _, value in fields:
        if value is not None:
            blocks[name] = value
    return blocks.view(np.uint8).reshape(rows, -1)
