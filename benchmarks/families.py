"""The model zoo: every family in W4A16, its exported graphs in ONNX Runtime against transformers' own class.

    python benchmarks/families.py [--families qwen2_vl llama ...] [--results out/families.json]

Every model is transformers' own class with small random weights, the one of the family's tests. It is quantized (round
to nearest, W4A16, all parts), written, read, exported and run. `error` is the largest difference of a logit over all
valid tokens of all cases, relative to the largest logit; of an encoder, of a feature. `tokens` says in how many cases
the greedy answers are the same. The cases are those of `tests/models/conversations.py`: a square, a panorama, odd
sizes, two pictures, a picture last, several turns, a padded batch, text only, a long question. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models import FAMILIES, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import MODULES, make_recipe
from qe_edge.runtime.actions import ActionEngine, noise_of
from qe_edge.runtime.encoder import EncoderEngine
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.validate.actions import TorchActor
from qe_edge.validate.features import extract_features
from tests.models import (
    pi0_models,
    test_decoders,
    test_gemma3,
    test_gemma4,
    test_idefics3,
    test_lfm2_vl,
    test_llava_onevision,
    test_minicpmv4_6,
    test_paligemma,
    test_phi4_multimodal,
    test_vision_encoders,
)
from tests.models.conftest import write_tiny_internvl
from tests.models.conversations import CASES, greedy, noise
from tests.models.families import GROUPS, TOKENS, Made, make, token_errors
from tests.models.qwen_models import write_qwen

Write = Callable[[Path], Path]
REAL = {  # trained weights that other scripts of ours measured; docs/results.md has the numbers
    "qwen2_vl": "the demo",
    "internvl": "SmolLM2-135M with DINOv2 ViT-S/14",
    "llama": "SmolLM2-135M",
    "dinov2": "DINOv2 ViT-S/14",
}
HEADER = (
    "| family | model | quantized layers: visual, merger, language, action | cases | error | same tokens | trained "
    "weights |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)
PROMPT_ALONE = ("paligemma", "paligemma 2")  # which know no conversation


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        family: Its `model_type`.
        model: Which architecture of the family.
        layers: Quantized linear layers: of the visual encoder, the merger, the language model; then perhaps of the
            action expert.
        cases: Number of cases.
        error: Largest relative error.
        same: Cases with the same greedy tokens; None of what writes no text.
        real: Trained weights that were measured too, or nothing.
    """

    family: str
    model: str
    layers: tuple[int, ...]
    cases: int
    error: float
    same: int | None
    real: str


