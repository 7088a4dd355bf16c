#!/usr/bin/env bash
# Everything a GPU has to say about the CUDA kernels, in one call under nine minutes: builds them, runs their tests on the
# GPU while compute-sanitizer looks on and bundles are exported, then times the kernels alone, then whole bundles by ONNX
# Runtime's CUDA provider. Such a machine has a processor with many cores, too, and often AVX-512, for the CPU kernels'
# tests and, last, their times. Needs nvcc, CMake, ninja, pybind11, PyTorch, onnx and pytest in the Python that is
# found, and nothing from the network; bundles need wheels/ as benchmarks/gpu/requirements.txt says, and are left out
# without.
#
#   benchmarks/gpu.sh [FOLDER]             gpu.json, gpu.md, gpu-bundles.json, gpu-bundles-rows.json, of the processor
#                                          gpu-cpu.json and gpu-cpu-threads.json, and gpu.log go to FOLDER, by default
#                                          benchmarks/results
#   benchmarks/gpu.sh --rehearse [FOLDER]  without a GPU: all steps on the host's fibers, at small sizes
#
# GPU_SECONDS limits all of it, GPU_KERNEL_SECONDS the times of the kernels. PROCESSOR=no leaves out the processor's
# times. COMMIT says what is tested, where git does not. Ends with 0 only if all was right. What came before a failure
# stays in FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=no
if [[ ${1:-} == --rehearse ]]; then
  rehearse=yes
  shift
