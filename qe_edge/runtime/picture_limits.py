"""Translates the limits of engines to sizes of pictures, and warns if the image processor makes larger ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qe_edge.models.family import ModelFamily, Sample
from qe_edge.runtime.engine import family_of_engines
from qe_edge.runtime.limits import check_limits, describe_limits, limits_of
from qe_edge.system.errors import InputError, QENotice

if TYPE_CHECKING:
    from qe_edge.runtime.manifest import Manifest

CAMERAS = ((640, 480), (1280, 720), (1920, 1080))  # width and height, from small to large
QUESTION, ANSWER = "What is this?", 64  # of the example; tokens of its answer


def tell_limits(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Say the limits of engines, and warn if the model's image processor exceeds them.

    Args:
        folder: Folder of exported graphs.
        manifest: Its manifest, with the limits that engines will have.
        say: Receives one line.

    Raises:
        ArtifactError: If the folder's configuration is missing or damaged.

    Example:
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> tell_limits(Path("out/demo/onnx"), read_manifest(Path("out/demo/onnx")), print)  # doctest: +SKIP
    """
    line = describe_limits(manifest)
    if manifest.image_token_id is None:
        say(line)
        return
    family = family_of_engines(folder, manifest.model_type)
    processor = family.load_processor(str(folder))
    say(f"{line} {describe_pictures(manifest, family, processor)}")
    warn_of_pictures(manifest, processor.image_processor)


def describe_pictures(manifest: Manifest, family: ModelFamily, processor: Any) -> str:  # noqa: ANN401
    """Usual sizes of a camera's pictures that engines take with a short question and its answer.

    Example:
        >>> from qe_edge.models.loading import load_model  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> loaded = load_model("demo")  # doctest: +SKIP
        >>> describe_pictures(read_manifest(Path("out/demo/onnx")), loaded.family, loaded.processor)  # doctest: +SKIP
    """
    fitting = [size for size in CAMERAS if _fits(manifest, family, processor, size)]
    refused = [size for size in CAMERAS if size not in fitting]
    parts = [f"{max(fitting)[0]} x {max(fitting)[1]} fits"] if fitting else []
    parts += [f"{min(refused)[0]} x {min(refused)[1]} does not fit"] if refused else []
    return f"A picture of {', '.join(parts)}."


def warn_of_pictures(manifest: Manifest, image_processor: Any) -> None:  # noqa: ANN401 - transformers' own classes
    """A notice where the model's image processor makes larger pictures than the engines take.

    Example:
        >>> from qe_edge.models.loading import load_model  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> processor = load_model("demo").processor  # doctest: +SKIP
        >>> warn_of_pictures(read_manifest(Path("out/demo/onnx")), processor.image_processor)  # doctest: +SKIP
    """
    limits = limits_of(manifest)
    if limits.patches is not None:
        largest, most, name = _most_patches(image_processor), limits.patches, "patches"
    elif limits.tiles is not None:
        tiles, name = _most_tiles(image_processor), "tiles"
        largest, most = tiles + (tiles > 1), limits.tiles
    else:
        return
    if largest > most:
        warnings.warn(
            f"The model's image processor makes pictures of up to {largest} {name}, these engines take {most}: "
            f"larger pictures are refused; --max-{name} raises the limit.",
            QENotice,
            stacklevel=2,
        )


def _most_patches(image_processor: Any) -> int:  # noqa: ANN401 - transformers' own classes
    """Patches that an image processor cuts the largest picture into."""
    tokens = getattr(image_processor, "max_soft_tokens", None)
    if tokens is not None:
        return int(tokens) * int(image_processor.pooling_kernel_size) ** 2
    return int(image_processor.size["longest_edge"]) // int(image_processor.patch_size) ** 2


def _most_tiles(image_processor: Any) -> int:  # noqa: ANN401 - transformers' own classes
    """Tiles that an image processor cuts the largest picture into, without its overview."""
    slices = getattr(image_processor, "max_slice_nums", getattr(image_processor, "dynamic_hd", None))
    if slices is not None:
        return int(slices)
    most = getattr(image_processor, "max_patches", getattr(image_processor, "max_tiles", None))
    if most is not None:
        return int(most) if getattr(image_processor, "do_image_splitting", True) else 1
    resolutions = getattr(image_processor, "image_grid_pinpoints", None)
    if resolutions is not None:
        return int(max(height * width for height, width in resolutions)) // int(image_processor.size["height"]) ** 2
    if not getattr(image_processor, "do_image_splitting", False):
        return 1
    return int(-(-image_processor.size["longest_edge"] // image_processor.max_image_size["longest_edge"])) ** 2


def _fits(manifest: Manifest, family: ModelFamily, processor: Any, size: tuple[int, int]) -> bool:  # noqa: ANN401
    try:
        encoded = family.encode(processor, [Sample(Image.new("RGB", size), QUESTION)])
        check_limits(limits_of(manifest), encoded, ANSWER)
    except InputError:  # beyond the model's own context, or beyond the engine's limits
        return False
    return True
