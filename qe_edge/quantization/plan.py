"""Plans a quantization from the model's configuration alone: no weight is read, and nothing is written.

Layers are built on PyTorch's meta device, which has shapes and no data, and counted by the same code as real layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qe_edge.budget.accounting import BitCount, add_counts, layer_counts
from qe_edge.budget.model import AdapterSize, check_affordable
from qe_edge.budget.sizes import empty_linear
from qe_edge.calibration.sources import check_robot
from qe_edge.export.plugin_check import LayerForm
from qe_edge.layers.linear import QELinear
from qe_edge.methods import Method
from qe_edge.models.configuration import load_family
from qe_edge.models.export_limits import check_exportable
from qe_edge.models.family import ModelFamily, Sample
from qe_edge.models.groups import LinearGroup, linear_groups
from qe_edge.models.loading import shapes_only
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.numerics.schemes import Scheme
from qe_edge.quantization.embedding import embedding_of
from qe_edge.quantization.head import head_of
from qe_edge.quantization.memory import mixing_numbers, peak_memory, stored_itemsize
from qe_edge.quantization.preflight import check_modules, check_predictions, check_shapes, note_groups
from qe_edge.recipes.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_BITS = 8.0  # stored per weight where a budget limits only the read bits


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer that would be quantized.

    Attributes:
        name: Dotted name.
        group: "visual", "merger" or "language".
        in_features: Width of the input.
        out_features: Width of the output.
        adapter: Ranks and experts of its low-rank correction.
        bits: Predicted bits, stored and read.
        joint_outputs: Output channels of all layers that read the same input.
    """

    name: str
    group: str
    in_features: int
    out_features: int
    adapter: AdapterSize
    bits: BitCount
    joint_outputs: int


@dataclass(frozen=True)
class Plan:
    """Layers, bits, disk space and memory of a quantization.

    Attributes:
        layers: Every layer that would be quantized, in module order.
        total: Bits of all layers, and of a matrix that a rotation puts beside them.
        checkpoint_bytes: Size of the checkpoint.
        disk_bytes: Checkpoint and the finished blocks that are kept beside it until the end.
        memory_bytes: Peak memory, roughly.
    """

    layers: list[PlannedLayer]
    total: BitCount
    checkpoint_bytes: int
    disk_bytes: int
    memory_bytes: int


