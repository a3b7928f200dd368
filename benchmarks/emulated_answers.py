"""Answers of the target `cuda` without a GPU, beside those of the target `cpu`.

ONNX Runtime's CPU provider runs the built graphs. `libqe_ort.so` is compiled for that provider, and its kernels run on
the plugin's source emulator. So everything but the CUDA provider's own kernels is what a GPU would run.

    python benchmarks/emulated_answers.py out/demo/onnx out/demo/engines/cuda --questions 200

The emulator takes about 5 s for a question of the demo. Needs g++, and what `plugins/ladder.sh` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qe_edge.calibration.sources import load_evaluation
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.ort_cuda_session import OrtDevice, OrtDeviceSession

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
COMPILE = """
import sys
from pathlib import Path
from tests.test_onnxruntime import compile_for_cpu, source_emulator
compile_for_cpu(Path(sys.argv[1]), f'-DQE_EMULATOR="{source_emulator()}"')
"""


def emulated(onnx: Path, engines: Path, operator: Path) -> VisionLanguageEngine:
    """The engines of the target `cuda` on the CPU provider, with everything else of the ONNX folder."""
    device = OrtDevice(operator, "CPUExecutionProvider", "cpu", {})
    engine, manifest = VisionLanguageEngine.load(onnx, threads=1), read_manifest(engines)
    sessions = {name: OrtDeviceSession(engines, entry, device) for name, entry in manifest.graphs.items()}
    return VisionLanguageEngine(manifest, engine.family, engine.processor, engine._embedding, sessions)


def main() -> None:
    """Print how many answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path, help="folder of 'qe-edge export'")
    parser.add_argument("engines", type=Path, help="folder of 'qe-edge build --target cuda --plugin'")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(PLUGINS)}
        subprocess.run([sys.executable, "-c", COMPILE, folder], cwd=PLUGINS, env=environment, check=True)
        engine = emulated(options.onnx, options.engines, Path(folder) / "libqe_ort.so")
        expected = VisionLanguageEngine.load(options.onnx, threads=1)
        samples = load_evaluation("demo")[: options.questions]
        equal = 0
        for number, sample in enumerate(samples, 1):
            answers = [each.generate([sample], 4) for each in (engine, expected)]
            equal += answers[0] == answers[1]
            if answers[0] != answers[1]:
                print(f"question {number}: {answers[0]} on the emulator, {answers[1]} on the CPU")
            if number % 20 == 0:
                print(f"{equal} of {number} answers are equal", flush=True)
    print(json.dumps({"questions": len(samples), "equal": equal}))


if __name__ == "__main__":
    main()
