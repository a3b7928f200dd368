"""Quantize the demo, export it to ONNX, and ask the exported model a question.

    python examples/04_export_and_run.py

Everything is written below a temporary folder. `out/demo` of the quickstart holds the same kinds of folders.
"""

import tempfile
from pathlib import Path

import qe_edge
from qe_edge.calibration.sources import load_evaluation
from qe_edge.export.exporter import export_model
from qe_edge.models.quantized import save_quantized
from qe_edge.runtime.engine import VisionLanguageEngine


def main() -> None:
    """Print questions, the engine's answers and the right ones."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint, onnx = Path(name, "checkpoint"), Path(name, "onnx")
        loaded, recipe = qe_edge.quantize("demo", qe_edge.make_recipe(method="gptq", calibration={"samples": 16}))
        save_quantized(loaded, recipe, checkpoint)
        export_model(checkpoint, onnx)
        print("The export holds", ", ".join(sorted(path.name for path in onnx.glob("*.onnx"))))

        engine = VisionLanguageEngine.load(onnx)
        questions = load_evaluation("demo")[:4]
        for question, answer in zip(questions, engine.generate(questions), strict=True):
            print(f"{question.question} {answer} (right: {question.answer})")


if __name__ == "__main__":
    main()
