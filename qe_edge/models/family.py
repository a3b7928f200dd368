"""The interface of a family of models: vision-language, language only, vision only, or vision-language-action."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from qe_edge.models.chat import render_turns
from qe_edge.models.samples import TEXT, Sample, Turn
from qe_edge.models.video_values import write_video_settings
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models.picture_graphs import PictureGraph
else:  # engines read families, and run without torch
    torch = lazy_module("torch")


@dataclass(frozen=True)
class Encoded:
    """A left-padded batch, ready for the PyTorch model or for the exported graphs; all arrays are numpy.

    Attributes:
        input_ids: `[batch, sequence]` int64, with one image token per visual feature.
        attention_mask: `[batch, sequence]` int64, 0 on padding.
        image_mask: `[batch, sequence]` bool, True where a visual feature stands.
        answer_mask: `[batch, sequence]` bool, True on the tokens of the reference answer, and on the assistant's own
            in earlier turns, where reference answers were asked for.
        pixels: Further inputs under the names that the PyTorch model gives them, for example `pixel_values`.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_mask: np.ndarray
    answer_mask: np.ndarray
    pixels: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A repeated part of the model that is quantized in one step.

    Attributes:
        name: Dotted path from the model's root.
        module: The module itself.
        group: "visual", "merger", "language" or "action".
        ends_chain: Whether its output is not just the next block's input, so that the two cannot be run one after the
            other without the rest of the model.
    """

    name: str
    module: nn.Module
    group: str
    ends_chain: bool = False


__all__ = ["TEXT", "Block", "Encoded", "GraphSpec", "ModelFamily", "Profile", "Sample"]

# for every input of a graph the smallest, the typical and the largest shape that an engine is built for
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class GraphSpec:
    """A part of the model as it is exported to ONNX.

    Attributes:
        name: "visual", "merger", "language", "prefix" or "action"; the file is `<name>.onnx`.
        module: Wrapper whose forward takes the example inputs in order; it holds the model's own submodules. Linear
            layers must see rank 3: on other ranks ONNX Runtime loses its INT4 kernel.
        inputs: Example inputs (tensors, or nested lists of tensors).
        input_names: Flat names of the inputs.
        output_names: Flat names of the outputs.
        dynamic_shapes: As for `torch.export.export`, matching `inputs`.
        profiles: By name, the shapes that engines are built for.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    dynamic_shapes: tuple[Any, ...]
    profiles: dict[str, Profile]


