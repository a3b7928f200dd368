"""Quantizing a model: block by block, on statistics of its own inputs, resumable."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.accounting import add_counts
from qe_edge.atomic import atomic_file
from qe_edge.blas import blas_threads
from qe_edge.budget import Offer, allocate, check_affordable, output_factors, relative_sensitivity, scaled_back
from qe_edge.calibration.modality import modality_ratios
from qe_edge.calibration.sensitivity import (
    IMAGE,
    Sensitivity,
    has_loss,
    load_sensitivities,
    output_gradients,
    save_sensitivities,
    token_kinds,
)
from qe_edge.calibration.sources import hash_samples, load_samples
from qe_edge.calibration.statistics import (
    InputStatistics,
    StatisticsCollector,
    StatisticsRequest,
    collect_statistics,
)
from qe_edge.errors import CalibrationError, NumericalError, RecipeError
from qe_edge.heap import trim_heap
from qe_edge.linear import QELinear, QuantizedLinear
from qe_edge.methods import LinearProblem, Method
from qe_edge.methods.base import AdapterSize, Choice
from qe_edge.models.family import Block, Encoded, Sample
from qe_edge.models.loading import LoadedModel, load_outside_blocks
from qe_edge.models.stored import StoredWeights
from qe_edge.progress import Progress, Silent, track
from qe_edge.recipe import Recipe
from qe_edge.sizes import predicted_bits
from qe_edge.streaming import Chain, Streamer, chains_of, run_block
from qe_edge.workfolder import WorkFolder

BATCH = 8  # calibration samples per forward pass


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input.

    Attributes:
        names: Full dotted names, in module order.
        linears: The layers.
    """

    names: list[str]
    linears: list[nn.Linear]


def quantize(
    model: str | LoadedModel,
    recipe: Recipe,
    calibration: str | Sequence[Sample] | None = None,
    *,
    work: Path | None = None,
    resume: bool = False,
    on_disk: bool = False,
    progress: Progress | None = None,
) -> tuple[LoadedModel, Recipe]:
    """Quantize a model.

    A model given by name stays on disk but for what is outside its blocks and the block at work; only a method that
    transforms the whole model beforehand (QuaRot) has all of it read. Budgets read every block once more. Gradients
    (budgets, MBQ) read every block twice for every batch of `BATCH` samples.

    Args:
        model: "demo", a folder, a hub id, or a model in memory (which is changed in place).
        recipe: What to do.
        calibration: Source name, or the samples themselves; None takes the recipe's source.
        work: Folder for finished blocks, so that a stopped run can be resumed.
        resume: Continue from the finished blocks in `work`.
        on_disk: Leave finished blocks in `work`, and blocks that are not quantized in the model's files, as
            placeholders that `save_quantized` follows. Otherwise the model that is returned is all in memory.
        progress: Where to report progress.

    Returns:
        The model with `QELinear` layers, and the resolved recipe with the hash of the calibration data.

    Raises:
        QEError: Of the kinds that its parts raise: unknown model, bad recipe, NaN in weights, no calibration data.
    """
    on_disk = on_disk and work is not None
    loaded = load_outside_blocks(model) if isinstance(model, str) else model
    if calibration is None or isinstance(calibration, str):
        samples = load_samples(calibration or recipe.calibration.source, recipe.calibration.samples, recipe.seed)
    else:
        samples = list(calibration)
    if not samples:
        raise CalibrationError("There is no calibration sample.", "Pass at least one picture with a question, or text.")
    spec = replace_calibration(recipe, calibration, samples)
    blocks = loaded.family.blocks(loaded.model)
    check_modules(blocks, spec.modules)
    chosen = [block for block in blocks if block.group in spec.modules]
    check_weights(loaded, chosen)
    fingerprint = model_fingerprint(loaded) if work else ""
    method = spec.build_method()
    if method.transforms_model:
        loaded.stored.read("", loaded.model)
        loaded.stored = StoredWeights()  # the files hold what the model was before
        method.transform(loaded, spec.seed)
    folder = WorkFolder.open(work, spec, fingerprint, resume=resume) if work else None
    total = sum(parameter.numel() for block in chosen for parameter in block.module.parameters())
    total *= 2 if spec.budget else 1  # measured first, then quantized
    with track(progress or Silent(), "Quantizing", total) as tracked:
        _Run(loaded, spec, samples, folder, tracked, on_disk=on_disk).execute()
    if not on_disk:
        loaded.stored.read("", loaded.model)
    return loaded, spec


