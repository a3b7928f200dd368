"""Quantizing a model: block by block, on statistics of its own inputs, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_edge.budget.accounting import rotation_bits
from qe_edge.budget.allocation import scaled_back
from qe_edge.calibration.sources import check_reached, check_robot
from qe_edge.layers.linear import QELinear, QuantizedLinear
from qe_edge.layers.magnitudes import check_result
from qe_edge.methods import LinearProblem
from qe_edge.methods.checked import quantize_problem
from qe_edge.models.export_limits import check_exportable
from qe_edge.models.family import Block, Encoded, Sample
from qe_edge.models.groups import linear_groups, set_module
from qe_edge.models.loading import LoadedModel, load_outside_blocks
from qe_edge.models.precision import make_float32
from qe_edge.models.rotation import rotate_language_model
from qe_edge.models.stored import StoredWeights
from qe_edge.models.streaming import Chain
from qe_edge.quantization.attention import watch_attention
from qe_edge.quantization.embedding import embedding_of, quantize_embedding
from qe_edge.quantization.executors import LOCAL, FarBlocks, Solved, Workers, check_way, open_workers
from qe_edge.quantization.head import head_of, quantize_head
from qe_edge.quantization.job import Job, encoded_batches, make_job
from qe_edge.quantization.measure import measure, needs_gradients
from qe_edge.quantization.preflight import (
    check_modules,
    check_predictions,
    check_shapes,
    check_weights,
    note_calibration,
    note_groups,
    note_torch_only,
)
from qe_edge.quantization.problems import Member, Problems
from qe_edge.quantization.run_record import current_environment
from qe_edge.quantization.side_by_side import SideBySide
from qe_edge.quantization.walk import BlockWalk, parameters_of
from qe_edge.quantization.whole_model import train_model
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.device import CPU, choose_device, fitting
from qe_edge.system.heap import trim_heap
from qe_edge.system.locks import hold
from qe_edge.system.progress import Progress, Silent, track

LAYER, SMALLER = "one layer and its calibration tokens", "Choose --device cpu, or a smaller option 'tokens'."


def quantize(  # noqa: PLR0913 - an argument for every choice
    model: str | LoadedModel,
    recipe: Recipe,
    calibration: str | Sequence[Sample] | None = None,
    *,
    work: Path | None = None,
    resume: bool = False,
    on_disk: bool = False,
    device: str = "auto",
    executor: str = LOCAL,
    progress: Progress | None = None,
) -> tuple[LoadedModel, Recipe]:
    """Quantize a model.

    Of a model given by name, only the parts outside its blocks and the block at work are in memory. Budgets read every
    block once more. Gradients (budgets, MBQ) read every block twice for every batch of samples.

    Args:
        model: "demo", a folder, a hub id, or a model in memory (which is changed in place).
        recipe: The recipe.
        calibration: Source name, or the samples themselves; None takes the recipe's source.
        work: Folder for finished blocks, so that a stopped run can be resumed.
        resume: Continue from the finished blocks in `work`, if model, recipe and data are the same.
        on_disk: Leave finished blocks in `work`, and blocks that are not quantized in the model's files, as
            placeholders that `save_quantized` follows. Otherwise the model that is returned is all in memory.
        device: Device that runs blocks: "auto" (a GPU if there is one), "cpu", "cuda". The methods qe, gptq and quarot
            do all work on a layer there. The only GPU that was tried is an H100.
        executor: Who solves the problems of blocks: "local", "ray" for workers of Ray on this machine, "ray:ADDRESS"
            for those of a cluster. The result is the same, to the last bit.
        progress: Where to report progress.

    Returns:
        The model with `QELinear` layers, and the resolved recipe with the hash of the calibration data.

    Raises:
        QEError: Of the kinds that its parts raise: unknown model, bad recipe, NaN in weights, no calibration data.

    Example:
        >>> import qe_edge
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8", calibration={"samples": 1})
        >>> loaded, resolved = quantize("demo", recipe, device="cpu")
        >>> loaded.model.model.language_model.layers[0].mlp.up_proj
        QELinear(in_features=256, out_features=768, weight_bits=4, group_size=-1, activation_bits=8,
        rank_shared=0, experts=0x0)
    """
    choose_device(device)  # a wrong name is refused before samples are drawn
    check_way(executor, recipe, device)
    job = make_job(model, recipe, calibration)
    keywords: dict[str, Any] = {"device": device, "executor": executor, "progress": progress}
    loaded = run_job(job, work=work, resume=resume, on_disk=on_disk, **keywords)
    return loaded, job.recipe


def run_job(
    job: Job,
    *,
    work: Path | None = None,
    resume: bool = False,
    on_disk: bool = False,
    device: str = "auto",
    executor: str = LOCAL,
    progress: Progress | None = None,
) -> LoadedModel:
    """Do a job. `quantize` describes the arguments and errors.

    Example:
        >>> import qe_edge
        >>> from qe_edge.layers.linear import quantized_linears
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a8", calibration={"samples": 1})
        >>> loaded = run_job(make_job("demo", recipe), device="cpu")
        >>> len(quantized_linears(loaded.model))
        28
    """
    on_disk = on_disk and work is not None
    chosen_device = choose_device(device)
    check_way(executor, job.recipe, device)
    loaded = load_outside_blocks(job.model) if isinstance(job.model, str) else job.model
    chosen = checked_blocks(loaded, job)
    gradients = needs_gradients(job.recipe, job.recipe.build_method(), chosen)
    passes = 1 + bool(job.recipe.budget) + gradients  # measured first, then quantized
    total = passes * sum(parameters_of(block) for block in chosen)
    with ExitStack() as held:
        folder = None
        if work:
            held.enter_context(hold(work))
            run = job.record(current_environment(str(chosen_device)))
            folder = held.enter_context(WorkFolder.open(work, run, resume=resume).removed_if_useless())
        if job.recipe.rotates:
            rotate_language_model(loaded, job.recipe.seed)
        workers = held.enter_context(open_workers(executor))
        with track(progress or Silent(), "Quantizing", total) as tracked, fitting(chosen_device, LAYER, SMALLER):
            _quantize_blocks(loaded, job, folder, tracked, chosen_device, workers, on_disk=on_disk)
    if job.recipe.embedding != "none":
        quantize_embedding(loaded, job.recipe)
    if not on_disk:
        loaded.stored.read("", loaded.model)
    return loaded


def checked_blocks(loaded: LoadedModel, job: Job) -> list[Block]:
    """The blocks that are quantized. All checks that need no long work are made here.

    Raises:
        QEError: If the model, the recipe and the samples do not go together.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> job = make_job("demo", make_recipe(method="rtn", calibration={"samples": 1}))
        >>> len(checked_blocks(load_outside_blocks("demo"), job))
        4
    """
    blocks = loaded.family.blocks(loaded.model)
    check_modules(blocks, job.recipe.modules)
    check_predictions(loaded.family, job.recipe)
    check_reached(job.samples, job.recipe.modules)
    check_robot(job.samples, job.recipe.calibration.source, acts=loaded.family.acts)
    check_exportable(loaded.family.config)
    chosen = [block for block in blocks if block.group in job.recipe.modules]
    check_shapes(chosen, job.recipe.build_method())
    check_weights(loaded, chosen, job.recipe.get_scheme().weight)
    note_groups(chosen, job.recipe.grids)
    note_calibration(loaded, blocks, job.samples)
    note_torch_only(job.recipe)
    if job.recipe.head_grid is not None:
        head_of(loaded.model)
    if job.recipe.embedding != "none":
        embedding_of(loaded.model, job.recipe)
    return chosen


def _quantize_blocks(
    loaded: LoadedModel,
    job: Job,
    folder: WorkFolder | None,
    progress: Progress,
    device: torch.device,
    workers: Workers | None,
    *,
    on_disk: bool,
) -> None:
    """Every block of the chains up to the last one that the recipe selects."""
    recipe, method = job.recipe, job.recipe.build_method()
    batches = encoded_batches(loaded, job.samples)
    if method.trains_model:
        _train_blocks(loaded, recipe, batches, folder, progress)
        return
    rotation = rotation_bits(loaded.model)  # in its own precision, before the walk makes it float32
    walk = BlockWalk(loaded, recipe.modules, batches, device, to_the_end=recipe.head_grid is not None)
    measured = measure(walk, recipe, method, rotation, folder, progress, workers)
    problems = Problems(recipe, method, device, measured, loaded.stored)
    both = SideBySide(walk, problems) if method.sees_both_models else None

    def done(block: Block) -> None:
        if on_disk and folder:
            loaded.stored.wrote(folder.sources(block.name))
            loaded.stored.release(block.name, block.module)
        trim_heap()
        progress.advance(walk.sizes[block.name], block.name)

    far = FarBlocks(workers, method, quantize_problem, partial(_receive, walk, folder, done)) if workers else None
    for chain, position, block in walk:
        if far:
            _send_block(walk, problems, far, folder, chain, position, block, done)
        else:
            quantize_block(walk, problems, both, folder, chain, position, block)
            done(block)
    if far:
        far.finish()
    walk.restore()
    if recipe.head_grid is not None:  # the last chain is the language model's
        valid = [batches[number].attention_mask for number in chain.batches]
        quantize_head(loaded, recipe.head_grid, chain.hidden, valid)


def _train_blocks(
    loaded: LoadedModel, recipe: Recipe, batches: list[Encoded], folder: WorkFolder | None, progress: Progress
) -> None:
    """All blocks that the recipe selects, together; from the work folder if it has them."""
    loaded.stored.read("", loaded.model)
    blocks = [block for block in loaded.family.blocks(loaded.model) if block.group in recipe.modules]
    finished = {block.name: folder.load(block.name) if folder else None for block in blocks}
    if not all(finished.values()):  # a training that was stopped begins again
        for name, layers in train_model(loaded, blocks, recipe, batches, progress).items():
            if folder:
                folder.save(name, layers)
        return
    for block in blocks:
        for name, layer in (finished[block.name] or {}).items():
            set_module(loaded.model, name, layer)
        progress.advance(parameters_of(block), block.name)


def quantize_block(
    walk: BlockWalk,
    problems: Problems,
    both: SideBySide | None,
    folder: WorkFolder | None,
    chain: Chain,
    position: int,
    block: Block,
) -> None:
    """Put quantized layers into one block, from the work folder if it has them, and hand its outputs on.

    Args:
        walk: The walk that has come to the block.
        problems: Makes the layers' problems.
        both: Walks the original beside the quantized model, for methods that see both.
        folder: Keeps finished blocks; None keeps nothing.
        chain: The block's chain.
        position: The block's place in it.
        block: The block.

    Example:
        >>> from qe_edge.quantization.problems import Measured
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> recipe, loaded = make_recipe(method="rtn"), load_outside_blocks("demo")
        >>> walk = BlockWalk(loaded, recipe.modules, encoded_batches(loaded, make_job("demo", recipe).samples[:1]), CPU)
        >>> problems = Problems(recipe, recipe.build_method(), CPU, Measured(), loaded.stored)
        >>> chain, position, block = next(iter(walk))
        >>> quantize_block(walk, problems, None, None, chain, position, block)
        >>> type(block.module.mlp.up_proj).__name__
        'QELinear'
    """
    loaded = walk.loaded
    walk.make_ready(block)
    groups = linear_groups(block, loaded.family.siblings)
    finished = folder.load(block.name) if folder else None

    if both:
        make_float32(block.module.modules())

        def work(member: Member, problem: LinearProblem) -> dict[str, QELinear]:
            return _layers(loaded.stored, member, quantize_problem(problems.method, problem))

        layers = both.quantize(chain, position, block, groups, finished, work)
        if folder and not finished:
            folder.save(block.name, layers)
        _put(walk, chain, position, block, layers)
        return
    heads = {} if finished or not problems.method.sees_attention else watch_attention(walk, chain, position, block)
    collectors = {} if finished else problems.collectors(groups)
    outputs = walk.run(chain, position, block, collectors)
    layers = finished or {}
    if not finished:
        walk.release_linears(groups)
        for member, result in problems.each(groups, collectors, quantize_problem, heads):
            layers.update(_layers(loaded.stored, member, result))
        if folder:
            folder.save(block.name, layers)
    _put(walk, chain, position, block, layers, None if problems.recipe.flow == "sequential" else outputs)


def _put(
    walk: BlockWalk,
    chain: Chain,
    position: int,
    block: Block,
    layers: dict[str, QELinear],
    outputs: list[Tensor] | None = None,
) -> None:
    """Put quantized layers into a block, and hand on its outputs as they were, or as they are now if None."""
    for name, layer in layers.items():
        set_module(walk.loaded.model, name, layer)
    walk.hand_on(chain, position, walk.run(chain, position, block, {}) if outputs is None else outputs)
    walk.restore_block(block)


def _send_block(
    walk: BlockWalk,
    problems: Problems,
    far: FarBlocks[QuantizedLinear],
    folder: WorkFolder | None,
    chain: Chain,
    position: int,
    block: Block,
    done: Callable[[Block], None],
) -> None:
    """Send a block's problems to workers, unless the work folder has their results, and hand its outputs on."""
    walk.make_ready(block)
    groups = linear_groups(block, walk.loaded.family.siblings)
    finished = folder.load(block.name) if folder else None
    heads = {} if finished or not problems.method.sees_attention else watch_attention(walk, chain, position, block)
    collectors = {} if finished else problems.collectors(groups)
    walk.hand_on(chain, position, walk.run(chain, position, block, collectors))
    if finished:
        _set_layers(walk, block, finished)
        done(block)
    else:
        far.send(block, (list(problems.of_group(group, collectors, heads)) for group in groups))
        walk.restore_block(block)


def _receive(
    walk: BlockWalk,
    folder: WorkFolder | None,
    done: Callable[[Block], None],
    block: Block,
    solved: Solved[QuantizedLinear],
) -> None:
    """Put what workers sent back into a block."""
    layers: dict[str, QELinear] = {}
    for member, result in solved:
        layers |= _layers(walk.loaded.stored, member, result)
    if folder:
        folder.save(block.name, layers)
    _set_layers(walk, block, layers)
    done(block)


def _set_layers(walk: BlockWalk, block: Block, layers: dict[str, QELinear]) -> None:
    for name, layer in layers.items():
        set_module(walk.loaded.model, name, layer)
    walk.restore_block(block)


def _layers(stored: StoredWeights, member: Member, result: QuantizedLinear) -> dict[str, QELinear]:
    """The quantized layers of one problem."""
    result = result.to(CPU)
    if member.factors is not None:
        result = scaled_back(result, member.factors)
        check_result(member.name, result)
    layers = {}
    for number, part in zip(member.numbers, result.split(member.outputs), strict=True):
        name = member.group.names[number]
        bias: Tensor | None = member.group.linears[number].bias
        layers[name] = QELinear(part, None if bias is None else stored.value(f"{name}.bias", bias).float())
    return layers
