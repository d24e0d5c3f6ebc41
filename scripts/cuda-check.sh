#!/usr/bin/env bash
# Check the `cuda` feature on a machine without a GPU.
#
#   cuda-check.sh rust                 type-check the Rust side only (no toolkit needed)
#   cuda-check.sh kernels [ARGUMENTS]  compile candle's kernels with nvcc from PyPI, link
#                                      against stand-in libraries, run `upcycle ARGUMENTS`
#                                      (`upcycle doctor` if there are none)
#
# TOOLS holds what is downloaded (default: target/cuda-tools, about 280 MB).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
tools=${TOOLS:-$PWD/target/cuda-tools}
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}

case "${1:-rust}" in
rust)
  install -D -m755 "$here/nvcc-shim.sh" "$tools/shim/nvcc"
  PATH="$tools/shim:$PATH" cargo check --locked --features cuda --target-dir target/cuda-rust
  ;;
kernels)
  if [ ! -x "$tools/venv/bin/pip" ]; then python3 -m venv "$tools/venv"; fi
  # One CUDA version for all five: nvcc and nvvm of different releases do not fit.
  "$tools/venv/bin/pip" install -q --no-deps \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  export CUDA_HOME
  CUDA_HOME=$(echo "$tools"/venv/lib/python3*/site-packages/nvidia/cu13)
  export PATH="$CUDA_HOME/bin:$PATH"
  ln -sf libcudart.so.13 "$CUDA_HOME/lib/libcudart.so"
  cargo fetch --locked
  cudarc=$(cargo metadata --locked --format-version 1 --features cuda |
    python3 -c 'import json,sys,os; print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"]=="cudarc"))')
  python3 "$here/cuda-stubs.py" "$cudarc" "$CUDA_HOME/lib/stubs"
  LIBRARY_PATH="$CUDA_HOME/lib/stubs" cargo build --locked --features cuda --target-dir target/cuda-kernels
  if [ $# -lt 2 ]; then set -- kernels doctor; fi
  LD_LIBRARY_PATH="$CUDA_HOME/lib:$CUDA_HOME/lib/stubs" target/cuda-kernels/debug/upcycle "${@:2}"
  ;;
*) echo "usage: $0 rust | kernels [ARGUMENTS]" >&2; exit 2 ;;
esac
