"""Opens every model of a folder with an operator library: `python -m tests.onnxruntime_child LIBRARY FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def outcome(library: str, model: Path) -> str:
    """What ONNX Runtime says, or "ran"."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for tokens in (1, 5, 40):
            session.run(None, {"h0": np.ones((1, tokens, 256), np.float16)})
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's have no base of their own
        return " ".join(str(error).split())
    return "ran"


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[2]).glob("*.onnx")):
        sys.stdout.write(f"{path.stem}: {outcome(sys.argv[1], path)}\n")
