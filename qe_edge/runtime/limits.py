"""Limits of engines: batch, context, prompt, patches or tiles. A manifest's profiles hold them.

Larger limits cost memory when an engine is built and when it runs: attention over a prompt or over the patches of a
picture grows with their square. ONNX Runtime needs no limits, it takes any size up to the model's context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qe_edge.models.export_limits import MAX_LOGITS
from qe_edge.models.family import Encoded
from qe_edge.runtime.cache_tensors import PAST, is_state
from qe_edge.runtime.manifest import GraphEntry, Manifest, Size
from qe_edge.system.errors import InputError

Triple = tuple[Size, Size, Size]


@dataclass(frozen=True)
class EngineLimits:
    """Largest sizes; None leaves one as it is.

    Attributes:
        batch: Questions at a time.
        context: Tokens of prompt and answer together.
        prompt: Tokens of a prompt, pictures included.
        patches: Patches of one picture, where a model reads pictures of any size.
        tiles: Tiles of all pictures of a batch, where a model cuts pictures into tiles.
    """

    batch: int | None = None
    context: int | None = None
    prompt: int | None = None
    patches: int | None = None
    tiles: int | None = None


def limits_of(manifest: Manifest) -> EngineLimits:
    """The limits that a manifest's profiles hold.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> limits_of(read_manifest(Path("out/demo/onnx")))  # doctest: +SKIP
    """
    language = manifest.graphs["language"].profiles
    batch, prompt = language["prefill"]["attention_mask"][2]
    context = language["decode"]["attention_mask"][2][1]
    if "visual" not in manifest.graphs:
        return EngineLimits(batch, context, prompt)
    pixels = manifest.graphs["visual"].profiles["default"]["pixel_values"][2]
    if _has_patches(manifest):
        return EngineLimits(batch, context, prompt, patches=pixels[0] * pixels[1])
    return EngineLimits(batch, context, prompt, tiles=pixels[0])


def with_limits(manifest: Manifest, wanted: EngineLimits) -> Manifest:
    """The manifest with profiles for other limits.

    Raises:
        InputError: If the model has no such limit, or a limit is above the model's context or contradicts another.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> manifest = with_limits(read_manifest(Path("out/demo/onnx")), EngineLimits(context=1024))  # doctest: +SKIP
    """
    batch, context, prompt = resolve_limits(wanted, limits_of(manifest), manifest.model_type, manifest.max_context)
    graphs = dict(manifest.graphs)
    asked = min(prompt, MAX_LOGITS)
    sizes = {"prefill": (batch, prompt, prompt, context, asked), "decode": (batch, 1, context, context, 1)}
    profiles = {
        name: {key: _language(key, triple, *sizes[name]) for key, triple in shapes.items()}
        for name, shapes in graphs["language"].profiles.items()
    }
    graphs["language"] = _with_profiles(graphs["language"], profiles)
    pictures = wanted.tiles
    if wanted.patches is not None:
        group = manifest.graphs["visual"].profiles["default"]["pixel_values"][2][1]
        pictures = -(-wanted.patches // group)
    for name in ("visual", "merger"):
        if pictures is None:
            break
        shapes = graphs[name].profiles["default"]
        counted = manifest.graphs["visual"].profiles["default"]["pixel_values"][2][0]
        default = {
            key: _capped(triple, (-(-pictures * triple[2][0] // counted), *triple[2][1:]))
            for key, triple in shapes.items()
        }
        graphs[name] = _with_profiles(graphs[name], {"default": default})
    return manifest.model_copy(update={"graphs": graphs})


def with_capacity(manifest: Manifest, capacity: int) -> Manifest:
    """The manifest with profiles for KV caches of one capacity alone.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> manifest = with_capacity(read_manifest(Path("out/demo/onnx")), capacity=1024)  # doctest: +SKIP
    """
    graphs = dict(manifest.graphs)
    profiles = {
        name: {
            key: (
                tuple((batch, heads, capacity, width) for batch, heads, _, width in triple)
                if key.startswith(PAST) and not is_state(key)
                else triple
            )
            for key, triple in shapes.items()
        }
        for name, shapes in graphs["language"].profiles.items()
    }
    graphs["language"] = _with_profiles(graphs["language"], profiles)  # type: ignore[arg-type] # three of three
    return manifest.model_copy(update={"graphs": graphs})


def resolve_limits(
    wanted: EngineLimits, present: EngineLimits, model_type: str, max_context: int
) -> tuple[int, int, int]:
    """Largest batch, context and prompt.

    Args:
        wanted: Limits that the user asks for.
        present: Limits that hold otherwise.
        model_type: Type of the model, for messages.
        max_context: Tokens that the model attends to.

    Raises:
        InputError: If the model has no such limit, or a limit is above the model's context or contradicts another.

    Example:
        >>> present = EngineLimits(batch=4, context=2048, prompt=1024)
        >>> resolve_limits(EngineLimits(context=512), present, "llama", max_context=4096)
        (4, 512, 512)
        >>> resolve_limits(EngineLimits(tiles=4), present, "llama", max_context=4096)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: A 'llama' model has no tiles. Leave --max-tiles out.
    """
    for name in ("patches", "tiles"):
        if getattr(wanted, name) is not None and getattr(present, name) is None:
            raise InputError(f"A '{model_type}' model has no {name}.", f"Leave --max-{name} out.")
    batch, context = wanted.batch or present.batch or 1, wanted.context or present.context or 1
    prompt = wanted.prompt or min(present.prompt or 1, context)
    if context > max_context:
        raise InputError(f"The model attends to {max_context} tokens, {context} are asked for.", "Lower --max-context.")
    if prompt > context:
        raise InputError(
            f"A prompt of {prompt} tokens does not fit into a context of {context}.", "Raise --max-context as well."
        )
    if context < 2:
        raise InputError("A context of 1 token leaves no room for an answer.", "Raise --max-context.")
    return batch, context, prompt


def check_limits(limits: EngineLimits, encoded: Encoded, max_new_tokens: int) -> None:
    """Refuse a batch that engines do not take, before anything runs.

    Raises:
        InputError: If it has too many rows, tokens, patches or tiles.

    Example:
        >>> import numpy as np
        >>> ids = np.zeros((1, 100), np.int64)
        >>> encoded = Encoded(ids, np.ones_like(ids), np.zeros_like(ids, bool), np.zeros_like(ids, bool))
        >>> check_limits(EngineLimits(prompt=64), encoded, max_new_tokens=16)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: This engine does not take a prompt of 100 tokens: it was built for 64.
        Use a smaller picture or prompt, or build it with --max-prompt 100.
    """
    rows, prompt = encoded.input_ids.shape
    for name, size, most in (
        ("batch", rows, limits.batch),
        ("patches", _largest_picture(encoded), limits.patches),
        ("tiles", _tiles(encoded), limits.tiles),
        ("prompt", prompt, limits.prompt),
        ("context", prompt + max_new_tokens, limits.context),
    ):
        if most is not None and size > most:
            what = {
                "batch": f"{size} questions at a time",
                "prompt": f"a prompt of {size} tokens",
                "context": f"{prompt} tokens of prompt and {max_new_tokens} of answer",
                "patches": f"a picture of {size} patches",
            }.get(name, f"pictures of {size} {name}")
            raise InputError(
                f"This engine does not take {what}: it was built for {most}.",
                f"Use a smaller picture or prompt, or build it with --max-{name} {size}.",
            )


def describe_limits(manifest: Manifest) -> str:
    """One line that says the limits of engines of this manifest.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> describe_limits(read_manifest(Path("out/demo/onnx")))  # doctest: +SKIP
    """
    limits = limits_of(manifest)
    parts = [f"{limits.batch} questions at a time", f"prompts of {limits.prompt} tokens", f"{limits.context} in all"]
    if limits.patches is not None:
        parts.append(f"pictures of {limits.patches} patches each")
    if limits.tiles is not None:
        parts.append(f"pictures of {limits.tiles} tiles")
    return f"These engines take up to {', '.join(parts)}."


def _has_patches(manifest: Manifest) -> bool:
    return any(spec.name == "position_ids" for spec in manifest.graphs["visual"].inputs)


def _tiles(encoded: Encoded) -> int:
    """Tiles of all pictures and frames. Where they differ in size, patches stand in one row, beside a list of sizes."""
    counted = ("grids", "target_sizes", "pixel_values"), ("target_sizes_videos", "pixel_values_videos")
    found = [next((encoded.pixels[name] for name in names if name in encoded.pixels), ()) for names in counted]
    return sum(map(len, found))


def _largest_picture(encoded: Encoded) -> int:
    """Patches of the largest picture, or of the largest pair of frames."""
    places = encoded.pixels.get("image_position_ids")
    if places is not None:  # Gemma 4; padding stands at -1
        return int((places >= 0).all(-1).sum(-1).max())
    grids = [encoded.pixels[name] for name in ("image_grid_thw", "video_grid_thw") if name in encoded.pixels]
    return max((int(grid[:, 1:].prod(1).max()) for grid in grids), default=0)


def _language(name: str, triple: Triple, batch: int, sequence: int, total: int, capacity: int, asked: int) -> Triple:
    """Smallest, typical and largest shape of one input of the language graph."""
    largest = triple[2]
    shape: Size
    if name == "inputs_embeds":
        shape = (batch, sequence, largest[2])
    elif name == "position_ids":
        shape = (*largest[:-2], batch, sequence)
    elif name == "attention_mask":
        shape = (batch, total)
    elif name == "logit_positions":
        shape = (batch, asked)
    elif is_state(name):
        shape = (batch, *largest[1:])
    else:
        shape = (batch, largest[1], capacity, largest[3])
    return _capped(triple, shape)


def _capped(triple: Triple, largest: Size) -> Triple:
    """A triple with another largest shape; the others stay below it."""
    smallest, typical, _ = triple
    return smallest, tuple(min(*sizes) for sizes in zip(typical, largest, strict=True)), largest


def _with_profiles(entry: GraphEntry, profiles: Mapping[str, dict[str, Triple]]) -> GraphEntry:
    return entry.model_copy(update={"profiles": dict(profiles)})
