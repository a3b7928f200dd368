#!/bin/bash
# Check and time the plugin's kernels on a machine with an NVIDIA GPU. DEVICE.md says where it has run.
#
#   plugins/device_check.sh OUT_FOLDER [--seconds S] [--sanitize] [--commit TEXT] [--python PYTHON]
#
# Builds the kernels for this GPU where no build is there, compares every mode with the float64 reference, and times the
# linears of two models and what else can run them. OUT_FOLDER/device.json is what to send back. --sanitize repeats the
# small results under compute-sanitizer, which takes minutes. PYTHON is the one that has the peers, such as torch.
set -eu
usage() { echo "Usage: plugins/device_check.sh OUT_FOLDER [--seconds S] [--sanitize] [--commit TEXT] [--python PYTHON]" >&2; exit 2; }
out= python=python3 sanitize=0 options=()
while [ $# -gt 0 ]; do
  case $1 in
    --sanitize) sanitize=1; shift ;;
    --python) [ $# -gt 1 ] || usage; python=$2; shift 2 ;;
    --seconds | --commit) [ $# -gt 1 ] || usage; options+=("$1" "$2"); shift 2 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1; shift ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out"
out=$(cd "$out" && pwd)
found=$(command -v "$python") || { echo "There is no Python '$python'. Give one with --python." >&2; exit 1; }
python=$(cd "$(dirname "$found")" && pwd)/$(basename "$found")
cd "$(dirname "$0")"
if ! "$python" -c 'import numpy' 2> /dev/null; then
  [ -x build/device/bin/python ] || "$python" -m venv --system-site-packages build/device
  python=build/device/bin/python
  "$python" -m pip install numpy
fi
# What the plugin's build made, or what somebody carried here from another machine, is taken as it is.
has_fatbin() { [ -s "$1/cuda13.fatbin" ] || [ -s "$1/cuda12.fatbin" ]; }
if ! has_fatbin build/plugin && { [ -f build/payload/CMakeCache.txt ] || ! has_fatbin build/payload; }; then
  command -v nvcc > /dev/null || { echo "nvcc is not on PATH. Install the CUDA toolkit, or add its bin folder." >&2; exit 1; }
  chip=$("$python" -m device.chip)
  # Under CUDA 12 the toolkit's own ptxas makes the payload that its driver loads.
  cuda12=()
  nvcc --version | grep -q 'release 12' && cuda12=(-DQE_PTXAS12="$(command -v ptxas)")
  cmake -S . -B build/payload -DQE_PAYLOAD_ONLY=ON "-DQE_CHIPS=$chip" "-DQE_CHIPS12=$chip" "${cuda12[@]}"
  cmake --build build/payload
fi
code=0
"$python" -m device.check "$out/device.json" "${options[@]}" || code=$?
if [ $sanitize = 1 ]; then
  command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed. Install the CUDA toolkit." >&2; exit 1; }
  for tool in memcheck racecheck initcheck synccheck; do
    if compute-sanitizer --tool $tool --error-exitcode 1 --log-file "$out/$tool.log" \
      "$python" -m device.check "$out/$tool.json" --quick > "$out/$tool.txt"; then
      echo "$tool: clean"
    else
      code=1
      echo "$tool: see $out/$tool.log and $out/$tool.txt"
    fi
  done
fi
exit $code
