#!/bin/bash
# The verification ladder of the plugin, on a machine without a GPU. One line per rung; the first failure of a rung prints
# its log and makes the exit code 1, and the rungs after it still run.
#
#   plugins/ladder.sh [--python PYTHON] [--jobs N]
#
# Everything is built in plugins/build. What is missing is fetched: Python packages and, when nvcc is not on PATH, CUDA's
# compiler from PyPI into plugins/build/tools; g++, cmake, ninja and the aarch64 compiler with apt-get. PYTHON has
# qe-edge[rtx,dev] installed: the last rungs build the demo's engines and compare its layers, and the Triton oracle
# computes on torch.
set -u
cd "$(dirname "$0")"
python=python3
jobs=2
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    *) echo "Unknown argument $1. Use --python PYTHON or --jobs N." >&2; exit 2 ;;
  esac
done
python=$(command -v "$python") || { echo "There is no Python '$python'. Give one with --python." >&2; exit 2; }
mkdir -p build/logs
failed=0
tools=$PWD/build/tools
cuda=nvidia/cu13

rung() { # rung NAME COMMAND...
  local name=$1 log start end
  shift
  log=build/logs/${name// /_}.log
  start=$(date +%s)
  if "$@" > "$log" 2>&1; then
    end=$(date +%s)
    echo "ok      $name ($((end - start)) s): $(grep -E '(passed|cases|Success|All checks|plugin nodes)' "$log" | tail -1)"
  else
    failed=1
    echo "FAILED  $name, the end of plugins/$log:"
    tail -40 "$log"
  fi
}

fetch_system_tools() {
  local wanted=()
  command -v g++ || wanted+=(g++)
  command -v cmake || wanted+=(cmake)
  command -v ninja || wanted+=(ninja-build)
  command -v readelf || wanted+=(binutils)
  command -v aarch64-linux-gnu-g++ || wanted+=(g++-aarch64-linux-gnu)
  [ ${#wanted[@]} = 0 ] && return 0
  local as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update && "${as_root[@]}" apt-get install -y --no-install-recommends "${wanted[@]}"
}

fetch_python_tools() {
  [ -x "$tools/bin/python" ] || "$python" -m venv "$tools" || return 1
  "$tools/bin/python" -m pip install -r requirements-ladder.txt || return 1
  # TensorRT's public headers; without its dependencies, which are a deep-learning framework.
  "$tools/bin/python" -m pip install --no-deps kernel-lens==2.0.1 || return 1
  # The compiler of CUDA 13 only when the machine has none; it is large.
  command -v nvcc || "$tools/bin/python" -m pip install -r requirements-cuda.txt
}

emulated_ptx() { # nvcc takes a minute for it, and a rung says that the plugin's is made in the same way
  python -c 'from emulator.build import ptx; print(ptx())'
}

build_plugin() { # build_plugin FOLDER CMAKE_ARGUMENTS...
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja -DQE_NVCC="$nvcc" -DQE_TENSORRT_INCLUDE="$site/kernel_lens/include/tensorrt" \
    -DQE_PTXAS12="$site/nvidia/cuda_nvcc/bin/ptxas" -DQE_KERNELS_PTX="$(emulated_ptx)" "$@" && cmake --build "$folder" -j "$jobs"
}

test_oracle() { # Triton (188 MB) once, then its interpreter in PYTHON
  "$python" -c 'import pytest, torch, xdist' || { echo "Install qe-edge[dev] in $python."; return 1; }
  if ! cmp -s requirements-oracle.txt build/triton/requirements-oracle.txt; then
    rm -rf build/triton
    "$python" -m pip install --no-deps --target build/triton -r requirements-oracle.txt &&
      cp requirements-oracle.txt build/triton || return 1
  fi
  OPENBLAS_NUM_THREADS=1 PYTHONPATH=$PWD/build/triton "$python" -m pytest -q -n "$jobs" tests/test_oracle.py
}

build_demo() { # the demo's three graphs as engines with the plugin that was just built, with 4-bit weights, and with 3-bit ones and INT4 factors
  "$python" -c 'import qe_edge, tensorrt_rtx' || { echo "Install qe-edge[rtx] in $python."; return 1; }
  rm -rf build/demo
  # one process for all commands: importing torch takes longer than building an engine
  OMP_WAIT_POLICY=PASSIVE "$python" -c '
import sys
from qe_edge.cli import main
for words in """
quantize demo -o build/demo/checkpoint --modules language,visual,merger --samples 4 --set tokens=256 --set em_steps=1
export build/demo/checkpoint -o build/demo/onnx
build build/demo/onnx -o build/demo/engines --target rtx --plugin --plugin-library build/plugin/libqe_plugin.so
build build/demo/onnx -o build/demo/cuda --target cuda --plugin --plugin-library build/plugin/libqe_plugin.so
quantize demo -o build/demo/w3/checkpoint --scheme w3a16 --modules language,visual,merger --samples 4 --set tokens=256 --set em_steps=1 --set adapter_dtype=int4
export build/demo/w3/checkpoint -o build/demo/w3/onnx
build build/demo/w3/onnx -o build/demo/w3/engines --target rtx --plugin --plugin-library build/plugin/libqe_plugin.so
""".strip().splitlines():
    if code := main(words.split()):
        sys.exit(code)
# the nodes as the engine got them, for the chain from ONNX to PTX
import onnx_ir
from qe_edge.export.lowering.plugin import pack_layers
model = onnx_ir.load("build/demo/onnx/language.onnx")
pack_layers(model)
onnx_ir.save(model, "build/demo/packed.onnx", external_data="packed.onnx.data")'
}

rung "system tools" fetch_system_tools
rung "python tools" fetch_python_tools
site=$("$tools/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
chmod +x "$site"/nvidia/cuda_nvcc/bin/* "$site"/$cuda/bin/* "$site"/$cuda/nvvm/bin/* 2> /dev/null
PATH=$tools/bin:$PATH:$site/$cuda/bin
nvcc=$(command -v nvcc)
# A wrapper on PATH hides where its toolkit is; ask it.
toolkit=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p' | head -1)
[ -n "$toolkit" ] && [ -x "$toolkit/nvcc" ] && nvcc=$toolkit/nvcc
# The matrices are small and the tests run side by side: threads of BLAS would only wait for each other.
test() { OPENBLAS_NUM_THREADS=1 python -m pytest -q -n "$jobs" --dist worksteal "$@"; }

rung "0 style and types" sh -c 'ruff check . && ruff format --check . && mypy --config-file mypy.ini prepack emulator gates device oracle tests'
rung "0 emulators built" python -m emulator.build
rung "1 layout and reference" test tests/test_layout.py tests/test_reference.py tests/test_fragments.py tests/test_plan.py
rung "1 triton oracle" test_oracle
rung "1 predicted grids" "$python" -m pytest -q tests/test_predicted_grids.py
rung "2 source emulator" test tests/test_source_emulator.py tests/test_clusters.py
rung "3 ptx emulator" test tests/test_ptx_memory.py tests/test_ptx_clusters.py tests/test_ptx_emulator.py
rung "4 planted bugs" test tests/test_planted_bugs.py
rung "5 plugin x86_64" build_plugin build/plugin -DQE_FUZZ=ON
rung "5 plugin aarch64" build_plugin build/plugin-aarch64 -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64.cmake" \
  -DQE_FATBIN_FOLDER="$PWD/build/plugin"
rung "6 static gates" test tests/test_gates.py
rung "6 library and fuzz" test tests/test_library.py
rung "7 engines" test tests/test_engine.py
rung "7 demo" build_demo
rung "7 demo engines" test tests/test_demo_engines.py
rung "7 device kit" "$python" -m pytest -q tests/test_device_kit.py
rung "7 onnx to ptx" test tests/test_chain.py tests/test_exported_layers.py
rung "7 onnx runtime" test tests/test_onnxruntime.py
rung "8 self-test emulated" test tests/test_self_test.py
rung "8 launcher on a stand-in driver" test tests/test_driver.py
echo "not run 8 on a GPU: see plugins/DEVICE.md"
exit $failed