fi
folder=${1:-benchmarks/results}
if (($# > 1)) || [[ $folder == -* ]] || ! mkdir -p "$folder"; then
  echo "benchmarks/gpu.sh: expected [--rehearse] [FOLDER], found $*" >&2
  exit 2
fi
results=$(cd "$folder" && pwd)
python=${PYTHON:-python3}
begin=$SECONDS
name=gpu
limit=${GPU_SECONDS:-520}
check=120
if [[ $rehearse == yes ]]; then # faults are planted as well, and nobody waits for a GPU
  name=gpu-rehearsal
  limit=${GPU_SECONDS:-1500}
  check=600
fi
log=$results/$name.log
: >"$log"
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
declare -A running
failed=()

left() { echo $((limit - (SECONDS - begin))); }

start() { # start NAME SECONDS COMMAND...: goes on beside what comes next
  local step=$1 seconds=$2
  shift 2
  ((seconds < $(left))) || seconds=$(left)
  {
    local from=$SECONDS
    timeout "$((seconds > 1 ? seconds : 1))" "$@" >"$parts/$step.log" 2>&1
    echo "$? $((SECONDS - from))" >"$parts/$step.code"
  } &
  running[$step]=$!
}

finish() { # finish NAME...: waits for what was started, and says how it went
  local step code seconds all=0
  for step in "$@"; do
    wait "${running[$step]}"
    read -r code seconds <"$parts/$step.code"
    { echo "== $step"; cat "$parts/$step.log"; echo "== $step: exit code $code, $seconds s"; } >>"$log"
    echo "== $step"
    tail -n 12 "$parts/$step.log"
    echo "== $step: exit code $code, $seconds s"
    ((code == 0)) || failed+=("$step") all=1
  done
  return $all
}

step() { # step NAME SECONDS COMMAND...: alone
  start "$@"
  finish "$1"
}

build=build/$name
module=_cuda
library=healthgpt_onnxruntime_cuda
options=(-DCUDA=ON)
targets=("$module" "$library" healthgpt_onnxruntime _kernels)
if [[ $rehearse == yes ]]; then
  module=_cuda_host
  library=healthgpt_onnxruntime_cuda_host
  options=()
  targets=("$module" "$library")
else
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  options+=("-DCMAKE_CUDA_ARCHITECTURES=${capability:?nvidia-smi names no GPU}")
  { nvidia-smi; lscpu; } >>"$log"
fi
step configure 60 cmake -S . -B "$build" -G Ninja "${options[@]}" -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" || exit 1
step build 240 cmake --build "$build" --target "${targets[@]}" || exit 1
HEALTHGPT_CUDA_MODULE=$(find "$PWD/$build" -name "$module*.so" | head -n 1)
export HEALTHGPT_CUDA_MODULE

# The package from its sources, beside the wheels that came along: nothing is installed.
site=$PWD/$build/site
work=${GPU_WORK:-$PWD/$build/work}
bundles=no
if [[ $rehearse == no && ! -d wheels ]]; then
  echo "== bundles: wheels/ is not here, so no bundle is run" | tee -a "$log"
else
  bundles=yes
  mkdir -p "$site/healthgpt_edge" "$work"
  ln -sfn "$PWD"/runtime/* "$PWD/export" "$site/healthgpt_edge/"
  find "$PWD/$build" -path "$site" -prune -o -name "*.so" -exec ln -sfn {} "$site/healthgpt_edge/" \;
  [[ $rehearse == yes ]] || step wheels 60 "$python" -m benchmarks.gpu.wheels wheels "$site" || bundles=no
fi
rehearsal=()
[[ $rehearse == yes ]] && rehearsal=(--rehearse "$site/healthgpt_edge/$library.so")
on_bundles=(env "PYTHONPATH=$site" "$python" -m benchmarks.gpu.bundles "$work" "${rehearsal[@]}")

# Checks side by side, for nothing is timed yet. Bundles are exported on half of the cores, and go on while the kernels are
# timed, which is the GPU's work alone.
cores=$(nproc)
[[ $bundles == yes ]] && start export "$limit" taskset -c "$((cores / 2))-$((cores - 1))" "${on_bundles[@]}" --export
checks=(tests)
start tests "$check" "$python" -m pytest -p no:cacheprovider --maxfail 20 tests/csrc/cuda
here=(env "PYTHONPATH=$site" "$python" -m)
if [[ $rehearse == no && $bundles == yes ]]; then
  checks+=(cpu-tests)
  start cpu-tests "$check" "${here[@]}" pytest -p no:cacheprovider --maxfail 20 tests/csrc/test_hlora_linear.py \
    tests/csrc/test_cached_attention.py tests/csrc/test_packed_attention.py tests/csrc/test_convolution.py
fi
if [[ $rehearse == no ]]; then
  # The kernels once each; the races and bounds it looks for do not depend on sizes that the tests try.
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      checks+=("$tool")
      start "$tool" "$check" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/csrc/cuda/run_operations.py
    else
      echo "== $tool: compute-sanitizer is not here" | tee -a "$log"
    fi
  done
fi
finish "${checks[@]}"

# Times, one after the other.
seconds=${GPU_KERNEL_SECONDS:-$((($(left) - 30) / 2))}
[[ $rehearse == yes ]] && seconds=60
step times $((seconds + 15)) "$python" -m benchmarks.gpu "$HEALTHGPT_CUDA_MODULE" --out "$results/$name.json" \
  --seconds "$seconds"
if [[ $bundles == yes ]] && finish export; then
  step bundles "$limit" "${on_bundles[@]}" --out "$results/$name-bundles.json" --seconds $(($(left) - 10))
fi

# The processor's times, last, for it has other chances.
if [[ $rehearse == no && $bundles == yes && ${PROCESSOR:-yes} == yes ]]; then
  step cpu-linears 60 "${here[@]}" benchmarks.linears --threads 2 --rows 256 --layers 2 --instructions \
    $(PYTHONPATH=$site "$python" -c "from healthgpt_edge import _kernels; print(*{*_kernels.targets()} - {'portable'})")
  step cpu-threads 120 "${here[@]}" benchmarks.threads "$work/m3-int4" --context 128 --repeat 2 \
    --out "$results/$name-cpu-threads.json"
  step cpu-times 200 "${here[@]}" benchmarks.gpu.processor "$work/m3-int4" --repeat 2 --out "$results/$name-cpu.json"
fi

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all was right, in $((SECONDS - begin)) s"
