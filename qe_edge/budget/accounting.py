"""Sizes of a quantized model: effective bits per weight with all tensors of a layer, and file sizes.

There are three numbers, each in bits per weight of the original matrix:

- stored bits: the tensors in the checkpoint: packed codes, outliers, scales, zero points, channel factors, changes of
  basis, adapters and router;
- adapter bits: the low-rank factors and the router alone, a part of the stored bits;
- read bits: the tensors that one decoded token reads: codes, scales, router, the shared expert and one routed expert.
  A runtime that evaluates all experts and masks them, as the exported ONNX function does, reads the stored bits.

A tensor that siblings share (one down factor and one router for q, k and v) is counted once: each sibling bears a part
in proportion to its output channels. A bias is not counted, since the original has it too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, computed_field

from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qe_edge.layers import linear
    from qe_edge.layers.linear import QELinear
    from qe_edge.models import rotation
else:  # reports count bits that were counted, without torch
    linear = lazy_module("qe_edge.layers.linear")
    rotation = lazy_module("qe_edge.models.rotation")

Count = Annotated[int, Field(ge=0, le=2**62)]
Amount = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
PARTS = {
    "codes": ("qweight", "fine_codes", "outlier_starts", "outlier_columns", "outlier_values"),
    "scales": (
        "scales", "zeros", "inv_omega", "fine_scale", "order",
        "in_signs", "in_left", "in_right", "out_signs", "out_left", "out_right", "image_inverse",
    ),
    "adapters": ("down", "up", "down_scale", "up_scale", "image_down", "image_up"),
    "router": ("router", "image_router"),
}  # fmt: skip


# mypy cannot see through decorators on properties (prop-decorator); pydantic asks to ignore that below.
class BitCount(BaseModel):
    """Bits of one layer or of several together.

    Attributes:
        weights: Number of weights of the original matrices.
        codes: Bits of the codes as stored, packed.
        scales: Bits of scales, zero points and channel factors.
        adapters: Bits of the low-rank factors and their scales, all experts.
        router: Bits of the router.
        read: Bits that one decoded token reads.
    """

    model_config = ConfigDict(frozen=True)
    weights: Count = 0
    codes: Amount = 0
    scales: Amount = 0
    adapters: Amount = 0
    router: Amount = 0
    read: Amount = 0

    @computed_field  # type: ignore[prop-decorator] # pydantic asks for this order; mypy knows no such properties
    @property
    def code_bits(self) -> float:
        """Codes alone, per weight."""
        return self._per_weight(self.codes)

    @computed_field  # type: ignore[prop-decorator] # pydantic asks for this order; mypy knows no such properties
    @property
    def stored_bits(self) -> float:
        """Everything in the checkpoint, per weight."""
        return self._per_weight(self.codes + self.scales + self.adapters + self.router)

    @computed_field  # type: ignore[prop-decorator] # pydantic asks for this order; mypy knows no such properties
    @property
    def adapter_bits(self) -> float:
        """Low-rank factors and router, per weight."""
        return self._per_weight(self.adapters + self.router)

    @computed_field  # type: ignore[prop-decorator] # pydantic asks for this order; mypy knows no such properties
    @property
    def read_bits(self) -> float:
        """Bits that one decoded token reads, per weight."""
        return self._per_weight(self.read)

    def _per_weight(self, bits: float) -> float:
        return bits / self.weights if self.weights else 0.0


class LayerBits(BaseModel):
    """Bits of one quantized layer.

    Attributes:
        name: Dotted name.
        group: "visual", "merger" or "language".
        bits: Its bits, with its part of tensors that siblings share.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    group: str
    bits: BitCount


class ModelBits(BaseModel):
    """Bits of a quantized model.

    Attributes:
        layers: Every quantized layer in module order.
        groups: Sum of every group that holds quantized layers.
        total: Sum of all quantized layers, and of what a rotation put beside them (see `rotation_bits`).
        parameters: Parameters of the whole original model, tied ones once.
        model_bytes: Bytes of the whole quantized model, with everything that stays unquantized.
    """

    model_config = ConfigDict(frozen=True)
    layers: list[LayerBits]
    groups: dict[str, BitCount]
    total: BitCount
    parameters: Annotated[Count, Field(ge=1)]
    model_bytes: Count

    @computed_field  # type: ignore[prop-decorator] # pydantic asks for this order; mypy knows no such properties
    @property
    def model_bits(self) -> float:
        """Bits per parameter of the whole model, embeddings and norms included."""
        return 8 * self.model_bytes / self.parameters


class FileSize(BaseModel):
    """Size of a file of one stage.

    Attributes:
        stage: "original", "checkpoint", "onnx" or "engines".
        name: Path below the stage's folder.
        size: Bytes.
    """

    model_config = ConfigDict(frozen=True)
    stage: str
    name: str
    size: Count


