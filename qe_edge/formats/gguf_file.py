"""llama.cpp's GGUF: one file of a language model, one of its correction as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from qe_edge.formats.base import Conversion, Format, Reason
from qe_edge.formats.blocks_of_32 import BLOCK, Q4_BYTES, Q8_BYTES, q4_0, q8_0
from qe_edge.formats.carried import CarriedLayer
from qe_edge.formats.gguf_vocabulary import add_vocabulary, tokenizer_problem
from qe_edge.formats.plain import plain_pieces
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.system.progress import Progress, track

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
OTHERWISE = "Choose --to compressed-tensors."
MODEL, ADAPTER = "model.gguf", "adapter.gguf"
BYTES = np.dtype(np.uint8)
Q4, Q8 = (gguf.GGMLQuantizationType.Q4_0, Q4_BYTES), (gguf.GGMLQuantizationType.Q8_0, Q8_BYTES)
Order = Callable[[Tensor], Tensor]
KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


class Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        kind: Type of its numbers.
        bytes_shape: Its shape in bytes.
        make: Makes it, of any type with these bytes.
    """

    name: str
    kind: gguf.GGMLQuantizationType
    bytes_shape: tuple[int, ...]
    make: Callable[[], Tensor]


class GGUF(Format):
    """The format of llama.cpp: Q4_0 for layers without zero points or of fewer than 4 bits, Q8_0 for the others.

    A weight is a code times a float16 scale, in blocks of 32. A scale of more channels is the scale of all their
    blocks. Codes of 4 bits less their zero points have 5 bits, so they take 8: Q4_1 stores the smallest weight of a
    block in float16, which is rounded.

    Example:
        >>> GGUF().adapter, GGUF().folds_rows
        ('adapter.gguf', False)
    """

    reader: ClassVar[str] = "llama.cpp and programs built on it, and transformers with the package gguf"
    folds_rows: ClassVar[bool] = False  # its scales are float16
    adapter: ClassVar[str] = ADAPTER

    def check(self, conversion: Conversion) -> list[Reason]:
        """Only decoders that llama.cpp computes as transformers does, with a tokenizer that it has."""
        config = conversion.source.family.config
        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            return [(f"'{config.model_type}' is none of the language models {known}", OTHERWISE)]
        found: list[Reason] = []
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
        if config.rope_parameters.get("rope_type", "default") != "default" or config.hidden_act != "silu" or kinds:
            found.append(("its positions, windows or activations are not the usual ones", OTHERWISE))
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            found.append(("its layers have biases that readers of GGUF do not look for", OTHERWISE))
        problem = tokenizer_problem(conversion.source.folder)
        return found if problem is None else [*found, problem]

    def layer_problem(self, layer: CarriedLayer) -> str | None:
        """Groups that blocks of 32 do not divide."""
        size = layer.geometry.in_features if layer.grid.group_size == PER_CHANNEL else layer.grid.group_size
        return f"has groups that are no multiple of {BLOCK}" if size % BLOCK else None

    def write(self, conversion: Conversion, folder: Path, name: str, progress: Progress) -> None:
        """Write model.gguf, and adapter.gguf where there is a correction."""
        model, adapter = list(_model_entries(conversion)), list(_adapter_entries(conversion))
        total = float(sum(_size(entry) for entry in (*model, *adapter)))
        with track(progress, "Converting", total) as tracked:
            _write(folder / MODEL, _described(conversion, name), model, tracked)
            if adapter:
                writer = _writer(conversion)
                writer.add_type("adapter")
                writer.add_string("adapter.type", "lora")
                writer.add_float32("adapter.lora.alpha", 0.0)  # none: the factor is 1, whatever the rank
                _write(folder / ADAPTER, writer, adapter, tracked)

    def how_to_load(self, conversion: Conversion, name: str) -> str:
        """With llama.cpp."""
        adapter = f" --lora {name}/{ADAPTER}" if conversion.corrected else ""
        return f'llama-cli -m {name}/{MODEL}{adapter} -p "What is this?"'

    def notes(self, conversion: Conversion) -> list[str]:
        """What the 8 bits cost."""
        wide = [layer for layer in conversion.coded.values() if not _is_narrow(layer)]
        if not wide:
            return []
        return [f"{len(wide)} layers with zero points are Q8_0, of 8.5 bits a weight; those of Q4_0 have 4.5."]