def make_plan(source: str, recipe: Recipe, samples: Sequence[Sample]) -> Plan:
    """Plan a quantization.

    Args:
        source: Model folder or hub id.
        recipe: The recipe.
        samples: The calibration samples; a few are encoded to count their tokens.

    Raises:
        ModelError: If QE-Edge does not know the model, or it cannot be exported.
        RecipeError: If the model lacks one of the recipe's modules.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> plan = make_plan(str(model_path()), make_recipe(method="qe"), load_samples("demo", 2))
        >>> len(plan.layers), plan.layers[0].name, 4 < plan.total.stored_bits < 8
        (28, 'model.language_model.layers.0.self_attn.q_proj', True)
    """
    family = load_family(source)
    check_exportable(family.config)
    check_robot(samples, recipe.calibration.source, acts=family.acts)
    model = shapes_only(family)
    blocks = family.blocks(model)
    check_modules(blocks, recipe.modules)
    check_predictions(family, recipe)
    blocks = [block for block in blocks if block.group in recipe.modules]
    note_groups(blocks, recipe.grids)
    method = recipe.build_method()
    check_shapes(blocks, method)
    linears: dict[str, QELinear] = {}
    adapters: dict[str, AdapterSize] = {}
    groups, joint = dict[str, str](), dict[str, int]()
    for block in blocks:
        for group in linear_groups(block, family.siblings):
            linears |= _planned_group(group, method, recipe, adapters)
            groups |= dict.fromkeys(group.names, block.group)
            joint |= dict.fromkeys(group.names, sum(linear.out_features for linear in group.linears))
    if recipe.head_grid is not None:
        name, head = head_of(model)
        linears[name] = QELinear(
            empty_linear(head.out_features, head.in_features, Scheme("head", recipe.head_grid, 0), AdapterSize())
        )
        adapters[name], groups[name], joint[name] = AdapterSize(), "language", head.out_features
    counts = layer_counts(linears)
    layers = [
        PlannedLayer(
            name, groups[name], layer.in_features, layer.out_features, adapters[name], counts[name], joint[name]
        )
        for name, layer in linears.items()
    ]
    mixing = 8 * stored_itemsize(family) * mixing_numbers(model, recipe)
    total = add_counts((*counts.values(), BitCount(scales=mixing, read=mixing)))
    stored = _stored_bytes(total, recipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    own = parameters - total.weights + (_shared_head(model) if recipe.head_grid else 0)  # an embedding stays
    checkpoint = stored + own * stored_itemsize(family) - _saved_by_embedding(model, family, recipe)
    memory = peak_memory(source, family, model, blocks, recipe, samples)
    return Plan(layers, total, checkpoint, checkpoint + stored, memory)


def collapse(layers: Sequence[PlannedLayer]) -> list[tuple[str, PlannedLayer, int]]:
    """Join layers that differ only in their block number to one row: name with `*`, an example, and their number.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> plan = make_plan(str(model_path()), make_recipe(method="rtn"), load_samples("demo", 2))
        >>> name, example, count = collapse(plan.layers)[0]
        >>> name, count
        ('model.language_model.layers.*.self_attn.q_proj', 4)
    """
    rows: dict[tuple[object, ...], list[PlannedLayer]] = defaultdict(list)
    for layer in layers:
        name = re.sub(r"\.\d+\.", ".*.", layer.name)
        rows[name, layer.in_features, layer.out_features, layer.adapter].append(layer)
    return [(str(key[0]) if len(found) > 1 else found[0].name, found[0], len(found)) for key, found in rows.items()]


def planned_forms(plan: Plan, recipe: Recipe) -> list[LayerForm]:
    """The layers of a plan in the forms that the plugin would run.

    A budget chooses among several grids of a weight, and among ranks that the plugin takes. Layers that read the same
    input may be joined to one, so the build checks the limits that a single one of them exceeds.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> recipe = make_recipe(method="rtn", scheme="w4a8")
        >>> plan = make_plan(str(model_path()), recipe, load_samples("demo", 2))
        >>> form = planned_forms(plan, recipe)[0]
        >>> form.in_features, form.act_bits, form.group_size
        (256, 8, -1)
    """
    scheme = recipe.get_scheme()
    forms = []
    for layer in plan.layers:
        routed = layer.adapter.experts > 1
        for grid in recipe.grids:
            group = grid.resolve_group(layer.in_features)
            forms.append(
                LayerForm(
                    layer.name,
                    layer.in_features,
                    layer.joint_outputs,
                    act_bits=scheme.activation_bits,
                    group_size=PER_CHANNEL if group == layer.in_features else group,
                    rank_shared=layer.adapter.rank_shared,
                    rank_routed=layer.adapter.rank_routed if routed else 0,
                    num_experts=layer.adapter.experts if routed else 0,
                )
            )
    return forms


def _stored_bytes(total: BitCount, recipe: Recipe) -> int:
    """Bytes of the layers in a checkpoint; with a budget, the most that it allows.

    Raises:
        RecipeError: If the budget cannot be met.
    """
    stored = round(total.stored_bits * total.weights / 8)
    if not recipe.budget:
        return stored
    check_affordable(recipe.budget, total.weights, 8 * stored, total.read)
    return round((recipe.budget.bits or LARGEST_BITS) * total.weights / 8)


def _planned_group(
    group: LinearGroup, method: Method[Any], recipe: Recipe, adapters: dict[str, AdapterSize]
) -> dict[str, QELinear]:
    """The layers of one input as they will be, without data; notes their adapters. With a budget, the smallest ones."""
    layers, scheme = {}, recipe.get_scheme()
    if recipe.budget:
        scheme = scheme.with_grid(scheme.budget_grids()[0])
    for members in group.problems(stacked=method.stack_siblings):
        sizes = [group.linears[member].out_features for member in members]
        outputs, inputs = sum(sizes), group.linears[0].in_features
        size = AdapterSize() if recipe.budget else method.adapter_size(outputs, inputs)
        empty = empty_linear(outputs, inputs, scheme, size) if recipe.budget else method.empty(outputs, inputs, scheme)
        parts = empty.split(sizes)
        for member, part in zip(members, parts, strict=True):
            layers[group.names[member]] = QELinear(part)
            adapters[group.names[member]] = size
    return layers


def _saved_by_embedding(model: PreTrainedModel, family: ModelFamily, recipe: Recipe) -> int:
    """Bytes that an embedding in INT8, with a scale for every row, takes less than one as it is."""
    if recipe.embedding == "none":
        return 0
    rows, width = embedding_of(model, recipe)[1].weight.shape
    return rows * width * (stored_itemsize(family) - 1) - rows * stored_itemsize(family)


def _shared_head(model: PreTrainedModel) -> int:
    """Numbers of a head that is the embedding too."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return int(head.weight.numel()) if head.weight is embedding.weight else 0
