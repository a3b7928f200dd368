"""The supported family that is nearest to a model of an unknown `model_type`, and the keys that do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from qe_edge.models import FAMILIES
from qe_edge.system.errors import printable
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import transformers
else:
    transformers = lazy_module("transformers")

SECTIONS = ("text_config", "vision_config")
SHOWN = 3  # keys in a message
OF_ANY = {  # keys that files of every family have, or had under an earlier version of transformers
    *("model_type", "transformers_version", "_name_or_path", "auto_map", "torch_dtype", "rope_scaling", "rope_theta"),
    *("_attn_implementation", "attn_implementation", "use_cache", "attention_dropout", "unsloth_version"),
    *("output_attentions", "output_hidden_states", "return_dict", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "architectures"),
}


def describe_nearest(values: Mapping[str, Any]) -> str:
    """Describe the nearest family in a message.

    Args:
        values: Table of a config.json.

    Example:
        >>> describe_nearest({"model_type": "lama", "hidden_size": 64, "experts": 8})
        "the nearest family is 'llama', whose configuration has no 'experts'"
    """
    name, unknown = nearest_family(values)
    if not unknown:
        return f"the nearest family is '{name}', whose configuration has all of its keys"
    keys = ", ".join(f"'{printable(key)[:60]}'" for key in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    return f"the nearest family is '{name}', whose configuration has no {keys}{more}"


def nearest_family(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The family whose configuration knows most of the keys, and the keys that it does not know.

    If several know equally many, it is the family with the most similar name.

    Example:
        >>> nearest_family({"model_type": "lama", "hidden_size": 64, "experts": 8})
        ('llama', ['experts'])
    """
    name = str(values.get("model_type"))
    unknown = {family: _unknown(values, family) for family in FAMILIES}
    sees = _has_pictures(values)
    chosen = min(
        FAMILIES,
        key=lambda family: (
            sees != _sees(family),
            len(unknown[family]),
            -SequenceMatcher(None, name, family).ratio(),
        ),
    )
    return chosen, unknown[chosen]


def _has_pictures(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("vision_config"), dict)


def _sees(family: str) -> bool:
    return "vision_config" in _sections(transformers.CONFIG_MAPPING[family])


def _unknown(values: Mapping[str, Any], family: str) -> list[str]:
    """Keys of a table and its sections that are no setting of a family's configuration."""
    kind = transformers.CONFIG_MAPPING[family]
    found = [key for key in values if key not in _keys(kind) and key not in SECTIONS]
    for section, section_kind in _sections(kind).items():
        table = values.get(section)
        if isinstance(table, dict):
            known = _keys(_kind_of(section_kind, kind, section, table))
            found += [f"{section}.{key}" for key in table if key not in known]
    return sorted(found)


def _keys(kind: Any) -> set[str]:  # noqa: ANN401 - a class of transformers
    fields = {found.name for found in dataclasses.fields(kind)}
    return fields | set(getattr(kind, "attribute_map", {})) | OF_ANY


def _sections(kind: Any) -> dict[str, Any]:  # noqa: ANN401
    """Classes of a configuration's sections."""
    return {name: found for name, found in (getattr(kind, "sub_configs", None) or {}).items() if name in SECTIONS}


def _kind_of(found: Any, kind: Any, section: str, table: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """A section's class; where it may be any, that of the family that it names, else the usual one."""
    if dataclasses.is_dataclass(found):
        return found
    named = table.get("model_type")
    usual = kind.sub_configs_defaults[section].model_type
    return transformers.CONFIG_MAPPING[named if isinstance(named, str) and named in FAMILIES else usual]
