"""What a manifest says of every graph: its file, inputs and outputs; and of the graph that prepares pictures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qe_edge.models.picture_names import PICTURES

DType = Literal["float32", "float16", "int64", "uint8"]
Dimension = int | str
TokenId = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """A table of a manifest: it has the keys that are named and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(Strict):
    """An input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: Element type.
        shape: Sizes; dynamic ones are names such as "sequence".
    """

    name: str = Field(min_length=1, max_length=256)
    dtype: DType
    shape: tuple[Dimension, ...] = Field(max_length=8)


class GraphFile(Strict):
    """A graph with its inputs and outputs.

    Attributes:
        file: Its file in the folder; a plain file name.
        inputs: Inputs in order.
        outputs: Outputs in order.
    """

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,100}$")
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)


class PictureLabel(Strict):
    """Tokens that say the number of a picture in its prompt, from 0.

    Attributes:
        before: Tokens before the number.
        digits: The ten tokens of digits.
        after: Tokens after it.

    Example:
        >>> PictureLabel(before=(90,), digits=tuple(range(10)), after=(91,)).ids(12)
        [90, 1, 2, 91]
    """

    before: tuple[TokenId, ...] = Field(max_length=64)
    digits: tuple[TokenId, ...] = Field(min_length=10, max_length=10)
    after: tuple[TokenId, ...] = Field(max_length=64)

    def ids(self, number: int) -> list[int]:
        """The tokens of one number."""
        return [*self.before, *(self.digits[int(digit)] for digit in str(number)), *self.after]


class PictureEntry(GraphFile):
    """The graph that prepares one picture; it runs in ONNX Runtime on the CPU, whatever the target.

    Its inputs are the picture and, where pictures depend on how many a prompt has, that number.
    The visual encoder runs once for the outputs with its inputs' names, once more for those that end in ".2", and so
    on. A run without any `pixel_values` is left out. A picture without `placeholder_ids` is one that the model refuses,
    because it is too narrow.

    Attributes:
        placeholder_id: Token of a prompt that stands for a picture; the graph's `placeholder_ids` replace it.
        max_pixels: Most pixels of a picture.
        max_side: Most pixels of a side.
        max_aspect: Largest ratio of the longest to the shortest side; None for any.
        numbered: Whether the language graph's `attention_mask` numbers the features of every picture of a prompt: 2 on
            those of the first, 3 of the second, 1 on all other tokens. Without it, it is 1 on all.
        label: Tokens before the picture's own that say its number in the prompt; None without.
        whole: Whether all tokens of a prompt see each other: the `attention_mask` is 2 on them.
        first_position: Position of a prompt's first token.
        max_prompt: Most tokens of a prompt; None for as many as the context has.
    """

    placeholder_id: int = Field(ge=0)
    max_pixels: int = Field(ge=1, le=1 << 26)
    max_side: int = Field(ge=1, le=1 << 16)
    max_aspect: int | None = Field(None, ge=1)
    numbered: bool = False
    label: PictureLabel | None = None
    whole: bool = False
    first_position: int = Field(0, ge=0, le=1)
    max_prompt: int | None = Field(None, ge=1)

    @property
    def counts_pictures(self) -> bool:
        """Whether a picture becomes something else beside other pictures."""
        return any(spec.name == PICTURES for spec in self.inputs)

    @property
    def largest_id(self) -> int:
        """The largest token that this names."""
        label = self.label
        said = () if label is None else (*label.before, *label.digits, *label.after)
        return max([self.placeholder_id, *said])

    @model_validator(mode="after")
    def _one_mask(self) -> PictureEntry:
        if self.numbered and self.whole:
            raise ValueError("a mask either numbers pictures or is one number")
        return self
