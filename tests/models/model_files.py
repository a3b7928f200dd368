"""Small models of every family without their weights, for tests that change one file of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from qe_edge.models.family import Sample
from qe_edge.quantization.plan import Plan, make_plan
from qe_edge.recipes.recipe import make_recipe

Edit = Callable[[dict[str, Any]], object]

PICTURE = Image.new("RGB", (70, 50), (200, 10, 10))
SAMPLES = {
    "qwen2_vl": Sample(PICTURE, "what?", "yes"),
    "internvl": Sample(PICTURE, "what?", "yes"),
    "llama": Sample(None, "hello there", "yes"),
    "dinov2": Sample(PICTURE, ""),
}


def copy_files(source: Path, folder: Path) -> Path:
    """A folder of its own with everything but weights."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def edit(path: Path, change: Edit) -> None:
    """Change the table in a JSON file."""
    table = json.loads(path.read_text(encoding="utf-8"))
    change(table)
    path.write_text(json.dumps(table), encoding="utf-8")


def plan(folder: Path, family: str) -> Plan:
    """What a dry run does: configuration, tokenizer, image processor, shapes, one sample."""
    module = "visual" if family == "dinov2" else "language"
    return make_plan(str(folder), make_recipe(method="rtn", modules=(module,)), [SAMPLES[family]])
