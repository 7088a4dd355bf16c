#!/usr/bin/env bash
# Everything a GPU has to say about the CUDA kernels, in one call under nine minutes: builds them, runs their tests on the
# GPU, lets compute-sanitizer look on, and times them. Needs nvcc, CMake, ninja, pybind11, PyTorch, onnx and pytest in the
# Python that is found, and nothing from the network.
#
#   benchmarks/gpu.sh [FOLDER]             gpu.json, gpu.md and gpu.log go to FOLDER, benchmarks/results by default
#   benchmarks/gpu.sh --bundles [FOLDER]   a second call: whole bundles by ONNX Runtime's CUDA provider, gpu-bundles.json;
#                                          wheels/ must hold what benchmarks/gpu/requirements.txt lists
#   benchmarks/gpu.sh --rehearse [FOLDER]  without a GPU: all steps of both on the host's fibers, at small sizes
#
# Ends with 0 only if all was right. What came before a failure stays in FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=no
bundles=no
case ${1:-} in
  --rehearse) rehearse=yes bundles=yes; shift ;;
  --bundles) bundles=yes; shift ;;
esac
results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}
begin=$SECONDS
name=gpu
[[ $bundles == yes ]] && name=gpu-bundles
[[ $rehearse == yes ]] && name=gpu-rehearsal
log=$results/$name.log
: >"$log"
trap 'rm -f "$log.part"' EXIT
limit=${GPU_SECONDS:-520}
tests=120
if [[ $rehearse == yes ]]; then # faults are planted as well, and nobody waits for a GPU
  limit=${GPU_SECONDS:-1500}
  tests=600
fi
failed=()

step() { # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  local left=$((limit - (SECONDS - begin)))
  if ((left < 5)); then
    echo "== $name: no time left" | tee -a "$log"
    failed+=("$name")
    return 1
  fi
  echo "== $name" | tee -a "$log"
  local start=$SECONDS
  timeout $((seconds < left ? seconds : left)) "$@" >"$log.part" 2>&1
  local code=$?
  cat "$log.part" >>"$log"
  tail -n 12 "$log.part"
  echo "== $name: exit code $code, $((SECONDS - start)) s" | tee -a "$log"
  ((code == 0)) || failed+=("$name")
  return $code
}

build=build/gpu
target=_cuda
library=healthgpt_onnxruntime_cuda
options=(-DCUDA=ON)
if [[ $rehearse == yes ]]; then
  build=build/gpu-rehearsal
  target=_cuda_host
  library=healthgpt_onnxruntime_cuda_host
  options=()
else
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  options+=("-DCMAKE_CUDA_ARCHITECTURES=${capability:?nvidia-smi names no GPU}")
  nvidia-smi >>"$log"
fi
step configure 60 cmake -S . -B "$build" -G Ninja "${options[@]}" -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" || exit 1
targets=("$target")
[[ $bundles == yes ]] && targets=("$library" healthgpt_onnxruntime _kernels)
[[ $rehearse == yes ]] && targets=("$target" "$library")
step build 240 cmake --build "$build" --target "${targets[@]}" || exit 1

kernels() {
  module=$(find "$PWD/$build" -name "$target*.so" | head -n 1)
  export HEALTHGPT_CUDA_MODULE=$module
  step tests "$tests" "$python" -m pytest -x -p no:cacheprovider tests/csrc/cuda
  if [[ $rehearse == no ]]; then
    # The kernels once each; the races and bounds it looks for do not depend on sizes that tests have tried already.
    calls=(tests/csrc/cuda/run_operations.py)
    for tool in memcheck racecheck; do
      if command -v compute-sanitizer >/dev/null; then
        step "$tool" 80 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" "${calls[@]}"
      else
        echo "== $tool: compute-sanitizer is not here" | tee -a "$log"
      fi
    done
  fi
  seconds=$((limit - (SECONDS - begin) - 20))
  [[ $rehearse == yes ]] && seconds=60
  step times "$((seconds + 15))" "$python" -m benchmarks.gpu "$module" --out "$results/$name.json" --seconds "$seconds"
}

whole_bundles() {
  # The package from its sources, beside the wheels that came along: nothing is installed.
  site=$PWD/$build/site
  mkdir -p "$site/healthgpt_edge"
  ln -sfn "$PWD"/runtime/* "$PWD/export" "$site/healthgpt_edge/"
  find "$PWD/$build" -path "$site" -prune -o -name "*.so" -exec ln -sfn {} "$site/healthgpt_edge/" \;
  if [[ -d wheels ]]; then
    step wheels 60 "$python" -m benchmarks.gpu.wheels wheels "$site" || return
  fi
  export PYTHONPATH=$site
  arguments=("$build/work" --out "$results/$name.json" --seconds "$((limit - (SECONDS - begin) - 20))")
  [[ $rehearse == yes ]] && arguments=("$build/work" --out "$results/$name-bundles.json" --rehearse
    "$site/healthgpt_edge/$library.so")
  step bundles "$limit" "$python" -m benchmarks.gpu.bundles "${arguments[@]}"
}

[[ $rehearse == yes || $bundles == no ]] && kernels
[[ $bundles == yes ]] && whole_bundles

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all was right, in $((SECONDS - begin)) s"
