"""transformers' own combined processors, video processors included, without torchvision.

Its video processors take a few functions from torchvision. Here they get the same ones from torch, which torchvision's
own call: `python benchmarks/video_processors.py` compares them with torchvision where it is installed.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import image_processing_backends, video_processing_utils
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from qe_edge.models.smolvlm_videos import in_words

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class InterpolationMode(enum.Enum):
    """torchvision's names of filters."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def resize(
    image: Tensor,
    size: tuple[int, int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool = True,
) -> Tensor:
    """Scale pictures: those of 8 bits with antialiasing, which torch does itself on a CPU, and floats without."""
    assert antialias == (image.dtype == torch.uint8)
    flat = image.reshape(-1, *image.shape[-3:])
    if tuple(flat.shape[-2:]) != tuple(size):
        flat = interpolate(flat, size, mode=interpolation.value, antialias=antialias)
    return flat.reshape(*image.shape[:-2], *size)


def pad(image: Tensor, padding: list[int], fill: list[int]) -> Tensor:
    """Fill a picture `[channels, height, width]` up at the left, top, right and bottom."""
    left, top, right, bottom = padding
    sizes = image.shape[0], top + image.shape[1] + bottom, left + image.shape[2] + right
    filled = torch.tensor(fill, dtype=image.dtype)[:, None, None].expand(sizes).clone()
    filled[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return filled


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:  # noqa: ANN401
    """Subtract means and divide by deviations, of channels."""
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return image.clone().sub_(mean).div_(std)


@contextmanager
def torch_alone() -> Iterator[None]:
    """While the context is open, transformers finds these functions where it looks for torchvision's."""
    with pytest.MonkeyPatch.context() as patch:
        modules = [ModuleType(name) for name in NAMES]
        for name, module in zip(NAMES, modules, strict=True):
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
        for outer, inner, name in zip(modules, modules[1:], NAMES[1:], strict=False):
            setattr(outer, name.rpartition(".")[2], inner)
        functional: Any = modules[-1]
        functional.resize, functional.normalize, functional.pad = resize, normalize, pad
        functional.grayscale_to_rgb, functional.InterpolationMode = (lambda image: image), InterpolationMode
        mapping = {1: InterpolationMode.LANCZOS, 3: InterpolationMode.BICUBIC, 2: InterpolationMode.BILINEAR}
        for module in (image_processing_backends, video_processing_utils):
            patch.setattr(module, "tvF", functional, raising=False)
        patch.setattr(image_processing_backends, "is_torchvision_greater_or_equal", lambda _: True)
        patch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", mapping, raising=False)
        if processing_smolvlm.num2words is None:  # a package of its own
            patch.setattr(processing_smolvlm, "num2words", in_words)
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        yield


def image_class(model_type: str) -> Any:  # noqa: ANN401 - a class of transformers
    """The image processor of an architecture that transformers has for torchvision alone."""
    module = importlib.import_module(f"transformers.models.{model_type}.image_processing_{model_type}")
    return getattr(module, module.__all__[0])


def video_class(model_type: str) -> Any:  # noqa: ANN401 - a class of transformers
    """The video processor of an architecture, as transformers names its folder."""
    module = importlib.import_module(f"transformers.models.{model_type}.video_processing_{model_type}")
    return getattr(module, module.__all__[0])