def main() -> None:
    """Print a Markdown table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--results", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    print(HEADER)
    rows = []
    for family, measure in measurements():
        if family in arguments.families:
            with tempfile.TemporaryDirectory() as scratch:
                rows.append(measure(Path(scratch)))
            print(line(rows[-1]), flush=True)
    found = json.dumps([asdict(row) for row in rows])
    print(found)
    if arguments.results is not None:
        arguments.results.write_text(found + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """A line of the table."""
    layers = ", ".join(str(count) if count else "-" for count in row.layers)
    same = "-" if row.same is None else f"{row.same} of {row.cases}"
    return (
        f"| `{row.family}` | {row.model} | {layers} | {row.cases} | {row.error:.1e} | {same} | {row.real or 'none'} |"
    )


def measurements() -> list[tuple[str, Callable[[Path], Row]]]:
    """Family and what measures a model of it in a folder, in the order of the families."""
    found: list[tuple[str, Callable[[Path], Row]]] = [
        (family, partial(seeing_row, family, name, write)) for family, name, write in seeing_models()
    ]
    found += [
        (family, partial(text_row, family, name, changes)) for name, (family, changes) in test_decoders.MODELS.items()
    ]
    found += [(family, partial(encoder_row, family)) for family in test_vision_encoders.MODELS]
    found.append(("pi0", action_row))
    order = list(FAMILIES)
    return sorted(found, key=lambda one: order.index(one[0]))


def seeing_models() -> list[tuple[str, str, Write]]:
    """Family, name and what writes it into a folder, of every model that reads pictures and writes text."""
    return [
        *((name, name, partial(_qwen, name)) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl")),
        *(("internvl", f"internvl, {text} text", partial(_internvl, text)) for text in ("llama", "qwen2", "qwen3")),
        ("gemma3", "gemma3", test_gemma3.write),
        *(("gemma4", f"gemma 4 {kind}", partial(_gemma4, kind)) for kind in ("E2B", "31B")),
        *((name, name, partial(_idefics3, name)) for name in ("idefics3", "smolvlm")),
        ("lfm2_vl", "lfm2_vl", test_lfm2_vl.write),
        ("llava_onevision", "llava_onevision", test_llava_onevision.write),
        ("minicpmv4_6", "minicpmv4_6", test_minicpmv4_6.write),
        ("phi4_multimodal", "phi4_multimodal", test_phi4_multimodal.write),
        ("paligemma", PROMPT_ALONE[0], partial(_paligemma, "gemma")),
        ("paligemma", PROMPT_ALONE[1], partial(_paligemma, "gemma2")),
    ]


def seeing_row(family: str, name: str, write: Write, scratch: Path) -> Row:
    """A model that reads pictures and writes text."""
    modules = tuple(group for group in GROUPS if (family, group) != ("gemma3", "merger"))
    made = make(write(scratch / "model"), scratch, modules)
    cases = {key: samples for key, samples in CASES.items() if name not in PROMPT_ALONE or key != "several turns"}
    return _answered(family, name, made, cases)


def text_row(family: str, name: str, changes: dict[str, Any], scratch: Path) -> Row:
    """A language model alone."""
    folder = test_decoders.write(scratch / "model", family, **changes)
    texts, long = test_decoders.TEXTS, test_decoders.LONG
    loaded = _quantized(folder, ["language"], texts, scratch)
    build_engines(scratch / "onnx", scratch / "cpu", "cpu")
    engine, built = (VisionLanguageEngine.load(scratch / name, threads=1) for name in ("onnx", "cpu"))
    made = Made(loaded, engine, built, scratch / "checkpoint", scratch / "onnx")
    return _answered(family, name, made, {"one": texts[:1], "batch": texts, "long": long})


def encoder_row(family: str, scratch: Path) -> Row:
    """A vision encoder alone."""
    folder = test_vision_encoders.write(scratch / "model", family)
    pictures = [Sample(noise(width, 60), "") for width in (40, 64, 200)]
    loaded = _quantized(folder, ["visual"], pictures, scratch)
    engine = EncoderEngine.load(scratch / "onnx", threads=1)
    wanted, found = (extract_features(one, pictures).patches.numpy() for one in (loaded, engine))
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    layers = (len(quantized_linears(loaded.model)), 0, 0)
    return Row(family, family, layers, len(pictures), error, None, REAL.get(family, ""))


def action_row(scratch: Path) -> Row:
    """A model that makes actions; its error is that of the actions, relative to the largest number of one."""
    folder = pi0_models.write(scratch / "model")
    loaded = _quantized(folder, MODULES, pi0_models.CALIBRATION, scratch)
    engine, error = ActionEngine.load(scratch / "onnx", threads=1), 0.0
    for samples in pi0_models.CASES.values():
        encoded, noises = engine.encode(samples), noise_of(engine.chunk, range(len(samples)))
        wanted, found = (one.actions(encoded, noises) for one in (TorchActor(loaded), engine))
        error = max(error, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return Row("pi0", "pi0", _counts(loaded, (*GROUPS, "action")), len(pi0_models.CASES), error, None, "")


def _quantized(folder: Path, modules: Sequence[str], samples: list[Sample], scratch: Path) -> LoadedModel:
    """A model in W4A16, in float32, with its checkpoint and its graphs in `scratch`."""
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=tuple(modules))
    save_quantized(*quantize(str(folder), recipe, samples), scratch / "checkpoint")
    loaded = load_quantized(scratch / "checkpoint")
    loaded.model.float()
    export_model(scratch / "checkpoint", scratch / "onnx")
    return loaded


def _answered(family: str, name: str, made: Made, cases: dict[str, list[Sample]]) -> Row:
    error = max(float(token_errors(made, samples).max()) for samples in cases.values())
    same = sum(
        made.engine.generate_ids(made.engine.encode(samples), TOKENS) == greedy(made.loaded, samples, TOKENS)
        for samples in cases.values()
    )
    return Row(family, name, _counts(made.loaded, GROUPS), len(cases), error, same, REAL.get(family, ""))


def _counts(loaded: LoadedModel, groups: Sequence[str]) -> tuple[int, ...]:
    """Quantized layers of each group."""
    counts = dict.fromkeys(groups, 0)
    blocks = loaded.family.blocks(loaded.model)
    for layer in quantized_linears(loaded.model):
        counts[next(block.group for block in blocks if layer.startswith(f"{block.name}."))] += 1
    return tuple(counts.values())


def _qwen(model_type: str, folder: Path) -> Path:
    return write_qwen(folder, model_type)


def _internvl(text_model: str, folder: Path) -> Path:
    return write_tiny_internvl(folder, text_model, head_dim=32, max_position_embeddings=2048)


def _gemma4(kind: str, folder: Path) -> Path:
    return test_gemma4.write(folder, kind)


def _idefics3(model_type: str, folder: Path) -> Path:
    return test_idefics3.write(folder, model_type)


def _paligemma(text_model: str, folder: Path) -> Path:
    return test_paligemma.write(folder, text_model)


if __name__ == "__main__":
    main()
