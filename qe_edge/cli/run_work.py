"""The work of `qe-edge run`; without PyTorch, except for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.cli import run_actions
from qe_edge.cli.inputs import find_runnable
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.videos import Video, open_video
from qe_edge.runtime.answers import Timings
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.provenance import check_deployment
from qe_edge.system.errors import InputError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import run_in_torch
else:
    run_in_torch = lazy_module("qe_edge.cli.run_in_torch")


def run(
    *,
    folder: Path,
    images: tuple[Path, ...],
    videos: Sequence[Video],
    prompt: str,
    max_tokens: int,
    robot: run_actions.Robot,
    target: str | None,
    accuracy_level: str,
    **opening: Any,  # noqa: ANN401 - plugin_library, threads and max_context, as the engine takes them
) -> None:
    """Answer, and say how long it took; arguments as the command's."""
    sample = Sample([*(open_image(image) for image in images), *videos], prompt, state=robot.state)
    found = find_runnable(folder, target)
    check_deployment(folder, found)
    if run_actions.acts(found):
        run_actions.run(found, sample, robot, accuracy_level=int(accuracy_level), **opening)
        return
    robot.check_absent()
    if is_checkpoint(found):
        if accuracy_level != "0":
            raise InputError("PyTorch has no accuracy levels.", "Leave --accuracy-level out, or run exported graphs.")
        if opening["max_context"] is not None:
            raise InputError(
                "PyTorch has no cache of a fixed size.", "Leave --max-context out, or run exported graphs."
            )
        text, seconds = run_in_torch.answer(found, sample, max_tokens, opening["threads"])
        click.echo(text)
        click.echo(f"{found}: {_ms(seconds)} in PyTorch", err=True)
        return
    engine = VisionLanguageEngine.load(found, accuracy_level=int(accuracy_level), **opening)
    pipeline = Pipeline(engine)
    timings: Timings | None = None
    for piece in pipeline(sample, stream=True, max_new_tokens=max_tokens, temperature=0):
        click.echo(piece.text, nl=False)
        timings = piece.timings
    click.echo()
    if timings is not None:
        cache = f"KV cache for {pipeline.slot_tokens} tokens {pipeline.slot_bytes / 2**20:.1f} MiB"
        click.echo(f"{found}: {', '.join([*_spent(timings, len(sample.pictures), len(videos)), cache])}", err=True)


def read_robot(state: str | None, steps: int | None, seed: int | None) -> run_actions.Robot:
    """What the command line says about a robot.

    Raises:
        InputError: If its state is no list of finite numbers.
    """
    return run_actions.Robot(run_actions.read_state(state), steps, seed)


def named_videos(paths: Sequence[str], fps: float | None, *, every_frame: bool) -> list[Video]:
    """The videos that the command line names; each is opened, so that a mistake is said before the model is loaded.

    Args:
        paths: Of each a path, or the paths of frames with commas between.
        fps: Frames per second; None for what a file says.
        every_frame: Whether all frames are shown.

    Raises:
        InputError: If one cannot be read, or there is none to which the others belong.
    """
    if not paths and (fps is not None or every_frame):
        raise InputError("There is no video.", "Leave --video-fps and --every-frame out, or give --video.")
    videos = [Video(_frames(path), fps, every_frame) for path in paths]
    for video in videos:
        open_video(video)
    return videos


def _frames(video: str) -> Path | list[Path]:
    """A path, or the paths of frames with commas between."""
    if "," not in video or Path(video).exists():
        return Path(video)
    return [Path(frame) for frame in video.split(",") if frame]


def _spent(timings: Timings, pictures: int, videos: int) -> list[str]:
    """Where the time of an answer went, in words."""
    lines = [f"prompt of {timings.prompt_tokens} tokens {_ms(timings.prefill)}"]
    numbers = {"picture": pictures, "video": videos}
    counted = [f"{noun}{'' if count == 1 else 's'}" for noun, count in numbers.items() if count]
    if counted:
        lines.insert(0, f"{' and '.join(counted)} {_ms(timings.visual + timings.merger)}")
    lines.append(f"first token after {_ms(timings.first_token)}")
    if timings.answer_tokens:
        lines.append(f"{timings.answer_tokens} tokens {_ms(timings.decode / timings.answer_tokens)} each")
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
