"""Read a quantized checkpoint tensor by tensor, so that converting it takes the memory of one layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qe_edge.checkpoint.dtypes import torch_dtypes
from qe_edge.checkpoint.files import check_checkpoint
from qe_edge.checkpoint.layer_files import LayerGeometry, assemble_layers, check_layer, parse_geometry
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.layers.linear import QELinear
from qe_edge.models.configuration import load_family
from qe_edge.models.family import ModelFamily
from qe_edge.models.quantized import WEIGHTS, read_section
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

CODES, SCALES = "codes", "scales"  # of an embedding in INT8
Header = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class CheckpointSource:
    """An open checkpoint whose files have been checked against their hashes.

    Attributes:
        folder: Its folder.
        config: Its config.json.
        family: The family of its model.
        layers: Geometry of every quantized layer by name.
        plain: Shape and dtype of every other tensor by name, on the meta device.
        unquantized: Names of linear layers that are not quantized.
    """

    folder: Path
    config: dict[str, Any]
    family: ModelFamily
    layers: dict[str, LayerGeometry]
    plain: dict[str, Tensor]
    unquantized: list[str]
    _header: Header
    _file: Any

    @property
    def section(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        section: dict[str, Any] = self.config["quantization_config"]
        return section

    @property
    def tied(self) -> dict[str, str]:
        """The other tensor's name, by the name of each tensor that equals another one."""
        tied: dict[str, str] = self.section["tied"]
        return tied

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored, in memory of its own; a name that shares another's tensor gives that one."""
        table = name.removesuffix(".weight")
        if f"{table}.{CODES}" in self._header and name not in self._header:
            parts = (self._file.get_tensor(f"{table}.{part}") for part in (CODES, SCALES))
            return QuantizedEmbedding(*parts).decode()
        found: Tensor = self._file.get_tensor(self.section["shared"].get(name, name)).clone()
        return found

    def layer(self, name: str) -> QELinear:
        """One quantized layer.

        Raises:
            ArtifactError: If its numbers lead out of it.
        """
        shared = self.section["shared"]
        own = {f"{name}.{key}": shared.get(f"{name}.{key}", f"{name}.{key}") for key in self.layers[name].tensors}
        header = {full: self._header[stored] for full, stored in own.items()}
        tensors = {full: self._file.get_tensor(stored) for full, stored in own.items()}
        return assemble_layers({name: self.section["layers"][name]}, {}, header, tensors)[name]


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[CheckpointSource]:
    """Open a quantized checkpoint; every file is hashed once.

    Args:
        folder: Output of `qe-edge quantize`.

    Raises:
        ArtifactError: If it is none, is damaged, or of another version.

    Example:
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     name = next(iter(source.layers))
        ...     print(name, source.layer(name))
    """
    section = read_section(folder)
    check_checkpoint(folder)
    header = check_safetensors(folder / WEIGHTS)
    layers = {name: parse_geometry(name, values) for name, values in section["layers"].items()}
    inside = _check_layers(folder, layers, section["shared"], header)
    dtypes = torch_dtypes()
    plain = {
        name: torch.empty(shape, dtype=dtypes[dtype], device="meta")
        for name, (dtype, shape) in header.items()
        if name not in inside
    }
    for table in [name.removesuffix(f".{CODES}") for name in plain if name.endswith(f".{CODES}")]:
        codes, scales = plain.pop(f"{table}.{CODES}"), plain.pop(f"{table}.{SCALES}", None)
        if scales is None or codes.dtype != torch.int8 or codes.ndim != 2 or scales.shape != codes.shape[:1]:
            raise ArtifactError(f"The embedding '{table}' of '{folder}' is damaged.", "Quantize the model again.")
        plain[f"{table}.weight"] = torch.empty(codes.shape, dtype=scales.dtype, device="meta")
    family = load_family(str(folder), ArtifactError)
    family.config = copy.deepcopy(family.config)
    if hasattr(family.config, "quantization_config"):
        del family.config.quantization_config  # transformers would look for its own
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        yield CheckpointSource(
            folder,
            read_json_table(folder / "config.json"),
            family,
            layers,
            plain,
            _unquantized(folder, section),
            header,
            file,
        )


def _unquantized(folder: Path, section: dict[str, Any]) -> list[str]:
    """Names of the linear layers that are not quantized."""
    names = section.get("ignore", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(
            f"'ignore' in the quantization_config of '{folder}' is no list of names.", "Quantize the model again."
        )
    return names


def _check_layers(folder: Path, layers: dict[str, LayerGeometry], shared: dict[str, str], header: Header) -> set[str]:
    """Compare all layers with the file's header; returns the names of their tensors in the file."""
    inside: set[str] = set()
    for name, geometry in layers.items():
        own = {key: shared.get(f"{name}.{key}", f"{name}.{key}") for key in geometry.tensors}
        missing = next((stored for stored in own.values() if stored not in header), None)
        if missing is not None:
            raise ArtifactError(f"The checkpoint '{folder}' lacks '{missing}'.", "Quantize the model again.")
        check_layer(name, geometry, {key: header[stored] for key, stored in own.items()})
        inside.update(own.values())
    return inside
