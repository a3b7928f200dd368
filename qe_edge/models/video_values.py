"""Settings of a model's videos, as video_preprocessor_config.json has them, with bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from qe_edge.models.frames import MAX_FRAMES
from qe_edge.models.guard import check_values
from qe_edge.models.image_processors import Area, PatchValues, PictureValues, Tile
from qe_edge.models.model_files import find_file
from qe_edge.models.torch_resize import FILTERS
from qe_edge.models.videos import MAX_FPS
from qe_edge.system.errors import InputError, ModelError
from qe_edge.system.json_files import read_json_table

FILE = "video_preprocessor_config.json"
REMEDY = f"Copy {FILE} from the original model."
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
Rate = Annotated[float, Field(gt=0, le=MAX_FPS, allow_inf_nan=False)]
FrameCount = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
Values = TypeVar("Values", bound="SamplingValues")


class SamplingValues(PictureValues):
    """Settings of every video processor.

    Attributes:
        do_sample_frames: Whether some of the frames are chosen, by `num_frames` or `fps`.
        num_frames: How many; None for as many as `fps` gives.
        fps: Frames per second that are seen.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    do_sample_frames: Annotated[bool, Field(strict=True)] = False
    num_frames: FrameCount | None = None
    fps: Rate | None = None

    @property
    def samples(self) -> bool:
        """Whether the settings choose some of the frames."""
        return self.do_sample_frames and (self.num_frames is not None or self.fps is not None)

    def check_filter(self) -> None:
        """Refuse a filter that scales no videos here.

        Raises:
            InputError: If it is one.
        """
        if self.do_resize and self.resample not in FILTERS:
            raise InputError(
                f"This model's settings scale frames with filter {self.resample}, which scales no videos here.",
                f"Set resample in {FILE} to one of {', '.join(map(str, FILTERS))}.",
            )


class VideoValues(SamplingValues, PatchValues):
    """Settings of a processor that cuts frames into patches; its edges are numbers of pixels.

    Attributes:
        min_frames: Fewest frames that `fps` gives.
        max_frames: Most frames that `fps` gives.
        cap_pixels_per_frame: Whether the pixels of a frame are bounded by `max_video_tokens` too.
        max_video_tokens: Tokens of a video in Qwen2-VL and Qwen2.5-VL, of a frame in Qwen3-VL.
    """

    min_frames: FrameCount = 4
    max_frames: FrameCount = 768
    cap_pixels_per_frame: bool | None = None
    max_video_tokens: Area = 128000

    @model_validator(mode="after")
    def _one_rule(self) -> VideoValues:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("fps and num_frames exclude each other")
        return self


class TileVideoValues(SamplingValues):
    """Settings of a processor that scales every frame to one size.

    Attributes:
        size: Height and width.
        initial_shift: Number of the first chosen frame; true for the middle of the first share.
        do_center_crop: Whether the middle of a frame is cut out, which is not done here.
    """

    size: Tile
    initial_shift: bool | Annotated[float, Field(ge=0, le=MAX_FRAMES, allow_inf_nan=False)] = True
    do_center_crop: bool | None = False  # files of older versions say null

    @model_validator(mode="after")
    def _one_rule(self) -> TileVideoValues:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("fps and num_frames exclude each other")
        return self


def load_video_values(
    source: str, kind: type[Values], defaults: Mapping[str, object], *, pixel_keys: bool = False
) -> Values | None:
    """Read a model's settings from the files that transformers reads, in its order.

    Args:
        source: Folder or hub id.
        kind: The keys with their bounds.
        defaults: The settings of transformers' class.
        pixel_keys: Whether `min_pixels` and `max_pixels` count, as older files write them.

    Returns:
        The settings; None if no file has any, so that the model takes no videos.

    Raises:
        ModelError: If a file is broken, or holds a value out of its bounds.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.qwen_vl_videos import QwenVideos
        >>> load_video_values(str(model_path()), VideoValues, QwenVideos.defaults, pixel_keys=True).temporal_patch_size
        2
    """
    for name in ("processor_config.json", FILE, "preprocessor_config.json"):
        path = find_file(source, name)
        if path is None:
            continue
        table: Any = read_json_table(path, error=ModelError, remedy=REMEDY)
        if name == "processor_config.json":
            table = table.get("video_processor")
            if table is None:
                continue
        if not isinstance(table, dict):
            raise ModelError(f"Key 'video_processor' of '{path}' is no table.", REMEDY)
        given = {key: value for key, value in table.items() if value is not None or key not in defaults}
        values = {**defaults, **given}
        size = values.get("size")
        if isinstance(size, dict) and pixel_keys:
            edges = {EDGES.get(key, key): value for key, value in size.items()}
            edges |= {edge: table[key] for key, edge in EDGES.items() if table.get(key) is not None}
            values["size"] = edges
        return check_values(kind, values, path, REMEDY, ModelError)
    return None


def value_table(values: PictureValues) -> np.ndarray:
    """What a value of a channel becomes, float32 `[3, 256]`, by the arithmetic of transformers' torch processors.

    They rescale and normalize at once, in float32.

    Example:
        >>> from qe_edge.models.qwen_vl_videos import Qwen3Videos
        >>> table = value_table(VideoValues(**Qwen3Videos.defaults))
        >>> float(table[0, 0]), float(table[0, 255])  # black and white
        (-1.0, 1.0)
    """
    levels = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    if not values.do_normalize:
        return levels * np.float32(values.rescale_factor) if values.do_rescale else levels
    mean, deviation = (
        np.broadcast_to(np.asarray(value, np.float32), 3)[:, None] for value in (values.image_mean, values.image_std)
    )
    if values.do_rescale:
        mean, deviation = (value * np.float32(1.0 / values.rescale_factor) for value in (mean, deviation))
    table: np.ndarray = (levels - mean) / deviation
    return table


def write_video_settings(processor: Any, folder: Path) -> None:  # noqa: ANN401 - of any family
    """Write a video processor's settings beside a model, where `load_video_values` finds them.

    Nothing is written if the files that are there say the same, as the image processor's file may.

    Example:
        >>> from qe_edge.models.qwen_vl_videos import Qwen3Videos
        >>> processor = Qwen3Videos(VideoValues(**Qwen3Videos.defaults))
        >>> write_video_settings(processor, Path())
        >>> load_video_values(".", VideoValues, Qwen3Videos.defaults) == processor.values
        True
    """
    values = processor.values
    keys = getattr(processor, "pixel_keys", False)
    if load_video_values(str(folder), type(values), processor.defaults, pixel_keys=keys) == values:
        return
    text = json.dumps(values.model_dump(mode="json", exclude_none=True), indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
