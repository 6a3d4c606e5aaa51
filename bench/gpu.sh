#!/usr/bin/env bash
# Tests, sanitizers and benchmarks of the CUDA kernels on a machine with a GPU:
#   bench/gpu.sh FOLDER [tests] [sanitize] [bench] [engine]     (all four by default)
# Logs and JSON go to FOLDER. BUILD_DIR (default: build) may hold programs that were built elsewhere;
# what it lacks is built. `engine` builds the extension and measures whole steps and runs. PYTHON
# names a Python whose torch brings libcublasLt along.
# SANITIZE_FILTER limits the sanitized tests, as --gtest_filter takes it, SANITIZE_SECONDS the time of
# each (default 600; a few take longer under racecheck).
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?"usage: bench/gpu.sh FOLDER [tests] [sanitize] [bench] [engine]"}
shift
parts=${*:-tests sanitize bench engine}
build=${BUILD_DIR:-build}
mkdir -p "$folder"

if [[ ! -x $build/optimus_cuda_tests || ! -d $build/bench-cuda ]]; then
  cmake -S . -B "$build" -DOPTIMUS_CUDA=1
  cmake --build "$build" --parallel
fi

# gemm opens libcublasLt by name: the toolkit's, or the one that PyTorch's wheel brings along.
cublaslt=$("${PYTHON:-python3}" - <<'END' || true
import glob, importlib.util, os
spec = importlib.util.find_spec("torch")
site = os.path.dirname(os.path.dirname(spec.origin)) if spec else ""
found = glob.glob(os.path.join(site, "nvidia", "*", "lib", "libcublasLt.so.1[23]"))
print(os.path.dirname(found[0]) if found else "")
END
)
if [[ -n $cublaslt ]]; then export LD_LIBRARY_PATH=$cublaslt${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi

status=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

if [[ " $parts " == *" tests "* ]]; then
  "$build/optimus_cuda_tests" --gtest_brief=1 2>&1 | tee "$folder/tests.log" || status=1
  # What GPUs later than Hopper run: our PTX for sm_80. The library brings no PTX.
  CUDA_FORCE_PTX_JIT=1 "$build/optimus_cuda_tests" --gtest_brief=1 \
    --gtest_filter="-CudaGemm.*:CudaEngine.*" 2>&1 | tee "$folder/tests_ptx.log" || status=1
fi

if [[ " $parts " == *" sanitize "* ]]; then
  # The library's own kernels are not ours to check.
  filter=${SANITIZE_FILTER:-*:-CudaGemm.*:CudaEngine.*}
  mkdir -p "$folder/sanitize"
  # A test a process, many at once: most of their time is the tool's, on the CPU.
  check() {
    local log="$folder/sanitize/$1.${2//\//_}.log" flags=()
    # Or it reports as hazards more of what barriers in shared memory order.
    if [[ $1 == racecheck ]]; then flags=(--racecheck-indirect-barrier-dependency); fi
    timeout "${SANITIZE_SECONDS:-600}" compute-sanitizer --tool "$1" "${flags[@]}" \
      --error-exitcode 1 "$build/optimus_cuda_tests" --gtest_brief=1 --gtest_filter="$2" >"$log" 2>&1
    echo "$1 $2: exit status $?, $(grep SUMMARY "$log" | sed 's/=* *//')"
  }
  export -f check
  export folder build
  "$build/optimus_cuda_tests" --gtest_list_tests --gtest_filter="$filter" |
    awk '/^[^ ]/ {suite = $1} /^ / {for (tool in tools) print tools[tool], suite $1}
         BEGIN {split("racecheck memcheck initcheck", tools)}' | sort -r |
    xargs -P "$(nproc)" -L 1 bash -c 'check "$0" "$1"' | tee "$folder/sanitize.log"
  if grep -qv 'exit status 0' "$folder/sanitize.log"; then status=1; fi
fi

if [[ " $parts " == *" bench "* ]]; then
  for program in "$build"/bench-cuda/*; do
    if [[ ! -x $program || -d $program ]]; then continue; fi
    name=$(basename "$program")
    "$program" --json "$folder/$name.json" 2>&1 | tee "$folder/$name.log" || status=1
  done
fi

if [[ " $parts " == *" engine "* ]]; then
  python=${PYTHON:-python3}
  export PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}
  OPTIMUS_CUDA=1 "$python" setup.py --quiet build_ext --inplace >"$folder/build_ext.log" 2>&1 || status=1
  "$python" bench/gpu_engine.py "$folder" --parts accuracy steps throughput kernels 2>&1 |
    tee "$folder/engine.log" || status=1
fi
exit $status
