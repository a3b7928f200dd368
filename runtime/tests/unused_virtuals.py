"""Writes a C++ header of what a stand-in of TensorRT leaves out: every pure function of the headers' classes, aborting.

python unused_virtuals.py FOLDER_OF_NVINFER_H OUTPUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLASSES = (
    ("NvInferImpl.h", "VRuntime", "nvinfer1::apiv::VRuntime"),
    ("NvInferImpl.h", "VCudaEngine", "nvinfer1::apiv::VCudaEngine"),
    ("NvInferImpl.h", "VExecutionContext", "nvinfer1::apiv::VExecutionContext"),
    ("NvInferRuntimeCommon.h", "IPluginRegistry", "nvinfer1::IPluginRegistry"),
)
MACRO = re.compile(r"\bTRT_(DEPRECATED|NODISCARD)\b")


def pure_functions(header: str, name: str) -> list[tuple[str, str]]:
    """Names and declarations of a class's pure functions, without `virtual` and `= 0`."""
    text = re.sub(r"//[^\n]*", "", header)
    start = re.search(rf"class {name}\b[^;{{]*{{", text)
    if start is None:
        raise SystemExit(f"The headers have no class {name}.")
    body = text[start.end() : text.index("\n};", start.end())]
    found = []
    for declaration in re.findall(r"virtual\s([^;{}]*?)=\s*0\s*;", body):
        plain = " ".join(MACRO.sub("", declaration).split())
        plain = re.sub(r"\s=\s[^,)]+(?=[,)])", "", plain)  # a default of a parameter
        called = re.search(r"(\w+)\s*\(", plain)
        if called is not None:
            found.append((called[1], plain))
    return found


def main() -> None:
    folder, output = map(Path, sys.argv[1:])
    lines = ["#pragma once", "#include <NvInferRuntime.h>", "#include <cstdio>", "#include <cstdlib>", ""]
    lines.append("namespace standin {")
    lines.append("using namespace nvinfer1;")
    lines.append("[[noreturn]] inline void Left(const char* name) noexcept {")
    lines.append('  std::fprintf(stderr, "The stand-in has no %s.\\n", name);')
    lines += ["  std::abort();", "}"]
    for header, name, base in CLASSES:
        lines.append(f"struct Unused{name} : {base} {{")
        for called, plain in pure_functions((folder / header).read_text(), name):
            lines.append(f'  {plain} {{ Left("{name}::{called}"); }}')
        lines.append("};")
    output.write_text("\n".join([*lines, "}  // namespace standin", ""]))


if __name__ == "__main__":
    main()
