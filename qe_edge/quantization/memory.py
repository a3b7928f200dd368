"""The peak memory of a quantization, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qe_edge.calibration.statistics import DOUBLE_WIDTH
from qe_edge.methods import Method
from qe_edge.models.family import Block, Encoded, ModelFamily, Sample
from qe_edge.models.groups import LinearGroup, linear_groups
from qe_edge.models.tables import tables_of
from qe_edge.quantization.job import BATCH
from qe_edge.quantization.measure import needs_gradients
from qe_edge.quantization.walk import parameters_of
from qe_edge.recipes.recipe import Recipe
from qe_edge.reconstruction.gptq import WEIGHTS, WIDE
from qe_edge.system.parallel import gains_by_one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = 480 * 2**20  # bytes that Python, torch and transformers take with the smallest model
MASK_BYTES = 5  # of an attention mask per pair of tokens: kept as one byte, and as a float while a block computes
SMALLEST_PATCH = 14  # pixels per side, of vision encoders without text
FLOAT = 4  # bytes
SOLVED = 14  # bytes per weight of a problem: itself, what of it is rounded, codes; and another trial's error and codes
ROUNDED = 12  # bytes per weight that is being rounded
TRAINED = 20  # bytes per parameter of a model that is trained: itself, the original, its gradient and two moments
LOGITS = 12  # bytes per logit where gradients are measured: itself, its probability and its gradient


def peak_memory(
    source: str,
    family: ModelFamily,
    model: PreTrainedModel,
    blocks: Sequence[Block],
    recipe: Recipe,
    samples: Sequence[Sample],
) -> int:
    """Bytes of the largest moment of a quantization.

    Embedding and head stay in their files. There are the libraries, the model's other parts in float32, what the
    samples become, and one block: while it runs, while gradients are measured, or while its layers are solved.

    Args:
        source: Model folder or hub id.
        family: Its family.
        model: The model; it may be on PyTorch's meta device.
        blocks: Those that are quantized.
        recipe: The recipe.
        samples: The calibration samples; a few are encoded to count their tokens.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> loaded = load_model("demo")
        >>> blocks, samples = loaded.family.blocks(loaded.model), load_samples("demo", 2)
        >>> given = (loaded.source, loaded.family, loaded.model, blocks)
        >>> rtn, qe = (peak_memory(*given, make_recipe(method=name), samples) for name in ("rtn", "qe"))
        >>> LIBRARIES < rtn < qe
        True
    """
    method, walked = recipe.build_method(), family.blocks(model)
    if method.trains_model:
        return LIBRARIES + TRAINED * sum(parameter.numel() for parameter in model.parameters())
    streamed = {id(part): part.numel() for block in walked for part in block.module.parameters()}
    streamed |= {id(part): part.numel() for table in tables_of(model).values() for part in table.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(streamed.values())
    outside += mixing_numbers(model, recipe)
    rows, batches = min(BATCH, len(samples)), -(-len(samples) // BATCH)
    processor = family.load_processor(source)
    encoded = family.encode(processor, samples[:BATCH], answers=True)
    # a single long text makes its whole batch long
    usual = encoded.input_ids.shape[1]
    longest = family.encode(processor, [max(samples, key=_characters)], answers=True).input_ids.shape[1]
    text = encoded.input_ids.size * batches + rows * max(0, longest - usual)
    masks = rows * (batches * usual**2 + MASK_BYTES * max(longest, usual) ** 2)
    pixels = sum(array.nbytes for array in encoded.pixels.values()) * batches
    patches = _patches(family, encoded, batches, text, pixels)
    most = max(_running(block, family) for block in walked)  # blocks that are not quantized run too
    if needs_gradients(recipe, method, blocks):
        most = max(most, _gradients(family, model, walked, rows * max(longest, usual)))
    for block in blocks:
        language = block.group in ("language", "action")
        tokens, beside = (text, masks) if language else (patches, 0)
        most = max(most, beside + _block(block, family, method, tokens, batches, trial=bool(recipe.budget)))
    return LIBRARIES + FLOAT * outside + pixels + most + family.kept_bytes(text)


def mixing_numbers(model: PreTrainedModel, recipe: Recipe) -> int:
    """Numbers of the matrix that a rotated model needs before a head that shares the embedding.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> model = load_model("demo").model
        >>> mixing_numbers(model, make_recipe(method="quarot")), mixing_numbers(model, make_recipe(method="gptq"))
        (65536, 0)
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    shared = isinstance(head, nn.Module) and head.weight is embedding.weight
    return int(embedding.weight.shape[1]) ** 2 if shared and recipe.rotates else 0