def check_modules(blocks: Sequence[Block], modules: Sequence[str]) -> None:
    """Refuse modules that a model with these blocks does not have.

    Raises:
        RecipeError: Naming those that it has.
    """
    present = list(dict.fromkeys(block.group for block in blocks))
    missing = sorted(set(modules) - set(present))
    if missing:
        raise RecipeError(
            f"The model has no {missing[0]} module.", f"Choose among those that it has: --modules {','.join(present)}."
        )


def quantize_linear(weight: Tensor, tokens: Tensor, recipe: Recipe, bias: Tensor | None = None) -> QELinear:
    """Quantize one linear layer.

    Args:
        weight: `[out, in]`.
        tokens: `[n, in]` calibration inputs.
        recipe: Method, scheme, options and seed.
        bias: `[out]` or None.

    Raises:
        NumericalError: If the weight is not finite or too many tokens are not.
        RecipeError: If the shapes do not fit each other.
    """
    if weight.ndim != 2 or tokens.ndim != 2 or tokens.shape[1] != weight.shape[1]:
        raise RecipeError(
            f"Weight {tuple(weight.shape)} and tokens {tuple(tokens.shape)} do not fit each other.",
            "Pass a weight [out, in] and tokens [n, in].",
        )
    method = recipe.build_method()
    request = method.request(*weight.shape)
    statistics = collect_statistics("linear", weight, tokens, request, recipe.seed) if request else None
    problem = LinearProblem("linear", weight.detach().float(), recipe.get_scheme(), statistics, recipe.seed)
    return QELinear(method.quantize(problem), bias)


def replace_calibration(recipe: Recipe, calibration: object, samples: Sequence[Sample]) -> Recipe:
    """The resolved recipe with what the calibration data really were."""
    source = calibration if isinstance(calibration, str) else recipe.calibration.source
    if calibration is not None and not isinstance(calibration, str):
        source = "samples passed from Python"
    spec = recipe.calibration.model_copy(
        update={"source": source, "samples": len(samples), "sha256": hash_samples(samples)}
    )
    return recipe.resolved().model_copy(update={"calibration": spec})


def check_weights(loaded: LoadedModel, blocks: Sequence[Block]) -> None:
    """Refuse NaN and infinity before any long work.

    Raises:
        NumericalError: Naming the first layer that holds one.
    """
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            if not bool(torch.isfinite(loaded.stored.value(full, parameter)).all()):
                raise NumericalError(
                    f"The weights '{full}' hold NaN or infinity.",
                    "The checkpoint is damaged or diverged in training; get a sound one.",
                )


def linear_groups(block: Block, siblings: Sequence[Sequence[str]]) -> list[LinearGroup]:
    """Linear layers of a block, those that read the same input together."""
    linears = {name: module for name, module in block.module.named_modules() if isinstance(module, nn.Linear)}
    groups: list[LinearGroup] = []
    seen: set[str] = set()
    for name in linears:
        if name in seen:
            continue
        parent, _, leaf = name.rpartition(".")
        family = next((names for names in siblings if leaf in names), (leaf,))
        names = [f"{parent}.{other}" if parent else other for other in family]
        names = [other for other in names if other in linears]
        seen.update(names)
        groups.append(LinearGroup([f"{block.name}.{other}" for other in names], [linears[other] for other in names]))
    return groups


