"""A deployment with every choice made and every check done that needs no long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from qe_edge.calibration.sources import hash_samples, load_evaluation
from qe_edge.deploy.layout import DEFAULT_TARGETS
from qe_edge.export import plugin_check
from qe_edge.export.decoding import check_decoding
from qe_edge.export.targets import check_targets, get_target, has_limits
from qe_edge.models.configuration import load_family
from qe_edge.models.decoder import default_lengths
from qe_edge.models.export_limits import context_of
from qe_edge.models.loading import resolve_model
from qe_edge.quantization.job import Job, make_job
from qe_edge.quantization.plan import Plan, make_plan, planned_forms
from qe_edge.recipes.recipe import Recipe
from qe_edge.runtime.limits import EngineLimits, resolve_limits
from qe_edge.runtime.plugin_library import digest


@dataclass(frozen=True)
class Order:
    """The choices of a deployment. Its stages take them as they are, and resolve nothing again.

    Attributes:
        model: "demo", a folder or a hub id, as the user named it.
        source: Folder or hub id behind that name.
        job: The quantization.
        targets: Names of the targets to build for.
        runnable: Names of the targets whose engines run on this machine.
        plugins: The plugin library of every target that is built with it.
        limits: Largest sizes of GPU engines; None keeps the defaults.
        evaluation: Source of held-out questions with answers.
        questions: Hash of the questions.
        limit: Number of questions to ask; None for all.
    """

    model: str
    source: str
    job: Job
    targets: tuple[str, ...]
    runnable: tuple[str, ...]
    plugins: Mapping[str, Path]
    limits: EngineLimits | None
    evaluation: str
    questions: str
    limit: int | None

    @cached_property
    def plan(self) -> Plan:
        """The plan of the quantization; it is made once.

        Raises:
            ModelError: If the model cannot be exported.
            RecipeError: If it lacks one of the recipe's modules.
        """
        return make_plan(self.source, self.job.recipe, self.job.samples)

    def limits_of(self, target: str) -> EngineLimits | None:
        """The limits of a target's engines; None for ONNX Runtime, whose engines have no limits."""
        return self.limits if has_limits(target) else None

    def build_key(self, target: str) -> list[object]:
        """Inputs of a target's engines besides the graphs: the library's hash, and limits that were given."""
        limits, library = self.limits_of(target), self.plugins.get(target)
        given = {} if limits is None else {name: size for name, size in asdict(limits).items() if size is not None}
        return [target, *([] if library is None else [digest(library)]), *([given] if given else [])]


def make_order(
    model: str,
    recipe: Recipe,
    targets: Sequence[str] = DEFAULT_TARGETS,
    *,
    plugin_library: Path | None = None,
    limits: EngineLimits | None = None,
    evaluation: str = "demo",
    limit: int | None = None,
) -> Order:
    """Resolve a deployment: samples and questions are opened, so that a broken picture is found at once.

    Args:
        model: "demo", a folder or a hub id.
        recipe: How to quantize.
        targets: Names of the targets to build for.
        plugin_library: Build TensorRT targets with this plugin library; None builds all without the plugin.
        limits: Largest sizes that engines of TensorRT take; None keeps the defaults.
        evaluation: Source of held-out questions with answers.
        limit: Use only the first questions.

    Raises:
        RecipeError: If no graph can hold the method's result.
        InputError: If no target takes the plugin, or the model cannot have such limits.
        TargetError: If a target cannot be built here, or the plugin library does not work or refuses a layer.
        QEError: Errors of models, samples and questions.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> recipe = make_recipe(method="qe", scheme="w4a8", calibration={"samples": 2})
        >>> order = make_order("demo", recipe, ["cpu"], limit=10)
        >>> order.runnable, len(order.plan.layers)
        (('cpu',), 28)
        >>> make_order("demo", make_recipe(method="quip"), ["cpu"])
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.RecipeError: The result of the method 'quip' cannot be exported: its changes of
        basis at every layer's input and output have no place in the operator. Quantize with 'qe-edge quantize',
        and load the checkpoint with qe_edge.load_quantized in PyTorch.
    """
    recipe.check_exportable()
    runnable = check_targets(targets)
    plugins = {} if plugin_library is None else _plugins(targets, plugin_library)
    source = resolve_model(model)
    check_decoding(source)
    if limits is not None:
        _check_limits(limits, source)
    job = make_job(model, recipe)
    questions = hash_samples(load_evaluation(evaluation))
    order = Order(model, source, job, tuple(targets), tuple(runnable), plugins, limits, evaluation, questions, limit)
    if plugins:
        forms = planned_forms(order.plan, job.recipe)
        plugin_check.check_forms([get_target(name) for name in plugins], next(iter(plugins.values())), forms)
    return order


def _plugins(targets: Sequence[str], library: Path) -> dict[str, Path]:
    """The plugin library for every target that takes one, checked."""
    found = plugin_check.choose_plugin(targets, library)
    return {name: found for name in targets if plugin_check.takes_plugin(get_target(name))}


def _check_limits(limits: EngineLimits, source: str) -> None:
    """Refuse limits that the model cannot have, before it is quantized."""
    family = load_family(source)
    context, prompt = default_lengths(family.config.get_text_config())
    pictures = {family.picture_unit: 1} if family.picture_unit else {}
    present = EngineLimits(context=context, prompt=prompt, **pictures)
    resolve_limits(limits, present, family.model_type, context_of(family.config))
