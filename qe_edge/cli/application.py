"""The group of all commands; a command's module is imported when it is called, completed or listed."""

from __future__ import annotations

import importlib

import click

from qe_edge import __version__
from qe_edge.cli.options import write_example
from qe_edge.cli.outcome import Interrupted
from qe_edge.system.errors import UnknownNameError

COMMANDS = (
    "deploy",
    "quantize",
    "export",
    "build",
    "build-plugin",
    "validate",
    "report",
    "run",
    "serve",
    "bench",
    "convert",
    "predict",
    "doctor",
)
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
EXAMPLE = """\
qe-edge deploy demo -o out

qe-edge quantize demo -o checkpoint
qe-edge export checkpoint -o onnx
qe-edge build onnx -o engines --target cpu
qe-edge validate demo checkpoint --engines engines -o report.json
qe-edge run engines --image picture.png --prompt "What is this?"
"""
COMPLETION = (
    "Tab completion: put 'eval \"$(_QE_EDGE_COMPLETE=bash_source qe-edge)\"' into ~/.bashrc, or the same with "
    "zsh_source into ~/.zshrc."
)


class LazyGroup(click.Group):
    """A group whose commands are the attribute `command` of `qe_edge.cli.<name>`, with underscores for hyphens."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"qe_edge.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples as they are to be typed, then the hint on tab completion."""
        write_example(formatter, EXAMPLE)
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> object:
        """Run the chosen command.

        Raises:
            Interrupted: After Ctrl-C; click itself would print an empty line.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted from stop

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names.

        Raises:
            UnknownNameError: If there is none; the nearest is suggested.
        """
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)


@click.command(cls=LazyGroup, context_settings=SETTINGS, epilog=COMPLETION)
@click.version_option(__version__, prog_name="QE-Edge", message="%(prog)s %(version)s")
def application() -> None:
    """Quantize vision-language models to 4 bits, export them to ONNX, build engines, and run them at the edge.

    'deploy' does everything at once. Each other command is one stage, and writes what the next one reads.
    """
