"""From a model to engines and a report in one call; every stage's output is a folder that the next one reads.

`OUT/checkpoint`, `OUT/onnx`, `OUT/engines/<target>`, `OUT/report.json`, `OUT/report.html`, and `OUT/deploy.json`, which
says what each of them was made from, so that a stopped deployment can be continued.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qe_edge.progress import Progress

if TYPE_CHECKING:
    from qe_edge.recipe import Recipe

MANIFEST = "deploy.json"


def quantize_to_folder(
    model: str, recipe: Recipe, output: Path, *, resume: bool = False, progress: Progress | None = None
) -> Recipe:
    """Quantize a model and write the checkpoint; finished blocks lie in `<output>.work` until it is complete.

    Args:
        model: "demo", a folder or a hub id.
        recipe: What to do.
        output: Folder of the checkpoint; it appears when it is complete.
        resume: Continue from the finished blocks of a stopped run.
        progress: Where to report progress.

    Returns:
        The resolved recipe, as it is stored in the checkpoint.

    Raises:
        QEError: As `qe_edge.quantize`, and ResourceError if the disk is full.
    """
    from qe_edge.checkpoint import save_quantized
    from qe_edge.quantizer import quantize
    from qe_edge.workfolder import WorkFolder

    work = work_folder(output)
    loaded, resolved = quantize(model, recipe, work=work, resume=resume, progress=progress)
    save_quantized(loaded, resolved, output)
    WorkFolder(work).remove()
    return resolved


def work_folder(output: Path) -> Path:
    """Where the finished blocks of a checkpoint lie until it is complete."""
    return output.with_name(f"{output.name}.work")
