"""Target: a quantized checkpoint, read by converting it into every format of other runtimes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qe_edge.formats import FORMATS
from qe_edge.formats.convert import convert_checkpoint
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from tests.fuzz.target import Target, check_finite, digest, unchanged

RECIPE: dict[str, Any] = {"method": "lqer", "scheme": "w4a16", "options": {"rank": 4}}


def _prepare(folder: Path, sound: Mapping[str, Path]) -> None:
    source = {"samples": 2, "source": str(sound["model-llama"] / "texts.jsonl")}
    recipe = make_recipe(**RECIPE, calibration=source)
    save_quantized(*quantize(str(sound["model-llama"] / "model"), recipe), folder / "checkpoint")


def _convert(folder: Path) -> str:
    """Into every format; found are the hashes of what they wrote."""
    written = []
    for name in FORMATS:
        out = folder / f"as-{name}"
        convert_checkpoint(folder / "checkpoint", name, out, decode=True)
        weights = (path for path in sorted(out.rglob("*")) if path.suffix in {".safetensors", ".gguf"})
        written += [path.read_bytes() for path in weights]
    return digest(*written)


def _convert_sealed(folder: Path) -> str:
    """What a stranger wrote must be finite numbers at least."""
    _convert(folder)
    for path in folder.glob("as-*/*.safetensors"):
        check_finite(load_file(path))
    return ""


def _copy(folder: Path, sound: Mapping[str, Path]) -> None:
    shutil.copytree(sound["formats"] / "checkpoint", folder / "checkpoint")


TARGETS = (
    Target("formats", _prepare, _convert, ("checkpoint/*",), after="model-llama", judge=unchanged),
    Target("formats-sealed", _copy, _convert_sealed, ("checkpoint/*",), after="formats", sealed="checkpoint"),
)
