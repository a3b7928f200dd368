"""Read config.json and check it before anything is built from it; imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qe_edge.models import FAMILIES
from qe_edge.models.config_values import ConfigFile, SizesFile
from qe_edge.models.export_limits import layer_config
from qe_edge.models.family import ModelFamily
from qe_edge.models.generation_files import read_generation_config
from qe_edge.models.guard import Guard, check_key_names, check_values
from qe_edge.models.model_files import find_file
from qe_edge.models.nearest import SECTIONS, describe_nearest
from qe_edge.system.errors import ModelError, QEError, printable
from qe_edge.system.json_files import read_json_table
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import transformers
else:
    transformers = lazy_module("transformers")

CONFIG = "config.json"
REMEDY = "Get config.json of the original model again."
MULTIPLES = {  # by model_type: the number that divides a vision encoder's head width, where it is not 1
    "qwen2_vl": 4,  # rotary positions of two axes
    "qwen2_5_vl": 4,
    "qwen3_5": 4,
    "qwen3_vl": 4,
}
ENCODERS = ("clip_vision_model", "dinov2", "siglip_vision_model")  # alone: the file is the vision encoder's own

FEATURE_WIDTHS = {  # key of vision_config that names the width of the features for the language model
    "qwen2_vl": "hidden_size",
    "qwen2_5_vl": "out_hidden_size",
    "qwen3_5": "out_hidden_size",
    "qwen3_vl": "out_hidden_size",
}


def load_config(source: str, error: type[QEError] = ModelError) -> Any:  # noqa: ANN401 - transformers' classes
    """The model's configuration.

    Args:
        source: Folder or hub id.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`, if it cannot be read, holds a value that no model has, or is no model that
            QE-Edge knows.

    Example:
        >>> from qe_edge.demo import model_path
        >>> load_config(str(model_path())).text_config.hidden_size
        256
    """
    values = read_config_values(source, error)
    for section, table in _tables(values):
        kind = transformers.PretrainedConfig if section else transformers.CONFIG_MAPPING[values["model_type"]]
        check_key_names(kind, table, Path(source) / CONFIG, REMEDY, error)
    with Guard(f"The configuration of '{source}' cannot be read", REMEDY, error):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    _check_sizes(config, values, source, error)
    return config


def load_family(source: str, error: type[QEError] = ModelError) -> ModelFamily:
    """Return the family of a model, from its configuration alone.

    Raises:
        QEError: Of the class `error`, as `load_config`, and for a generation_config.json that is broken: every later
            stage reads it.

    Example:
        >>> from qe_edge.demo import model_path
        >>> load_family(str(model_path())).model_type
        'qwen2_vl'
    """
    config = load_config(source, error)
    read_generation_config(source, error)
    return FAMILIES[config.model_type](config)


def read_config_values(source: str, error: type[QEError] = ModelError) -> dict[str, Any]:
    """Read config.json and check every value that has bounds. No defaults are added.

    Args:
        source: Folder or hub id.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`.

    Example:
        >>> from qe_edge.demo import model_path
        >>> read_config_values(str(model_path()))["model_type"]
        'qwen2_vl'
    """
    path = find_file(source, CONFIG, error)
    if path is None:
        raise error(f"'{source}' has no config.json.", "Give a transformers model: a downloaded folder, or a hub id.")
    values = read_json_table(path, error=error, remedy=REMEDY)
    name = values.get("model_type")
    if not isinstance(name, str):
        raise error(f"'{path}' names no model_type.", "Give the folder of a transformers model.")
    if name not in FAMILIES:
        raise error(
            f"'{source}' is a '{printable(name)[:60]}' model, which QE-Edge does not support; "
            f"{describe_nearest(values)}.",
            f"Supported: {', '.join(FAMILIES)}. If it is one of them under another name: qe-edge convert "
            f"{shlex.quote(source)} --as FAMILY -o CONVERTED.",
        )
    check_values(ConfigFile, values, path, REMEDY, error)
    return values


def check_sizes_file(values: dict[str, Any], path: Path) -> None:
    """Check the sizes that a prediction reads, in a config.json of which no model is built.

    Raises:
        ModelError: If one is missing or out of its bounds.

    Example:
        >>> check_sizes_file({"model_type": "qwen2_vl", "text_config": {"hidden_size": -1}}, Path("config.json"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: Key 'vision_config' of 'config.json' is wrong: Field required (got
        {'model_type': 'qwen2_vl', 'text_config': {'hidden_size': -1}}). Get config.json of the original model
        again.
    """
    check_values(SizesFile, values, path, REMEDY, ModelError)


def _tables(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The table itself and its sections."""
    yield "", values
    for name in SECTIONS:
        if isinstance(values.get(name), dict):
            yield name, values[name]


class _Facts:
    """Checks that need several values, with one form of message."""

    def __init__(self, source: str, error: type[QEError]) -> None:
        self.source = source
        self.error = error

    def require(self, holds: bool, problem: str) -> None:
        """Refuse the file unless the fact holds."""
        if not holds:
            raise self.error(f"In config.json of '{self.source}' {problem}.", REMEDY)

    def divides(self, part: tuple[str, int], whole: tuple[str, int]) -> None:
        """Refuse the file unless a value is a multiple of another."""
        name = f"{part[0]} {part[1]}".strip()
        self.require(part[1] > 0 and whole[1] % part[1] == 0, f"{whole[0]} {whole[1]} is no multiple of {name}")

    def known_tokens(self, config: Any, keys: tuple[str, ...]) -> None:  # noqa: ANN401 - transformers' classes
        """Refuse the file if a key names no token of the language model."""
        vocabulary = config.text_config.vocab_size
        for key in keys:
            number = getattr(config, key)
            known = isinstance(number, int) and 0 <= number < vocabulary
            self.require(known, f"{key} {number} is outside the vocabulary of {vocabulary}")


def _check_sizes(config: Any, values: dict[str, Any], source: str, error: type[QEError]) -> None:  # noqa: ANN401
    """Check what belongs together: heads and widths, token ids and vocabulary, tiles and patches."""
    facts = _Facts(source, error)
    acts = config.model_type == "pi0"
    config, values = _check_expert(config, values, facts) if acts else (config, values)
    if config.model_type in ENCODERS:
        vision: Any = config
    else:
        vision = getattr(config, "vision_config", None)
        _check_text(getattr(config, "text_config", config), values, facts)
    if vision is not None:
        width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
        heads = vision.num_attention_heads
        facts.divides(("the vision encoder's number of heads", heads), ("its width", width))
        multiple = MULTIPLES.get(config.model_type, 1)
        facts.divides(("", multiple), ("the vision encoder's width per head", width // heads))
    if config.model_type in FEATURE_WIDTHS:
        _check_patches(config, facts)
    if config.model_type == "lfm2_vl":
        points = getattr(vision, "num_patches", 0)
        facts.require(
            vision.model_type == "siglip2_vision_model" and points == isqrt(points) ** 2 > 0,
            f"vision_config is a '{vision.model_type}' of {points} learnt positions, no square of SigLIP 2's",
        )
    of_family = CHECKS.get(config.model_type)
    if of_family is not None:
        of_family(config, facts)
    if config.model_type in ("llava_onevision", "paligemma") and not acts:  # pi0 never looks its image token up
        facts.known_tokens(config, ("image_token_index",))
    if config.model_type == "paligemma":
        width, wanted = config.projection_dim, config.text_config.hidden_size
        facts.require(width == wanted, f"projection_dim {width} is not text_config.hidden_size {wanted}")
    if hasattr(config, "scale_factor"):
        merged = vision.patch_size * config.scale_factor
        facts.divides(("a merged patch's size", merged), ("vision_config.image_size", vision.image_size))


def _check_expert(
    config: Any,  # noqa: ANN401 - transformers' classes
    values: dict[str, Any],
    facts: _Facts,
) -> tuple[Any, dict[str, Any]]:
    """pi0: two Gemmas with layers that fit each other, since the expert reads the other one's keys and values.

    Returns:
        Configuration and table of its vision-language model.
    """
    vlm, expert = config.vlm_config, config.dit_config
    facts.require(
        vlm.model_type == "paligemma" and expert.model_type == "gemma" and vlm.text_config.model_type == "gemma",
        "vlm_config is no 'paligemma' with a 'gemma', or dit_config no 'gemma'",
    )
    for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
        sizes = [getattr(one, key) for one in (vlm.text_config, expert)]
        facts.require(
            sizes[0] == sizes[1], f"{key} is {sizes[0]} in vlm_config.text_config and {sizes[1]} in dit_config"
        )
    facts.divides(
        ("dit_config.num_key_value_heads", expert.num_key_value_heads), ("its heads", expert.num_attention_heads)
    )
    for one in (vlm.text_config, expert):
        rope = (one.rope_parameters or {}).get("rope_type", "default")
        facts.require(rope == "default", f"rope_type is '{rope}', and graphs of pi0 know 'default' alone")
    facts.divides(("", 2), ("dit_config.hidden_size", expert.hidden_size))
    facts.divides(
        ("vision_config.patch_size", vlm.vision_config.patch_size),
        ("vision_config.image_size", vlm.vision_config.image_size),
    )
    facts.require(
        config.max_state_dim > 0 and config.max_action_dim > 0 and config.chunk_size > 0,
        "max_state_dim, max_action_dim or chunk_size is below 1",
    )
    facts.require(0 < config.num_inference_steps <= 1000, f"num_inference_steps is {config.num_inference_steps}")
    return vlm, values.get("vlm_config") or {}


def _check_text(text: Any, values: dict[str, Any], facts: _Facts) -> None:  # noqa: ANN401
    """Heads, rotary sections and token ids of a language model."""
    heads, width = text.num_attention_heads, text.hidden_size
    for layer in range(text.num_hidden_layers if getattr(text, "is_heterogeneous", False) else 1):
        own = layer_config(text, layer)
        head_dim = getattr(own, "head_dim", None)
        if head_dim is None:
            facts.divides(("num_attention_heads", heads), ("hidden_size", width))
            head_dim = width // heads
        facts.divides(("num_key_value_heads", own.num_key_value_heads or heads), ("num_attention_heads", heads))
        facts.divides(("", 2), ("the width per head", head_dim))
    layer_types = getattr(text, "layer_types", None)
    facts.require(
        layer_types is None or len(layer_types) == text.num_hidden_layers,
        f"layer_types has {len(layer_types or ())} entries for {text.num_hidden_layers} layers",
    )
    rope = getattr(text, "rope_parameters", None) or {}
    if text.model_type in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"):
        sections = rope.get("mrope_section")
        facts.require(
            sections is not None and len(sections) == 3 and 2 * sum(sections) == head_dim,
            f"mrope_section {sections} does not share out the width per head {head_dim} among three axes",
        )
    if hasattr(text, "linear_num_value_heads"):
        heads = ("linear_num_value_heads", text.linear_num_value_heads)
        facts.divides(("linear_num_key_heads", text.linear_num_key_heads), heads)
    for section, table in _tables(values):
        for key, found in table.items():
            ids = found if isinstance(found, list) else [found]
            # SmolVLM's files name another tokenizer's padding beside the section of the text model, which has its own
            unused = key.endswith("pad_token_id") and not section and "text_config" in values
            if key.endswith("token_id") and section != "vision_config" and not unused:
                wrong = [number for number in ids if isinstance(number, int) and number >= text.vocab_size]
                facts.require(not wrong, f"{key} {wrong and wrong[0]} is outside the vocabulary of {text.vocab_size}")


def _check_patches(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """Qwen-VL's pictures: width of their features, windows, learnt positions, features of earlier blocks."""
    vision, text = config.vision_config, config.text_config
    key = FEATURE_WIDTHS[config.model_type]
    width = getattr(vision, key)
    facts.require(
        width == text.hidden_size, f"vision_config.{key} {width} is not text_config.hidden_size {text.hidden_size}"
    )
    if hasattr(vision, "window_size"):
        merged = vision.patch_size * vision.spatial_merge_size
        facts.divides(("a merged patch's size", merged), ("vision_config.window_size", vision.window_size))
    if hasattr(vision, "num_position_embeddings"):
        points = vision.num_position_embeddings
        facts.require(
            points == isqrt(points) ** 2, f"vision_config.num_position_embeddings {points} is no square number"
        )
    taps = list(getattr(vision, "deepstack_visual_indexes", ()))
    facts.require(
        len(set(taps)) == len(taps) <= text.num_hidden_layers and all(0 <= tap < vision.depth for tap in taps),
        f"deepstack_visual_indexes {taps} do not fit {vision.depth} vision blocks and {text.num_hidden_layers} layers",
    )


def _check_layers(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """Gemma 4: layers of a kind have the same sizes, and every kind a layer with keys and values of its own."""
    text = config.text_config
    own = text.num_hidden_layers - text.num_kv_shared_layers
    facts.require(
        own > 0 and set(text.layer_types) == set(text.layer_types[:own]),
        f"num_kv_shared_layers {text.num_kv_shared_layers} leaves a kind of layers without keys and values",
    )
    layers = [layer_config(text, layer) for layer in range(text.num_hidden_layers)]
    sizes = {(kind, one.head_dim, one.num_key_value_heads) for kind, one in zip(text.layer_types, layers, strict=True)}
    facts.require(len(sizes) == len(set(text.layer_types)), "layers of one kind differ in their heads")
    facts.known_tokens(config, ("image_token_id", "boi_token_id", "eoi_token_id"))
    facts.require(
        isinstance(text.pad_token_id, int) and 0 <= text.pad_token_id < text.vocab_size,
        f"pad_token_id {text.pad_token_id}, which stands for pictures, is outside the vocabulary of {text.vocab_size}",
    )
    if config.vision_config is not None:
        facts.divides(("", 4), ("the vision encoder's width per head", config.vision_config.head_dim))


def _check_joining(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """MiniCPM-V's patches: windows of two by two after one of the layers, merged two by two, once."""
    vision = config.vision_config
    for name, size in (
        ("window_kernel_size", vision.window_kernel_size),
        ("merge_kernel_size", config.merge_kernel_size),
    ):
        facts.require(list(size) == [2, 2], f"{name} is {list(size)}, and patches are joined two by two")
    facts.require(config.merger_times == 1, f"merger_times is {config.merger_times}, and tokens are counted for 1")
    modes = ("4x", "16x")
    facts.require(config.downsample_mode in modes, f"downsample_mode '{config.downsample_mode}' is none of {modes}")
    layers, place = vision.num_hidden_layers, vision.insert_layer_id
    facts.require(0 <= place < layers, f"insert_layer_id {place} is none of the vision encoder's {layers} layers")
    sizes = (vision.patch_size, vision.image_size)
    facts.require(
        all(isinstance(size, int) for size in sizes) and sizes[0] <= sizes[1],
        f"patches of {sizes[0]} pixels do not fit an image_size of {sizes[1]}",
    )
    facts.known_tokens(config, ("image_token_id",))


def _check_crops(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """Phi-4-multimodal's crops: whole pairs of patches, the layer whose output is used, the image token."""
    vision = config.vision_config
    crop, size, patch = vision.crop_size, vision.image_size, vision.patch_size
    facts.require(crop == size, f"vision_config.crop_size is {crop}, and positions are learnt for crops of {size}")
    facts.require(isinstance(patch, int), f"vision_config.patch_size {patch} is no one number")
    facts.divides(("pixels of a pair of patches,", 2 * patch), ("vision_config.image_size", size))
    layers, used = vision.num_hidden_layers, vision.feature_layer
    facts.require(
        -layers <= used <= layers and used != 0,
        f"vision_config.feature_layer {used} names none of the vision encoder's {layers} layers",
    )
    image, known = vision.image_token_id, config.vocab_size
    facts.require(0 <= image < known, f"vision_config.image_token_id {image} is outside the vocabulary of {known}")


def _check_pooling(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """Gemma 3's pictures: patches per side, tokens per side, token ids of pictures."""
    vision, tokens = config.vision_config, config.mm_tokens_per_image
    facts.divides(("vision_config.patch_size", vision.patch_size), ("vision_config.image_size", vision.image_size))
    side = isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    facts.require(side > 0 and side**2 == tokens, f"mm_tokens_per_image {tokens} is no square number")
    facts.divides(("tokens per side", side), ("the patches per side", vision.image_size // vision.patch_size))
    facts.known_tokens(config, ("image_token_index", "boi_token_index", "eoi_token_index"))


def _check_tiles(config: Any, facts: _Facts) -> None:  # noqa: ANN401
    """InternVL's tiles: patches per side, merged patches per side, tokens per tile."""
    vision, ratio = config.vision_config, config.downsample_ratio
    facts.require(
        len(vision.image_size) == 2 and len(vision.patch_size) == 2,
        "image_size and patch_size need a height and a width",
    )
    tokens = 1
    for size, patch in zip(vision.image_size, vision.patch_size, strict=True):
        facts.divides(("vision_config.patch_size", patch), ("vision_config.image_size", size))
        merged = size // patch * ratio
        facts.require(merged == int(merged) > 0, f"downsample_ratio {ratio} does not fit {size // patch} patches")
        tokens *= int(merged)
    facts.require(
        tokens == config.image_seq_length,
        f"image_seq_length is {config.image_seq_length}; a tile of the vision encoder becomes {tokens} tokens",
    )


CHECKS: dict[str, Callable[[Any, _Facts], None]] = {
    "gemma3": _check_pooling,
    "gemma4": _check_layers,
    "internvl": _check_tiles,
    "minicpmv4_6": _check_joining,
    "phi4_multimodal": _check_crops,
}
