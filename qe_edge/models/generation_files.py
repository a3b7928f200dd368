"""Reading generation_config.json: which tokens end an answer, and how a model chooses the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.models.guard import Guard, check_key_names, check_values
from qe_edge.models.model_files import find_file
from qe_edge.system.errors import ModelError, QEError
from qe_edge.system.json_files import read_json_table
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import transformers
    from transformers import GenerationConfig
else:
    transformers = lazy_module("transformers")

NAME = "generation_config.json"
REMEDY = "Get generation_config.json of the original model again, or remove it where config.json names the end token."
Token = Annotated[int, Field(strict=True, ge=-1, le=2**21)]
Switch = Annotated[bool, Field(strict=True)]
Length = Annotated[int, Field(strict=True, ge=0, le=2**24)]


class GenerationFile(BaseModel):
    """Keys of generation_config.json with bounds; transformers checks the others."""

    model_config = ConfigDict(extra="allow")
    eos_token_id: Token | Annotated[list[Token], Field(min_length=1, max_length=64)] | None = None
    bos_token_id: Token | None = None
    pad_token_id: Token | None = None
    do_sample: Switch | None = None
    use_cache: Switch | None = None
    max_length: Length | None = None
    max_new_tokens: Length | None = None
    min_length: Length | None = None
    min_new_tokens: Length | None = None
    num_beams: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    num_return_sequences: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None


def read_generation_config(source: str, error: type[QEError] = ModelError) -> GenerationConfig | None:
    """The generation settings of a model; None only if it has no generation_config.json.

    Args:
        source: Folder or hub id.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`, if the file cannot be read or holds a value that makes no sense.

    Example:
        >>> from qe_edge.demo import model_path
        >>> read_generation_config(str(model_path())).eos_token_id is not None
        True
    """
    path = find_file(source, NAME, error)
    if path is None:
        return None
    values = read_json_table(path, error=error, remedy=REMEDY)
    check_values(GenerationFile, values, path, REMEDY, error)
    check_key_names(transformers.GenerationConfig, values, path, REMEDY, error)
    with Guard(f"'{path}' cannot be read", REMEDY, error):
        return transformers.GenerationConfig.from_pretrained(source)