class ModelFamily(ABC):
    """A family of models that share their code in transformers.

    Class attributes:
        model_type: `model_type` of the family's config.json.
        auto_class: The class of transformers that loads the family's models.
        writes_text: Whether the models answer; others are compared by their features only.
        class_token: Whether an encoder's first feature stands for the picture as a whole, where it writes no text.
        picture_unit: What the size of pictures is counted in: "patches", "tiles", or "" where there are no pictures.
        acts: Whether the models make actions of a robot; they are compared by these.
        has_vision_adapter: Whether the model needs a LoRA for pictures, which may lie in a subfolder of its own.
        pictures_stand_alone: Whether a picture becomes the same features whatever other pictures a prompt has.
        writes_prompts: Whether `chat_text` needs no chat template.
        siblings: Names of linear layers of one parent module that read the same input.

    Args:
        config: The model's configuration.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.configuration import load_family
        >>> family = load_family(str(model_path()))
        >>> family.model_type, family.writes_text, family.picture_unit
        ('qwen2_vl', True, 'patches')
        >>> processor = family.load_processor(str(model_path()))
        >>> encoded = family.encode(processor, [Sample(None, "is it red?", "yes")], answers=True)
        >>> int(encoded.answer_mask.sum())  # the answer and its end
        2
    """

    model_type: ClassVar[str]
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    writes_text: ClassVar[bool] = True
    acts: ClassVar[bool] = False
    class_token: ClassVar[bool] = True
    picture_unit: ClassVar[Literal["patches", "tiles", ""]] = ""
    has_vision_adapter: ClassVar[bool] = False
    pictures_stand_alone: ClassVar[bool] = True
    writes_prompts: ClassVar[bool] = False
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    @property
    def image_token_id(self) -> int | None:
        """Token at whose places features of pictures stand; None of a model without pictures."""
        return getattr(self.config, "image_token_id", None)

    @abstractmethod
    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Every quantizable block in the order in which data flows: visual, merger, language."""

    @abstractmethod
    def load_processor(self, folder: str) -> Any:  # noqa: ANN401 - each family has its own processor type
        """Tokenizer and image processor, as far as there are such, from a folder or hub id; never runs remote code."""

    @abstractmethod
    def encode(self, processor: Any, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:  # noqa: ANN401
        """Tokenize prompts and prepare pictures as one left-padded batch.

        Args:
            processor: As returned by `load_processor`.
            samples: The samples.
            answers: Whether the reference answer follows the prompt (for calibration and teacher forcing).

        Raises:
            InputError: Naming the sample, if a picture cannot be read, a prompt is longer than the model's context, or
                the family takes no such samples.
        """

    @abstractmethod
    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Keyword arguments of the PyTorch model's forward and generate, as arrays."""

    def adapt(self, model: PreTrainedModel) -> None:  # noqa: B027 - most families change nothing
        """Change how a loaded model calls its blocks, so that a forward pass calls each of them once.

        The model computes what it did. Nothing is changed where transformers calls a block once.
        """

    def run_blocks(self, model: PreTrainedModel, encoded: Encoded, kept: dict[str, Any]) -> None:  # noqa: ARG002
        """One forward pass in which every block is called once, for calibration.

        Args:
            model: The model.
            encoded: A batch with its answers.
            kept: What blocks leave for later ones besides hidden states. It belongs to the batch: empty before the
                first pass, and the same in every further one.
        """
        model(**self.torch_inputs(encoded), use_cache=False)

    def kept_bytes(self, tokens: int) -> int:  # noqa: ARG002 - most families keep nothing
        """Bytes of what the blocks leave of so many tokens, as `run_blocks` says."""
        return 0

    def torch_inputs(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """`model_inputs` as tensors."""
        arrays = self.model_inputs(encoded)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    @abstractmethod
    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Inputs of every run of the exported visual encoder; the outputs of all runs are put together in order."""

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """Positions of the prompt tokens, int64 `[axes, batch, sequence]` or `[batch, sequence]`.

        Without axes valid tokens count from 0, and padding stands at 0.
        """
        positions: np.ndarray = np.maximum(np.cumsum(encoded.attention_mask, axis=1) - 1, 0)
        return positions

    def graph_mask(self, encoded: Encoded) -> np.ndarray:
        """`attention_mask` of the language graph for a prompt, int64 `[batch, sequence]`: 0 on padding."""
        return encoded.attention_mask

    @abstractmethod
    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """The visual encoder, the merger and the language model as exportable modules of float32 weights.

        The visual encoder takes `visual_feeds`; its one output is the merger's one input, and the merger's output
        `[features, width]` stands where `image_mask` is True in `inputs_embeds` `[batch, sequence, width]` of the
        language graph, which `qe_edge.models.decoder` makes. Token embeddings narrower than that are followed by zeros.
        """

    def picture_graph(self, processor: Any) -> PictureGraph | None:  # noqa: ANN401, ARG002 - of families with pictures
        """The preparation of one picture as a graph, equal to `encode` and `visual_feeds`; None where there is none.

        Args:
            processor: As returned by `load_processor`.
        """
        return None

    def chat_text(self, processor: Any, turns: Sequence[Turn]) -> str:  # noqa: ANN401
        """What `encode` tokenizes for a conversation: the template's text, with one placeholder for each picture.

        Args:
            processor: As returned by `load_processor`.
            turns: The conversation.

        Raises:
            InputError: If the template refuses it.
        """
        return render_turns(processor.tokenizer, turns, as_parts=True)

    def next_position_ids(self, positions: np.ndarray, step: int) -> np.ndarray:
        """Positions of generated token number `step` (0 is the first after the prompt): one past the largest so far."""
        return following_positions(positions, step)

    def save_processor(self, processor: Any, folder: Path) -> None:  # noqa: ANN401
        """Write tokenizer, image processor and the settings of videos beside a checkpoint or engine."""
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        if processor.video_processor is not None:
            write_video_settings(processor.video_processor, folder)


def following_positions(positions: np.ndarray, step: int) -> np.ndarray:
    """Positions of generated token number `step`, int64 `[..., batch, 1]`: one past the largest of each row so far.

    Args:
        positions: Of the prompt, int64 `[..., batch, sequence]`.
        step: 0 for the first token after the prompt.

    Example:
        >>> following_positions(np.array([[0, 1, 2]]), 1).tolist()
        [[4]]
    """
    axes = tuple(range(positions.ndim - 2))
    largest = positions.max(axis=(*axes, -1))
    following = np.broadcast_to(largest[:, None] + 1 + step, (*positions.shape[:-1], 1))
    return np.ascontiguousarray(following)
