"""`qe-edge convert`: layouts and names of others become transformers' own, and checkpoints become others' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, output_option, overwrite_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import convert_work
else:
    convert_work = lazy_module("qe_edge.cli.convert_work")

EXAMPLE = """\
qe-edge convert OpenGVLab/InternVL2-2B -o internvl2-2b-hf
qe-edge convert checkpoint --to compressed-tensors -o for-vllm"""


@click.command("convert", cls=Command, example=EXAMPLE)
@click.argument("model", metavar="MODEL")
@click.option(
    "--as", "family", metavar="FAMILY", help="The model_type that a model of another name is to have: qwen3_vl, llama."
)
@click.option(
    "--to",
    "form",
    metavar="FORMAT",
    help="The format that a quantized checkpoint is to have: compressed-tensors, gptq, gguf.",
)
@click.option(
    "--activations",
    type=click.Choice(["16"]),
    metavar="16",
    help="With --to: leave activations unrounded that the checkpoint rounds to 8 or 6 bits.",
)
@click.option(
    "--decode",
    is_flag=True,
    help="With --to: write layers that the format cannot hold as codes as ordinary weights.",
)
@output_option("Folder for the converted model.")
@overwrite_option()
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Convert a model to transformers' own classes, or a checkpoint to the format of another runtime.

    Without --as and --to, MODEL is a folder or a hub id whose config.json says "internvl_chat", with an InternLM2 or
    Qwen2 language model. With --as, it is a folder whose config.json has a model_type that QE-Edge does not know,
    though the tensors are those of a family that it knows. None of its code is run. The output folder is a model of
    transformers' own classes, in the same precision.

    With --to, MODEL is a quantized checkpoint, or holds one as MODEL/checkpoint. Its codes stay as they are. Its
    low-rank correction becomes a LoRA, in the folder `adapter` of the output or as `adapter.gguf`.
    """
    convert_work.run(**choices)
