"""Quantizing a model: block by block, on statistics of its own inputs, resumable."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.budget.accounting import add_counts, rotation_bits
from qe_edge.budget.allocation import allocate, output_factors, scaled_back
from qe_edge.budget.model import AdapterSize, Budget, Choice, Offer, check_affordable
from qe_edge.budget.sizes import predicted_bits
from qe_edge.calibration.modality import modality_ratios
from qe_edge.calibration.sensitivity import (
    Of,
    Sensitivity,
    load_sensitivities,
    output_gradients,
    save_sensitivities,
)
from qe_edge.calibration.sources import check_reached, hash_samples, load_samples
from qe_edge.calibration.statistics import InputStatistics, StatisticsCollector, StatisticsRequest
from qe_edge.layers.linear import QELinear
from qe_edge.layers.magnitudes import check_result
from qe_edge.methods import LinearProblem, Method
from qe_edge.methods.checked import candidates_of, quantize_problem
from qe_edge.models.export_limits import check_exportable
from qe_edge.models.family import Block, Encoded, Sample
from qe_edge.models.fingerprints import model_parts
from qe_edge.models.groups import LinearGroup, linear_groups, set_module
from qe_edge.models.loading import LoadedModel, load_outside_blocks
from qe_edge.models.precision import make_float32
from qe_edge.models.rotation import rotate_language_model
from qe_edge.models.streaming import Chain
from qe_edge.quantization.preflight import check_modules, check_weights, note_groups
from qe_edge.quantization.run_record import current_environment, make_record
from qe_edge.quantization.walk import BlockWalk
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.atomic import atomic_file
from qe_edge.system.blas import one_lapack_thread
from qe_edge.system.device import CPU, choose_device, fitting
from qe_edge.system.errors import CalibrationError
from qe_edge.system.heap import trim_heap
from qe_edge.system.locks import hold
from qe_edge.system.parallel import gains_by_one_thread, map_threads
from qe_edge.system.progress import Progress, Silent, track

GRADIENTS = "gradients.safetensors"  # in the work folder
LAYER, SMALLER = "one layer and its calibration tokens", "Choose --device cpu, or a smaller option 'tokens'."
BATCH = 8  # calibration samples per forward pass
Result = TypeVar("Result")


def quantize(
    model: str | LoadedModel,
    recipe: Recipe,
    calibration: str | Sequence[Sample] | None = None,
    *,
    work: Path | None = None,
    resume: bool = False,
    on_disk: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[LoadedModel, Recipe]:
    """Quantize a model.

    A model given by name stays on disk but for what is outside its blocks and the block at work. Budgets read every
    block once more. Gradients (budgets, MBQ) read every block twice for every batch of `BATCH` samples.

    Args:
        model: "demo", a folder, a hub id, or a model in memory (which is changed in place).
        recipe: What to do.
        calibration: Source name, or the samples themselves; None takes the recipe's source.
        work: Folder for finished blocks, so that a stopped run can be resumed.
        resume: Continue from the finished blocks in `work`, if they were made from the same.
        on_disk: Leave finished blocks in `work`, and blocks that are not quantized in the model's files, as
            placeholders that `save_quantized` follows. Otherwise the model that is returned is all in memory.
        device: Where blocks run and, of the methods qe, gptq and quarot, all of a layer's work is done from its input
            to its codes: "auto" (a GPU if there is one), "cpu", "cuda". Of GPUs only an H100 was tried.
        progress: Where to report progress.

    Returns:
        The model with `QELinear` layers, and the resolved recipe with the hash of the calibration data.

    Raises:
        QEError: Of the kinds that its parts raise: unknown model, bad recipe, NaN in weights, no calibration data.
    """
    on_disk = on_disk and work is not None
    chosen_device = choose_device(device)
    loaded = load_outside_blocks(model) if isinstance(model, str) else model
    if calibration is None or isinstance(calibration, str):
        drawn = recipe.calibration
        samples = load_samples(calibration or drawn.source, drawn.samples, recipe.seed, asked=drawn.asks)
    else:
        samples = list(calibration)
    if not samples:
        raise CalibrationError("There is no calibration sample.", "Pass at least one picture with a question, or text.")
    spec = replace_calibration(recipe, calibration, samples)
    blocks = loaded.family.blocks(loaded.model)
    check_modules(blocks, spec.modules)
    check_reached(samples, spec.modules)
    check_exportable(loaded.family.config)
    chosen = [block for block in blocks if block.group in spec.modules]
    check_weights(loaded, chosen, spec.get_scheme().weight)
    note_groups(chosen, spec.grids)
    total = sum(_parameters(block) for block in chosen)
    total *= 2 if spec.budget else 1  # measured first, then quantized
    with ExitStack() as held:
        folder = None
        if work:
            held.enter_context(hold(work))
            run = make_record(model_parts(model), spec, current_environment(str(chosen_device)))
            folder = held.enter_context(WorkFolder.open(work, run, resume=resume).removed_if_useless())
        if spec.rotates:
            rotate_language_model(loaded, spec.seed)
        with track(progress or Silent(), "Quantizing", total) as tracked, fitting(chosen_device, LAYER, SMALLER):
            _Run(loaded, spec, samples, folder, tracked, chosen_device, on_disk=on_disk).execute()
    if not on_disk:
        loaded.stored.read("", loaded.model)
    return loaded, spec


def replace_calibration(recipe: Recipe, calibration: object, samples: Sequence[Sample]) -> Recipe:
    """The resolved recipe with what the calibration data really were."""
    source = calibration if isinstance(calibration, str) else recipe.calibration.source
    if calibration is not None and not isinstance(calibration, str):
        source = "samples passed from Python"
    spec = recipe.calibration.model_copy(
        update={"source": source, "samples": len(samples), "sha256": hash_samples(samples)}
    )
    return recipe.resolved().model_copy(update={"calibration": spec})


class _Run:
    """One quantization run over the chains up to the last one that the recipe selects."""

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe,
        samples: Sequence[Sample],
        folder: WorkFolder | None,
        progress: Progress,
        device: torch.device,
        *,
        on_disk: bool,
    ) -> None:
        self.loaded = loaded
        self.recipe = recipe
        self.method: Method = recipe.build_method()
        self.folder = folder
        self.on_disk = on_disk
        self.progress = progress
        self.device = device
        self.at_work = device if self.method.on_device else CPU  # where problems are solved
        family, processor = loaded.family, loaded.processor
        self.batches: list[Encoded] = [
            family.encode(processor, samples[start : start + BATCH], answers=True)
            for start in range(0, len(samples), BATCH)
        ]
        self.rotation = rotation_bits(loaded.model)  # in its own precision, before the walk makes it float32
        self.walk = BlockWalk(loaded, recipe.modules, self.batches, device)
        self.chains = self.walk.chains
        self.choices: dict[str, Choice] = {}
        self.modality_ratios: dict[str, float] = {}
        self.gradients: dict[str, Sensitivity] = {}

    def execute(self) -> None:
        if self.method.needs_gradients:
            self._weigh_modalities()
        if self.recipe.budget:
            self._spend_budget()
        for chain, position, block in self.walk:
            self._block(chain, position, block)
        self.walk.restore()

    def _weigh_modalities(self) -> None:
        """Measure what errors on image tokens cost, where those and answers go through the same layers."""
        blocks = [block for chain in self.chains for block in chain if block.group == "language"]
        if blocks:
            self.modality_ratios = modality_ratios(blocks, self._gradients())

    def _spend_budget(self) -> None:
        """Measure what every layer offers on the original model, and choose inside the budget."""
        offers: dict[str, Offer] = {}
        budget = self._check_budget()
        self.gradients = self._gradients()

        for chain, position, block in self.walk:
            groups = linear_groups(block, self.loaded.family.siblings)
            known = self.folder.load_offers(block.name) if self.folder else None
            with self.walk.original(block):
                collectors = {} if known else self._collectors(groups)
                outputs = self.walk.run(chain, position, block, collectors)
                self.walk.hand_on(chain, position, outputs)
                found = known or self._offers(groups, collectors)
            if self.folder and not known:
                self.folder.save_offers(block.name, found)
            offers.update(found)
            trim_heap()
            self.progress.advance(_parameters(block), f"{block.name}: measuring")
        self.choices = allocate(offers, budget)

    def _check_budget(self) -> Budget:
        """What layers may take of the budget; one that cannot be met is refused, before anything is measured."""
        scheme, blocks = self.recipe.get_scheme(), [block for chain in self.chains for block in chain]
        cheapest = scheme.on(scheme.budget_grids()[0])
        groups = [group for block in blocks for group in linear_groups(block, self.loaded.family.siblings)]
        least = add_counts(
            predicted_bits(linear.out_features, linear.in_features, cheapest, AdapterSize())
            for group in groups
            for linear in group.linears
        )
        total = add_counts((least, self.rotation))
        check_affordable(self.recipe.budget, total.weights, total.stored_bits * total.weights, total.read)
        return self.recipe.budget.without(self.rotation.read / total.weights)

    def _offers(self, groups: list[LinearGroup], collectors: dict[nn.Module, StatisticsCollector]) -> dict[str, Offer]:
        """Candidates of every linear problem of a block."""

        def measure(group: LinearGroup, members: list[int], problem: LinearProblem) -> tuple[str, Offer]:
            sensitivity = self._sensitivity(group, members)
            return problem.name, Offer(problem.weight.numel(), sensitivity, candidates_of(self.method, problem))

        return dict(self._each_problem(groups, collectors, measure))

    def _gradients(self) -> dict[str, Sensitivity]:
        """Gradients at the outputs of every layer."""
        if self.folder and self.folder.holds(GRADIENTS):
            return load_sensitivities(self.folder.path / GRADIENTS)
        blocks = [block for chain in self.chains for block in chain]
        groups = [group for block in blocks for group in linear_groups(block, self.loaded.family.siblings)]
        names = [name for group in groups for name in group.names]
        of: Of = "answers" if self.method.needs_gradients else "predictions"
        found = output_gradients(self.loaded, self.batches, names, of=of, seed=self.recipe.seed, device=self.device)
        if self.folder:
            self.folder.expect(GRADIENTS)
            with atomic_file(self.folder.path / GRADIENTS) as part:
                save_sensitivities(part, found)
            self.folder.wrote(GRADIENTS)
        return found

    def _sensitivity(self, group: LinearGroup, members: list[int]) -> float:
        """What makes a problem's losses comparable with those of other layers."""
        found = [self.gradients[group.names[member]] for member in members]
        outputs = [group.linears[member].out_features for member in members]
        return float(np.average([one.energy for one in found], weights=outputs))

    def _output_factors(self, group: LinearGroup, members: list[int]) -> Tensor | None:
        """Powers of two that weigh the outputs of a problem, where gradients are known."""
        if not self.gradients:
            return None
        channels = np.concatenate([self.gradients[group.names[member]].channels for member in members])
        return torch.from_numpy(output_factors(channels)).float()

    def _problem(
        self, group: LinearGroup, members: list[int], weight: Tensor, statistics: InputStatistics | None
    ) -> LinearProblem:
        """The linear problem of some members of a group."""
        name = group.names[members[0]]
        own = self._own_statistics(statistics, weight) if statistics else None
        return LinearProblem(
            name,
            weight.to(self.at_work),
            self.recipe.get_scheme(),
            own,
            self._seed(name),
            self.choices.get(name),
            self.modality_ratios.get(name, 1.0),
            self.at_work,
        )

    def _block(self, chain: Chain, position: int, block: Block) -> None:
        size = _parameters(block)
        self.loaded.stored.read(block.name, block.module)
        make_float32(block.module.modules())
        groups = linear_groups(block, self.loaded.family.siblings)
        finished = self.folder.load(block.name) if self.folder else None
        collectors = {} if finished else self._collectors(groups)
        outputs = self.walk.run(chain, position, block, collectors)
        layers = finished or {}
        if not finished:
            for quantized in self._each_problem(groups, collectors, self._quantize):
                layers.update(quantized)
            if self.folder:
                self.folder.save(block.name, layers)
        for name, layer in layers.items():
            set_module(self.loaded.model, name, layer)
        if self.recipe.flow == "sequential":
            outputs = self.walk.run(chain, position, block, {})
        self.walk.hand_on(chain, position, outputs)
        self.walk.restore_block(block)
        if self.on_disk and self.folder:
            self.loaded.stored.wrote(self.folder.sources(block.name))
            self.loaded.stored.release(block.name, block.module)
        trim_heap()
        self.progress.advance(size, block.name)

    def _collectors(self, groups: list[LinearGroup]) -> dict[nn.Module, StatisticsCollector]:
        """One collector per shared input, by the layer at which it listens; none if the method wants no statistics."""
        collectors: dict[nn.Module, StatisticsCollector] = {}
        for group in groups:
            weights = [problem for _, problem in self._problems(group)]
            requests = [request for weight in weights if (request := self.method.request(*weight.shape))]
            if requests:
                joint = StatisticsRequest(
                    gram=any(request.gram for request in requests),
                    tokens=max(request.tokens for request in requests),
                    important=max(request.important for request in requests),
                )
                name, first = group.names[0], group.linears[0]
                collectors[first] = StatisticsCollector(
                    name, first.in_features, weights, joint, self._seed(name), self.at_work
                )
        return collectors

    def _problems(self, group: LinearGroup) -> list[tuple[list[int], Tensor]]:
        """Members and weight of every linear problem of a group: one stacked problem, or one per layer."""
        weights = [linear.weight.detach().float() for linear in group.linears]
        problems = []
        for members in group.problems(stacked=self.method.stack_siblings):
            weight, factors = torch.cat([weights[member] for member in members]), self._output_factors(group, members)
            problems.append((members, weight if factors is None else weight * factors.unsqueeze(1)))
        return problems

    def _each_problem(
        self,
        groups: list[LinearGroup],
        collectors: dict[nn.Module, StatisticsCollector],
        work: Callable[[LinearGroup, list[int], LinearProblem], Result],
    ) -> Iterator[Result]:
        """`work` for every linear problem of a block: large groups one by one, the others side by side."""

        def run(group: LinearGroup) -> list[Result]:
            collector = collectors.pop(group.linears[0], None)
            measured = collector.finish() if collector else None
            results = []
            for number, (members, weight) in enumerate(self._problems(group)):
                problem = self._problem(group, members, weight, measured[number] if measured else None)
                results.append(work(group, members, problem))
            return results

        # where a device computes, threads would only wait for it
        apart = [group for group in groups if self.device == CPU and gains_by_one_thread(_weights(group))]
        for group in groups:
            if group not in apart:
                yield from run(group)
        apart.sort(key=lambda group: -_weights(group) * group.linears[0].in_features)  # the longest first
        with one_lapack_thread():
            for results in map_threads(run, apart):
                yield from results

    def _quantize(self, group: LinearGroup, members: list[int], problem: LinearProblem) -> dict[str, QELinear]:
        """The quantized layers of one problem."""
        result = quantize_problem(self.method, problem).to(CPU)
        factors = self._output_factors(group, members)
        if factors is not None:
            result = scaled_back(result, factors)
            check_result(problem.name, result)
        parts = result.split([group.linears[member].out_features for member in members])
        return {
            group.names[member]: QELinear(part, group.linears[member].bias)
            for member, part in zip(members, parts, strict=True)
        }

    def _own_statistics(self, statistics: InputStatistics, weight: Tensor) -> InputStatistics:
        """Cut the jointly measured top-k lists to this problem's own k (the lists are sorted, best first)."""
        request = self.method.request(*weight.shape)
        if request is None or statistics.importance is None:
            return statistics
        lists = statistics.importance[:, : request.important] if request.important else None
        return replace(statistics, importance=lists)

    def _seed(self, name: str) -> int:
        """A seed of its own for every layer, whatever the order of work."""
        return (self.recipe.seed + zlib.crc32(name.encode())) % 2**31


def _weights(group: LinearGroup) -> int:
    return sum(linear.weight.numel() for linear in group.linears)


def _parameters(block: Block) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())
