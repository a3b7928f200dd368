"""A real but small vision-language model: the demo cut to one vision block and two decoder layers."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file, save_file

from qe_edge.demo import model_path

VISION_BLOCKS, DECODER_LAYERS = 1, 2


def write_small_vlm(folder: Path) -> Path:
    """Write the cut model with tokenizer and processor to `folder`."""
    shutil.copytree(model_path(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["depth"] = VISION_BLOCKS
    text = config["text_config"]
    text["num_hidden_layers"] = DECODER_LAYERS
    text["layer_types"] = text["layer_types"][:DECODER_LAYERS]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not _cut(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _cut(name: str) -> bool:
    """Whether a tensor belongs to a block that is left out ("visual.blocks.2.…", "model.layers.3.…")."""
    limits = {"blocks": VISION_BLOCKS, "layers": DECODER_LAYERS}
    parts = name.split(".")
    return any(part in limits and int(number) >= limits[part] for part, number in pairwise(parts))
