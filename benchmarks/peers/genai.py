"""onnxruntime-genai in int4, without adapters: it has no simple way to give every linear its own LoRA.

Its own builder makes the model once, from the random base checkpoint in WORK. The builder needs PyTorch, onnx and a
newer transformers than the exporter.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

from ..systems import SYSTEMS
from .common import Report, absent, parse_arguments, system

MAX_LENGTH = 2048
VOCABULARY = SYSTEMS["m3"].base_vocab
TOLERANCE = 0.1  # activations are quantised to 8 bits per block
INSTALL = "pip install onnxruntime-genai onnx onnx_ir torch==2.13.0 transformers"


def build(work: Path, layers: int, out: Path) -> None:
    """Quantise the random base as the documentation recommends: blocks of 32, activations in 8 bits."""
    base = work / "m3" / "base"
    config = base / "config.json"
    if not config.exists() or json.loads(config.read_text())["num_hidden_layers"] != layers:
        absent(f"it needs a checkpoint of {layers} layers in WORK/m3 (python -m benchmarks.random_checkpoint)")
    # Run as a script, not imported: the builder's folder must come first in the import path of its modules.
    package = importlib.util.find_spec("onnxruntime_genai")
    assert package is not None and package.origin is not None
    builder = Path(package.origin).parent / "models" / "builder.py"
    partial = out.with_suffix(".partial")
    options = ["-i", base, "-o", partial, "-p", "int4", "-e", "cpu", "-c", work / "genai-cache"]
    command = [sys.executable, builder, *options, "--extra_options", "int4_accuracy_level=4"]
    done = subprocess.run([str(word) for word in command], stdout=sys.stderr)
    if done.returncode:
        absent(f"its builder failed on the random checkpoint; it needs: {INSTALL}")
    partial.rename(out)


def main() -> None:
    arguments = parse_arguments(__doc__, choices=["int4"], required=True)
    try:
        import numpy as np
        import onnxruntime_genai as genai
    except ImportError as error:
        absent(f"{error.name} is not installed: {INSTALL}")
    layers = system(arguments).layers
    folder = arguments.work / f"genai-{layers}-layers"
    if not folder.exists():
        build(arguments.work, layers, folder)
    config = genai.Config(str(folder))
    threads = {"session_options": {"intra_op_num_threads": arguments.threads}}
    config.overlay(json.dumps({"model": {"decoder": threads}}))
    model = genai.Model(config)
    random = np.random.default_rng(0)

    def generator() -> genai.Generator:
        parameters = genai.GeneratorParams(model)
        # min_length forbids end tokens, which would stop the generation.
        parameters.set_search_options(max_length=MAX_LENGTH, min_length=MAX_LENGTH, do_sample=False)
        return genai.Generator(model, parameters)

    def last_logits(steps: list[int]) -> np.ndarray:
        sequence, done = generator(), 0
        for step in steps:
            sequence.append_tokens(np.arange(3 + done, 3 + done + step, dtype=np.int32))
            done += step
        return np.asarray(sequence.get_logits(), np.float64).reshape(-1, VOCABULARY)[-1]

    def append(sequence: genai.Generator, count: int) -> float:
        tokens = random.integers(0, VOCABULARY, count).astype(np.int32)
        begin = time.perf_counter()
        sequence.append_tokens(tokens)
        return (time.perf_counter() - begin) * 1e3

    version = importlib.metadata.version("onnxruntime-genai")
    note = "int4 blocks of 32, activations in 8 bits, no adapters, vocabulary of the base"
    report = Report(f"onnxruntime-genai {version}", note)
    prefilled, decoded = last_logits([16]), last_logits([8] + [1] * 8)
    distance = np.linalg.norm(decoded - prefilled) / np.linalg.norm(prefilled - prefilled.mean())
    report.check("base decode and prefill", float(distance), TOLERANCE)
    report.row(
        f"pp{arguments.prefill}", "base", [append(generator(), arguments.prefill) for _ in range(arguments.repeat)]
    )
    steps = []
    for _ in range(arguments.repeat):
        sequence = generator()
        append(sequence, arguments.context)
        sequence.generate_next_token()  # chosen from the prefill's logits
        for _ in range(arguments.decode):
            begin = time.perf_counter()
            sequence.generate_next_token()
            steps.append((time.perf_counter() - begin) * 1e3)
    report.row(f"tg{arguments.decode}@{arguments.context}", "base", steps)
    report.print()


if __name__ == "__main__":
    main()
