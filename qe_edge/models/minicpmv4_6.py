"""MiniCPM-V 4.6: pictures of any size, large ones in slices, a SigLIP that joins patches midway, and Qwen3.5's text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qe_edge.models.batching import (
    check_chat_template,
    check_length,
    encode_row,
    left_pad,
    naming,
    prepare_pictures,
)
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import SliceValues, check_equal, load_image_processor
from qe_edge.models.minicpmv4_6_slices import Slices
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.qwen3_5 import SIBLINGS
from qe_edge.models.tokenizers import REMEDY, load_tokenizer
from qe_edge.system.errors import ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import minicpmv4_6_graphs
else:
    minicpmv4_6_graphs = lazy_module("qe_edge.models.minicpmv4_6_graphs")

LAYER, WINDOWS, MERGER = (
    f"MiniCPMV4_6{name}" for name in ("VisionEncoderLayer", "ViTWindowAttentionMerger", "DownsampleMLP")
)
MARKS = ("image_id_start", "image_id_end", "image_start", "image_end", "slice_start", "slice_end")


class MiniCPMV46(ModelFamily):
    """Any `MiniCPMV4_6ForConditionalGeneration`, whatever its text model.

    Example:
        >>> from transformers import MiniCPMV4_6Config
        >>> MiniCPMV46(MiniCPMV4_6Config()).joined  # patches of a token: windows of four, merged by four
        (4, 4)
        >>> MiniCPMV46(MiniCPMV4_6Config(downsample_mode="4x")).joined
        (4,)
    """

    model_type = "minicpmv4_6"
    picture_unit = "tiles"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS

    @property
    def joined(self) -> tuple[int, ...]:
        """How many neighbours become one, step by step: in the vision encoder, if it joins any, and in the merger."""
        return (4,) if self.config.downsample_mode == "4x" else (4, 4)

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, among them what joins patches, if it is used; the merger, decoder layers."""
        modules = [(type(module).__name__, name, module) for name, module in model.named_modules()]
        visual, windows, merger = (
            [Block(name, module, group) for kind, name, module in modules if kind == wanted]
            for wanted, group in ((LAYER, "visual"), (WINDOWS, "visual"), (MERGER, "merger"))
        )
        after = self.config.vision_config.insert_layer_id + 1
        visual[after:after] = windows if len(self.joined) > 1 else []
        language = [Block(name, module, "language") for kind, name, module in modules if kind.endswith("DecoderLayer")]
        return [*visual, *merger, *language]

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of the merger's layers for all images; transformers calls them for each."""
        minicpmv4_6_graphs.merge_once(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "minicpmv4_6", SliceValues)
        check_equal(folder, "patch_size", image_processor.patch_size, self.config.vision_config.patch_size)
        check_equal(folder, "downsample_mode", image_processor.downsample_mode, self.config.downsample_mode)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        for name in MARKS:
            mark = getattr(tokenizer, f"{name}_token", None)
            if mark not in tokenizer.get_added_vocab():
                raise ModelError(f"The tokenizer of '{folder}' has no {name}_token, which stands at a picture.", REMEDY)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; before a picture stands its number, and its slices follow, as transformers writes."""
        pixels = prepare_pictures(Slices(processor.image_processor), samples)
        sizes, cut = pixels.get("target_sizes", np.zeros((0, 2), np.int64)), iter(pixels.pop("slices", ()))
        counts = iter((sizes.prod(1) // math.prod(self.joined)).tolist())
        image, rows = self.config.image_token_id, []
        context = context_of(self.config)
        for sample in samples:
            pictures = []
            for number in range(len(sample.pictures)):
                across = int((slices := next(cut))[1])
                own = [next(counts) for _ in range(1 + int(slices.prod()))]
                shown = number if processor.image_processor.use_image_id else None
                pictures.append(self._picture_ids(processor.tokenizer, shown, own, across))
            with naming(sample):
                row = encode_row(processor.tokenizer, sample, image, pictures, answer=answers)
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward; `pixel_values` is one row of patches, `[1, 3, side, patches * side]`."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
        }
        if encoded.pixels:
            side = self.config.vision_config.patch_size
            patches = encoded.pixels["pixel_values"].reshape(-1, 3, side, side)
            arrays["pixel_values"] = patches.transpose(1, 2, 0, 3).reshape(1, 3, side, -1)
            arrays["target_sizes"] = encoded.pixels["target_sizes"]
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Images of one size that follow each other, which attend to nothing outside of themselves.

        `pixel_values` float32 `[images, patches, values]`, patches of a token together, and of them those of a window;
        `places` float32 `[1, patches, 2]`: where a patch begins, as shares of the image's height and width.
        """
        sizes, pixels = encoded.pixels["target_sizes"], encoded.pixels["pixel_values"]
        feeds: list[dict[str, np.ndarray]] = []
        first = start = 0
        while first < len(sizes):
            rows, columns = map(int, sizes[first])
            count = int((np.cumsum((sizes[first:] != sizes[first]).any(1)) == 0).sum())
            order = together(rows, columns, len(self.joined))
            end = start + count * rows * columns
            images = pixels[start:end].reshape(count, rows * columns, -1)[:, order]
            shares = [np.arange(size, dtype=np.float32) / np.float32(size) for size in (rows, columns)]
            places = np.stack(np.meshgrid(*shares, indexing="ij"), -1).reshape(1, -1, 2)[:, order]
            feeds.append({"pixel_values": images, "places": places})
            first, start = first + count, end
        return feeds

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over images of one size, merger over tokens, decoder with positions `[batch, sequence]`."""
        return minicpmv4_6_graphs.graphs(model, windows=len(self.joined) > 1)

    def _picture_ids(self, tokenizer: Any, number: int | None, counts: list[int], across: int) -> list[int]:  # noqa: ANN401
        """Tokens of a picture: its number, the whole of it, and its slices, `across` a line; `counts` are features."""
        image = tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        id_start, id_end, start, end, slice_start, slice_end = (getattr(tokenizer, f"{name}_token") for name in MARKS)
        slices = [f"{slice_start}{image * count}{slice_end}" for count in counts[1:]]
        lines = ["".join(slices[place : place + across]) for place in range(0, len(slices), across or 1)]
        shown = "" if number is None else f"{id_start}{number}{id_end}"
        text = f"{shown}{start}{image * counts[0]}{end}" + "\n".join(lines)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def together(rows: int, columns: int, steps: int) -> np.ndarray:
    """Numbers of the patches of an image, those together that become one: first four, then four of these, and so on.

    Example:
        >>> together(2, 4, steps=1).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    order = np.arange(rows * columns).reshape(rows, columns, 1)
    for _ in range(steps):
        down, across = order.shape[0] // 2, order.shape[1] // 2
        order = order.reshape(down, 2, across, 2, -1).swapaxes(1, 2).reshape(down, across, -1)
    return order.ravel()
