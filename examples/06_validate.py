"""Validate an exported model against its original, and read the report.

    python examples/06_validate.py

It asks 20 questions. `qe-edge validate` does the same from the command line.
"""

import tempfile
from pathlib import Path

import qe_edge
from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.models.quantized import save_quantized
from qe_edge.report.page import write_report
from qe_edge.validate.run import validate


def main() -> None:
    """Print the most important lines of the report."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        loaded, recipe = qe_edge.quantize("demo", qe_edge.make_recipe(method="gptq", calibration={"samples": 16}))
        save_quantized(loaded, recipe, root / "checkpoint")
        export_model(root / "checkpoint", root / "onnx")
        engines = build_engines(root / "onnx", root / "engines", "cpu")

        report = validate("demo", root / "checkpoint", engines, "demo", onnx=root / "onnx", limit=20)
        write_report(report, root / "report.json", root / "report.html")
        for contender in report.contenders:
            right = sum(contender.accuracy.correct.values())
            tokens = contender.answer_tokens
            print(f"{contender.role:9} {right} of 20 right, KL {tokens.kl if tokens else 0:.1e}, {contender.runtime}")
        if report.engine is not None:
            print(f"The engine gives the same answer as PyTorch to {report.engine.same_answers:.0%} of the questions.")
        print(f"The page for reading has {(root / 'report.html').stat().st_size // 1000} kB.")


if __name__ == "__main__":
    main()
