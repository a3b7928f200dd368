"""pi0, a vision-language-action model: PaliGemma reads pictures and a task, and an expert makes actions of noise."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import Row, check_length, left_pad, naming, prepare_pictures
from qe_edge.models.chat import text_ids
from qe_edge.models.family import TEXT, Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import PaddedValues, check_equal, load_image_processor
from qe_edge.models.robot import RobotProcessor, read_statistics
from qe_edge.models.samples import Turn
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import CommonNotice, InputError, ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import pi0_graphs
else:
    pi0_graphs = lazy_module("qe_edge.models.pi0_graphs")

MAX_CAMERAS = 8
UNKNOWN = (
    "Some samples have no 'actions': random numbers of mean 0 and deviation 1 stand for them, which is what normalized "
    "ones have. Give the recorded actions, so that the action expert is calibrated on what it will see."
)


class Pi0(ModelFamily):
    """Any `PI0ForConditionalGeneration`. A camera that is missing is a picture that a sample does not have."""

    model_type = "pi0"
    writes_text = False
    acts = True

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projector, layers of the language model, layers of the action expert."""
        groups = {"SiglipEncoderLayer": "visual", "PaliGemmaMultiModalProjector": "merger"}
        every = [
            Block(name, module, groups.get(kind, "action" if ".dit." in name else "language"))
            for name, module in model.named_modules()
            if (kind := type(module).__name__) in groups or kind == "GemmaDecoderLayer"
        ]
        return sorted(every, key=lambda block: ("visual", "merger", "language", "action").index(block.group))

    def load_processor(self, folder: str) -> RobotProcessor:
        """Tokenizer, image processor and the robot's statistics of `folder`."""
        vlm = self.config.vlm_config
        tokenizer = load_tokenizer(folder, max(vlm.text_config.vocab_size, vlm.image_token_id + 1))
        if tokenizer.bos_token_id is None:
            raise ModelError(
                f"The tokenizer of '{folder}' names no bos_token, which pi0's tasks begin with.",
                "Copy tokenizer.json and tokenizer_config.json from the original model.",
            )
        image_processor = load_image_processor(folder, "pi0", PaddedValues)
        size = [image_processor.pad_size["height"], image_processor.pad_size["width"]]
        check_equal(folder, "pad_size", size, [vlm.vision_config.image_size] * 2)
        state, actions = read_statistics(folder, self.config.max_state_dim, self.config.max_action_dim)
        return RobotProcessor(tokenizer, image_processor, state, actions)

    def save_processor(self, processor: RobotProcessor, folder: Path) -> None:
        """Write tokenizer, image processor and statistics beside a checkpoint or engine."""
        processor.save(folder)

    def encode(self, processor: RobotProcessor, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:
        """One left-padded batch; beside the pixels the state, the number of cameras, and with `answers` the actions.

        Raises:
            InputError: Naming the sample, if it lacks a picture or a state, or has what the model does not read.
        """
        rows = []
        for sample in samples:
            with naming(sample):
                self._check(processor, sample)
                rows.append(self._row(processor.tokenizer, sample))
        pixels = prepare_pictures(processor.image_processor, samples)
        pixels["cameras"] = np.array([len(sample.pictures) for sample in samples], np.int64)
        states = np.array([sample.state for sample in samples])
        pixels["state"] = processor.state.normalized(states, self.config.max_state_dim)
        if answers:
            pixels["actions"], pixels["noise"] = self._actions(processor, samples)
        return left_pad(rows, processor.tokenizer, self.config.vlm_config.image_token_id, pixels)

    def chat_text(self, processor: RobotProcessor, turns: Sequence[Turn]) -> str:  # noqa: ARG002 - there are none
        """There are no conversations.

        Raises:
            InputError: Always.
        """
        raise InputError("A 'pi0' model knows no conversation.", "Give one task to Python.")

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of `PI0ForConditionalGeneration.sample_actions`, without the noise."""
        pixels, cameras = encoded.pixels["pixel_values"], encoded.pixels["cameras"]
        present = np.arange(cameras.max()) < cameras[:, None]
        padded = np.zeros((*present.shape, *pixels.shape[1:]), np.float32)
        padded[present] = pixels
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "pixel_values": padded,
            "pixel_attention_mask": present,
            "state": encoded.pixels["state"],
        }

    def run_blocks(self, model: PreTrainedModel, encoded: Encoded, kept: dict[str, Any]) -> None:
        """The prompt once, and the action expert at every step of denoising."""
        pi0_graphs.run_blocks(self, model, encoded, kept)

    def kept_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in float32."""
        text = self.config.vlm_config.text_config
        return 8 * int(text.num_hidden_layers * text.num_key_value_heads * text.head_dim) * tokens

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[pictures, 3, side, side]`."""
        return [{"pixel_values": encoded.pixels["pixel_values"].astype(np.float32, copy=False)}]

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over pictures, projection, keys and values of a prompt, one step of denoising."""
        return pi0_graphs.graphs(model)

    def _actions(self, processor: RobotProcessor, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Actions and noise `[batch, chunk, action_dim]` of a batch; the noise of a sample is always the same."""
        shape = (self.config.chunk_size, self.config.max_action_dim)
        found = []
        for sample in samples:
            draws = np.random.default_rng(zlib.crc32(repr((sample.question, sample.state)).encode()))
            noise, actions = (draws.standard_normal(shape, np.float32) for _ in range(2))
            if sample.actions is not None:
                actions = processor.actions.normalized(np.array(sample.actions), shape[1])
            else:
                actions[:, len(processor.actions.mean) :] = 0
            found.append((actions, noise))
        if any(sample.actions is None for sample in samples):
            warnings.warn(UNKNOWN, CommonNotice, stacklevel=2)
        return np.stack([actions for actions, _ in found]), np.stack([noise for _, noise in found])

    def _check(self, processor: RobotProcessor, sample: Sample) -> None:
        """Refuse a sample that is no state with pictures and a task."""
        wanted, actions = len(processor.state.mean), len(processor.actions.mean)
        chunk, shape = self.config.chunk_size, np.shape(sample.actions or ())
        lengths = f"{wanted} number{'s' * (wanted != 1)}"
        problem, remedy = "", "Give one picture for each camera, a task and the robot's state."
        if sample.kind == TEXT or sample.earlier or sample.videos:
            problem = "A 'pi0' model reads no running text, no conversation and no video."
        elif not sample.pictures:
            problem = "A 'pi0' model acts on what it sees, and there is no picture."
        elif len(sample.pictures) > MAX_CAMERAS:
            problem, remedy = f"There are {len(sample.pictures)} cameras.", f"Give at most {MAX_CAMERAS} pictures."
        elif sample.marks:
            problem, remedy = "Pictures stand before a task.", "Leave the places of pictures in the text out."
        elif sample.state is None:
            problem, remedy = "There is no state of the robot.", f"Give 'state' (--state), a list of {lengths}."
        elif len(sample.state) != wanted:
            problem = f"The robot's state has {len(sample.state)} numbers; the model was trained on {wanted}."
            remedy = "Give one for each number of state_mean in processor_config.json."
        elif sample.actions is not None and shape != (chunk, actions):
            problem = f"There are {shape[0]} actions of {shape[1]} numbers; the model makes {chunk} of {actions}."
            remedy = "Give as many, or leave 'actions' out."
        if problem:
            raise InputError(problem, remedy)

    def _row(self, tokenizer: Any, sample: Sample) -> Row:  # noqa: ANN401 - tokenizers share no base
        """Tokens of a sample, as transformers' processor writes them."""
        vlm = self.config.vlm_config
        vision = vlm.vision_config
        picture = [vlm.image_token_id] * (vision.image_size // vision.patch_size) ** 2
        task = text_ids(tokenizer, f"{sample.question}\n", add_special_tokens=False)
        ids = [*(picture * len(sample.pictures)), tokenizer.bos_token_id, *task]
        row = Row(ids, len(ids))
        contexts = (vlm.text_config.max_position_embeddings, self.config.dit_config.max_position_embeddings)
        check_length(row, min(contexts) - self.config.chunk_size - 1, "A prompt")
        return row
