"""Compare a full-size M3 in this runtime with the alternatives that people would use, in turn, in one run.

    python -m benchmarks WORK_DIR [--peers-python PYTHON] [--rounds 3] [--threads N] [--picture] [--out DIR]

Every contender runs once per round in its own process, so that only one is in memory; each round starts with a
different one. Samples of all rounds are pooled. WORK_DIR keeps the random checkpoint (11 GB), the bundle, the same in
rows for ONNX Runtime alone, and the peers' files. The peers' interpreter has benchmarks/peers/requirements.txt
installed (`make peers`); missing peers are reported as absent.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from healthgpt_edge import machine

from . import full_size
from .commit import commit
from .contenders import BODIES, CONTENDERS
from .goals import goals
from .pooled import Results
from .report import markdown, plot
from .systems import SYSTEMS

PRECISION = "int4"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peers-python", type=Path, help="interpreter that has the peers' packages")
    parser.add_argument("--bundle", type=Path, help="another bundle than WORK_DIR's full-size one")
    parser.add_argument("--bundle-in-rows", type=Path, help="what ONNX Runtime alone gets in place of WORK_DIR's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="for comparison.{json,md,png}")
    parser.add_argument("--only", action="append", help="this contender; may be repeated, in the order to begin with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="times each row in every turn")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--picture", action="store_true", help="whole pictures too, in the first round: minutes each")
    parser.add_argument("--prefill", type=int, default=600)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--context", type=int, default=700)
    parser.add_argument("--layers", type=int, default=SYSTEMS["m3"].layers, help="of the peers; fewer for a quick look")
    arguments = parser.parse_args()
    names = [contender.name for contender in CONTENDERS]
    if unknown := set(arguments.only or names) - set(names):
        parser.error(f"--only must be one of {', '.join(names)}, got {sorted(unknown)}")
    # Contenders run in the repository's root. Nothing is resolved: an environment's interpreter is a link.
    for name in ("work", "bundle", "bundle_in_rows", "peers_python"):
        if path := getattr(arguments, name):
            setattr(arguments, name, path.absolute())
    return arguments


def full_size_bundle(work: Path, layout: str = "panels") -> Path:
    """The full-size int4 bundle in `work`, made first where it is not there."""
    bundle, checkpoint = work / f"bundle-{PRECISION}-{layout}", work / "m3"
    if not bundle.exists():
        full_size.make_checkpoint(checkpoint)
        full_size.export(checkpoint, bundle, PRECISION, layout=layout)
    return bundle


def main() -> None:
    arguments = parse_arguments()
    arguments.bundle = arguments.bundle or full_size_bundle(arguments.work)
    arguments.out.mkdir(parents=True, exist_ok=True)
    named = {contender.name: contender for contender in CONTENDERS}
    chosen = [named[name] for name in dict.fromkeys(arguments.only or named)]
    if named.get(BODIES) in chosen:
        arguments.bundle_in_rows = arguments.bundle_in_rows or full_size_bundle(arguments.work, "rows")
    results = Results()
    ceilings: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        start = number % len(chosen)
        for contender in [*chosen[start:], *chosen[:start]]:
            if contender.name in results.absent:
                continue
            ceilings.append(
                {
                    "before": contender.name,
                    "read_bytes_per_s": machine.read_bandwidth(arguments.threads),
                    "int8_operations_per_s": machine.arithmetic_rate("int8", arguments.threads),
                }
            )
            print(f"round {number + 1} of {arguments.rounds}: {contender.name}", file=sys.stderr, flush=True)
            results.add(contender.name, contender.turn(arguments, first=number == 0))
            page = write(arguments, number + 1, ceilings, results)
        print(page)
        draw(results, arguments.out / "comparison.png")


def command(arguments: argparse.Namespace) -> str:
    """The command line, with placeholders for this machine's paths."""
    names = {
        str(path): name for name in ("work", "bundle", "peers_python", "out") if (path := getattr(arguments, name))
    }
    words = [names[full].upper() if (full := str(Path(word).absolute())) in names else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks", *words])


def write(arguments: argparse.Namespace, rounds: int, ceilings: list[dict[str, Any]], results: Results) -> str:
    """Write the results so far as JSON and Markdown, so that an interrupted run keeps its turns; returns the page."""
    settings = {
        "command": command(arguments),
        "commit": commit(),
        "bundle": arguments.bundle.name,
        "machine": machine.description(),
        "instruction_set": machine.instruction_set(),
        "threads": arguments.threads,
        "rounds": rounds,
        "repeat": arguments.repeat,
    }
    reached = goals(results)
    report = {
        "settings": settings,
        "ceilings": ceilings,
        "goals": [dict(zip(("goal", "limit", "measured", "met"), goal.cells(), strict=True)) for goal in reached],
        "contenders": results.to_json(),
    }
    (arguments.out / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(settings, results, reached)
    (arguments.out / "comparison.md").write_text(page)
    return page


def draw(results: Results, path: Path) -> None:
    """Draw the plot, where what draws it is installed."""
    try:
        plot(results, path)
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed (pip install 'healthgpt-edge[bench]')", file=sys.stderr)


if __name__ == "__main__":
    main()
