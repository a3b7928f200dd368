"""A model is loaded exactly or not at all: all its tensors come from its files, and all tensors of the files are used.

What became of every tensor only transformers knows, whose own rules say which names of old files it renames and which
may be left out: buffers that it computes (rotary frequencies, position ids), and heads that share the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qe_edge.models.family import ModelFamily
from qe_edge.system.errors import ModelError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVE = "Download the weights and config.json again, together; or load the model in transformers and save it anew."


COMPUTED = ("inv_freq", "position_ids")  # buffers that old files hold and nobody reads
SLACK = 2**24  # numbers that a model may lack before they are looked for one by one


def check_amount(source: str, model: nn.Module, held: int) -> None:
    """Refuse a model of which much is missing, before transformers takes memory for random numbers in its stead.

    A vocabulary, a width or a number of layers in config.json that the files do not have ends here.

    Args:
        source: Folder or hub id, for the message.
        model: The model, without data.
        held: Numbers that the files hold.

    Raises:
        ModelError: If there are too few.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > held + SLACK:
        raise ModelError(
            f"config.json of '{source}' describes {wanted / 1e6:.0f} million weights, and the files hold "
            f"{held / 1e6:.0f} million.",
            SAVE,
        )


def check_loading(source: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are not all from its files, or whose files hold more.

    Args:
        source: Folder or hub id, for the message.
        model: The model.
        info: What `from_pretrained` returns beside it: missing_keys, unexpected_keys, mismatched_keys, error_msgs.

    Raises:
        ModelError: Naming one of the tensors and how many there are.
    """
    other = saved_by(model)
    remedy = other or SAVE
    for name, found, wanted in sorted(info.get("mismatched_keys") or (), key=str):
        raise ModelError(
            f"'{printable(str(name))}' of '{source}' has the shape {list(found)}, and config.json says {list(wanted)}.",
            remedy,
        )
    missing = sorted(set(info.get("missing_keys") or ()))
    part = _missing_part(model, set(missing))
    if part:
        raise ModelError(
            f"The files of '{source}' hold nothing of the model's '{part}'; they were saved without this part.",
            other or f"Add the tensors of '{part}' from the model that was fine-tuned, and save it whole.",
        )
    if missing:
        raise ModelError(
            f"The files of '{source}' lack {len(missing)} of the model's tensors, among them '{missing[0]}'.", remedy
        )
    unexpected = sorted(set(info.get("unexpected_keys") or ()))
    if unexpected:
        raise _unused(source, unexpected, remedy)
    wrong = list(info.get("error_msgs") or ()) + list((info.get("conversion_errors") or {}).values())
    if wrong:
        raise ModelError(f"'{source}' cannot be loaded: {printable(str(wrong[0]).splitlines()[0])[:300]}.", SAVE)


def _missing_part(model: nn.Module, missing: set[str]) -> str:
    """The outermost part of a model, at most two levels down, of which every tensor is missing; empty if none is."""
    state = list(model.state_dict())
    for depth in (1, 2):
        for prefix in dict.fromkeys(".".join(name.split(".")[:depth]) for name in state):
            inside = [name for name in state if name.startswith(f"{prefix}.")]
            if len(inside) > 1 and missing.issuperset(inside):
                return prefix
    return ""


def check_all_used(source: str, model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that is none of the model's although transformers took it, because two have one place.

    Args:
        source: Folder or hub id, for the message.
        model: The model, loaded from `given`.
        given: Tensors by their names in the files.

    Raises:
        ModelError: Naming one of them.
    """
    state = model.state_dict(keep_vars=True)
    addresses = {tensor.data_ptr() for tensor in state.values()}
    unused = sorted(name for name, tensor in given.items() if tensor.data_ptr() not in addresses)
    # one that was put together of several, or changed, has an address that none of them has
    theirs = {tensor.data_ptr() for tensor in given.values()}
    changed = any(tensor.data_ptr() not in theirs for tensor in state.values())
    unused = [name for name in unused if not name.endswith(COMPUTED)]
    if unused and not changed:
        raise _unused(source, unused, SAVE)


def note_own_head(model: PreTrainedModel, family: ModelFamily) -> None:
    """Correct a configuration that says that head and embedding are one, where the files hold both.

    transformers keeps both in memory, and ties them whenever it ties weights again: the head would be lost.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
        return
    own, shared = getattr(head, "weight", None), embedding.get_parameter("weight")  # a quantized head has codes
    if own is not None and own.data_ptr() == shared.data_ptr():
        return
    for config in (model.config, family.config):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False


def saved_by(model: PreTrainedModel) -> str:
    """What to do where config.json names another class than the one that is loaded; empty where it does not."""
    names = [str(name) for name in getattr(model.config, "architectures", None) or ()]
    mine = type(model).__name__
    if not names or mine in names:
        return ""
    return f"It was saved as a {printable(names[0])[:80]}, and QE-Edge quantizes a {mine}: give a model of that class."


def _unused(source: str, names: list[str], remedy: str) -> ModelError:
    return ModelError(
        f"The files of '{source}' hold {len(names)} tensors that are none of the model's, among them "
        f"'{printable(names[0])[:200]}'.",
        remedy,
    )
