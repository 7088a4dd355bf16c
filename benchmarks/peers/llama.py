"""llama.cpp through llama-cpp-python: a random GGUF of M3's sizes with plain LoRA, without flash attention.

Plain LoRA has no router, so it does a little less work than H-LoRA. The files are written to WORK once.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from ..systems import System
from .common import RANKS, Report, absent, milliseconds, parse_arguments, system

try:
    import llama_cpp
    import numpy as np
    from gguf import GGMLQuantizationType

    from .gguf_files import write_adapter, write_model
except ImportError as error:
    absent(f"{error.name} is not installed: pip install llama-cpp-python gguf")

CONTEXT_TOKENS = 2048
# llama.cpp quantises activations to 8 bits per block, and groups them differently for one row and for many.
TOLERANCE = 0.1
PICTURE_PROMPT, PICTURE_CODES = 600, 1024


class Model:
    """A model in memory, with one context on it."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = CONTEXT_TOKENS
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = 0  # off, which was faster on the machine of the comparison (by hand)
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(0)

    def adapt(self, path: Path | None) -> None:
        """Use this adapter, or none if the path is None."""
        adapters = [] if path is None else [llama_cpp.llama_adapter_lora_init(self._model, str(path).encode())]
        if None in adapters:
            raise SystemExit(f"llama.cpp cannot load {path.name if path else ''}")
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(*adapters)
        scales = (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self._context, pointers, len(adapters), scales):
            raise SystemExit("llama.cpp refused the adapter")

    def forget(self, length: int = 0) -> None:
        """Keep only the first `length` tokens."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, length, -1)

    def forward(self, count: int) -> None:
        """Append `count` random tokens and compute the logits of the last one."""
        tokens = (llama_cpp.llama_token * count)(*self._random.integers(0, self._vocab, count).tolist())
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise SystemExit("llama.cpp failed to decode")
        llama_cpp.llama_get_logits(self._context)

    def restart_random(self) -> None:
        self._random = np.random.default_rng(0)

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (self._vocab,)).astype(np.float64)


def decoding_distance(model: Model) -> float:
    """The relative distance of a prompt's last logits between decoding it and prefilling it."""
    results = []
    for steps in ([16], [8] + [1] * 8):
        model.forget()
        model.restart_random()
        for step in steps:
            model.forward(step)
        results.append(model.logits())
    prefilled, decoded = results
    return float(np.linalg.norm(decoded - prefilled) / np.linalg.norm(prefilled - prefilled.mean()))


def decode(model: Model, count: int) -> list[float]:
    return milliseconds(lambda: model.forward(1), count)


def files(work: Path, variant: str, sizes: System) -> tuple[Path, dict[str, Path]]:
    """The model and each task's adapter in `work`, written first where they are not there."""
    folder = work / f"llama-{sizes.layers}-layers"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{variant}.gguf"
    partial = folder / "partial.gguf"  # an interrupted file must not look complete
    if not path.exists():
        write_model(partial, sizes, GGMLQuantizationType[variant])
        partial.rename(path)
    adapters = {task: folder / f"lora-{rank}.gguf" for task, rank in RANKS.items()}
    for task, adapter in adapters.items():
        if not adapter.exists():
            write_adapter(partial, sizes, RANKS[task])
            partial.rename(adapter)
    return path, adapters


def main() -> None:
    arguments = parse_arguments(__doc__, choices=["Q4_0", "Q4_K"], required=True)
    sizes = system(arguments)
    path, adapters = files(arguments.work, arguments.variant, sizes)
    # llama.cpp's own messages go to stderr. stdout is only for the report.
    begin = time.perf_counter()
    model = Model(path, arguments.threads)
    print(f"loaded in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    report = Report(
        f"llama-cpp-python {llama_cpp.__version__}",
        f"random {arguments.variant}, head Q6_K, flash attention off; plain LoRA in float16, no router; "
        + llama_cpp.llama_print_system_info().decode(),
    )
    for task, adapter in {"base": None, **adapters}.items():
        model.adapt(adapter)
        report.check(f"{task} decode and prefill", decoding_distance(model), TOLERANCE)
        prefills, steps = [], []
        for _ in range(arguments.repeat):
            model.forget()
            prefills += milliseconds(lambda: model.forward(arguments.prefill))
        model.forget()
        model.forward(arguments.context)
        for _ in range(arguments.repeat):
            model.forget(arguments.context)
            steps += decode(model, arguments.decode)
        report.row(f"pp{arguments.prefill}", task, prefills)
        report.row(f"tg{arguments.decode}@{arguments.context}", task, steps)
    if arguments.picture:
        # The language model's part of a picture. The adapter set last is generation's.
        model.forget()
        begin = time.perf_counter()
        model.forward(PICTURE_PROMPT)
        decode(model, PICTURE_CODES)
        report.row("img256", "generation", [(time.perf_counter() - begin) * 1e3])
    report.print()


if __name__ == "__main__":
    main()
