"""The interface of a format of another runtime: which checkpoints it can hold, and how it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from qe_edge.formats.carried import CarriedLayer
from qe_edge.formats.folding import Folding
from qe_edge.formats.source import CheckpointSource
from qe_edge.system.progress import Progress

Reason = tuple[str, str]  # the part that has no place in the format, and the remedy


@dataclass(frozen=True)
class Conversion:
    """A checkpoint on its way into another format.

    Attributes:
        source: The checkpoint.
        folding: New places of its channel scales.
        layers: Its quantized layers as they are carried.
    """

    source: CheckpointSource
    folding: Folding
    layers: dict[str, CarriedLayer]

    @property
    def coded(self) -> dict[str, CarriedLayer]:
        """Layers that are written as codes."""
        return {name: layer for name, layer in self.layers.items() if not layer.decoded}

    @property
    def decoded(self) -> dict[str, CarriedLayer]:
        """Layers that are written as ordinary weights."""
        return {name: layer for name, layer in self.layers.items() if layer.decoded}

    @property
    def corrected(self) -> dict[str, CarriedLayer]:
        """Layers with a low-rank correction."""
        return {name: layer for name, layer in self.layers.items() if layer.rank}

    @property
    def plain_linears(self) -> list[str]:
        """Names of linear layers that are not quantized."""
        mixing = self.folding.mixing
        matrix = None if mixing is None else mixing.matrix.removesuffix(".weight")
        return [name for name in self.source.unquantized if name != matrix]

    @property
    def dtype(self) -> torch.dtype:
        """The type of most numbers outside the quantized layers."""
        sizes: dict[torch.dtype, int] = {}
        for like in self.source.plain.values():
            if like.is_floating_point():
                sizes[like.dtype] = sizes.get(like.dtype, 0) + like.numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


class Format(ABC):
    """A format of another runtime.

    Class attributes:
        reader: The programs that read it, in a few words.
        adapter: Place of the correction inside the folder.
        folds_rows: Whether its scales may be float32; channel scales of a later layer that are folded in need that.

    Example:
        >>> from qe_edge.formats import FORMATS
        >>> FORMATS["gptq"].reader
        'vLLM, GPTQModel, and transformers with the packages gptqmodel and optimum'
    """

    reader: ClassVar[str]
    adapter: ClassVar[str] = "adapter"
    folds_rows: ClassVar[bool] = True

    def check(self, conversion: Conversion) -> list[Reason]:  # noqa: ARG002 - most formats take any model
        """Return the parts of a whole model that have no place in the format, empty if all have. No weight is read.

        Args:
            conversion: The checkpoint.
        """
        return []

    def layer_problem(self, layer: CarriedLayer) -> str | None:  # noqa: ARG002 - likewise
        """Return why the format cannot hold a layer's codes, without the layer's name; None if it can."""
        return None

    def prepared(self, conversion: Conversion) -> Conversion:
        """Return the conversion with its layers on the grids that the format writes."""
        return conversion

    @abstractmethod
    def write(self, conversion: Conversion, folder: Path, name: str, progress: Progress) -> None:
        """Write the model.

        Args:
            conversion: The checkpoint, checked.
            folder: An empty folder, which is renamed when everything is written.
            name: Its later name.
            progress: Where to report progress.
        """

    @abstractmethod
    def how_to_load(self, conversion: Conversion, name: str) -> str:
        """Return the lines of code that load the folder of this name, for its README."""

    def notes(self, conversion: Conversion) -> list[str]:  # noqa: ARG002 - most have none
        """Return notes for a user of this format and this checkpoint, a sentence each."""
        return []
