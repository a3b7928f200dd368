"""Nodes that prepare a picture for the visual encoder; the graphs `preprocess.onnx` of all families share them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qe_edge.models.graph_nodes import Nodes
from qe_edge.models.picture_names import IMAGE, PICTURES, PLACEHOLDER_IDS, PLACEHOLDER_POSITIONS

Size = int | str
EVERY = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 1, 3))  # every value of every channel


@dataclass(frozen=True)
class PictureGraph:
    """The preparation of one picture.

    Attributes:
        nodes: In order.
        image: The input, uint8 `[height, width, 3]`, RGB.
        outputs: Inputs of the visual encoder by name, then the tokens that stand for the picture and their positions.
        placeholder: Token of the prompt that the picture's tokens replace.
        max_aspect: Longest side over shortest, beyond which the family's image processor refuses a picture.
        numbered: Whether the family's `graph_mask` numbers pictures.
        label: Tokens before a picture's own that say its number in the prompt: those before the number, of the ten
            digits, and after the number. None without.
        whole: Whether the family's `graph_mask` is 2 on a whole prompt.
        first_position: Position of a prompt's first token.
        max_prompt: Most tokens of a prompt that the graphs take.
        further: Inputs besides the picture: none, or that of `pictures_input`.
    """

    nodes: list[ir.Node]
    image: ir.Value
    outputs: dict[str, ir.Value]
    placeholder: int
    max_aspect: int | None = None
    numbered: bool = False
    label: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    whole: bool = False
    first_position: int = 0
    max_prompt: int | None = None
    further: tuple[ir.Value, ...] = ()


def picture_input() -> ir.Value:
    """The graph's input.

    Example:
        >>> picture_input()
        Value(name='image', type=Tensor(UINT8), shape=Shape([SymbolicDim('height'), SymbolicDim('width'), 3]))
    """
    return ir.Value(name=IMAGE, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["height", "width", 3]))


def pictures_input() -> ir.Value:
    """A second input, of a family whose pictures depend on how many a prompt has: their number.

    Example:
        >>> pictures_input()
        Value(name='pictures', type=Tensor(INT64), shape=Shape([]))
    """
    return ir.Value(name=PICTURES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))


def output(value: ir.Value, dtype: ir.DataType, *sizes: Size) -> ir.Value:
    """Set the type and shape of a value and return it; a name stands for a size that depends on the picture.

    Example:
        >>> write = Nodes()
        >>> output(write.constant(np.zeros((4, 3), np.float32)), ir.DataType.FLOAT, "tokens", 3).shape
        Shape([SymbolicDim('tokens'), 3])
    """
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(sizes)
    return value


def placeholders(write: Nodes, ids: ir.Value, positions: ir.Value, axes: int) -> dict[str, ir.Value]:
    """The outputs of a picture's tokens.

    Args:
        write: Receives the nodes.
        ids: int64 `[tokens]`.
        positions: int64 `[axes, tokens]`, of the first token 0.
        axes: 3 with M-RoPE, else 1.

    Example:
        >>> write = Nodes()
        >>> ids, positions = write.constant(np.zeros(4, np.int64)), write.constant(np.zeros((3, 4), np.int64))
        >>> {name: str(value.shape) for name, value in placeholders(write, ids, positions, 3).items()}
        {'placeholder_ids': '[tokens]', 'placeholder_positions': '[3,tokens]'}
    """
    return {
        PLACEHOLDER_IDS: output(write("Identity", ids), ir.DataType.INT64, "tokens"),
        PLACEHOLDER_POSITIONS: output(write("Identity", positions), ir.DataType.INT64, axes, "tokens"),
    }


def counted(write: Nodes, ids: ir.Value) -> dict[str, ir.Value]:
    """The outputs of a picture whose positions count on like text; `ids` is int64 `[tokens]`.

    Example:
        >>> write = Nodes()
        >>> list(counted(write, write.constant(np.zeros(4, np.int64))))
        ['placeholder_ids', 'placeholder_positions']
    """
    return placeholders(write, ids, write.spread(write.count(write.size(ids, 0)), 0), 1)


def none_if(write: Nodes, refused: ir.Value, ids: ir.Value) -> ir.Value:
    """The tokens of a picture, int64 `[tokens]`; none of them where the model refuses it, as a manifest says.

    Example:
        >>> write = Nodes()
        >>> _ = none_if(write, write.constant(np.array(True)), write.constant(np.zeros(4, np.int64)))
        >>> write.nodes[-1].op_type
        'Slice'
    """
    count = write("Where", refused, 0, write.size(ids, 0))
    return write("Slice", ids, write.joined(0), write.joined(count))


def value_table(image_processor: Any) -> np.ndarray:  # noqa: ANN401 - image processors share no typed base
    """Table of an image processor's result for every value of every channel: float32 `[3 * 256]`.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> table = value_table(pil_image_processor("siglip")())
        >>> table.shape, float(table[0]), float(table[255])  # black and white
        ((768,), -1.0, 1.0)
    """
    values = EVERY.transpose(2, 0, 1)
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(values, image_processor.image_mean, image_processor.image_std)
    return np.ascontiguousarray(values[:, :, 0], np.float32).ravel()


def table_of(normalize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """As `value_table`, of a function that makes float32 `[height, width, 3]` of uint8.

    Example:
        >>> table = table_of(lambda pixels: pixels.astype(np.float32) / 255)
        >>> table.shape, float(table[255]), float(table[256])  # red: white, green: black
        ((768,), 1.0, 0.0)
    """
    return np.ascontiguousarray(normalize(EVERY)[:, 0].T, np.float32).ravel()


def normalized(write: Nodes, pixels: ir.Value, table: np.ndarray, channel: int) -> ir.Value:
    """float32 values of uint8 pixels, looked up, so that no arithmetic can differ.

    Args:
        write: Receives the nodes.
        pixels: uint8.
        table: From `value_table`.
        channel: Axis of the channels, counted from the end: -1 is the last.

    Example:
        >>> write = Nodes()
        >>> values = normalized(write, picture_input(), np.zeros(768, np.float32), channel=-1)
        >>> [node.op_type for node in write.nodes]
        ['Cast', 'Constant', 'Add', 'Constant', 'Gather']
    """
    offsets = (np.arange(3, dtype=np.int32) * 256).reshape(3, *([1] * (-channel - 1)))
    return write("Gather", table, write("Add", write.cast(pixels, ir.DataType.INT32), offsets))


def finished(
    write: Nodes,
    image: ir.Value,
    feeds: Mapping[str, ir.Value],
    tokens: Mapping[str, ir.Value],
    placeholder: int,
    max_aspect: int | None = None,
) -> PictureGraph:
    """The whole graph; its outputs get their names.

    Args:
        write: Holds the nodes.
        image: The input.
        feeds: Inputs of the visual encoder by name, with types and shapes.
        tokens: From `placeholders` or `counted`.
        placeholder: As in `PictureGraph`.
        max_aspect: As in `PictureGraph`.

    Example:
        >>> write, image = Nodes(), picture_input()
        >>> tokens = counted(write, write.constant(np.full(4, 9)))
        >>> feeds = {"pixel_values": write.cast(image, ir.DataType.FLOAT)}
        >>> list(finished(write, image, feeds, tokens, placeholder=9).outputs)
        ['pixel_values', 'placeholder_ids', 'placeholder_positions']
    """
    outputs = {**feeds, **tokens}  # feeds of a second run are named with ".2" at the end
    for name, value in outputs.items():
        value.name = name
    return PictureGraph(write.nodes, image, outputs, placeholder, max_aspect)
