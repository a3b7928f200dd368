#!/usr/bin/env bash
# Builds libqe_edge and checks it: with AddressSanitizer and UndefinedBehaviorSanitizer against Python's answers, with
# ThreadSanitizer on two threads, installed and found by CMake and pkg-config, and for aarch64 where that compiler is.
# TensorRT's backend is checked on stand-ins of it and of CUDA's driver; its public headers come as a Python package.
#
#   runtime/check.sh FOLDER    FOLDER is the demo's output of `qe-edge export`
#
# Python has qe-edge[dev] installed. What is missing of Debian's packages is installed with apt-get.
set -euo pipefail
folder=$(realpath "${1:?Give the demo\'s ONNX folder.}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$PWD/runtime/build
python=$(command -v python)

install_packages() {
    local wanted=()
    for package in cmake ninja-build g++ pkg-config nlohmann-json3-dev libpcre2-dev libutf8proc-dev libstb-dev; do
        dpkg -s "$package" > /dev/null 2>&1 || wanted+=("$package")
    done
    [ ${#wanted[@]} = 0 ] && return 0
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${wanted[@]}" > /dev/null
}

fetch_headers() { # TensorRT's; without the package's dependencies, which are a deep-learning framework
    [ -e "$headers/NvInferRuntime.h" ] && return 0
    "$python" -m pip install --no-deps --target "$build/kernel_lens" kernel-lens==2.0.1
}

compile() { # compile NAME TARGET OPTIONS...
    local name=$1 target=$2
    shift 2
    cmake -S runtime -B "$build/$name" -G Ninja "$@" > /dev/null
    ninja -C "$build/$name" "$target" | grep -vE '^(\[|ninja: (Entering|no work))' || true
    ninja -C "$build/$name" "$target" > /dev/null
}

# The C++ of the page's block, built against an installation as a stranger would, has to give Python's answer.
snippet() {
    local prefix=$build/prefix work=$build/snippet
    rm -rf "$prefix" "$work"
    mkdir -p "$work"
    cmake --install "$build/release" --prefix "$prefix" > /dev/null
    awk '/^<!-- ci:cpp -->$/ {armed = 1; next} armed && /^```/ {if (inside) exit; inside = 1; next} inside' docs/cpp.md > "$work/main.cpp"
    cp examples/cpp/picture.h "$work"
    cat > "$work/CMakeLists.txt" << 'END'
cmake_minimum_required(VERSION 3.20)
project(hello LANGUAGES CXX)
find_package(qe_edge REQUIRED)
add_executable(hello main.cpp)
target_link_libraries(hello PRIVATE qe_edge::qe_edge)
END
    cmake -S "$work" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" > /dev/null
    ninja -C "$work/build" > /dev/null
    local picture=qe_edge/demo/data/images/evaluation/0002.png question="what shape is in the image?" found wanted
    found=$("$work/build/hello" "$folder" "$onnxruntime" "$picture" "$question")
    wanted=$("$python" -c 'import sys
from qe_edge.models.samples import Sample
from qe_edge.runtime.engine import VisionLanguageEngine
print(VisionLanguageEngine.load(sys.argv[1]).generate([Sample(sys.argv[2], sys.argv[3])])[0])' "$folder" "$picture" "$question")
    [ "$found" = "$wanted" ] || { echo "docs/cpp.md answers '$found', Python '$wanted'." >&2; return 1; }
    PKG_CONFIG_PATH=$prefix/lib/pkgconfig:$(echo "$prefix"/lib/*/pkgconfig) pkg-config --libs --cflags qe_edge > /dev/null
    cmake -S examples/cpp -B "$build/examples" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" > /dev/null
    ninja -C "$build/examples" > /dev/null
    local frames=$build/frames answers
    rm -rf "$frames" && mkdir "$frames" && cp qe_edge/demo/data/images/evaluation/000[1-5].png "$frames"
    answers=$("$build/examples/camera" "$folder" "$onnxruntime" "$frames" "$question" 0)
    [ "$(grep -c '\.png: .' <<< "$answers")" = 5 ] || { echo "The camera did not answer every frame: $answers" >&2; return 1; }
    answers=$(printf 'what color is it?\nand its shape?\n' | "$build/examples/chat" "$folder" "$onnxruntime" "$picture")
    [ "$(grep -c '^> .' <<< "$answers")" = 2 ] || { echo "The chat did not answer twice: $answers" >&2; return 1; }
}

# The seam to other programs: the functions of the header and no other symbol.
symbols() {
    local found declared
    found=$(nm -D --defined-only "$build/release/libqe_edge.so" | awk '{print $3}' | grep -v '^_' | sort)
    declared=$(grep -oE '\bqe_[a-z_]+\(' runtime/include/qe_edge/qe_edge.h | tr -d '(' | sort -u)
    diff <(echo "$found") <(echo "$declared")
}

install_packages
headers=$build/kernel_lens/kernel_lens/include/tensorrt
fetch_headers
onnxruntime=$("$python" -c 'import pathlib, onnxruntime; print(*(pathlib.Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))')
debug=(-DQE_EDGE_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1")
compile asan all "${debug[@]}" -DQE_EDGE_SANITIZE=address,undefined -DQE_EDGE_TENSORRT="$headers"
(cd runtime && OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 --dist loadfile tests "--build=$build/asan" "--folder=$folder")
"$build/asan/tests/fuzz" "$folder" 4000 1
compile tsan tests/threads "${debug[@]}" -DQE_EDGE_SANITIZE=thread
TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/runtime/tests/tsan.txt" "$build/tsan/tests/threads" "$folder" "$onnxruntime"
compile release all
symbols
snippet
if [ -e /usr/lib/aarch64-linux-gnu/libpcre2-8.so ] && command -v aarch64-linux-gnu-g++ > /dev/null; then
    compile aarch64 all -DCMAKE_TOOLCHAIN_FILE="$PWD/runtime/cmake/aarch64.cmake" -DQE_EDGE_TESTS=ON \
        -DQE_EDGE_TENSORRT="$headers" -DQE_EDGE_TENSORRT_RTX="$headers" # of RTX there are none in a package
    echo "Cross-built for aarch64; it has run on no such machine."
else
    echo "Not cross-built: g++-aarch64-linux-gnu, libpcre2-dev:arm64 or libutf8proc-dev:arm64 is not installed."
fi
