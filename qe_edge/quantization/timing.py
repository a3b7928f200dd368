"""How long a quantization takes: one block of every kind is quantized and thrown away.

Nothing else knows what a processor, a method and its options make of each other.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack

from torch import nn

from qe_edge.budget.accounting import BitCount, rotation_bits
from qe_edge.budget.allocation import allocate
from qe_edge.budget.model import Offer
from qe_edge.models.family import Block
from qe_edge.models.loading import load_outside_blocks
from qe_edge.models.rotation import rotate_language_model
from qe_edge.models.streaming import Chain
from qe_edge.quantization.head import quantize_head
from qe_edge.quantization.job import Job, encoded_batches
from qe_edge.quantization.measure import affordable, measure_block, measure_gradients, needs_gradients
from qe_edge.quantization.problems import Measured, Problems
from qe_edge.quantization.quantizer import LAYER, SMALLER, checked_blocks, quantize_block
from qe_edge.quantization.side_by_side import SideBySide
from qe_edge.quantization.walk import BlockWalk
from qe_edge.system.device import choose_device, fitting
from qe_edge.system.heap import trim_heap
from qe_edge.system.progress import Progress, Silent, track

QUICK = 2.0  # seconds: a block that takes less is measured once more, when everything has been used before

Work = Callable[[Chain, int, Block], None]
Kind = tuple[str, tuple[tuple[str, int, int], ...]]


def predicted_seconds(job: Job, *, device: str = "auto", progress: Progress | None = None) -> float:
    """Seconds that a job takes here, without its files: one block of every kind is quantized, others let data pass.

    Gradients are measured on one batch of samples.

    Args:
        job: What is to be done, with a method that does not train a whole model.
        device: As of `qe_edge.quantize`.
        progress: Where to report progress.

    Raises:
        QEError: As `qe_edge.quantize`.

    Example:
        >>> from qe_edge.quantization.job import make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> job = make_job("demo", make_recipe(method="rtn", calibration={"samples": 2}))
        >>> 0 < predicted_seconds(job, device="cpu") < 60
        True
    """
    recipe, method = job.recipe, job.recipe.build_method()
    chosen_device, begun = choose_device(device), time.perf_counter()
    loaded = load_outside_blocks(str(job.model))
    blocks = checked_blocks(loaded, job)
    if recipe.rotates:
        rotate_language_model(loaded, recipe.seed)
    rotation = rotation_bits(loaded.model)  # in its own precision, before the walk makes it float32
    batches = encoded_batches(loaded, job.samples)
    walk = BlockWalk(loaded, recipe.modules, batches, chosen_device, to_the_end=recipe.head_grid is not None)
    seconds = time.perf_counter() - begun
    gradients = needs_gradients(recipe, method, blocks)
    kinds = len({_kind(block) for block in blocks})
    with ExitStack() as stack:
        stack.enter_context(fitting(chosen_device, LAYER, SMALLER))
        tracked = stack.enter_context(
            track(progress or Silent(), "Measuring the time", kinds * (1 + bool(recipe.budget)) + gradients)
        )
        measured, among, spent = _measured(walk, job, rotation, tracked, gradients=gradients)
        seconds += spent
        problems = Problems(recipe, method, walk.device, measured, loaded.stored)
        both = SideBySide(walk, problems) if method.sees_both_models else None

        last: Chain | None = None

        def solve(chain: Chain, position: int, block: Block) -> None:
            nonlocal last
            last = chain
            quantize_block(walk, problems, both, None, chain, position, block)
            loaded.stored.release(block.name, block.module)

        seconds += _walked(walk, solve, tracked, among)[0]
        if recipe.head_grid is not None and last is not None:
            begun = time.perf_counter()
            quantize_head(loaded, recipe.head_grid, last.hidden, [batches[i].attention_mask for i in last.batches])
            seconds += time.perf_counter() - begun
    return seconds


def _measured(
    walk: BlockWalk, job: Job, rotation: BitCount, progress: Progress, *, gradients: bool
) -> tuple[Measured, set[str] | None, float]:
    """What is measured before the first layer is quantized, the blocks that have it (None: all), and the seconds."""
    recipe, method = job.recipe, job.recipe.build_method()
    measured, seconds = Measured(), 0.0
    if gradients:
        begun = time.perf_counter()
        found = measure_gradients(walk, recipe, method, walk.batches[:1], Silent())
        seconds += len(walk.batches) * (time.perf_counter() - begun)
        progress.advance(1, "gradients")
        # what one batch tells of tokens is of no use for all
        measured = Measured(gradients=found if recipe.budget else {})
    if not recipe.budget:
        return measured, None, seconds
    problems = Problems(recipe, method, walk.device, measured, walk.loaded.stored)
    offers: dict[str, Offer] = {}

    def offer(chain: Chain, position: int, block: Block) -> None:
        offers.update(measure_block(walk, problems, chain, position, block))

    spent, among = _walked(walk, offer, progress)
    left = affordable(walk, recipe, rotation)
    return Measured(measured.gradients, choices=allocate(offers, left)), among, seconds + spent


def _walked(
    walk: BlockWalk, work: Work, progress: Progress, among: Collection[str] | None = None
) -> tuple[float, set[str]]:
    """Seconds of a walk in which every block does the `work`, from one block of every kind, or two quick ones.

    Args:
        walk: The walk.
        work: What is to be done with a block.
        progress: Where to report progress.
        among: The blocks that may be measured; None for all.

    Returns:
        The seconds, and the blocks that were measured.
    """
    names: set[str] = set()
    left: dict[Kind, list[float]] = defaultdict(list)
    counted: Counter[Kind] = Counter()
    begun, apart = time.perf_counter(), 0.0
    for chain, position, block in walk:
        kind, entered = _kind(block), time.perf_counter()
        counted[kind] += 1
        wanted = not left[kind] or (len(left[kind]) == 1 and left[kind][0] < QUICK)
        if wanted and (among is None or block.name in among):
            names.add(block.name)
            if not left[kind]:
                progress.advance(1, block.name)
            work(chain, position, block)
            trim_heap()
            left[kind].append(time.perf_counter() - entered)
        else:
            walk.hand_on(chain, position, chain.hidden)
        apart += time.perf_counter() - entered
    others = time.perf_counter() - begun - apart  # records inputs, runs blocks that are not quantized
    return others + sum(counted[kind] * times[-1] for kind, times in left.items()), names


def _kind(block: Block) -> Kind:
    """What blocks have in common that take the same time."""
    linears = ((name, part) for name, part in block.module.named_modules() if isinstance(part, nn.Linear))
    return block.group, tuple((name, part.out_features, part.in_features) for name, part in linears)