def model_fingerprint(loaded: LoadedModel) -> str:
    """Hash of the model's configuration and of every tensor's shape and first values."""
    digest = hashlib.sha256(loaded.family.config.to_json_string(use_diff=False).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(loaded.stored.value(name, tensor).reshape(-1)[:64].float().numpy().tobytes())
    return digest.hexdigest()


class _Run:
    """One quantization run over the chains up to the last one that the recipe selects."""

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe,
        samples: Sequence[Sample],
        folder: WorkFolder | None,
        progress: Progress,
        *,
        on_disk: bool,
    ) -> None:
        self.loaded = loaded
        self.recipe = recipe
        self.method: Method = recipe.build_method()
        self.blocks = loaded.family.blocks(loaded.model)
        chains = chains_of(self.blocks)
        while chains and chains[-1][0].group not in recipe.modules:
            chains.pop()
        self.walked = chains
        self.chains = [chain for chain in chains if chain[0].group in recipe.modules]
        self.folder = folder
        self.on_disk = on_disk
        self.progress = progress
        self.dtypes = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
        family, processor = loaded.family, loaded.processor
        self.batches: list[Encoded] = [
            family.encode(processor, samples[start : start + BATCH], answers=True)
            for start in range(0, len(samples), BATCH)
        ]
        self.choices: dict[str, Choice] = {}
        self.modality_ratios: dict[str, float] = {}
        self.gradients: dict[str, Sensitivity] = {}

    def execute(self) -> None:
        self._float_outside_blocks()
        if self.method.needs_gradients:
            self._weigh_modalities()
        if self.recipe.budget:
            self._spend_budget()
        self._walk(self._block)
        restore_dtypes(self.loaded.model, self.dtypes)

    def _weigh_modalities(self) -> None:
        """Measure what errors on image tokens cost, where those and answers go through the same layers."""
        blocks = [block for chain in self.chains for block in chain if block.group == "language"]
        if blocks:
            self.modality_ratios = modality_ratios(blocks, self._gradients())

    def _walk(self, visit: Callable[[Chain, int, Block], None]) -> None:
        """Visit every selected block in data-flow order with its recorded inputs; the others before them only run."""
        streamer = Streamer(self.loaded.model, self.walked, len(self.batches), self._forward)
        for index in range(len(self.walked)):
            chain = streamer.record(index)
            for position, block in enumerate(chain.blocks):
                if block.group in self.recipe.modules:
                    visit(chain, position, block)
                    continue
                with self._original(block):
                    chain.hidden = self._run(chain, position, block, [], {})
                chain.calls[position] = []
            streamer.finish(chain)

    @contextmanager
    def _original(self, block: Block) -> Iterator[None]:
        """A block is in memory and in float32 while the context is open; afterwards it is as it was before."""
        with self.loaded.stored.held(block.name, block.module):
            block.module.float()
            yield
            self._restore_block(block)

    def _restore_block(self, block: Block) -> None:
        names = block.module.state_dict()
        dtypes = {name: self.dtypes[f"{block.name}.{name}"] for name in names if f"{block.name}.{name}" in self.dtypes}
        restore_dtypes(block.module, dtypes)

    def _spend_budget(self) -> None:
        """Measure what every layer offers on the original model, and choose inside the budget."""
        offers: dict[str, Offer] = {}
        self._check_budget()
        self.gradients = self._gradients()

        def visit(chain: Chain, position: int, block: Block) -> None:
            weight = sum(parameter.numel() for parameter in block.module.parameters())
            groups = linear_groups(block, self.loaded.family.siblings)
            known = self.folder.load_offers(block.name) if self.folder else None
            with self._original(block):
                collectors = {} if known else self._collectors(groups)
                chain.hidden = self._run(chain, position, block, groups, collectors)
                chain.calls[position] = []
                found = known or self._offers(groups, collectors)
            if self.folder and not known:
                self.folder.save_offers(block.name, found)
            offers.update(found)
            trim_heap()
            self.progress.advance(weight, f"{block.name}: measuring")

        self._walk(visit)
        self.choices = allocate(offers, self.recipe.budget)

    def _check_budget(self) -> None:
        """Refuse a budget that cannot be met, before anything is measured."""
        scheme, blocks = self.recipe.get_scheme(), [block for chain in self.chains for block in chain]
        groups = [group for block in blocks for group in linear_groups(block, self.loaded.family.siblings)]
        least = add_counts(
            predicted_bits(linear.out_features, linear.in_features, scheme, AdapterSize())
            for group in groups
            for linear in group.linears
        )
        check_affordable(self.recipe.budget, least.weights, least.stored_bits * least.weights, least.read)

    def _offers(self, groups: list[LinearGroup], collectors: dict[int, StatisticsCollector]) -> dict[str, Offer]:
        """Candidates of every linear problem of a block."""
        offers = {}
        for number, group in enumerate(groups):
            measured = collectors[number].finish()
            for position, (members, weight) in enumerate(self._problems(group)):
                problem = self._problem(group, members, weight, measured[position])
                with blas_threads(max(weight.shape)):
                    candidates = self.method.candidates(problem)
                offers[problem.name] = Offer(weight.numel(), self._sensitivity(group, members, problem), candidates)
        return offers

    def _gradients(self) -> dict[str, Sensitivity]:
        """Gradients at the outputs of every layer; none for a model without a loss."""
        if not has_loss(self.loaded):
            return {}
        path = self.folder.path / "gradients.safetensors" if self.folder else None
        if path and path.is_file():
            return load_sensitivities(path)
        blocks = [block for chain in self.chains for block in chain]
        groups = [group for block in blocks for group in linear_groups(block, self.loaded.family.siblings)]
        found = output_gradients(self.loaded, self.batches, [name for group in groups for name in group.names])
        if path:
            with atomic_file(path) as part:
                save_sensitivities(part, found)
        return found

    def _sensitivity(self, group: LinearGroup, members: list[int], problem: LinearProblem) -> float:
        """What makes a problem's losses comparable with those of other layers."""
        if not self.gradients:
            return relative_sensitivity(problem)
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
            weight,
            self.recipe.get_scheme(),
            own,
            self._seed(name),
            self.choices.get(name),
            self.modality_ratios.get(name, 1.0),
        )

    def _forward(self, batch: int) -> object:
        return self.loaded.model(**self.loaded.family.torch_inputs(self.batches[batch]), use_cache=False)

    def _float_outside_blocks(self) -> None:
        """Everything that is not streamed computes in float32; streamed blocks follow one by one."""
        streamed = {block.module for block in self.blocks}

        def visit(module: nn.Module) -> None:
            if module in streamed:
                return
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()
            for child in module.children():
                visit(child)

        visit(self.loaded.model)

    def _block(self, chain: Chain, position: int, block: Block) -> None:
        weight = sum(parameter.numel() for parameter in block.module.parameters())
        self.loaded.stored.read(block.name, block.module)
        block.module.float()
        groups = linear_groups(block, self.loaded.family.siblings)
        finished = self.folder.load(block.name) if self.folder else None
        collectors = {} if finished else self._collectors(groups)
        outputs = self._run(chain, position, block, groups, collectors)
        layers = finished or {}
        if not finished:
            for number, group in enumerate(groups):
                layers.update(self._quantize_group(group, collectors.get(number)))
            if self.folder:
                self.folder.save(block.name, layers)
        self._install(layers)
        if self.recipe.flow == "sequential":
            outputs = self._run(chain, position, block, [], {})
        chain.hidden, chain.calls[position] = outputs, []
        self._restore_block(block)
        if self.on_disk and self.folder:
            self.loaded.stored.wrote(self.folder.sources(block.name))
            self.loaded.stored.release(block.name, block.module)
        trim_heap()
        self.progress.advance(weight, block.name)

    def _collectors(self, groups: list[LinearGroup]) -> dict[int, StatisticsCollector]:
        """One collector per shared input, or none if the method wants no statistics."""
        collectors = {}
        for number, group in enumerate(groups):
            weights = [problem for _, problem in self._problems(group)]
            requests = [request for weight in weights if (request := self.method.request(*weight.shape))]
            if requests:
                joint = StatisticsRequest(
                    gram=any(request.gram for request in requests),
                    tokens=max(request.tokens for request in requests),
                    important=max(request.important for request in requests),
                )
                name, width = group.names[0], group.linears[0].in_features
                collectors[number] = StatisticsCollector(name, width, weights, joint, self._seed(name))
        return collectors

    def _problems(self, group: LinearGroup) -> list[tuple[list[int], Tensor]]:
        """Members and weight of every linear problem of a group: one stacked problem, or one per layer."""
        weights = [linear.weight.detach().float() for linear in group.linears]
        together = [list(range(len(weights)))] if self.method.stack_siblings else [[i] for i in range(len(weights))]
        problems = []
        for members in together:
            weight, factors = torch.cat([weights[member] for member in members]), self._output_factors(group, members)
            problems.append((members, weight if factors is None else weight * factors.unsqueeze(1)))
        return problems

    def _run(
        self,
        chain: Chain,
        position: int,
        block: Block,
        groups: list[LinearGroup],
        collectors: dict[int, StatisticsCollector],
    ) -> list[Tensor]:
        """Run a block on every batch, feeding the collectors; returns its outputs."""
        valid: list[Tensor | None] = [None]
        kinds: list[Tensor | None] = [None]

        def feed(collector: StatisticsCollector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                tokens = inputs[0]
                mask = valid[0]
                if mask is None:
                    collector.update(tokens, torch.full(tokens.shape[:-1], IMAGE, dtype=torch.int8))
                else:
                    collector.update(tokens if bool(mask.all()) else tokens[mask], kinds[0])

            return hook

        handles = [
            groups[number].linears[0].register_forward_pre_hook(feed(collector))
            for number, collector in collectors.items()
        ]
        try:
            outputs = []
            for batch, hidden in enumerate(chain.hidden):
                if block.group == "language":
                    valid[0] = torch.from_numpy(self.batches[batch].attention_mask).bool()
                    kinds[0] = torch.from_numpy(token_kinds(self.batches[batch]))[valid[0]]
                outputs.append(run_block(block.module, hidden, chain.calls[position][batch]))
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _quantize_group(self, group: LinearGroup, collector: StatisticsCollector | None) -> dict[str, QELinear]:
        """Quantize the layers that share an input."""
        measured = collector.finish() if collector else None
        layers: dict[str, QELinear] = {}
        for number, (members, weight) in enumerate(self._problems(group)):
            problem = self._problem(group, members, weight, measured[number] if measured else None)
            with blas_threads(max(weight.shape)):
                result: QuantizedLinear = self.method.quantize(problem)
            factors = self._output_factors(group, members)
            if factors is not None:
                result = scaled_back(result, factors)
            parts = result.split([group.linears[member].out_features for member in members])
            for member, part in zip(members, parts, strict=True):
                layers[group.names[member]] = QELinear(part, group.linears[member].bias)
        return layers

    def _own_statistics(self, statistics: InputStatistics, weight: Tensor) -> InputStatistics:
        """Cut the jointly measured top-k lists to this problem's own k (the lists are sorted, best first)."""
        request = self.method.request(*weight.shape)
        if request is None or statistics.importance is None:
            return statistics
        lists = statistics.importance[:, : request.important] if request.important else None
        return replace(statistics, importance=lists)

    def _install(self, layers: dict[str, QELinear]) -> None:
        for name, layer in layers.items():
            set_module(self.loaded.model, name, layer)

    def _seed(self, name: str) -> int:
        """A seed of its own for every layer, whatever the order of work."""
        return (self.recipe.seed + zlib.crc32(name.encode())) % 2**31


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def restore_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Bring everything that was not quantized back to its original precision."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = dtypes.get(name)
        if wanted is not None and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
