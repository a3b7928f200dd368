"""A model is loaded exactly or not at all: all its tensors come from its files, and all tensors of the files are used.

Only transformers knows the fate of every tensor. Its own rules say which names of old files it renames, and which
tensors may be missing: buffers that it computes (rotary frequencies, position ids), and heads that share the embedding.
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
    """Refuse a model whose files lack many weights, before transformers fills memory with random numbers for them.

    This finds a vocabulary, a width or a number of layers in config.json that the files do not have.

    Args:
        source: Folder or hub id, for the message.
        model: The model, without data.
        held: Numbers that the files hold.

    Raises:
        ModelError: If there are too few.

    Example:
        >>> check_amount("a-model", nn.Linear(8192, 8192, bias=False), held=1000)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: config.json of 'a-model' describes 67 million weights, and the files
        hold 0 million. Download the weights and config.json again, together; or load the model in transformers
        and save it anew.
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
        info: The loading info of `from_pretrained`: missing_keys, unexpected_keys, mismatched_keys, error_msgs.

    Raises:
        ModelError: Naming one of the tensors and how many there are.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> check_loading("a-model", model, {"missing_keys": ["model.norm.weight"]})
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The files of 'a-model' lack 1 of the model's tensors, among them
        'model.norm.weight'. Download the weights and config.json again, together; or load the model in
        transformers and save it anew.
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
    """Refuse a tensor that transformers took and the model does not use, because another tensor has its place.

    Args:
        source: Folder or hub id, for the message.
        model: The model, loaded from `given`.
        given: Tensors by their names in the files.

    Raises:
        ModelError: Naming one of them.

    Example:
        >>> model = nn.Linear(4, 2, bias=False)
        >>> check_all_used("a-model", model, {"weight": model.weight, "extra": nn.Linear(4, 2).weight})
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The files of 'a-model' hold 1 tensors that are none of the model's,
        among them 'extra'. Download the weights and config.json again, together; or load the model in
        transformers and save it anew.
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

    Example:
        >>> from qe_edge.models.loading import load_model  # doctest: +SKIP
        >>> loaded = load_model("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> note_own_head(loaded.model, loaded.family)  # doctest: +SKIP
        >>> loaded.model.config.tie_word_embeddings  # still true: this head shares the embedding  # doctest: +SKIP
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
        return
    own, shared = getattr(head, "weight", None), getattr(embedding, "weight", None)  # quantized ones have codes
    if own is not None and shared is not None and own.data_ptr() == shared.data_ptr():
        return
    for config in (model.config, family.config):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False


def saved_by(model: PreTrainedModel) -> str:
    """Return a remedy if config.json names another class than the loaded one, else an empty text.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
        >>> config = LlamaConfig(**sizes, num_attention_heads=2, architectures=["LlamaForSequenceClassification"])
        >>> saved_by(LlamaModel(config))
        'It was saved as a LlamaForSequenceClassification, and QE-Edge quantizes a LlamaModel: give a model of
        that class.'
    """
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
