"""Options that several commands share, spelled one way everywhere, and the class of all commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.quiet import quiet_libraries
from qe_edge.system.errors import InputError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.quantization import executors
    from qe_edge.system import device
else:
    device = lazy_module("qe_edge.system.device")
    executors = lazy_module("qe_edge.quantization.executors")

Function = Callable[..., None]  # what a command runs
Decorator = Callable[[Function], Function]
LIMITS = {
    "max_batch": "Questions that a GPU engine takes at a time.",
    "max_context": "Tokens of prompt and answer that a GPU engine takes; more need more memory.",
    "max_prompt": "Tokens of a prompt that a GPU engine takes; memory grows with their square.",
    "max_patches": "Patches of a picture that a GPU engine takes, of a Qwen-VL model; more take more memory.",
    "max_tiles": "Tiles of pictures that a GPU engine takes, of InternVL, SmolVLM and Idefics3.",
}


class Command(click.Command):
    """A command with an example and `--verbose`; other libraries are silent unless that is given.

    Args:
        example: Command lines shown below the options.
        arguments: As click's.
        keywords: As click's.
    """

    def __init__(self, *arguments: Any, example: str, **keywords: Any) -> None:  # noqa: ANN401 - click's own signature
        super().__init__(*arguments, **keywords)
        self.example = example
        self.params.append(
            click.Option(
                ["--verbose"], is_flag=True, help="Show other libraries' messages and full tracebacks of errors."
            )
        )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The example, as it is to be typed."""
        write_example(formatter, self.example)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line.

        Raises:
            InputError: If a word holds bytes that are no text: libraries below us could not write or open it.
            click.UsageError: Also if an option that takes one value is given twice.
        """
        for word in args:
            _check_text(word)
        if args and not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, count in Counter(order).items():
                single = isinstance(parameter, click.Option) and not (parameter.multiple or parameter.count)
                same_each_time = getattr(parameter, "is_flag", False) and not parameter.secondary_opts
                if count > 1 and single and not same_each_time:
                    raise click.UsageError(f"{parameter.opts[-1]} is given {count} times; give it once.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what the command returns
        """Run the command's function."""
        with quiet_libraries(verbose=ctx.params.pop("verbose")):
            return super().invoke(ctx)


def _check_text(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError as error:  # Python reads such bytes as halves of surrogate pairs
        shown = word.encode("ascii", "backslashreplace").decode("ascii")
        raise InputError(
            f"'{shown}' on the command line holds bytes that are no text in this locale.",
            "Write it in UTF-8 and use a UTF-8 locale, for example LANG=C.UTF-8; rename files whose names are not.",
        ) from error


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    """Command lines as they are, without wrapping."""
    with formatter.section("Example"):
        for line in example.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}".rstrip() + "\n")


