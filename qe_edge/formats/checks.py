"""Find the parts of a checkpoint that a format cannot hold, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qe_edge.formats.base import Conversion, Format, Reason
from qe_edge.formats.carried import CarriedLayer
from qe_edge.formats.folding import MATRIX
from qe_edge.formats.source import CheckpointSource
from qe_edge.numerics.grids import rounds_activations
from qe_edge.system.errors import ArtifactError, TargetError

DECODE = "Add --decode, which writes such layers as ordinary weights, or quantize with --method gptq."


def check_conversion(name: str, form: Format, conversion: Conversion, *, drop_rounding: bool) -> None:
    """Refuse a checkpoint that a format cannot hold. The message names all problems at once.

    Args:
        name: Name of the format.
        form: The format.
        conversion: The checkpoint.
        drop_rounding: Whether activations may stay unrounded.

    Raises:
        TargetError: If it cannot.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> form = FORMATS["gptq"]()  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     check_conversion("gptq", form, plan_conversion(source, form), drop_rounding=False)
    """
    problems = [*_of_model(conversion, drop_rounding=drop_rounding), *form.check(conversion)]
    codes = {layer: problem for layer in conversion.coded.values() if (problem := code_problem(form, layer))}
    for problem in dict.fromkeys(codes.values()):
        names = [layer.name for layer, found in codes.items() if found == problem]
        problems.append((f"{_named(names)} {problem}", DECODE))
    if problems:
        said = "; ".join(problem for problem, _ in problems)
        remedies = " ".join(dict.fromkeys(remedy for _, remedy in problems))
        raise TargetError(f"'{name}' cannot hold '{conversion.source.folder}': {said}.", remedies)


def code_problem(form: Format, layer: CarriedLayer) -> str | None:
    """Return why a layer's main branch cannot be codes of a format, without the layer's name; None if it can.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> form = FORMATS["gptq"]()  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     print([code_problem(form, layer) for layer in plan_conversion(source, form).layers.values()])
    """
    if layer.geometry.parts:
        return "has parts that only PyTorch computes"
    if layer.name in layer.folding.stuck:
        return "has channel scales that cannot be folded into what comes before it"
    if layer.folding.mixing is not None and layer.name == layer.folding.mixing.head:
        return "is a head that a rotation put a matrix in front of"
    return form.layer_problem(layer)


def _of_model(conversion: Conversion, *, drop_rounding: bool) -> Iterable[Reason]:
    layers = conversion.layers
    if not conversion.source.family.writes_text:
        kind = "makes actions" if conversion.source.family.acts else "is a vision encoder alone"
        yield f"it {kind}, which readers of this format do not take", "Export it: qe-edge export."
    routed = [name for name, layer in layers.items() if layer.geometry.num_experts > 1]
    if routed:
        remedy = "Quantize again with --set experts=0, whose correction is the same for every token."
        yield f"{_named(routed)} has experts that every token chooses anew", remedy
    rounded = [layer.geometry for layer in layers.values() if rounds_activations(layer.geometry.activation_bits)]
    if rounded and not drop_rounding:
        yield (
            f"activations are rounded to {rounded[0].activation_bits} bits by rules that other runtimes lack",
            "Add --activations 16, so that they stay unrounded there, or quantize with --scheme w4a16.",
        )


def _named(names: list[str]) -> str:
    """The first name, and how many there are."""
    return f"'{names[0]}'" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def check_complete(source: CheckpointSource, model: nn.Module) -> None:
    """Refuse a checkpoint that has not exactly the tensors of its model, in their shapes. No weight is read.

    Args:
        source: The checkpoint.
        model: The model that its config.json describes, on the meta device.

    Raises:
        ArtifactError: Naming a tensor that is missing, unknown, or of another shape.

    Example:
        >>> from qe_edge.models.loading import shapes_only
        >>> check_complete(source, shapes_only(source.family))  # doctest: +SKIP
    """
    inside = tuple(f"{name}." for name in source.layers)
    whole = model.state_dict()
    wanted = {name: tuple(like.shape) for name, like in whole.items() if not name.startswith(inside)}
    for matrix in (name for name in source.plain if name.endswith(MATRIX)):  # a rotated model has a norm in its norm
        norm = matrix.removesuffix(MATRIX)
        size = wanted.pop(f"{norm}.weight", ())
        wanted |= {f"{norm}.norm.weight": size, matrix: size * 2}
    found = {name: tuple(like.shape) for name, like in source.plain.items()}
    found |= {name: found.get(stored, ()) for name, stored in source.tied.items()}
    layers = {f"{name}.weight" for name in source.layers} - whole.keys()
    wrong = layers | {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    if wrong:
        raise ArtifactError(
            f"'{source.folder}' is damaged: the tensors of '{min(wrong)}' are not those of the model.",
            "Quantize the model again.",
        )