def stored_itemsize(family: ModelFamily) -> int:
    """Bytes of one weight in the original checkpoint.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.configuration import load_family
        >>> stored_itemsize(load_family(str(model_path())))
        2
    """
    dtype = getattr(family.config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else FLOAT


def _patches(family: ModelFamily, encoded: Encoded, batches: int, text: int, pixels: int) -> int:
    """Tokens of a vision encoder, of all samples."""
    if not family.writes_text and not family.acts:
        return pixels // (FLOAT * 3 * SMALLEST_PATCH**2)
    grids = [encoded.pixels[name] for name in ("image_grid_thw", "video_grid_thw") if name in encoded.pixels]
    return sum(int(grid.prod(1).sum()) for grid in grids) * batches if grids else text


def _characters(sample: Sample) -> int:
    return sum(len(turn.text) for turn in sample.conversation) + len(sample.answer or "")


def _block(block: Block, family: ModelFamily, method: Method[Any], tokens: int, batches: int, *, trial: bool) -> int:
    """Bytes of a block that is quantized, with its inputs and outputs, the statistics and what solving takes."""
    groups = linear_groups(block, family.siblings)
    states = 2 * FLOAT * tokens * groups[0].linears[0].in_features
    states += 2 * FLOAT * -(-tokens // batches) * max(_width(group) for group in groups)
    copies = 2 * FLOAT * parameters_of(block) if method.sees_both_models else 0  # else a problem reads its own
    work = max(_running(block, family), copies + _solving(groups, method, trial=trial))
    return states + _statistics(groups, method, tokens) + work


def _running(block: Block, family: ModelFamily) -> int:
    """Bytes of a block that runs: as it is stored, and one layer in float32."""
    linears = [module.weight.numel() for module in block.module.modules() if isinstance(module, nn.Linear)]
    return stored_itemsize(family) * parameters_of(block) + FLOAT * max(linears, default=0)


def _width(group: LinearGroup) -> int:
    """Numbers per token that a group reads and writes."""
    return group.linears[0].in_features + sum(linear.out_features for linear in group.linears)


def _gradients(family: ModelFamily, model: PreTrainedModel, blocks: Sequence[Block], tokens: int) -> int:
    """Bytes of a batch of `tokens` with gradients: the head, a block with a copy in float32, and the logits."""
    item = stored_itemsize(family) + FLOAT
    head: Any = model.get_output_embeddings()
    ends = 0
    if isinstance(head, nn.Linear):
        ends = stored_itemsize(family) * head.weight.numel() + LOGITS * tokens * len(head.weight)
    kept = FLOAT * tokens * sum(group.linears[0].in_features for group in linear_groups(blocks[-1], ()))
    return ends + item * max(map(parameters_of, blocks)) + 2 * kept


def _statistics(groups: Sequence[LinearGroup], method: Method[Any], tokens: int) -> int:
    """Bytes of the Gram matrices, token samples and top-k lists of one block."""
    total = 0
    for group in groups:
        width = group.linears[0].in_features
        shapes = [sum(outputs) for outputs in _problems(group, method)]
        requests = [request for size in shapes if (request := method.request(size, width))]
        if requests:
            total += _gram_item(width) * width**2 if any(request.gram for request in requests) else 0
            total += FLOAT * width * min(tokens, max(request.tokens for request in requests))
            total += sum(FLOAT * min(tokens, request.tokens) * request.important for request in requests)
    return total


def _solving(groups: Sequence[LinearGroup], method: Method[Any], *, trial: bool) -> int:
    """Bytes that solving the problems of a block takes beside their statistics.

    A problem with a Gram matrix holds matrices of its weight's shape, and a factored Gram matrix, and a second one
    where channels are left out for a `trial`.
    """
    alone, beside = [0], [0]
    for group in groups:
        width = group.linears[0].in_features
        weights = width * sum(linear.out_features for linear in group.linears)
        for outputs in _problems(group, method):
            size = sum(outputs) * width
            request = method.request(sum(outputs), width)
            needed = SOLVED * size
            if request is not None and request.gram:
                factored = _gram_item(width) + (0 if width > DOUBLE_WIDTH else FLOAT)
                factored *= 1 + (trial and width <= WIDE)
                needed += factored * width**2 + ROUNDED * min(size, torch.get_num_threads() * WEIGHTS)
            (beside if gains_by_one_thread(weights) else alone).append(needed)
    return max(*alone, sum(sorted(beside)[-torch.get_num_threads() :]))


def _problems(group: LinearGroup, method: Method[Any]) -> list[list[int]]:
    """Output channels of the layers of every problem of a group."""
    outputs = [linear.out_features for linear in group.linears]
    return [[outputs[member] for member in members] for members in group.problems(stacked=method.stack_siblings)]


def _gram_item(width: int) -> int:
    return 8 if width <= DOUBLE_WIDTH else FLOAT