def count_bits(model: nn.Module, groups: Mapping[str, str]) -> ModelBits:
    """Count the bits of a model with `QELinear` layers as it was loaded (before any conversion of precision).

    Args:
        model: The quantized model.
        groups: For the dotted name of every block its group; a layer belongs to the block that holds it.

    Example:
        >>> import qe_edge, torch
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(64, 128), torch.ones(4, 128), recipe)
        >>> model = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"mlp": layer})})
        >>> bits = count_bits(model, {"block": "language"})
        >>> bits.total.code_bits, bits.total.stored_bits  # one float16 scale for every 128 weights
        (4.0, 4.125)
    """
    linears = linear.quantized_linears(model)
    counts = layer_counts(linears)
    layers = [LayerBits(name=name, group=group_of(name, groups), bits=bits) for name, bits in counts.items()]
    present = dict.fromkeys(layer.group for layer in layers)
    sums = {group: add_counts(layer.bits for layer in layers if layer.group == group) for group in present}
    basis = rotation_bits(model)
    if "language" in sums:
        sums["language"] = add_counts((sums["language"], basis))
    layered = add_counts(counts.values())
    total = add_counts((layered, basis))
    own = {id(buffer) for layer in linears.values() for buffer in layer.buffers()}
    plain = {id(tensor): tensor for tensor in model.parameters()}
    bias = [layer.bias for layer in linears.values() if layer.bias is not None]
    mixing = sum(matrix.numel() for matrix in rotation.mixing_of(model))
    other = [tensor for key, tensor in plain.items() if key not in own] + bias
    return ModelBits(
        layers=layers,
        groups=sums,
        total=total,
        parameters=total.weights + sum(tensor.numel() for tensor in other) - mixing,
        model_bytes=round((layered.codes + layered.scales + layered.adapters + layered.router) / 8)
        + sum(tensor.nbytes for tensor in other),
    )


def rotation_bits(model: nn.Module) -> BitCount:
    """Bits of the matrix that a rotated model with a tied head needs, counted as scales. Every token reads all of it.

    Example:
        >>> import torch
        >>> rotation_bits(torch.nn.Linear(4, 4)).stored_bits  # a model that was not rotated
        0.0
    """
    bits = 8 * sum(matrix.nbytes for matrix in rotation.mixing_of(model))
    return BitCount(scales=bits, read=bits)


def layer_counts(linears: Mapping[str, QELinear]) -> dict[str, BitCount]:
    """Bits of every layer; a tensor shared by several layers is divided among them by output channels.

    Example:
        >>> import qe_edge, torch
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(64, 128), torch.ones(4, 128), recipe)
        >>> count = layer_counts({"mlp": layer})["mlp"]
        >>> count.weights, count.codes, count.scales
        (8192, 32768.0, 1024.0)
    """
    outputs: dict[int, int] = defaultdict(int)
    for layer in linears.values():
        for tensor in _tensors(layer).values():
            outputs[id(tensor)] += layer.out_features
    counts = {}
    for name, layer in linears.items():
        tensors = _tensors(layer)
        part = {key: 8 * tensor.nbytes * layer.out_features / outputs[id(tensor)] for key, tensor in tensors.items()}
        sums = {title: sum(part.get(key, 0) for key in keys) for title, keys in PARTS.items()}
        rank = layer.rank_shared + layer.num_experts * layer.rank_routed
        used = (layer.rank_shared + (layer.rank_routed if layer.num_experts else 0)) / rank if rank else 0
        factors = sum(part.get(key, 0) for key in ("down", "up", "down_scale"))
        weights = layer.in_features * layer.out_features
        counts[name] = BitCount(
            weights=weights,
            read=sums["codes"] + sums["scales"] + sums["router"] + used * factors + part.get("up_scale", 0),
            **sums,
        )
    return counts


def add_counts(counts: Iterable[BitCount]) -> BitCount:
    """Sum of several counts.

    Example:
        >>> total = add_counts([BitCount(weights=100, codes=400), BitCount(weights=300, codes=900)])
        >>> total.code_bits
        3.25
    """
    fields = ("weights", "codes", "scales", "adapters", "router", "read")
    total: dict[str, float] = dict.fromkeys(fields, 0)
    for count in counts:
        for field in fields:
            total[field] += getattr(count, field)
    return BitCount.model_validate(total)


def group_of(layer: str, groups: Mapping[str, str]) -> str:
    """Group of the block that holds a layer; "language" for the head, the one layer outside every block.

    Example:
        >>> groups = {"vision.blocks.0": "visual", "layers.0": "language"}
        >>> group_of("vision.blocks.0.attn.qkv", groups), group_of("lm_head", groups)
        ('visual', 'language')
    """
    held = (group for block, group in groups.items() if layer == block or layer.startswith(f"{block}."))
    return next(held, "language")


def file_sizes(stage: str, folder: Path) -> list[FileSize]:
    """Files of a stage's folder, largest first.

    Example:
        >>> Path("onnx").mkdir()
        >>> _ = Path("onnx/language.onnx").write_bytes(bytes(500))
        >>> _ = Path("onnx/manifest.json").write_bytes(bytes(20))
        >>> [(file.name, file.size) for file in file_sizes("onnx", Path("onnx"))]
        [('language.onnx', 500), ('manifest.json', 20)]
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = [
        FileSize(stage=stage, name=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in files
    ]
    return sorted(sizes, key=lambda file: (-file.size, file.name))


def _tensors(layer: QELinear) -> dict[str, Tensor]:
    keys = [key for part in PARTS.values() for key in part]
    return {key: tensor for key in keys if (tensor := getattr(layer, key)) is not None}
