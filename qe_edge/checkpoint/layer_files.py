"""`QELinear` layers as safetensors: their geometry, tensors that siblings share, and the checks on reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qe_edge.checkpoint.dtypes import torch_dtypes
from qe_edge.checkpoint.part_sizes import MAX_FEATURES, PartSizes
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.layers.linear import Adapters, QELinear, QuantizedLinear
from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight, packed_width, unpack_codes
from qe_edge.system.atomic import atomic_file
from qe_edge.system.errors import ArtifactError

MAX_RANK = 1 << 14


class LayerGeometry(BaseModel):
    """Sizes of one `QELinear`, as stored in config.json; every tensor's shape follows from it.

    `tensors` names the layer's tensors: without it nobody would miss a bias or a channel scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    in_features: int = Field(ge=1, le=MAX_FEATURES)
    out_features: int = Field(ge=1, le=MAX_FEATURES)
    weight_bits: int = Field(ge=2, le=4)
    group_size: int = Field(ge=-1, le=MAX_FEATURES)
    activation_bits: int = Field(ge=0, le=8)
    rank_shared: int = Field(ge=0, le=MAX_RANK)
    rank_routed: int = Field(ge=0, le=MAX_RANK)
    num_experts: int = Field(ge=0, le=256)
    packed_factors: bool = False
    parts: PartSizes | None = None
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, layer: QELinear) -> LayerGeometry:
        """Geometry of a layer in memory."""
        sizes = {name: getattr(layer, name) for name in cls.model_fields if name not in ("tensors", "parts")}
        present = tuple(key for key in QELinear.TENSORS if getattr(layer, key) is not None)
        return cls.model_validate({**sizes, "tensors": present, "parts": PartSizes.of(layer)})

    @property
    def coded(self) -> int:
        """Input channels of the weight's packed codes: all but those with codes of 8 bits."""
        return self.in_features - (self.parts.fine if self.parts else 0)

    def stored(self) -> dict[str, Any]:
        """The geometry as JSON; a layer without parts names none."""
        return self.model_dump(mode="json", exclude_none=True)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...], bool]]:
        """For every tensor its shape, the dtypes it may have, and whether it must exist."""
        rank = self.rank_shared + self.num_experts * self.rank_routed
        groups = 1 if self.group_size == PER_CHANNEL else self.coded // max(self.group_size, 1)
        if self.parts and self.parts.codebook == "binary":
            groups *= self.weight_bits  # every binary matrix has scales of its own
        if self.parts and self.parts.codebook == "levels":
            groups *= 2**self.weight_bits  # every code has a value of its own
        half, real = (torch.float16,), (torch.float16, torch.float32)
        table = {
            "qweight": ((self.out_features, packed_width(self.coded, self.weight_bits)), (torch.uint8,), True),
            "scales": ((self.out_features, groups), half, True),
            "zeros": ((self.out_features, groups), (torch.int8,), False),
            "inv_omega": ((self.in_features,), half, False),
            "bias": ((self.out_features,), (*real, torch.bfloat16), False),
        }
        if rank:
            packed = self.packed_factors
            factor = (torch.uint8,) if packed else (torch.int8, *real)
            table |= {
                "down": ((rank, (self.in_features + 1) // 2 if packed else self.in_features), factor, True),
                "up": ((self.out_features, (rank + 1) // 2 if packed else rank), factor, True),
                "down_scale": ((rank,), half, False),
                "up_scale": ((self.out_features,), half, False),
            }
        if self.num_experts > 1:
            table["router"] = ((self.num_experts, self.in_features), half, True)
        return table | (self.parts.shapes(self.out_features, self.in_features) if self.parts else {})


def layer_tensors(layers: dict[str, QELinear]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of layers by full name, each once, and for every name that shares a tensor the name that has it.

    Stacked siblings read one down factor and one router. Each is one tensor object in memory and stays one.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> tensors, shared = layer_tensors({"query": layer, "again": layer})
        >>> sorted(tensors), shared
        (['query.qweight', 'query.scales'], {'again.qweight': 'query.qweight', 'again.scales': 'query.scales'})
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owner: dict[int, str] = {}
    for layer_name, layer in layers.items():
        for key in QELinear.TENSORS:
            tensor = getattr(layer, key)
            if tensor is None:
                continue
            name = f"{layer_name}.{key}"
            if id(tensor) in owner:
                shared[name] = owner[id(tensor)]
            else:
                owner[id(tensor)] = name
                tensors[name] = tensor.detach()
    return tensors, shared


def build_layer(name: str, geometry: LayerGeometry, tensors: dict[str, Tensor]) -> QELinear:
    """A layer from tensors that `check_layer` has accepted.

    Raises:
        ArtifactError: If a stored channel number lies outside the layer.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> tensors = {key: getattr(layer, key) for key in ("qweight", "scales")}
        >>> build_layer("query", LayerGeometry.of(layer), tensors)
        QELinear(in_features=64, out_features=32, weight_bits=4, group_size=-1, activation_bits=8, rank_shared=0,
        experts=0x0)
    """
    adapters = None
    if "down" in tensors:
        adapters = Adapters(
            down=tensors["down"],
            up=tensors["up"],
            down_scale=tensors.get("down_scale"),
            up_scale=tensors.get("up_scale"),
            rank_shared=geometry.rank_shared,
            rank_routed=geometry.rank_routed,
            num_experts=geometry.num_experts,
            router=tensors.get("router"),
        )
    weight = QuantizedWeight(
        unpack_codes(tensors["qweight"], geometry.coded, geometry.weight_bits),
        tensors["scales"],
        tensors.get("zeros"),
        geometry.weight_bits,
        geometry.group_size,
    )
    parts = None
    if geometry.parts:
        parts, problem = geometry.parts.build(tensors, geometry.in_features)
        if problem:
            raise _wrong(name, problem)
    quantized = QuantizedLinear(weight, geometry.activation_bits, tensors.get("inv_omega"), adapters, parts)
    layer = QELinear(quantized, tensors.get("bias"))
    if torch.equal(layer.qweight, tensors["qweight"]):
        layer.qweight = tensors["qweight"]  # which may lie in a file that is mapped
    return layer


def check_layer(name: str, geometry: LayerGeometry, header: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Compare a layer's tensors in a safetensors header (dtype and shape by key) with its geometry.

    Raises:
        ArtifactError: If a tensor is missing, unexpected, or of another shape or type.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> header = {"qweight": ("U8", (32, 32)), "scales": ("F16", (32, 2))}
        >>> check_layer("query", LayerGeometry.of(layer), header)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: The quantized layer 'query' is inconsistent: tensor 'scales' is
        F16[32, 2] and should be [32, 1]. Quantize the model again.
    """
    sizes, parts = (geometry.out_features, geometry.in_features, geometry.weight_bits), geometry.parts
    problem = parts.problem(*sizes) if parts else None
    if problem:
        raise _wrong(name, problem)
    group = geometry.group_size
    if group != PER_CHANNEL and (group < 1 or geometry.coded % group):
        raise _wrong(name, f"group size {group} does not divide {geometry.coded} inputs")
    table = geometry.shapes()
    for key in sorted(set(geometry.tensors) - header.keys()):
        raise _wrong(name, f"tensor '{key}' is missing")
    for key in sorted(header.keys() - (table.keys() & set(geometry.tensors))):
        raise _wrong(name, f"tensor '{key}' does not belong to it")
    for key, (shape, dtypes, required) in table.items():
        if key not in header:
            if required:
                raise _wrong(name, f"tensor '{key}' is missing")
            continue
        dtype, found = header[key]
        if found != shape or torch_dtypes().get(dtype) not in dtypes:
            raise _wrong(name, f"tensor '{key}' is {dtype}{list(found)} and should be {list(shape)}")
    for factor, scale in (("down", "down_scale"), ("up", "up_scale")):
        if (factor in header and header[factor][0] in ("I8", "U8")) != (scale in header):
            raise _wrong(name, f"'{scale}' must go with an integer '{factor}', and only with it")


def parse_geometry(name: str, values: object) -> LayerGeometry:
    """Validate a layer's entry of config.json.

    Raises:
        ArtifactError: If a field is missing, unknown or out of range.

    Example:
        >>> parse_geometry("query", {"in_features": 0})
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: The quantized layer 'query' is inconsistent: 'in_features' input
        should be greater than or equal to 1. Quantize the model again.
    """
    try:
        return LayerGeometry.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong(name, f"'{'.'.join(map(str, first['loc']))}' {first['msg'].lower()}") from error


def write_layers(path: Path, layers: dict[str, QELinear]) -> None:
    """Write layers to one safetensors file that describes itself in its metadata.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> write_layers(Path("block.safetensors"), {"query": layer})
        >>> list(check_safetensors(Path("block.safetensors")).items())
        [('query.scales', ('F16', (32, 1))), ('query.qweight', ('U8', (32, 32)))]
    """
    tensors, shared = layer_tensors(layers)
    geometry = {name: LayerGeometry.of(layer).stored() for name, layer in layers.items()}
    metadata = {"layers": json.dumps(geometry), "shared": json.dumps(shared)}
    with atomic_file(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)


def stored_keys(path: Path) -> dict[str, str]:
    """For every tensor of a file that `write_layers` wrote: the name under which it is stored.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> write_layers(Path("siblings.safetensors"), {"query": layer, "key": layer})
        >>> stored_keys(Path("siblings.safetensors"))["key.scales"]
        'query.scales'
    """
    with safe_open(path, framework="pt") as file:
        own, shared = list(file.keys()), json.loads((file.metadata() or {})["shared"])
    return {**{name: name for name in own}, **shared}


def read_layers(path: Path) -> dict[str, QELinear]:
    """Read what `write_layers` wrote.

    Raises:
        ArtifactError: If the file is damaged.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> write_layers(Path("one.safetensors"), {"query": layer})
        >>> read_layers(Path("one.safetensors"))
        {'query': QELinear(in_features=64, out_features=32, weight_bits=4, group_size=-1, activation_bits=8,
        rank_shared=0, experts=0x0)}
    """
    header = check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in header}  # not a view of the file
    try:
        geometries, shared = json.loads(metadata["layers"]), json.loads(metadata["shared"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"'{path}' describes no layers.", "Delete it and run again.") from error
    return assemble_layers(geometries, shared, header, tensors)


def assemble_layers(
    geometries: dict[str, Any],
    shared: dict[str, str],
    header: dict[str, tuple[str, tuple[int, ...]]],
    tensors: dict[str, Tensor],
) -> dict[str, QELinear]:
    """Check and build layers; shared names become the same tensor object again.

    Raises:
        ArtifactError: If a layer's tensors and its geometry differ, or a shared name is no tensor.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8")
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(4, 64), recipe)
        >>> tensors, shared = layer_tensors({"query": layer})
        >>> header = {"query.qweight": ("U8", (32, 32)), "query.scales": ("F16", (32, 1))}
        >>> list(assemble_layers({"query": LayerGeometry.of(layer).stored()}, shared, header, tensors))
        ['query']
    """
    layers = {}
    known = {f"{name}.{key}" for name in geometries for key in QELinear.TENSORS}
    for full, source in shared.items():
        if full not in known or full in header or source not in known or source not in header:
            raise _wrong(full, f"it shares a tensor '{source}' that is none of another layer")
    for full in header:
        owner = next((name for name in _parents(full) if name in geometries), None)
        if owner is not None and full not in known:
            raise _wrong(owner, f"tensor '{full}' does not belong to it")
    for name, values in geometries.items():
        geometry = parse_geometry(name, values)
        own: dict[str, str] = {}
        for key in QELinear.TENSORS:
            full = f"{name}.{key}"
            source = shared.get(full, full)
            if source in header:
                own[key] = source
        check_layer(name, geometry, {key: header[source] for key, source in own.items()})
        layers[name] = build_layer(name, geometry, {key: tensors[source] for key, source in own.items()})
    return layers


def _parents(name: str) -> Iterator[str]:
    """The dotted paths above a name, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _wrong(name: str, reason: str) -> ArtifactError:
    return ArtifactError(f"The quantized layer '{name}' is inconsistent: {reason}.", "Quantize the model again.")
