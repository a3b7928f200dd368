"""Writes a model whose config.json has an unknown `model_type` as one of a supported family with the same tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import CONFIG_MAPPING

from qe_edge.checkpoint.known_files import ADAPTER
from qe_edge.models import FAMILIES
from qe_edge.models.configuration import CONFIG, REMEDY
from qe_edge.models.conversion import check_converted
from qe_edge.models.nearest import SECTIONS
from qe_edge.models.origin import check_configuration
from qe_edge.models.weight_files import READ, check_links, folder_weights
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ModelError
from qe_edge.system.json_files import read_json_table


def rename_model(source: Path, family: str, out: Path) -> None:
    """Write a model as one of another `model_type`.

    The folder appears only when it is complete: the family's own class has exactly the model's tensors, and its
    tokenizer and image processor can be read. None of the model's code is copied or run.

    Args:
        source: The model's folder.
        family: A `model_type` that QE-Edge knows.
        out: Folder to write.

    Raises:
        UnknownNameError: If there is no such family.
        ModelError: If the model is none of it.
        ArtifactError: If a file is damaged.
        ResourceError: If the disk is full.

    Example:
        >>> rename_model(Path("my-model"), "qwen3_vl", Path("my-model-renamed"))  # doctest: +SKIP
    """
    FAMILIES.check(family)
    path = source / CONFIG
    if not path.is_file():
        raise ModelError(f"'{source}' is no folder with a {CONFIG}.", "Download the model, and give its folder.")
    values = read_json_table(path, error=ModelError, remedy=REMEDY)
    check_configuration(values, str(source))
    check_links(source)
    folder_weights(source)
    with atomic_folder(out) as part:
        for file in sorted((*source.iterdir(), *(source / ADAPTER).glob("*"))):
            if file.is_file() and file.suffix in READ and file.name != CONFIG:
                copied = part / file.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)
        renamed = {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
        renamed["model_type"] = family
        for section in SECTIONS:
            if isinstance(renamed.get(section), dict):
                renamed[section] = _known(renamed[section])
        (part / CONFIG).write_text(json.dumps(renamed, indent=2) + "\n", encoding="utf-8")
        try:
            check_converted(part)
        except ModelError as error:
            problem = error.problem.replace(str(part), str(source))
            raise ModelError(
                f"'{source}' is no '{family}' model: {problem[0].lower()}{problem[1:]}",
                "Choose the family whose tensors it has; if there is none, QE-Edge does not support it.",
            ) from error


def _known(section: dict[str, object]) -> dict[str, object]:
    """A section without a `model_type` that transformers does not know; the family then has its usual one."""
    known = section.get("model_type") in CONFIG_MAPPING
    return {key: value for key, value in section.items() if key != "auto_map" and (known or key != "model_type")}
