"""Move channel scales, and the last matrix of a rotation, to places that every runtime has.

A layer computes `W_q (x * inv_omega)`. Other formats have no `inv_omega`. Four things take its place:

- a factor of 0 drops the channel: its codes become the zero point, which decodes to 0;
- the factors of layers that read an RMSNorm go into its gains, if all its readers have the same;
- the factors of an attention output projection go into the rows of `v_proj`, if heads that share values agree;
- the factors of a gated MLP's last layer go into the rows of `up_proj`.

A correction that read the unscaled input has its down factor divided by them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qe_edge.formats.source import CheckpointSource
from qe_edge.models.family import Block
from qe_edge.models.rotation import PARTS, READERS, check_norm
from qe_edge.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX = ".mixing.weight"  # ending of its name


class Mixing(NamedTuple):
    """A matrix between the last norm and a head, which a rotation left there.

    Attributes:
        matrix: Its name in the checkpoint.
        norm: Name of the norm's gains in the checkpoint.
        norm_after: Their name in transformers' own model.
        head: Name of the head.
    """

    matrix: str
    norm: str
    norm_after: str
    head: str


@dataclass
class Folding:
    """New places of the channel scales of a checkpoint.

    Attributes:
        dropped: Channels that the main branch of a layer drops, `[in]` bool, by layer.
        inputs: Factors that the layer or norm before has already put on a layer's input, `[in]` float32, by layer.
        rows: Factors of a layer's outputs, `[out]` float32, by layer.
        norms: Factors of a norm's gains, `[hidden]` float32, by the name of the gains.
        stuck: Layers whose scales have no place.
        mixing: The matrix before the head, which becomes a part of it; None without one.
    """

    dropped: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)
    mixing: Mixing | None = None


def fold(source: CheckpointSource, model: PreTrainedModel, *, rows: bool = True) -> Folding:
    """Find a place for the channel scales of every layer; reads the scales and the gains of norms only.

    Args:
        source: The checkpoint.
        model: Its model, on the meta device.
        rows: Whether rows of earlier layers may take some; the scales of these layers become float32.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> from qe_edge.models.loading import shapes_only  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     folding = fold(source, shapes_only(source.family))
        ...     print(len(folding.norms), folding.stuck)
    """
    folding = Folding(mixing=_mixing(source, model))
    scales: dict[str, Tensor] = {}
    for name, geometry in source.layers.items():
        if "inv_omega" not in geometry.tensors:
            continue
        inverse = source.tensor(f"{name}.inv_omega").float()
        zero = inverse == 0
        if bool(zero.any()):
            folding.dropped[name] = zero
        inverse[zero] = 1.0
        if not bool((inverse == 1).all()):
            scales[name] = inverse
    if scales:
        for block in filter(_is_decoder, source.family.blocks(model)):
            _into_norms(source, block, scales, folding)
            if rows:
                _into_values(source, block, scales, folding)
                _into_up(source, block, scales, folding)
    folding.stuck = sorted(scales)
    return folding


def _mixing(source: CheckpointSource, model: PreTrainedModel) -> Mixing | None:
    matrix = next((name for name in source.plain if name.endswith(MATRIX)), None)
    if matrix is None:
        return None
    norm, head = matrix.removesuffix(MATRIX), model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    return Mixing(matrix, f"{norm}.norm.weight", f"{norm}.weight", name)


def _is_decoder(block: Block) -> bool:
    """Whether a block is RMSNorm, attention, RMSNorm and gated MLP, as Llama's and Qwen's are."""
    module = block.module
    if {name for name, _ in module.named_children()} != PARTS:
        return False
    found = _linears(module.get_submodule("self_attn")), _linears(module.get_submodule("mlp"))
    return found == ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"})


def _linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _into_norms(source: CheckpointSource, block: Block, scales: dict[str, Tensor], folding: Folding) -> None:
    for norm, (parent, *names) in READERS.items():
        readers = [f"{block.name}.{parent}.{name}" for name in names]
        first = scales.get(readers[0])
        if first is None or not all(name in scales and torch.equal(scales[name], first) for name in readers):
            continue
        gains = f"{block.name}.{norm}.weight"
        if _is_rms_norm(block.module.get_submodule(norm), source.tensor(gains)):
            folding.norms[gains] = first
            folding.inputs |= {name: scales.pop(name) for name in readers}


def _into_values(source: CheckpointSource, block: Block, scales: dict[str, Tensor], folding: Folding) -> None:
    name, values = (f"{block.name}.self_attn.{leaf}" for leaf in ("o_proj", "v_proj"))
    normed = hasattr(block.module.get_submodule("self_attn"), "v_norm")  # which would take a scale away again
    if name not in scales or values not in source.layers or normed:
        return
    rows = source.layers[values].out_features
    config = source.family.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = scales[name].reshape(rows // width, -1, width)  # query heads that share values lie side by side
    if torch.equal(heads, heads[:, :1].expand_as(heads)):
        folding.rows[values] = heads[:, 0].reshape(-1)
        folding.inputs[name] = scales.pop(name)


def _into_up(source: CheckpointSource, block: Block, scales: dict[str, Tensor], folding: Folding) -> None:
    name, up = (f"{block.name}.mlp.{leaf}" for leaf in ("down_proj", "up_proj"))
    if name in scales and up in source.layers:
        folding.rows[up] = scales[name]
        folding.inputs[name] = scales.pop(name)


def _is_rms_norm(module: nn.Module, gains: Tensor) -> bool:
    """Whether a norm of the meta device multiplies by its gains, as they are, after dividing by the RMS."""
    norm = copy.deepcopy(module).to_empty(device="cpu")
    norm.get_parameter("weight").data = gains
    try:
        check_norm("the norm", norm)
    except ModelError:
        return False
    return True
