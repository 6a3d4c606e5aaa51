#!/usr/bin/env bash
# Tests, sanitizers and benchmarks of the CUDA kernels on a machine with a GPU:
#   bench/gpu.sh FOLDER [tests] [sanitize] [bench] [engine]     (all four by default)
# Logs and JSON go to FOLDER. BUILD_DIR (default: build) may hold programs that were built elsewhere;
# what it lacks is built. `engine` builds the extension and measures whole steps and runs. PYTHON
# names a Python whose torch brings libcublasLt along.
# SANITIZE_FILTER limits the sanitized tests, as --gtest_filter takes it.
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
fi

if [[ " $parts " == *" sanitize "* ]]; then
  # The library's own kernels are not ours to check.
  filter=${SANITIZE_FILTER:-*:-CudaGemm.*}
  for tool in memcheck racecheck initcheck; do
    echo "compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/optimus_cuda_tests" \
      --gtest_brief=1 --gtest_filter="$filter" >"$folder/$tool.log" 2>&1 || status=1
    tail -n 4 "$folder/$tool.log"
  done
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
