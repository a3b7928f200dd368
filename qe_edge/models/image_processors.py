"""Loading an image processor: sizes are bounded, and fit the model's vision encoder."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qe_edge.models.guard import Guard, check_key_names, check_values
from qe_edge.models.model_files import find_file
from qe_edge.system.errors import ModelError
from qe_edge.system.json_files import read_json_table

REMEDY = "Copy preprocessor_config.json from the original model."
MAX_PIXELS = 2**25  # of a picture after scaling; Qwen2-VL's largest has 2**23.6
MAX_TILES = 64
OWN = {  # where transformers has one for torchvision alone
    "lfm2_vl": "qe_edge.models.lfm2_vl_processor",
    "phi4_multimodal": "qe_edge.models.phi4_multimodal_processor",
    "pi0": "qe_edge.models.pi0_processor",
}
Number = Annotated[float, Field(strict=True, ge=-1024, le=1024, allow_inf_nan=False)]
Deviation = Annotated[float, Field(strict=True, ge=1e-4, le=1024, allow_inf_nan=False)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Factor = Annotated[int, Field(strict=True, ge=1, le=64)]
Area = Annotated[int, Field(strict=True, ge=1, le=MAX_PIXELS)]
Three = Field(min_length=3, max_length=3)


class PictureValues(BaseModel):
    """Settings of every image processor for a picture that has its final size."""

    model_config = ConfigDict(from_attributes=True)
    do_resize: Annotated[bool, Field(strict=True)] = True
    do_rescale: Annotated[bool, Field(strict=True)] = True
    do_normalize: Annotated[bool, Field(strict=True)] = True
    resample: Annotated[int, Field(strict=True, ge=0, le=5)] = 3
    rescale_factor: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] = 1 / 255
    image_mean: Annotated[tuple[Number, ...], Three] | Number = 0.0
    image_std: Annotated[tuple[Deviation, ...], Three] | Deviation = 1.0


class _Areas(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    shortest_edge: Area
    longest_edge: Area

    @model_validator(mode="after")
    def _ordered(self) -> _Areas:
        if self.shortest_edge > self.longest_edge:
            raise ValueError("the smallest number of pixels is above the largest")
        return self


class PatchValues(PictureValues):
    """Settings of a processor that cuts a picture of any size into patches; its edges are numbers of pixels."""

    size: _Areas
    patch_size: Factor
    merge_size: Factor
    temporal_patch_size: Factor


class Tile(BaseModel):
    """Height and width of a tile."""

    model_config = ConfigDict(from_attributes=True)
    height: Side
    width: Side


class TileValues(PictureValues):
    """Settings of a processor that cuts a picture into tiles of one size."""

    size: Tile
    min_patches: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    max_patches: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]

    @model_validator(mode="after")
    def _ordered(self) -> TileValues:
        if self.min_patches > self.max_patches:
            raise ValueError("min_patches is above max_patches")
        return self


class SquareValues(PictureValues):
    """Settings of a processor that scales every picture to one size."""

    size: Tile


class _Room(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    max_height: Side
    max_width: Side


class PaddedValues(PictureValues):
    """Settings of a processor that scales a picture into a frame and fills the rest of it."""

    size: _Room
    pad_size: Tile
    do_resize: Literal[True]
    do_rescale: Literal[True]
    do_normalize: Literal[True]
    do_pad: Literal[True]

    @model_validator(mode="after")
    def _whole(self) -> PaddedValues:
        if (self.size.max_height, self.size.max_width) != (self.pad_size.height, self.pad_size.width):
            raise ValueError("size and pad_size differ")
        return self


class ResolutionValues(SquareValues):
    """Settings of a processor that scales a picture to one of several resolutions and cuts it into tiles."""

    image_grid_pinpoints: Annotated[list[Annotated[list[Side], Field(min_length=2, max_length=2)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _few_tiles(self) -> ResolutionValues:
        for height, width in self.image_grid_pinpoints:
            if height % self.size.height or width % self.size.width:
                raise ValueError(f"{height} x {width} is no multiple of a tile")
            if height // self.size.height * (width // self.size.width) > MAX_TILES:
                raise ValueError(f"{height} x {width} has more than {MAX_TILES} tiles")
        return self


class GridValues(PictureValues):
    """Settings of a processor that scales a picture to whole patches and cuts a large one into tiles."""

    downsample_factor: Factor
    encoder_patch_size: Factor
    tile_size: Side
    min_tiles: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    max_tiles: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    min_image_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)]
    max_image_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)]
    max_pixels_tolerance: Annotated[float, Field(strict=True, gt=0, le=1024, allow_inf_nan=False)]
    do_image_splitting: Annotated[bool, Field(strict=True)] = True
    use_thumbnail: Annotated[bool, Field(strict=True)] = True

    @model_validator(mode="after")
    def _whole(self) -> GridValues:
        if self.min_tiles > self.max_tiles or self.min_image_tokens > self.max_image_tokens:
            raise ValueError("the fewest tiles or tokens are above the most")
        if self.tile_size % (self.encoder_patch_size * self.downsample_factor):
            raise ValueError(f"a tile of {self.tile_size} pixels is no whole number of tokens")
        return self


class SliceValues(PictureValues):
    """Settings of a processor that scales a picture to whole patches and cuts a large one into slices of one size."""

    do_resize: Literal[True] = True  # a picture as it is rarely has whole patches
    patch_size: Factor
    scale_resolution: Side
    max_slice_nums: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    slice_mode: Annotated[bool, Field(strict=True)] = True
    use_image_id: Annotated[bool, Field(strict=True)] = True


class HDValues(PictureValues):
    """Settings of a processor that fits a picture into a grid of square crops and fills the rest of it."""

    size: Tile
    patch_size: Factor
    dynamic_hd: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    resample: Literal[3] = 3  # of the copy in one crop

    @model_validator(mode="after")
    def _whole(self) -> HDValues:
        if self.size.height != self.size.width or self.size.height % (2 * self.patch_size):
            raise ValueError(f"{self.size.height} x {self.size.width} is no square of pairs of patches")
        return self


class Longest(BaseModel):
    """The longest edge of a picture."""

    model_config = ConfigDict(from_attributes=True)
    longest_edge: Side


class SplitValues(PictureValues):
    """Settings of a processor that scales a picture to a longest edge and cuts it into tiles, row by row."""

    size: Longest
    max_image_size: Longest
    do_image_splitting: Annotated[bool, Field(strict=True)] = True


class SoftTokenValues(PictureValues):
    """Settings of a processor that scales a picture of any shape to at most so many tokens."""

    patch_size: Factor
    pooling_kernel_size: Factor
    max_soft_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)]

    @model_validator(mode="after")
    def _few_pixels(self) -> SoftTokenValues:
        if self.max_soft_tokens * (self.pooling_kernel_size * self.patch_size) ** 2 > MAX_PIXELS:
            raise ValueError(f"a picture would have more than {MAX_PIXELS} pixels")
        return self


class _Edges(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None
    longest_edge: Side | None = None


class CropValues(PictureValues):
    """Settings of a processor that scales a picture and may cut out its middle."""

    size: _Edges
    do_center_crop: Annotated[bool, Field(strict=True)] = False
    crop_size: _Edges | None = None


def pil_image_processor(model_type: str) -> Any:  # noqa: ANN401 - a class of transformers
    """The image processor that transformers has for an architecture and that works with Pillow alone.

    Args:
        model_type: Architecture, as transformers names its folder.

    Example:
        >>> pil_image_processor("clip").__name__
        'CLIPImageProcessorPil'
    """
    # by module: some versions of transformers hide the class itself where torchvision is not installed
    theirs = f"transformers.models.{model_type}.image_processing_pil_{model_type}"
    module = importlib.import_module(OWN.get(model_type, theirs))
    return getattr(module, next(name for name in module.__all__ if name.endswith("ImageProcessorPil")))


def load_image_processor(source: str, model_type: str, values: type[PictureValues]) -> Any:  # noqa: ANN401 - as above
    """The image processor of a model.

    Args:
        source: Folder or hub id.
        model_type: Architecture whose image processor it is, as transformers names its folder.
        values: Its settings with their bounds.

    Raises:
        ModelError: If its file is missing or broken, or holds a value out of its bounds.

    Example:
        >>> from qe_edge.demo import model_path
        >>> processor = load_image_processor(str(model_path()), "qwen2_vl", PatchValues)
        >>> processor.patch_size, processor.merge_size
        (14, 2)
    """
    kind = pil_image_processor(model_type)
    found = None
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = find_file(source, name)
        if path is not None:
            table = read_json_table(path, error=ModelError, remedy=REMEDY)
            table = table.get("image_processor", {}) if name == "processor_config.json" else table
            if table and found is None:
                found = path
                if not isinstance(table, dict):
                    raise ModelError(f"Key 'image_processor' of '{path}' is no table.", REMEDY)
                check_key_names(kind, (key for key in table), path, REMEDY, ModelError)
    if found is None:
        raise ModelError(f"'{source}' has no image processor: preprocessor_config.json is missing.", REMEDY)
    with Guard(f"'{found}' cannot be used", REMEDY):
        processor = kind.from_pretrained(source)
    check_values(values, processor, found, REMEDY, ModelError)
    return processor


def check_equal(
    source: str, key: str, processor: object, config: object, name: str = "preprocessor_config.json"
) -> None:
    """Refuse an image processor that was made for another vision encoder.

    Args:
        source: Folder or hub id.
        key: Name of the value.
        processor: The processor's value.
        config: The vision encoder's.
        name: The file that the value is from.

    Raises:
        ModelError: If they differ.

    Example:
        >>> check_equal("a-model", "patch_size", 14, 14)  # fine
        >>> check_equal("a-model", "patch_size", 14, 16)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: In preprocessor_config.json of 'a-model' patch_size is 14; the vision
        encoder of config.json has 16. Copy preprocessor_config.json and config.json from the same model.
    """
    if processor != config:
        raise ModelError(
            f"In {name} of '{source}' {key} is {processor}; the vision encoder of config.json has {config}.",
            f"Copy {name} and config.json from the same model.",
        )
