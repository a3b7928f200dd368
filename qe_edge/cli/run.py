"""`qe-edge run`: one question to a deployed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, speed_options, target_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import run_work
else:
    run_work = lazy_module("qe_edge.cli.run_work")


@click.command("run", cls=Command, example='qe-edge run out --image picture.png --prompt "What is this?"')
@click.argument("folder", metavar="ENGINES", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Picture; without one, text only. May be repeated: several pictures stand before the prompt in this order.",
)
@click.option(
    "--video",
    "videos",
    metavar="PATH",
    multiple=True,
    help="Video: a folder of frames, their files with commas between, an animated GIF or WebP, or a film. May be "
    "repeated; videos stand behind the pictures.",
)
@click.option(
    "--video-fps",
    type=click.FloatRange(min=0, min_open=True, max=1000),
    metavar="N",
    help="Frames per second of the videos; what a file says by default.",
)
@click.option("--every-frame", is_flag=True, help="Show all frames, though the model's settings would choose some.")
@click.option("--prompt", metavar="TEXT", required=True, help="Question or instruction.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Longest answer."
)
@click.option("--state", metavar="NUMBERS", help="The state of a robot, for a model that acts: 0.1,-0.5,2.")
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Steps of denoising of such a model; its own by default.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of such a model's noise; 0 by default.")
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    metavar="N",
    help="Most tokens of prompt and answer together; what the model or its engines take by default.",
)
@target_option("Engine to use, where the folder holds several; the first that runs here by default.")
@plugin_library_option()
@speed_options
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Answer a question about pictures and videos.

    The answer goes to standard output, the timings to standard error. ENGINES is a folder of engines, of ONNX
    graphs, a quantized checkpoint (run in PyTorch), or the output of 'deploy'. Decoding is greedy: the rules of
    generation_config.json hold, its sampling has no effect. A model that makes actions prints them in the robot's own
    numbers, one a line.
    """
    paths, fps, every = (choices.pop(name) for name in ("videos", "video_fps", "every_frame"))
    robot = run_work.read_robot(**{name: choices.pop(name) for name in ("state", "steps", "seed")})
    run_work.run(videos=run_work.named_videos(paths, fps, every_frame=every), robot=robot, **choices)
