"""`python -m healthgpt_edge.export.phantom --seed 0 --out DIR`: see train.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .train import train


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the phantom and write it in the released layout.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-work", action="store_true", help="keep the state of each stage in OUT/work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.seed, keep_work=arguments.keep_work)


if __name__ == "__main__":
    main()
