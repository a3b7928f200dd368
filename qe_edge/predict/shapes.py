"""The linear layers of a vision-language model, from its config.json or from the table of the paper's models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.demo import model_path
from qe_edge.models import FAMILIES as SUPPORTED
from qe_edge.models.configuration import REMEDY, check_sizes_file, load_family
from qe_edge.models.export_limits import check_exportable
from qe_edge.models.origin import check_configuration
from qe_edge.predict.tables import model_table
from qe_edge.system.errors import ModelError, UnknownNameError
from qe_edge.system.json_files import read_json_table

FAMILIES = ("qwen2_vl", "internvl")
MAX_WIDTH = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stack(_Strict):
    """Equal transformer blocks.

    Attributes:
        hidden: Width.
        layers: Number of blocks.
        mlp: Width inside the MLP.
        kv: Width of all keys of a token, 0 if it is `hidden`.
        vocabulary: Logits, 0 for a visual encoder.
        gated: Whether the MLP has a gate.
    """

    hidden: int = Field(gt=0, le=MAX_WIDTH)
    layers: int = Field(gt=0, le=4096)
    mlp: int = Field(gt=0, le=MAX_WIDTH)
    kv: int = Field(0, ge=0, le=MAX_WIDTH)
    vocabulary: int = Field(0, ge=0, le=1 << 24)
    gated: bool

    @property
    def keys(self) -> int:
        """Width of all keys of a token."""
        return self.kv or self.hidden


class ModelShape(_Strict):
    """Sizes of a model for a prediction.

    Attributes:
        title: Its name.
        text: The language model.
        vision: The visual encoder.
        merger: in_features and out_features of the layers between them.
        patches_per_token: Patches of a picture that become one token.
        refused: The reason why 'qe-edge quantize' refuses the model; empty if it does not.
    """

    title: str
    text: Stack
    vision: Stack
    merger: tuple[tuple[int, int], ...]
    patches_per_token: int = Field(gt=0, le=4096)
    refused: str = ""


@dataclass(frozen=True)
class Linear:
    """Layers that read the same input.

    Attributes:
        in_features: Width of the input, K.
        parts: out_features of every layer.

    Example:
        >>> Linear(1536, (1536, 256, 256)).out_features  # query, key and value joined
        2048
    """

    in_features: int
    parts: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Width of the output of all layers together, N."""
        return sum(self.parts)


def block_linears(stack: Stack) -> list[Linear]:
    """Return the linear layers of one block: query, key and value; output; MLP.

    Example:
        >>> stack = Stack(hidden=1536, layers=28, mlp=8960, kv=256, gated=True)
        >>> [(linear.in_features, linear.out_features) for linear in block_linears(stack)]
        [(1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)]
    """
    up = (stack.mlp, stack.mlp) if stack.gated else (stack.mlp,)
    return [
        Linear(stack.hidden, (stack.hidden, stack.keys, stack.keys)),
        Linear(stack.hidden, (stack.hidden,)),
        Linear(stack.hidden, up),
        Linear(stack.mlp, (stack.hidden,)),
    ]


def find_model(reference: str) -> ModelShape:
    """Find the sizes of 'demo', of a folder with a config.json, or of a model of the paper.

    Raises:
        ModelError: If the folder's configuration is missing or of another family.
        UnknownNameError: If it is neither a folder nor a known name.

    Example:
        >>> shape = find_model("qwen2-vl-2b")
        >>> shape.title, shape.text.layers, shape.vision.layers
        ('Qwen2-VL-2B-Instruct', 28, 32)
    """
    known = model_table()
    name = reference.lower().rpartition("/")[2].removesuffix("-instruct")
    if name in known:
        return ModelShape.model_validate(known[name])
    folder = Path(reference)
    if reference == "demo":
        folder = model_path()
    if not folder.is_dir():
        raise UnknownNameError("folder or model", reference, ["demo", *known])
    remedy = f"{REMEDY} Or predict 'qwen2-vl-2b'."
    config = read_json_table(folder / "config.json", error=ModelError, remedy=remedy)
    try:
        if config.get("model_type") in FAMILIES:
            check_sizes_file(config, folder / "config.json")
        shape = _from_config(config, reference)
    except (
        ArithmeticError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # ValueError: ValidationError too
        raise ModelError(
            f"'{folder}' has no config.json of a Qwen2-VL or InternVL model.",
            f"Give another folder, or 'qwen2-vl-2b'. Predicted are {' and '.join(FAMILIES)}; quantized are "
            f"{', '.join(SUPPORTED)}.",
        ) from error
    return shape.model_copy(update={"refused": _refusal(folder, config)})


def _refusal(folder: Path, config: dict[str, Any]) -> str:
    """Why a model with this configuration cannot be quantized; empty if its configuration is no reason."""
    try:
        check_configuration(config, str(folder))
        check_exportable(load_family(str(folder)).config)
    except ModelError as error:
        return error.problem
    return ""


def _from_config(config: dict[str, Any], title: str) -> ModelShape:
    text, vision = config.get("text_config", config), config["vision_config"]
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    language = Stack(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        mlp=text["intermediate_size"],
        kv=text.get("num_key_value_heads", heads) * head,
        vocabulary=text["vocab_size"],
        gated=True,
    )
    if config["model_type"] not in FAMILIES:
        raise ValueError("another family")
    if config["model_type"] == "qwen2_vl":
        width, together = vision["embed_dim"], vision.get("spatial_merge_size", 2) ** 2
        encoder = Stack(hidden=width, layers=vision["depth"], mlp=int(width * vision["mlp_ratio"]), gated=False)
        inner = width * together
    else:
        width, together = vision["hidden_size"], round(1 / config.get("downsample_ratio", 0.5) ** 2)
        encoder = Stack(hidden=width, layers=vision["num_hidden_layers"], mlp=vision["intermediate_size"], gated=False)
        inner = language.hidden
    merger = ((width * together, inner), (inner, language.hidden))
    return ModelShape(title=title, text=language, vision=encoder, merger=merger, patches_per_token=together)