def output_option(help_text: str) -> Decorator:
    """`-o`, `--output`."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=help_text)


def overwrite_option() -> Decorator:
    """`--overwrite`."""
    return click.option("--overwrite", is_flag=True, help="Replace what an earlier run has written there.")


def resume_option(help_text: str) -> Decorator:
    """`--resume`."""
    return click.option("--resume", is_flag=True, help=help_text)


def device_option(function: Function) -> Function:
    """`--device`, checked at once."""

    def check(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
        if value not in ("auto", "cpu"):  # those need no look at torch
            device.choose_device(value)
        return value

    return click.option(
        "--device",
        metavar="NAME",
        default="auto",
        show_default=True,
        callback=check,
        help="Where to quantize: auto (a GPU if there is one), cpu, cuda. Of GPUs only an H100 was tried.",
    )(function)


def executor_option(function: Function) -> Function:
    """`--executor`, checked at once."""

    def check(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
        if value != "local":  # that needs no look at torch
            executors.check_executor(value)
        return value

    return click.option(
        "--executor",
        metavar="NAME",
        default="local",
        show_default=True,
        callback=check,
        help="Who solves the layers of blocks: local, ray (workers on this machine), ray:ADDRESS (a cluster's).",
    )(function)


def target_option(help_text: str, **keywords: Any) -> Decorator:  # noqa: ANN401 - click's own
    """`--target`."""
    return click.option("--target", metavar="NAME", help=help_text, **keywords)


def plugin_library_option() -> Decorator:
    """`--plugin-library`."""
    return click.option(
        "--plugin-library",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="libqe_plugin.so to use; without it, the one of this package or of 'qe-edge build-plugin'.",
    )


def speed_options(function: Function) -> Function:
    """`--threads` and `--accuracy-level`."""
    function = click.option(
        "--accuracy-level",
        type=click.Choice(("0", "4")),
        default="0",
        show_default=True,
        help="Of ONNX Runtime: 0 is exact, 4 is faster and rounds activations of INT4 products once more.",
    )(function)
    return click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU; all cores by default."
    )(function)


def limit_options(function: Function) -> Function:
    """`--max-batch`, `--max-context`, `--max-prompt`, `--max-patches`, `--max-tiles`."""
    for name, text in reversed(LIMITS.items()):
        option = f"--{name.replace('_', '-')}"
        function = click.option(option, type=click.IntRange(min=1), metavar="N", help=text)(function)
    return function


def plugin_options(function: Function) -> Function:
    """`--plugin` and `--plugin-library`, of commands that build engines."""
    function = plugin_library_option()(function)
    return click.option(
        "--plugin",
        is_flag=True,
        help="Run quantized layers in the TensorRT plugin; its kernels ran on an H100, whole engines not yet.",
    )(function)


def evaluation_options() -> Decorator:
    """`--evaluation` and `--limit`."""

    def add(function: Function) -> Function:
        function = click.option(
            "--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N held-out samples only."
        )(function)
        return click.option(
            "--evaluation",
            metavar="SOURCE",
            default="demo",
            show_default=True,
            help="Held-out samples: 'demo', a JSONL file of image, question and answer, or a folder with one.",
        )(function)

    return add


def recipe_options(function: Function) -> Function:
    """Everything that makes a recipe; `qe_edge.cli.recipes.read_recipe` takes these values by name."""
    options = (
        click.option(
            "--method", metavar="NAME", help="How to quantize, for example 'qe' (Quant Experts, default) or 'rtn'."
        ),
        click.option(
            "--scheme",
            metavar="NAME",
            help="Bits of weights and activations: w4a8 (default), w4a6, w4a16, w3a8, w3a16, w2a16.",
        ),
        click.option(
            "--modules",
            metavar="NAMES",
            help="Parts of the model, with commas: language (default), visual, merger, action.",
        ),
        click.option("--head", metavar="GRID", help="Grid of the language model's head: int4, or none (default)."),
        click.option("--embedding", metavar="GRID", help="Codes of the token embedding: int8, or none (default)."),
        click.option(
            "--bits", type=float, metavar="B", help="Budget: mean stored bits per weight, spent over layers by gain."
        ),
        click.option(
            "--read-bits", type=float, metavar="B", help="Budget: mean bits per weight that one decoded token reads."
        ),
        click.option("--preset", metavar="NAME", help="Named defaults of the method, for example 'paper'."),
        click.option(
            "--set",
            "settings",
            metavar="KEY=VALUE",
            multiple=True,
            help="One option of the method, for example --set experts=4. May be repeated.",
        ),
        click.option(
            "--calibration",
            metavar="SOURCE",
            help="Calibration samples: 'demo' (default), a JSONL file, a folder, 'coco' or 'sharegpt4v:FOLDER'.",
        ),
        click.option("--samples", type=click.IntRange(min=1), metavar="N", help="How many of them to draw (128)."),
        click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Seed of everything drawn at random (0)."),
        click.option(
            "--recipe",
            "recipe_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="YAML or JSON file with any of these choices; options on the command line win over it.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function
