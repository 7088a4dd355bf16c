"""The contenders: each has a name and a command that times it once and prints one JSON object."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS, BODIES = "healthgpt-edge", "healthgpt-edge, no kernels"
LLAMA, LLAMA_K, GENAI = "llama.cpp Q4_0", "llama.cpp Q4_K", "onnxruntime-genai"
LINEARS = "healthgpt-edge, linears alone"
PYTORCH_HALF, PYTORCH = "PyTorch bf16", "PyTorch fp32"


@dataclass(frozen=True)
class Contender:
    """`command(arguments, first)` gives the words to run; `first` is its first turn, where ours checks and draws."""

    name: str
    command: Callable[[argparse.Namespace, bool], list[str]]
    needs_peers: bool = False

    def turn(self, arguments: argparse.Namespace, first: bool) -> dict[str, Any]:
        """Time everything once; {"absent": why} where it cannot run. Raises SystemExit where it fails a check."""
        if self.needs_peers and arguments.peers_python is None:
            return {"absent": "no --peers-python given"}
        done = subprocess.run(self.command(arguments, first), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"{self.name} failed with code {done.returncode}: {last}")
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if self.name == OURS and not report["settings"]["kernels"]:
            return {"absent": "its kernels are not built"}
        return report


def _bundle(kernels: bool) -> Callable[[argparse.Namespace, bool], list[str]]:
    def command(arguments: argparse.Namespace, first: bool) -> list[str]:
        rows = [f"pp{arguments.prefill}", f"tg{arguments.decode}@{arguments.context}", "vq", "vit"]
        rows += ["load"] if kernels else []
        rows += ["img"] if kernels and first and arguments.picture else []
        bundle = arguments.bundle if kernels else arguments.bundle_in_rows
        words = [sys.executable, "-m", "healthgpt_edge.cli", "bench", str(bundle), "--json"]
        words += ["--rows", ",".join(rows), "--threads", str(arguments.threads), "--repeat", str(arguments.repeat)]
        # Against the standard bodies once is enough; that it decodes as it prefills is checked in every turn.
        return words + (["--check" if first else "--no-check"] if kernels else ["--no-kernels"])

    return command


def _linears(arguments: argparse.Namespace, first: bool) -> list[str]:
    # The difference is a few percent, so it takes many samples.
    return [sys.executable, "-m", "benchmarks.linears", "--threads", str(arguments.threads), "--repeat", "10"]


def _peer(module: str, variant: str, own_python: bool = False) -> Callable[[argparse.Namespace, bool], list[str]]:
    def command(arguments: argparse.Namespace, first: bool) -> list[str]:
        python = sys.executable if own_python else arguments.peers_python
        words = [str(python), "-m", f"benchmarks.peers.{module}", "--variant", variant]
        for name in ("work", "threads", "repeat", "prefill", "decode", "context", "layers"):
            words += [f"--{name}", str(getattr(arguments, name))]
        return words + (["--picture"] if first and arguments.picture else [])

    return command


CONTENDERS = [
    Contender(OURS, _bundle(kernels=True)),
    Contender(BODIES, _bundle(kernels=False)),
    Contender(LINEARS, _linears),
    Contender(LLAMA, _peer("llama", "Q4_0"), needs_peers=True),
    Contender(LLAMA_K, _peer("llama", "Q4_K"), needs_peers=True),
    Contender(GENAI, _peer("genai", "int4"), needs_peers=True),
    Contender(PYTORCH_HALF, _peer("pytorch", "bf16", own_python=True)),
    Contender(PYTORCH, _peer("pytorch", "fp32", own_python=True)),
]
