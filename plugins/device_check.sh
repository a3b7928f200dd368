#!/bin/bash
# Check the plugin on a machine with an NVIDIA GPU (a Jetson or an RTX card). Not yet run on hardware.
#
#   plugins/device_check.sh OUT_FOLDER
#
# Builds what is missing, runs every mode against the float64 reference, times the linears of two models, and repeats
# the numerics under compute-sanitizer when it is installed. OUT_FOLDER/device.json is what to send back.
set -eu
[ $# = 1 ] || { echo "Usage: plugins/device_check.sh OUT_FOLDER" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
command -v nvcc > /dev/null || { echo "nvcc is not on PATH. Install the CUDA toolkit, or add its bin folder." >&2; exit 1; }
python=build/device/bin/python
[ -x $python ] || { python3 -m venv --system-site-packages build/device; $python -m pip install numpy onnx; }
if [ ! -f build/plugin/cuda13.fatbin ]; then
  $python -m pip install --no-deps kernel-lens==2.0.1
  headers=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kernel_lens/include/tensorrt
  major=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
  # Under CUDA 12 the toolkit's own ptxas makes the payload that its driver loads.
  cuda12=()
  [ "$major" = 12 ] && cuda12=(-DQE_PTXAS12="$(command -v ptxas)" "-DQE_CHIPS=80;86;87;89;90")
  cmake -S . -B build/plugin -DQE_TENSORRT_INCLUDE="$headers" "${cuda12[@]}"
  cmake --build build/plugin
fi
$python -m device.check "$out/device.json"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 --log-file "$out/$tool.log" \
      $python -m device.check "$out/$tool.json" --quick && echo "$tool: clean" || echo "$tool: see $out/$tool.log"
  done
else
  echo "compute-sanitizer is not installed: skipped, and not part of what this run shows."
fi
