"""Qwen2-VL: vision transformer over patches of any image size, 2x2 patch merger, Qwen2 language model with M-RoPE."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.errors import InputError, ModelError
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.images import open_image

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Qwen2VLProcessor:
    """Tokenizer and image processor, loaded one by one: the combined class needs torchvision for videos."""

    tokenizer: Any
    image_processor: Any


class Qwen2VL(ModelFamily):
    """Qwen2-VL 2B, 7B and 72B and anything of the same architecture."""

    model_type = "qwen2_vl"

    def blocks(self, model: nn.Module) -> list[Block]:
        """Vision blocks, the patch merger, decoder layers; found by class, not by path."""
        groups = {"Qwen2VLVisionBlock": "visual", "PatchMerger": "merger", "Qwen2VLDecoderLayer": "language"}
        return [
            Block(name, module, groups[type(module).__name__])
            for name, module in model.named_modules()
            if type(module).__name__ in groups
        ]

    def load_processor(self, folder: str) -> Qwen2VLProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        from transformers import AutoTokenizer  # noqa: PLC0415 - heavy import, only where it is needed
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: PLC0415
            Qwen2VLImageProcessorPil,
        )

        try:
            return Qwen2VLProcessor(
                AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"'{folder}' has no usable tokenizer or image processor: {error}.",
                "Copy tokenizer.json, tokenizer_config.json and preprocessor_config.json from the original model.",
            ) from error

    def encode(
        self, processor: Qwen2VLProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; the image token is repeated once per merged patch."""
        tokenizer = processor.tokenizer
        pictures = [open_image(sample.image) for sample in samples if sample.image is not None]
        pixels = dict(processor.image_processor(images=pictures, return_tensors="np")) if pictures else {}
        grids = iter(pixels.get("image_grid_thw", []))
        merge = self.config.vision_config.spatial_merge_size ** 2
        rows: list[tuple[list[int], int]] = []
        for sample in samples:
            content: list[dict[str, str]] = [{"type": "text", "text": sample.question}]
            if sample.image is not None:
                content.insert(0, {"type": "image"})
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if sample.image is not None:
                ids = self._expand_image_token(ids, int(np.prod(next(grids))) // merge)
            prompt_length = len(ids)
            if answers and sample.answer is not None:
                text = f"{sample.answer}{tokenizer.decode([self._end_token(tokenizer)])}"
                ids = ids + tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append((ids, prompt_length))
        return self._pad(rows, pixels, self._pad_token(tokenizer))

    def torch_inputs(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Arguments of `Qwen2VLForConditionalGeneration.forward`."""
        import torch  # noqa: PLC0415 - the engine runtime works without torch

        arrays = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask, **encoded.pixels}
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {**inputs, "mm_token_type_ids": torch.from_numpy(encoded.image_mask.astype(np.int64))}

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """M-RoPE positions `[3, batch, sequence]`: text counts on, a picture spans its grid of merged patches."""
        grids = iter(encoded.pixels.get("image_grid_thw", []))
        merge = self.config.vision_config.spatial_merge_size
        positions = np.zeros((3, *encoded.input_ids.shape), np.int64)
        for row, (mask, images) in enumerate(zip(encoded.attention_mask, encoded.image_mask, strict=True)):
            parts: list[np.ndarray] = []
            current = 0
            for is_image, run in itertools.groupby(images[mask.astype(bool)]):
                length = len(list(run))
                if not is_image:
                    parts.append(np.tile(np.arange(current, current + length), (3, 1)))
                    current += length
                    continue
                while length:
                    frames, height, width = (int(size) for size in next(grids))
                    shape = (frames, height // merge, width // merge)
                    parts.append(np.indices(shape).reshape(3, -1) + current)
                    current += max(height, width) // merge
                    length -= int(np.prod(shape))
            valid = np.concatenate(parts, axis=1)
            positions[:, row, mask.astype(bool)] = valid
        return positions

    def _expand_image_token(self, ids: list[int], count: int) -> list[int]:
        image = self.config.image_token_id
        if ids.count(image) != 1:
            raise InputError(
                "The prompt must hold exactly one picture.", "Leave image tokens out of the question's text."
            )
        at = ids.index(image)
        return [*ids[:at], *[image] * count, *ids[at + 1 :]]

    def _pad(self, rows: list[tuple[list[int], int]], pixels: dict[str, np.ndarray], pad: int) -> Encoded:
        length = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), length), pad, np.int64)
        attention_mask = np.zeros((len(rows), length), np.int64)
        answer_mask = np.zeros((len(rows), length), bool)
        for row, (ids, prompt_length) in enumerate(rows):
            start = length - len(ids)
            input_ids[row, start:] = ids
            attention_mask[row, start:] = 1
            answer_mask[row, start + prompt_length :] = True
        image_mask = (input_ids == self.config.image_token_id) & (attention_mask == 1)
        return Encoded(input_ids, attention_mask, image_mask, answer_mask, pixels)

    def _pad_token(self, tokenizer: Any) -> int:  # noqa: ANN401 - transformers' tokenizers share no typed base
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def _end_token(self, tokenizer: Any) -> int:  # noqa: ANN401
        return int(tokenizer.eos_token_id)

    def visual_feeds(self, encoded: Encoded) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def graphs(self, model: nn.Module) -> list[GraphSpec]:
        raise NotImplementedError
