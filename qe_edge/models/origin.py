"""Refuse folders that hold anything but an unquantized model of transformers, and name what they hold; no torch.

Wrappers, adapters and quantizers leave traces in file names, in config.json, and in names and types of tensors. The
check runs before transformers loads anything, because transformers fills missing weights with random numbers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qe_edge.checkpoint.detection import QUANT_METHOD
from qe_edge.system.errors import ModelError, printable

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# what quantizers write beside the weights: ModelOpt, AutoGPTQ, AutoAWQ, others
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
QUANTIZER_KEYS = ("quantization_config", "compression_config", "quantization")
FLOATS = ("BF16", "F16", "F32", "F64")
COUNTERS = ("position_ids", "num_batches_tracked")  # buffers of integers in old files
WRAPPERS = {  # part of a tensor's name by what put it there
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "module": "DataParallel",
}
LORA = re.compile(
    r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module|oft_\w+|ia3_l|hada_w\w+|lokr_\w+)(\.|$)"
)
PACKED = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales|zeros|scb|absmax|quant_map|quant_state|weight_format|trellis|suh|svh|q_perm|"
    r"q_scale|q_groups|(weight|input|output|activation|[qkv])_(scale(_inv|_2)?|zero_point|packed|shape|amax)|"
    r"(weight|input)_global_scale|weight_quantizer|input_quantizer|scale_weight|scale_inv|qdata)([._]|$)",
    re.IGNORECASE,
)
MERGE = "Merge the adapter into its base model (PEFT: merge_and_unload, then save_pretrained) and give that folder."
DEQUANTIZE = "Give the original model, or load this one with its own tool, dequantize it and save it in 16 bits."


def check_adapter(folder: Path) -> None:
    """Refuse an adapter: it changes the weights of a model, and only PEFT can apply it.

    Raises:
        ModelError: If there is one, beside a model or alone.

    Example:
        >>> _ = Path("adapter_config.json").write_text("{}")
        >>> check_adapter(Path())
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: '.' is an adapter ('adapter_config.json'), not a model. Merge the
        adapter into its base model (PEFT: merge_and_unload, then save_pretrained) and give that folder.
    """
    found = next((name for name in ADAPTER_FILES if _is_there(folder / name)), None)
    if found is None:
        return
    if _is_there(folder / "config.json"):
        raise adapter_beside(str(folder), found)
    raise ModelError(f"'{folder}' is an adapter ('{found}'), not a model.", MERGE)


def adapter_beside(source: str, found: str) -> ModelError:
    """The error about an adapter that lies beside a model.

    Args:
        source: Folder or hub id.
        found: Name of the adapter's file.

    Example:
        >>> adapter_beside("owner/model", "adapter_config.json").problem
        "'owner/model' holds an adapter ('adapter_config.json') beside the model; its weights would be left out."
    """
    return ModelError(
        f"'{source}' holds an adapter ('{found}') beside the model; its weights would be left out.",
        f"{MERGE} If the model is meant without it, give a folder without the adapter's files.",
    )


def check_configuration(values: Mapping[str, Any], source: str) -> None:
    """Refuse a config.json of a model that is quantized, or of InternVL's own layout.

    Raises:
        ModelError: If it is one.

    Example:
        >>> check_configuration({"model_type": "llama"}, "a-model")  # fine
        >>> check_configuration({"quantization_config": {"quant_method": "awq"}}, "a-model")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: 'a-model' is quantized already by the method 'awq': config.json holds
        'quantization_config'. Give the original model, or load this one with its own tool, dequantize it and save
        it in 16 bits.
    """
    for where, key, found in _quantizer_sections(values):
        method = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else None
        if method == QUANT_METHOD:
            raise ModelError(f"'{source}' is quantized already, by QE-Edge.", "Give the original model.")
        named = f" by the method '{printable(str(method))[:60]}'" if method else ""
        raise ModelError(f"'{source}' is quantized already{named}: config.json holds '{where}{key}'.", DEQUANTIZE)
    model_type, auto_map = values.get("model_type"), values.get("auto_map")
    original = isinstance(auto_map, dict) and any("internvl_chat" in str(entry).lower() for entry in auto_map.values())
    if model_type == "internvl_chat" or original:
        raise ModelError(
            f"'{source}' is an InternVL model in its original layout, which runs code of its own.",
            f"Convert it without running that code: qe-edge convert {shlex.quote(source)} -o CONVERTED, and give that "
            "folder. Or use the version whose name ends in '-hf'.",
        )


def check_quantizer_files(folder: Path) -> None:
    """Refuse a folder in which a quantizer left its settings.

    Raises:
        ModelError: If it did.

    Example:
        >>> _ = Path("quantize_config.json").write_text("{}")
        >>> check_quantizer_files(Path())
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: '.' is quantized already: it holds 'quantize_config.json'. Give the
        original model, or load this one with its own tool, dequantize it and save it in 16 bits.
    """
    found = next((name for name in QUANTIZER_FILES if _is_there(folder / name)), None)
    if found is not None:
        raise ModelError(f"'{folder}' is quantized already: it holds '{found}'.", DEQUANTIZE)


def check_tensors(header: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Refuse tensors that no plain model has, by their names and types.

    Args:
        header: Type and shape by name, as `check_safetensors` returns them.
        path: The file.

    Raises:
        ModelError: Naming one of them.

    Example:
        >>> check_tensors({"mlp.up_proj.weight": ("BF16", (64, 32))}, Path("model.safetensors"))  # fine
        >>> check_tensors({"mlp.up_proj.qweight": ("I32", (64, 4))}, Path("model.safetensors"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: Tensor 'mlp.up_proj.qweight' of 'model.safetensors' is what a quantizer
        writes, so the model is quantized already. Give the original model, or load this one with its own tool,
        dequantize it and save it in 16 bits.
    """
    for name, (dtype, _) in header.items():
        if LORA.search(name) or name.startswith("base_model.model."):
            _refuse(path, name, "belongs to an adapter that was not merged", MERGE)
        wrapper = next((part for part in WRAPPERS if part in name.split(".")), None)
        if wrapper is not None:
            remedy = f"Save the model without its wrapper, or strip '{wrapper}.' from the names of all tensors."
            _refuse(path, name, f"is named as {WRAPPERS[wrapper]} names it", remedy)
        if PACKED.search(name):
            _refuse(path, name, "is what a quantizer writes, so the model is quantized already", DEQUANTIZE)
        if dtype not in FLOATS and name.rpartition(".")[2] not in COUNTERS:
            _refuse(path, name, f"has the type {dtype}; unquantized weights are {_listed(FLOATS)}", DEQUANTIZE)


def _quantizer_sections(values: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Where a quantizer left its settings: in the table itself or in a section."""
    tables = {"": values, **{f"{name}.": table for name, table in values.items() if isinstance(table, dict)}}
    for where, table in tables.items():
        for key in QUANTIZER_KEYS:
            if table.get(key) is not None and where.rstrip(".") not in QUANTIZER_KEYS:
                yield where, key, table[key]


def _refuse(path: Path, name: str, what: str, remedy: str) -> NoReturn:
    raise ModelError(f"Tensor '{printable(name)[:200]}' of '{path}' {what}.", remedy)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_there(path: Path) -> bool:
    """Also of a link that points at nothing."""
    return path.exists() or path.is_symlink()