def _is_narrow(layer: CarriedLayer) -> bool:
    """Whether codes less their zero points have 4 bits."""
    return layer.grid.symmetric or layer.grid.bits < 4


def _model_entries(conversion: Conversion) -> Iterator[Entry]:
    names = _names(conversion)
    for name, (like, make) in plain_pieces(conversion).items():
        yield _real(names(name), like, make)
    for name, layer in conversion.layers.items():
        weight, order = names(f"{name}.weight"), _row_order(conversion, name)
        out_features, in_features = layer.geometry.out_features, layer.geometry.in_features
        if layer.decoded:
            like = torch.empty(out_features, in_features, dtype=conversion.dtype, device="meta")
            yield _real(weight, like, partial(_ordered, order, layer.weight))
        else:
            kind, size = Q4 if _is_narrow(layer) else Q8
            yield Entry(weight, kind, (out_features, in_features // BLOCK * size), partial(_blocks, layer, order))
        if "bias" in layer.geometry.tensors:
            like = torch.empty(out_features, device="meta")
            yield _real(names(f"{name}.bias"), like, partial(_ordered, order, layer.bias))


def _adapter_entries(conversion: Conversion) -> Iterator[Entry]:
    names = _names(conversion)
    for name, layer in conversion.corrected.items():
        weight, order = names(f"{name}.weight"), _row_order(conversion, name)
        down = torch.empty(layer.rank, layer.geometry.in_features, device="meta")
        up = torch.empty(layer.geometry.out_features, layer.rank, device="meta")
        yield _real(f"{weight}.lora_a", down, layer.down)
        yield _real(f"{weight}.lora_b", up, partial(_ordered, order, layer.up))


def _ordered(order: Order, make: Callable[[], Tensor]) -> Tensor:
    return order(make())


def _blocks(layer: CarriedLayer, order: Order) -> Tensor:
    zeros = layer.zeros().repeat_interleave(layer.geometry.in_features // layer.groups, dim=1)
    pack = q4_0 if _is_narrow(layer) else q8_0
    return pack(order(layer.codes() - zeros), order(layer.scales()))


def _real(name: str, like: Tensor, make: Callable[[], Tensor]) -> Entry:
    """A tensor of real numbers: as stored, but vectors in float32, as llama.cpp wants them."""
    dtype = like.dtype if like.ndim > 1 else torch.float32
    return Entry(name, KINDS[dtype], (*like.shape[:-1], like.shape[-1] * dtype.itemsize), lambda: make().to(dtype))


def _names(conversion: Conversion) -> Callable[[str], str]:
    """llama.cpp's names of tensors by transformers' own."""
    config = conversion.source.family.config
    table = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)

    def find(name: str) -> str:
        found: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KeyError(name)
        return found

    return find


def _row_order(conversion: Conversion, name: str) -> Order:
    """The order of a layer's output channels. In Llama, llama.cpp rotates neighbours, transformers halves."""
    config = conversion.source.family.config
    leaf = name.rpartition(".")[2]
    if config.model_type != "llama" or leaf not in ("q_proj", "k_proj"):
        return lambda tensor: tensor
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
    return lambda tensor: tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _described(conversion: Conversion, name: str) -> gguf.GGUFWriter:
    """A writer that has everything but the tensors."""
    config: Any = conversion.source.family.config
    writer = _writer(conversion)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    narrow = all(_is_narrow(layer) for layer in conversion.coded.values())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if narrow else gguf.LlamaFileType.MOSTLY_Q8_0)
    add_vocabulary(writer, conversion.source.folder, config.vocab_size)
    return writer


def _writer(conversion: Conversion) -> gguf.GGUFWriter:
    architecture = ARCHITECTURES[conversion.source.family.config.model_type]
    return gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])


def _size(entry: Entry) -> int:
    return math.prod(entry.bytes_shape)


def _write(path: Path, writer: gguf.GGUFWriter, entries: list[Entry], progress: Progress) -> None:
    """Write a file, one tensor at a time."""
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.bytes_shape, BYTES, _size(entry), raw_dtype=entry.kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        made = entry.make().contiguous().reshape(-1).view(torch.uint8)
        writer.write_tensor_data(made.numpy())
        progress.advance(float(made.nbytes), entry.name)
    writer.close()
