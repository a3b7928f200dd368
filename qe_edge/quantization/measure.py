"""Measures the original model before its first layer is quantized: gradients, and the candidates of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qe_edge.budget.accounting import BitCount, add_counts
from qe_edge.budget.allocation import allocate
from qe_edge.budget.model import AdapterSize, Budget, Candidate, Offer, check_affordable
from qe_edge.budget.sizes import predicted_bits
from qe_edge.calibration.modality import modality_ratios
from qe_edge.calibration.sensitivity import (
    LossKind,
    Sensitivity,
    load_sensitivities,
    output_gradients,
    save_sensitivities,
)
from qe_edge.methods import Method
from qe_edge.methods.checked import candidates_of
from qe_edge.models.family import Block, Encoded
from qe_edge.models.groups import LinearGroup, linear_groups
from qe_edge.models.streaming import Chain
from qe_edge.quantization.executors import FarBlocks, Solved, Workers
from qe_edge.quantization.problems import Measured, Member, Problems
from qe_edge.quantization.walk import BlockWalk, parameters_of
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.atomic import atomic_file
from qe_edge.system.heap import trim_heap
from qe_edge.system.progress import Part, Progress, track

GRADIENTS = "gradients.safetensors"  # in the work folder


def measure(
    walk: BlockWalk,
    recipe: Recipe,
    method: Method[Any],
    rotation: BitCount,
    folder: WorkFolder | None,
    progress: Progress,
    workers: Workers | None = None,
) -> Measured:
    """Measure the statistics that the method and the budget need, and spend the budget.

    Args:
        walk: The model's blocks with their calibration inputs.
        recipe: The resolved recipe.
        method: Its method.
        rotation: Bits that a rotation puts beside the layers.
        folder: Folder that keeps the measurements, so that a stopped run can be resumed; None keeps nothing.
        progress: Where to report progress.
        workers: Who measures candidates; None for this process.

    Raises:
        RecipeError: If the budget cannot be met.
        QEError: As calibration raises.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.job import encoded_batches, make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> from qe_edge.system.device import CPU
        >>> from qe_edge.system.progress import Silent
        >>> loaded, recipe = load_model("demo"), make_recipe(method="gptq")
        >>> batches = encoded_batches(loaded, make_job("demo", recipe).samples[:1])
        >>> walk = BlockWalk(loaded, recipe.modules, batches, CPU)
        >>> measured = measure(walk, recipe, recipe.build_method(), BitCount(), None, Silent())
        >>> measured.choices, measured.gradients  # gptq has no budget and needs no gradients
        ({}, {})
    """
    left = affordable(walk, recipe, rotation) if recipe.budget else None
    chosen = [block for chain in walk.chains for block in chain]
    blocks = [block for block in chosen if block.group == "language"]
    weighs = method.needs_gradients and bool(blocks)
    tokens = method.weighs_tokens
    gradients: dict[str, Sensitivity] = {}
    if needs_gradients(recipe, method, chosen):
        gradients = _gradients(walk, recipe, method, folder, Part(progress, sum(map(parameters_of, chosen))))
    measured = Measured(
        gradients=gradients if left else {},
        modality_ratios=modality_ratios(blocks, gradients) if weighs else {},
        token_energy={name: found.token_energy for name, found in gradients.items()} if tokens else {},
    )
    if left is None:
        return measured
    problems = Problems(recipe, method, walk.device, measured, walk.loaded.stored)
    offers = _offers(walk, problems, folder, progress, workers)
    return replace(measured, choices=allocate(offers, left))


def needs_gradients(recipe: Recipe, method: Method[Any], blocks: Sequence[Block]) -> bool:
    """Whether gradients are measured, for the budget or the method.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> recipe = make_recipe(method="gptq")
        >>> needs_gradients(recipe, recipe.build_method(), [])
        False
    """
    language = any(block.group == "language" for block in blocks)
    return bool(recipe.budget) or method.weighs_tokens or (method.needs_gradients and language)


def affordable(walk: BlockWalk, recipe: Recipe, rotation: BitCount) -> Budget:
    """The budget that is left for the layers. A budget that cannot be met is refused before anything is measured.

    Args:
        walk: The model's blocks.
        recipe: The resolved recipe, with a budget.
        rotation: Bits that a rotation puts beside the layers.

    Raises:
        RecipeError: If the budget cannot be met.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.job import encoded_batches, make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> from qe_edge.system.device import CPU
        >>> recipe = make_recipe(method="qe", budget={"bits": 5})
        >>> loaded = load_model("demo")
        >>> batches = encoded_batches(loaded, make_job("demo", recipe).samples[:1])
        >>> walk = BlockWalk(loaded, recipe.modules, batches, CPU)
        >>> affordable(walk, recipe, BitCount()).bits
        5.0
    """
    scheme = recipe.get_scheme()
    cheapest = scheme.with_grid(scheme.budget_grids()[0])
    least = add_counts(
        predicted_bits(linear.out_features, linear.in_features, cheapest, AdapterSize())
        for group in _groups(walk)
        for linear in group.linears
    )
    total = add_counts((least, rotation))
    check_affordable(recipe.budget, total.weights, total.stored_bits * total.weights, total.read)
    return recipe.budget.without(rotation.read / total.weights)


def _gradients(
    walk: BlockWalk, recipe: Recipe, method: Method[Any], folder: WorkFolder | None, progress: Progress
) -> dict[str, Sensitivity]:
    """Gradients at the outputs of every layer."""
    if folder and folder.holds(GRADIENTS):
        with track(progress, "Gradients", 1) as tracked:
            tracked.advance(1, "gradients")
        return load_sensitivities(folder.path / GRADIENTS)
    found = measure_gradients(walk, recipe, method, walk.batches, progress)
    if folder:
        folder.expect(GRADIENTS)
        with atomic_file(folder.path / GRADIENTS) as part:
            save_sensitivities(part, found)
        folder.wrote(GRADIENTS)
    return found


def measure_gradients(
    walk: BlockWalk, recipe: Recipe, method: Method[Any], batches: Sequence[Encoded], progress: Progress
) -> dict[str, Sensitivity]:
    """Gradients at the outputs of every layer, on some of the samples.

    Args:
        walk: The model's blocks.
        recipe: The resolved recipe.
        method: Its method.
        batches: Encoded calibration samples.
        progress: Where to report progress.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.job import encoded_batches, make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> from qe_edge.system.device import CPU
        >>> from qe_edge.system.progress import Silent
        >>> recipe = make_recipe(method="qe", budget={"bits": 5})
        >>> loaded = load_model("demo")
        >>> batches = encoded_batches(loaded, make_job("demo", recipe).samples[:1])
        >>> walk = BlockWalk(loaded, recipe.modules, batches, CPU)
        >>> found = measure_gradients(walk, recipe, recipe.build_method(), batches, Silent())
        >>> len(found), min(one.energy for one in found.values()) > 0
        (28, True)
    """
    names = [name for group in _groups(walk) for name in group.names]
    loss: LossKind = "answers" if method.needs_gradients else "predictions"
    return output_gradients(walk.loaded, batches, names, progress, loss=loss, seed=recipe.seed, device=walk.device)


def _offers(
    walk: BlockWalk, problems: Problems, folder: WorkFolder | None, progress: Progress, workers: Workers | None
) -> dict[str, Offer]:
    """The candidates of every layer, measured on the original model."""
    gradients = problems.measured.gradients
    offers: dict[str, Offer] = {}

    def done(block: Block, solved: Solved[list[Candidate]]) -> None:
        found = _offers_of(gradients, solved)
        if folder:
            folder.save_offers(block.name, found)
        known(block, found)

    def known(block: Block, found: Mapping[str, Offer]) -> None:
        offers.update(found)
        trim_heap()
        progress.advance(walk.sizes[block.name], f"{block.name}: measuring")

    far = FarBlocks(workers, problems.method, candidates_of, done) if workers else None
    for chain, position, block in walk:
        before = folder.load_offers(block.name) if folder else None
        if not before and not far:
            done(block, _candidates(walk, problems, chain, position, block))
            continue
        groups = linear_groups(block, walk.loaded.family.siblings)
        with walk.original(block):
            collectors = {} if before else problems.collectors(groups)
            walk.hand_on(chain, position, walk.run(chain, position, block, collectors))
            if far and not before:
                far.send(block, (list(problems.of_group(group, collectors)) for group in groups))
        if before:
            known(block, before)
    if far:
        far.finish()
    return offers


def measure_block(walk: BlockWalk, problems: Problems, chain: Chain, position: int, block: Block) -> dict[str, Offer]:
    """The candidates of one block's layers, by name; its outputs are handed on.

    Args:
        walk: The walk that has come to the block.
        problems: Makes the layers' problems; it knows their gradients.
        chain: The block's chain.
        position: The block's place in it.
        block: The block.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.job import encoded_batches, make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> from qe_edge.system.device import CPU
        >>> from qe_edge.system.progress import Silent
        >>> recipe = make_recipe(method="qe", budget={"bits": 5})
        >>> loaded = load_model("demo")
        >>> batches = encoded_batches(loaded, make_job("demo", recipe).samples[:1])
        >>> walk = BlockWalk(loaded, recipe.modules, batches, CPU)
        >>> gradients = measure_gradients(walk, recipe, recipe.build_method(), batches, Silent())
        >>> problems = Problems(recipe, recipe.build_method(), CPU, Measured(gradients=gradients))
        >>> offers = measure_block(walk, problems, *next(iter(walk)))
        >>> len(offers), all(len(offer.candidates) > 1 for offer in offers.values())
        (4, True)
    """
    return _offers_of(problems.measured.gradients, _candidates(walk, problems, chain, position, block))


def _candidates(
    walk: BlockWalk, problems: Problems, chain: Chain, position: int, block: Block
) -> Solved[list[Candidate]]:
    groups = linear_groups(block, walk.loaded.family.siblings)
    with walk.original(block):
        collectors = problems.collectors(groups)
        walk.hand_on(chain, position, walk.run(chain, position, block, collectors))
        walk.release_linears(groups)
        return list(problems.each(groups, collectors, candidates_of))


def _offers_of(gradients: Mapping[str, Sensitivity], solved: Solved[list[Candidate]]) -> dict[str, Offer]:
    return {
        member.name: Offer(sum(member.weights), _sensitivity(gradients, member), candidates)
        for member, candidates in solved
    }


def _sensitivity(gradients: Mapping[str, Sensitivity], member: Member) -> float:
    """The factor that makes a problem's losses comparable with the losses of other layers."""
    found = [gradients[member.group.names[number]].energy for number in member.numbers]
    return float(np.average(found, weights=member.outputs))


def _groups(walk: BlockWalk) -> list[LinearGroup]:
    blocks = [block for chain in walk.chains for block in chain]
    return [group for block in blocks for group in linear_groups(block, walk.loaded.family.siblings)]
