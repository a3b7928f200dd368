"""Common parts of the formats that are folders of transformers: config.json, safetensors, tokenizer, and a LoRA."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_edge.checkpoint.known_files import model_files
from qe_edge.checkpoint.safetensors_write import write_tensors
from qe_edge.formats.adapter import ADAPTER, adapter_config, adapter_pieces
from qe_edge.formats.base import Conversion, Format
from qe_edge.formats.carried import CarriedLayer, Piece, piece
from qe_edge.formats.plain import SECTION, config_of, plain_pieces
from qe_edge.models.quantized import WEIGHTS
from qe_edge.system.progress import Progress, track

CONFIG = "config.json"


class TransformersFolder(Format):
    """A format with a section of config.json and tensors of its own for every quantized layer.

    Example:
        >>> from qe_edge.formats import FORMATS
        >>> issubclass(FORMATS["gptq"], TransformersFolder)
        True
    """

    @abstractmethod
    def layer_pieces(self, layer: CarriedLayer) -> dict[str, Piece]:
        """The tensors of one layer's codes by their names in the file, without the bias."""

    @abstractmethod
    def quantization_config(self, conversion: Conversion) -> dict[str, Any]:
        """The section of config.json."""

    def pieces(self, conversion: Conversion) -> dict[str, Piece]:
        """All tensors of the model's file."""
        found = plain_pieces(conversion)
        for layer in conversion.layers.values():
            found |= _decoded(layer, conversion.dtype) if layer.decoded else self.layer_pieces(layer)
            found |= layer.bias_piece()
        return found

    def write(self, conversion: Conversion, folder: Path, name: str, progress: Progress) -> None:
        """Write config.json, the weights, tokenizer and processor, and the LoRA where there is a correction."""
        source = conversion.source
        for file in model_files(source.folder):
            if file not in (CONFIG, WEIGHTS):
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.folder / file, folder / file)
        config = config_of(conversion)
        if conversion.coded:
            config[SECTION] = self.quantization_config(conversion)
        _write_json(folder / CONFIG, config)
        model, adapter = self.pieces(conversion), adapter_pieces(conversion)
        total = sum(one.like.nbytes for one in (*model.values(), *adapter.values()))
        with track(progress, "Converting", float(total)) as tracked:
            _write_pieces(model, folder / WEIGHTS, tracked)
            if adapter:
                (folder / ADAPTER).mkdir()
                _write_json(folder / ADAPTER / "adapter_config.json", adapter_config(conversion, name))
                _write_pieces(adapter, folder / ADAPTER / "adapter_model.safetensors", tracked)

    def notes(self, conversion: Conversion) -> list[str]:
        """What reading the scales in the model's type does."""
        if conversion.dtype != torch.bfloat16 or not conversion.coded:
            return []
        return ["The model is bfloat16: a runtime that reads scales as bfloat16 rounds them from 11 bits to 8."]

    def how_to_load(self, conversion: Conversion, name: str) -> str:
        """With transformers, and PEFT."""
        kind = conversion.source.family.auto_class
        lines = [f"from transformers import {kind}", f'model = {kind}.from_pretrained("{name}")']
        if conversion.corrected:
            lines = ["from peft import PeftModel", *lines]
            lines.append(f'model = PeftModel.from_pretrained(model, "{name}/{ADAPTER}")')
        return "\n".join(lines)


def _decoded(layer: CarriedLayer, dtype: torch.dtype) -> dict[str, Piece]:
    shape = layer.geometry.out_features, layer.geometry.in_features
    return {f"{layer.name}.weight": piece(shape, dtype, lambda: layer.weight().to(dtype))}


def _write_pieces(pieces: Mapping[str, Piece], path: Path, progress: Progress) -> None:
    """Write tensors to a safetensors file, one at a time."""

    def make(name: str, like: Tensor) -> Tensor:
        made = pieces[name].make()
        if (made.dtype, made.shape) != (like.dtype, like.shape):
            raise ValueError(f"{name} is {made.dtype}{list(made.shape)}, and was to be {like.dtype}{list(like.shape)}")
        progress.advance(float(made.nbytes), name)
        return made

    write_tensors({name: one.like for name, one in pieces.items()}, path, make, metadata={"format": "pt"})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
