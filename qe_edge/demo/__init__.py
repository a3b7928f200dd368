"""The demo: a small vision-language model and its questions, shipped inside the package so that they work offline.

The model is a Qwen2-VL of 5.3 M parameters trained on easy-VQA; the questions and pictures are drawn from easy-VQA by
`benchmarks/make_demo_data.py` (MIT licence, see `LICENSE-easy-vqa` beside this file).
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["calibration_path", "evaluation_path", "model_path"]


def model_path() -> Path:
    """Folder of the demo model: weights, configuration, tokenizer, image processor and chat template.

    Example:
        >>> (model_path() / "config.json").is_file()
        True
    """
    return _shipped("model")


def calibration_path() -> Path:
    """JSON lines of 64 training pictures with one question and answer each; pictures are named relative to the file.

    Example:
        >>> len(calibration_path().read_text().splitlines())
        64
    """
    return _shipped("data", "calibration.jsonl")


def evaluation_path() -> Path:
    """JSON lines of 200 held-out questions, 100 open and 100 yes/no, each on a test picture of its own.

    Example:
        >>> len(evaluation_path().read_text().splitlines())
        200
    """
    return _shipped("data", "evaluation.jsonl")


def _shipped(*parts: str) -> Path:
    return Path(str(files(__name__))).joinpath(*parts)
