"""Shrink wheels to what the benchmark of one GPU needs, for a machine without a network.

    python -m benchmarks.gpu.slim WHEELS OUT --architecture 90

Such a machine may limit the size of files copied to it. The wheel of onnxruntime-gpu has 255 MB, nearly all of them
kernels for other GPUs or other models. The architecture is the GPU's compute capability without the point, such as 90.
The results run and export bundles. `benchmarks.gpu.wheels` unpacks them; pip cannot install them, because their lists
of files are those of the whole wheels. Needs zstandard.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
import zlib
from pathlib import Path

from .fat_binaries import keep_only

LEFT_OUT = re.compile(
    r"onnxruntime/(capi/libonnxruntime(\.so|_providers_tensorrt)|(tools|quantization|transformers)/)"
    # Of transformers only tokenizers are used, and the configurations that their modules import.
    r"|transformers/models/.*/(feature_extraction|image_processing|modeling|modular|processing|video_processing)_"
)
# ONNX Runtime's kernels that no graph of ours uses: mixtures of experts, and other kinds of attention and products.
# ("5flash" is the mangled namespace; kernels that only mention flash attention are used, such as those for masks.)
UNUSED = re.compile("moe|5flash|fpa_intb|cutlass|kernel_mha|deep_gemm|paged")
USED = "attentionkernel"  # the memory-efficient attention, although its names contain "cutlass"


def is_used(kernels: list[str]) -> bool:
    """Whether a bundle may call any of these kernels, which are linked together."""
    names = " ".join(kernels).lower()
    return USED in names or not UNUSED.search(names)


def slim(wheel: Path, out: Path, architecture: int) -> None:
    """Write the needed files of `wheel` to the file `out`. Raises ValueError if something is wrong with the wheel."""
    partial = out.with_name(f"{out.name}.part")
    try:
        with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as rest:
            for name in whole.namelist():
                if LEFT_OUT.match(name):
                    continue
                data = bytearray(whole.read(name))
                if name.endswith("_providers_cuda.so") and not keep_only(data, architecture, is_used):
                    raise ValueError(f"{name} has no code for a GPU")
                rest.writestr(name, data)
        partial.replace(out)
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{wheel.name}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", type=int, required=True)
    arguments = parser.parse_args()
    found = sorted(arguments.wheels.glob("*.whl"))
    if not found:
        sys.exit(f"no wheels in {arguments.wheels}")
    if arguments.out.resolve() == arguments.wheels.resolve():
        sys.exit("the slim wheels need a folder of their own")
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for wheel in found:
            out = arguments.out / wheel.name
            slim(wheel, out, arguments.architecture)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, now {out.stat().st_size / 1e6:.1f} MB")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
