"""Print an answer word by word, while it is made: the steps that `VisionLanguageEngine.generate` consists of.

    python examples/05_stream_an_answer.py
    python examples/05_stream_an_answer.py out/demo/engines/cpu

Without a folder, the unquantized demo is exported first.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qe_edge.calibration.sources import load_evaluation
from qe_edge.export.exporter import export_model
from qe_edge.models import Sample
from qe_edge.models.loading import load_model
from qe_edge.runtime.engine import VisionLanguageEngine


def stream(engine: VisionLanguageEngine, question: Sample, most: int = 64) -> Iterator[str]:
    """The parts of an answer, each as soon as its token is known."""
    encoded = engine.encode([question])
    engine.check_length(encoded, most)
    logits, state = engine.prefill(encoded, engine.features(encoded), most)
    tokens: list[int] = []
    text = ""
    for _ in range(most):
        token = engine.next_tokens(logits, state)
        if token[0] in engine.manifest.eos_token_ids:
            return
        tokens.append(int(token[0]))
        longer = engine.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        yield longer[len(text) :]
        text = longer
        logits = engine.decode(state, token)


def main(folder: Path) -> None:
    """Answer three questions."""
    engine = VisionLanguageEngine.load(folder)
    for question in load_evaluation("demo")[:3]:
        print(question.question, end=" ", flush=True)
        for part in stream(engine, question):
            print(part, end="", flush=True)
        print()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            export_model(load_model("demo"), Path(temporary, "onnx"))
            main(Path(temporary, "onnx"))
