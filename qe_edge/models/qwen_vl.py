"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: patches of pictures and videos of any size, 2 x 2 merged, M-RoPE."""

from __future__ import annotations

import itertools
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
from qe_edge.models.chat import Rewrite, as_it_is
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, ModelFamily, Sample
from qe_edge.models.image_processors import PatchValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.qwen_vl_tokens import IMAGE, VIDEO, TokenRuns
from qe_edge.models.qwen_vl_videos import QwenVideos
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.models.video_plans import take_times
from qe_edge.models.video_values import FILE, VideoValues, load_video_values
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from qe_edge.models import qwen_vl_at_once, qwen_vl_pictures
    from qe_edge.models.graph_nodes import Nodes
    from qe_edge.models.picture_graphs import PictureGraph
else:
    qwen_vl_at_once = lazy_module("qe_edge.models.qwen_vl_at_once")
    qwen_vl_pictures = lazy_module("qe_edge.models.qwen_vl_pictures")

GRIDS = ("image_grid_thw", "video_grid_thw")
VALUES = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}


class QwenVL(ModelFamily):
    """A family that reads pictures as Qwen2-VL does.

    Class attributes:
        groups: "visual", "merger" or "language" by the name of a class that is a block.
        videos: What prepares its videos.
        times_apart: Whether each step of time of a video has tokens of its own.
        counts_seconds: Whether positions of a video follow from its seconds.
    """

    picture_unit = "patches"
    groups: ClassVar[dict[str, str]]
    videos: ClassVar[type[QwenVideos]] = QwenVideos
    times_apart: ClassVar[bool] = False
    counts_seconds: ClassVar[bool] = False

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision blocks, the patch merger, decoder layers; found by class, not by path."""
        return [
            Block(name, module, self.groups[type(module).__name__])
            for name, module in model.named_modules()
            if type(module).__name__ in self.groups
        ]

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of the vision encoder for pictures and videos; transformers has one for each."""
        qwen_vl_at_once.see_at_once(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer, the PIL image processor and the settings of videos of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "qwen2_vl", PatchValues)
        vision = self.config.vision_config
        check_equal(folder, "patch_size", image_processor.patch_size, vision.patch_size)
        check_equal(folder, "merge_size", image_processor.merge_size, vision.spatial_merge_size)
        check_equal(folder, "temporal_patch_size", image_processor.temporal_patch_size, vision.temporal_patch_size)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        values = self._video_values(folder)
        if values is not None:
            check_equal(folder, "patch_size", values.patch_size, vision.patch_size, FILE)
            check_equal(folder, "merge_size", values.merge_size, vision.spatial_merge_size, FILE)
            check_equal(folder, "temporal_patch_size", values.temporal_patch_size, vision.temporal_patch_size, FILE)
        context = context_of(self.config)
        videos = None if values is None else self.videos(values, max_tokens=context)
        return VisionLanguageProcessor(tokenizer, image_processor, videos)

    def _video_values(self, folder: str) -> VideoValues | None:
        return load_video_values(folder, VideoValues, self.videos.defaults, pixel_keys=self.videos.pixel_keys)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; each picture's or video's token is repeated once per merged patch."""
        pixels = prepare_pictures(processor.image_processor, samples, processor.video_processor)
        grids = {name: iter(pixels.get(name, np.zeros((0, 3), np.int64)).tolist()) for name in GRIDS}
        times = take_times(pixels)
        seconds = iter(times["frame_seconds"].tolist())
        if self.counts_seconds and "video_grid_thw" in pixels:
            pixels["second_per_grid_ts"] = times["second_per_grid_ts"]
        merge = self.config.vision_config.spatial_merge_size**2
        image, video = self.config.image_token_id, self.config.video_token_id
        rows = []
        context = context_of(self.config)
        for sample in samples:
            pictures = [[image] * (math.prod(next(grids[GRIDS[0]])) // merge) for _ in sample.pictures]
            shown = [next(grids[GRIDS[1]]) for _ in sample.videos]
            taken = [list(itertools.islice(seconds, steps)) for steps, _, _ in shown]
            apart = [steps if self.times_apart else 1 for steps, _, _ in shown]
            counts = [
                math.prod(grid) // merge // parts
                for grid, parts in zip(shown, apart, strict=True)
                for _ in range(parts)
            ]
            with naming(sample):
                row = encode_row(
                    processor.tokenizer,
                    sample,
                    image,
                    pictures,
                    answer=answers,
                    rewrite=self.with_times(processor.tokenizer, taken),
                    video_token=video,
                    videos=[[video] * count for count in counts],
                )
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels, video)

    def with_times(self, tokenizer: Any, times: Sequence[Sequence[float]]) -> Rewrite:  # noqa: ANN401, ARG002
        """What the family does to a rendered prompt before it is tokenized.

        Args:
            tokenizer: Of transformers.
            times: For every video the seconds at which its steps of time were taken.
        """
        return as_it_is

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            **encoded.pixels,
            "mm_token_type_ids": self.runs.kinds(encoded),
        }

    @property
    def runs(self) -> TokenRuns:
        """Finds the tokens of pictures and videos."""
        merge = self.config.vision_config.spatial_merge_size
        return TokenRuns(merge, self.config.video_token_id, apart=self.times_apart)

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """M-RoPE positions `[3, batch, sequence]`: text counts on, a picture spans its grid of merged patches."""
        return self.runs.positions(encoded)

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Patches of every picture, and of every pair of frames: they attend to nothing outside of it.

        Patches come in groups of those that become one token: `pixel_values` float32 `[groups, patches, values]`;
        `position_ids` int64 `[groups, patches, 2]`, row and column; and what `frame_feeds` adds.
        """
        merge = self.config.vision_config.spatial_merge_size
        patches = {kind: _in_rows(encoded.pixels.get(name), merge) for kind, name in VALUES.items()}
        starts = dict.fromkeys(VALUES, 0)
        feeds: list[dict[str, np.ndarray]] = []
        for run in itertools.chain.from_iterable(self.runs.of(encoded)):
            frames, height, width = run.grid
            if not frames:
                continue
            shared = {"position_ids": in_groups(np.indices((height, width)), merge), **self.frame_feeds(height, width)}
            for _ in range(frames):
                start = starts[run.kind]
                end = starts[run.kind] = start + height * width // merge**2
                feeds.append({"pixel_values": patches[run.kind][start:end], **shared})
        return feeds

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Scaling, patches, positions, and what `frame_nodes` adds."""
        return qwen_vl_pictures.picture_graph(processor.image_processor, self.config.image_token_id, self.frame_nodes)

    def frame_nodes(self, write: Nodes, rows: ir.Value, columns: ir.Value) -> dict[str, ir.Value]:  # noqa: ARG002
        """`frame_feeds` as nodes, of numbers of rows and columns of patches."""
        return {}

    def frame_feeds(self, height: int, width: int) -> dict[str, np.ndarray]:  # noqa: ARG002 - for families that need more
        """Further inputs of the visual encoder for a frame of `height` x `width` patches."""
        return {}


def _in_rows(pixels: np.ndarray | None, merge: int) -> np.ndarray:
    """Patches `[patches, values]` as float32 `[groups, patches of a group, values]`."""
    if pixels is None:
        return np.zeros((0, merge**2, 0), np.float32)
    return pixels.astype(np.float32, copy=False).reshape(-1, merge**2, pixels.shape[-1])


def in_groups(values: np.ndarray, merge: int) -> np.ndarray:
    """Bring values of patches `[n, height, width]` into the image processor's order `[groups, patches, n]`.

    The `merge` x `merge` patches of a group are neighbours, row by row, as the groups are.

    Example:
        >>> numbers = np.arange(16).reshape(1, 4, 4)  # of 4 x 4 patches
        >>> in_groups(numbers, merge=2)[:2, :, 0].tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    count, height, width = values.shape
    split = values.reshape(count, height // merge, merge, width // merge, merge)
    grouped = split.transpose(1, 3, 2, 4, 0).reshape(-1, merge**2, count)
    return np.ascontiguousarray(grouped)
