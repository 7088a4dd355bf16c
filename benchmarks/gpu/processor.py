"""Check and time a bundle on the processor beside a GPU, where `healthgpt-edge bench` is not installed.

python -m benchmarks.gpu.processor BUNDLE --out FILE [--threads 2] [--rows pp600,tg64@700,vq,vit] [--repeat 3]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.commit import commit
from healthgpt_edge import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="pp600,tg64@700,vq,vit")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    rows = bench.parse_rows(arguments.rows)
    report = bench.run(arguments.bundle, rows, threads=arguments.threads, repeat=arguments.repeat)
    report |= {"commit": commit()}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print({f"{row['task']} {row['row']}": round(row["p50_ms"], 1) for row in report["rows"]})


if __name__ == "__main__":
    main()
