"""Convert a quantized checkpoint into a folder that other runtimes read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.checkpoint.files import read_checkpoint_files, write_checkpoint_files
from qe_edge.formats import FORMATS
from qe_edge.formats.base import Conversion, Format
from qe_edge.formats.carried import CarriedLayer
from qe_edge.formats.checks import check_complete, check_conversion, code_problem
from qe_edge.formats.folding import fold
from qe_edge.formats.source import CheckpointSource, open_checkpoint
from qe_edge.formats.summary import README, summarize, write_readme
from qe_edge.models.loading import shapes_only
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ArtifactError
from qe_edge.system.progress import Progress, Silent


def convert_checkpoint(
    checkpoint: Path,
    name: str,
    out: Path,
    *,
    drop_rounding: bool = False,
    decode: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a quantized checkpoint in the format of another runtime; the folder appears only when it is complete.

    Codes, scales and zero points stay what they are. A low-rank correction becomes a PEFT LoRA in the folder `adapter`
    inside. Tensors are written one at a time.

    Args:
        checkpoint: Output of `qe-edge quantize`.
        name: Name of the format.
        out: Folder to write; one that an earlier conversion wrote is replaced.
        drop_rounding: Whether a checkpoint of rounded activations is converted for a runtime that does not round them.
        decode: Whether layers that the format cannot hold as codes become ordinary weights.
        progress: Where to report progress.

    Returns:
        Sentences on what was carried over and what was lost.

    Raises:
        UnknownNameError: If there is no such format.
        ArtifactError: If the checkpoint is damaged.
        TargetError: If the format cannot hold it.
        ResourceError: If the disk is full.

    Example:
        >>> convert_checkpoint(Path("checkpoint"), "compressed-tensors", Path("out"))  # doctest: +SKIP
    """
    form = FORMATS[name]()
    with open_checkpoint(checkpoint) as source:
        conversion = form.prepared(plan_conversion(source, form, decode=decode))
        check_conversion(name, form, conversion, drop_rounding=drop_rounding)
        lines = summarize(conversion, form)
        with atomic_folder(out) as part:
            form.write(conversion, part, out.name, progress or Silent())
            write_readme(conversion, form, part, out.name, lines)
            write_checkpoint_files(part, str(checkpoint), None)
    return lines


def is_converted(folder: Path) -> bool:
    """Whether a folder holds what `convert_checkpoint` wrote, found out from its `files.json` and README.md.

    Example:
        >>> Path("other").mkdir()
        >>> is_converted(Path("other"))
        False
    """
    try:
        return README in read_checkpoint_files(folder).files and not is_checkpoint(folder)
    except ArtifactError:
        return False


def plan_conversion(source: CheckpointSource, form: Format, *, decode: bool = False) -> Conversion:
    """Plan how the layers of a checkpoint are carried into a format. Only scales and gains of norms are read.

    Args:
        source: The checkpoint.
        form: The format.
        decode: Whether layers that the format cannot hold as codes become ordinary weights.

    Example:
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     len(plan_conversion(source, FORMATS["gptq"]()).coded)
    """
    model = shapes_only(source.family)
    check_complete(source, model)
    folding = fold(source, model, rows=form.folds_rows)
    groups = {
        f"{block.name}.{name}": block.group
        for block in source.family.blocks(model)
        for name, _ in block.module.named_modules()
    }
    # the one layer that a checkpoint has outside its blocks is the head
    layers = {name: CarriedLayer(source, name, folding, group=groups.get(name, "head")) for name in source.layers}
    if decode:
        layers = {
            name: layer if code_problem(form, layer) is None else replace(layer, decoded=True)
            for name, layer in layers.items()
        }
    return Conversion(source, folding, layers)
