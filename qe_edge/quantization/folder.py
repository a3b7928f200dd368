"""A job becomes a checkpoint folder; finished blocks lie beside it until it is complete."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from qe_edge.checkpoint.known_files import work_folder
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.executors import LOCAL
from qe_edge.quantization.job import Job
from qe_edge.quantization.quantizer import run_job
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.system.locks import hold
from qe_edge.system.ownership import refuse_strangers
from qe_edge.system.progress import Progress


def quantize_to_folder(
    job: Job,
    output: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    executor: str = LOCAL,
    progress: Progress | None = None,
    locked: bool = False,
) -> None:
    """Quantize a model and write the checkpoint; finished blocks lie in `<output>.work` until it is complete.

    Args:
        job: What to do, with a model that has a name.
        output: Folder of the checkpoint; it appears when it is complete.
        resume: Continue from the finished blocks of a stopped run.
        device: As of `qe_edge.quantize`.
        executor: Likewise.
        progress: Where to report progress.
        locked: Whether the caller holds the lock on `output`.

    Raises:
        InputError: If `output` holds files that QE-Edge did not write.
        ResourceError: If another process writes there, or the disk is full.
        QEError: As `qe_edge.quantize`.

    Example:
        >>> from qe_edge.quantization.job import make_job
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> job = make_job("demo", make_recipe(method="rtn", scheme="w4a8", calibration={"samples": 1}))
        >>> quantize_to_folder(job, Path("checkpoint"), device="cpu")
        >>> Path("checkpoint/model.safetensors").is_file(), Path("checkpoint.work").exists()
        (True, False)
    """
    work = work_folder(output)
    with nullcontext() if locked else hold(output):
        refuse_strangers(output)
        loaded = run_job(
            job, work=work, resume=resume, on_disk=True, device=device, executor=executor, progress=progress
        )
        save_quantized(loaded, job.recipe, output, WorkFolder.run_of(work))
        WorkFolder.discard(work)
