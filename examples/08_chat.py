"""Talk about a picture: several turns on one cache, piece by piece, and with tokens drawn at random.

    python examples/08_chat.py
    python examples/08_chat.py out/demo/engines/cpu

Without a folder, the unquantized demo is exported first.
"""

import sys
import tempfile
from pathlib import Path

import qe_edge
from qe_edge.calibration.sources import load_evaluation
from qe_edge.export.exporter import export_model
from qe_edge.models.loading import load_model


def main(folder: Path) -> None:
    """Ask twice about one picture, then once about two."""
    pipeline = qe_edge.Pipeline.from_dir(folder, max_context=512)
    first, second = load_evaluation("demo")[3:5]
    with pipeline.conversation() as chat:
        for question, picture in (("what shape is in the image?", first.image), ("what color is it?", None)):
            print(question, end=" ")
            for piece in chat(question, picture, stream=True, max_new_tokens=32):
                print(piece.text, end="", flush=True)
                if piece.timings is not None:
                    print(f"  ({piece.timings.reused_tokens} of {piece.timings.prompt_tokens} tokens were known)")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": first.image},
                {"type": "image", "image": second.image},
                {"type": "text", "text": "what color is the shape?"},
            ],
        }
    ]
    for seed in (1, 2):
        answer = pipeline(messages, temperature=1.0, top_p=0.9, seed=seed, stop="\n", max_new_tokens=32)
        print(f"seed {seed}: {answer.text} ({answer.finish_reason}, {answer.timings.first_token * 1000:.0f} ms)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            export_model(load_model("demo"), Path(temporary, "onnx"))
            main(Path(temporary, "onnx"))
