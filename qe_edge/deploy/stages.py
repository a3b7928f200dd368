"""Runs the stages of a deployment that are not complete, and replaces no files of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qe_edge.deploy.ledger import Ledger
from qe_edge.system.digests import hash_parts
from qe_edge.system.errors import InputError
from qe_edge.system.ownership import refuse_strangers, remove_ours

REPORT_FILES = (".json", ".html")
REPORT_SIGNS = (b"QE-Edge report</title>", b'"qe_edge":')  # near the beginning of a page, and of its data
SIGN_BYTES = 4096


@dataclass(frozen=True)
class Stage:
    """One step of a deployment.

    Attributes:
        name: Its name in the ledger.
        outputs: Its files and folders; the first one stands for it in messages.
        made_from: Hash of its own choices.
        after: Stages whose outputs it reads.
        work: The function that does it.
    """

    name: str
    outputs: tuple[Path, ...]
    made_from: str
    after: tuple[str, ...]
    work: Callable[[], None]


def run_stages(
    stages: Sequence[Stage],
    ledger: Ledger,
    made_later: Callable[[], list[Path]],
    *,
    resume: bool,
    announce: Callable[[str], None],
) -> None:
    """Do the stages that are not complete.

    Args:
        stages: All stages, the checkpoint's first.
        ledger: What is finished.
        made_later: Lists the folders that were made from a checkpoint, also for targets that are no stage now.
        resume: Whether complete stages are kept.
        announce: Receives one line for every stage.

    Raises:
        InputError: If an output that would be replaced holds files of others; raised before the first stage.
        QEError: Errors of the stages.

    Example:
        >>> Path("out").mkdir()
        >>> def write() -> None:
        ...     Path("out/onnx").mkdir()
        ...     _ = Path("out/onnx/language.onnx").write_bytes(b"")
        >>> stage = Stage("onnx", (Path("out/onnx"),), made_from="choices", after=(), work=write)
        >>> run_stages([stage], Ledger(Path("out/deploy.json")), list, resume=False, announce=print)
        out/onnx
        >>> ledger = Ledger.read(Path("out/deploy.json"), resume=True)
        >>> run_stages([stage], ledger, list, resume=True, announce=print)
        out/onnx: complete already
    """
    reasons: dict[str, str | None] = {}
    for stage in stages:
        reasons[stage.name] = ledger.problem(stage.name, _key(stage, ledger), stage.outputs) if resume else ""
        if reasons[stage.name] is not None:
            break
    touched = [stage for stage in stages if reasons.get(stage.name, "") is not None]
    _refuse_others(touched, ledger, made_later())
    for stage in stages:
        if stage.name in reasons:
            reason = reasons[stage.name]
        else:
            reason = ledger.problem(stage.name, _key(stage, ledger), stage.outputs) if resume else ""
        if reason is None:
            announce(f"{stage.outputs[0]}: complete already")
            continue
        announce(f"{stage.outputs[0]}: made again, since {reason}" if reason else f"{stage.outputs[0]}")
        if reason:  # damaged, so that it may not be known as ours any more
            for output in stage.outputs:
                remove_ours(output, ledger.listed(output))
        before = ledger.stages.get(stage.name)
        stage.work()
        ledger.finish(stage.name, _key(stage, ledger), stage.outputs)
        if stage.name == "checkpoint" and not (
            resume and before and before.content == ledger.stages[stage.name].content
        ):
            _clear_after_checkpoint(stages, ledger, made_later())


def _key(stage: Stage, ledger: Ledger) -> str:
    """Hash of a stage's inputs: its own choices, and the choices and files of the stages before it."""
    before = [ledger.stages[name] for name in stage.after if name in ledger.stages]
    return hash_parts(stage.made_from, [[one.key, one.content] for one in before])


def _refuse_others(touched: Sequence[Stage], ledger: Ledger, made_later: Sequence[Path]) -> None:
    """Refuse to replace files of others.

    Raises:
        InputError: Naming one of them.
    """
    outputs = [output for stage in touched for output in stage.outputs]
    if touched and touched[0].name == "checkpoint":
        outputs += [folder for folder in made_later if _is_ours(folder, ledger)]
    for output in outputs:
        above = [output.parent] if output.parent != ledger.path.parent else []
        link = next((path for path in (output, *above) if path.is_symlink()), None)
        if link:
            raise InputError(f"'{link}' is a link, and not followed.", "Remove it, or choose another folder.")
        if output.suffix in REPORT_FILES:
            _refuse_other_file(output, ledger)
        elif output.exists() and not output.is_dir():
            raise InputError(f"'{output}' is a file, and is to be a folder.", "Move it, or choose another folder.")
        else:
            refuse_strangers(output, ledger.listed(output))


def _refuse_other_file(file: Path, ledger: Ledger) -> None:
    """Refuse to replace a file with a report, unless the file is a report of ours."""
    if not file.exists() or any(file.name in stage.files for stage in ledger.stages.values()):
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(SIGN_BYTES)
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.", "Choose another folder.") from error
    if not any(sign in head for sign in REPORT_SIGNS):
        raise InputError(
            f"'{file}' was not written by QE-Edge, and is to be replaced.",
            "Move it elsewhere, or choose another folder.",
        )


def _is_ours(folder: Path, ledger: Ledger) -> bool:
    """Whether a stage wrote a folder, now or for a target of an earlier deployment."""
    name = folder.relative_to(ledger.path.parent).as_posix()
    return name in ledger.stages or (folder / "manifest.json").is_file()


def _clear_after_checkpoint(stages: Sequence[Stage], ledger: Ledger, made_later: Sequence[Path]) -> None:
    """Remove the outputs of an earlier checkpoint, and nothing else."""
    for folder in made_later:
        if _is_ours(folder, ledger):
            remove_ours(folder, ledger.listed(folder))
    for output in (output for stage in stages for output in stage.outputs if output.suffix in REPORT_FILES):
        output.unlink(missing_ok=True)
    ledger.forget(name for name in ledger.stages if name != "checkpoint")
