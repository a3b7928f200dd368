"""From a checkpoint to a folder of canonical ONNX graphs, which ONNX Runtime runs as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.checker import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.checkpoint.files import RECIPE, read_checkpoint_files
from qe_edge.checkpoint.safetensors_write import write_rows
from qe_edge.export.attention import attach_attention
from qe_edge.export.cached_attention import attach_cached_attention
from qe_edge.export.chat_parts import chat_segments
from qe_edge.export.decoding import check_decoding
from qe_edge.export.head import attach_head, heads_of
from qe_edge.export.layers import attach_layers, check_layers
from qe_edge.export.linear_attention import attach_linear_attention
from qe_edge.export.naming import name_nodes
from qe_edge.export.norms import divide_by_roots
from qe_edge.export.plain_linears import PlainLinear, attach_plain_linears
from qe_edge.export.preprocessing import write_preprocessing
from qe_edge.export.saving import save_graph
from qe_edge.export.signature import tensor_spec
from qe_edge.export.tracing import exportable, second_embedding, trace_graph
from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.decoder import Decoder
from qe_edge.models.export_limits import context_of, layer_config
from qe_edge.models.family import GraphSpec
from qe_edge.models.layer_states import head_width, layer_states
from qe_edge.models.loading import LoadedModel
from qe_edge.models.quantized import load_quantized
from qe_edge.models.vision_encoder import VisionEncoder
from qe_edge.recipes.recipe import Recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.runtime.chat_segments import CHAT
from qe_edge.runtime.embedding import EMBEDDING, SCALES, TENSOR
from qe_edge.runtime.generation import GENERATION_CONFIG, GenerationSettings, settings_of
from qe_edge.runtime.manifest import (
    FORMAT_VERSION,
    ActionManifest,
    EncoderManifest,
    GraphEntry,
    KVLayout,
    Manifest,
)
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ModelError
from qe_edge.system.progress import Progress, Silent, track
from qe_edge.system.version import VERSION

IR_VERSION = 10  # the first with function overloads
KEPT_INLINE = 1024  # bytes up to which a constant stays in the .onnx file


def export_model(checkpoint: Path | LoadedModel, out: Path, *, progress: Progress | None = None) -> None:
    """Write the ONNX folder of a model; it appears only when it is complete, and replaces an older one.

    It holds `visual.onnx`, `merger.onnx` and `language.onnx` with their `.onnx.data`, `preprocess.onnx` if the family
    has one, `embedding.safetensors`, `manifest.json`, config.json, generation_config.json, tokenizer, image processor,
    `chat.json`, and recipe.json of a quantized model. A language model has `language.onnx` alone. A vision encoder has
    `visual.onnx` alone, without embedding and tokenizer. A model that makes actions has `prefix.onnx`, the keys and
    values of a prompt, and `action.onnx`, a step of denoising, in place of `language.onnx`.

    Args:
        checkpoint: Folder that `qe-edge quantize` wrote, or a model in memory (an unquantized one gives the same
            graphs with plain matrix products). The model is left as it was.
        out: Folder to write.
        progress: Where to report progress.

    Raises:
        ArtifactError: If the checkpoint is missing or damaged.
        ModelError: If the model cannot be exported, or no engine can decode as its generation_config.json says.
        ResourceError: If the disk is full.

    Example:
        >>> export_model(Path("out/demo/checkpoint"), Path("out/demo/onnx"))  # doctest: +SKIP
    """
    if not isinstance(checkpoint, LoadedModel) and is_checkpoint(checkpoint):
        check_decoding(str(checkpoint))
    loaded = checkpoint if isinstance(checkpoint, LoadedModel) else load_quantized(checkpoint)
    source = None if isinstance(checkpoint, LoadedModel) else read_checkpoint_files(checkpoint).digest
    recipe = None if isinstance(checkpoint, LoadedModel) else load_checkpoint_recipe(checkpoint)
    check_layers(quantized_linears(loaded.model))
    writes_text, embeds = loaded.family.writes_text, loaded.family.writes_text or loaded.family.acts
    tables = _layered_tables(loaded.model)
    embedding = _embedding_table(loaded.model.get_input_embeddings()) if embeds and not tables else None
    with atomic_folder(out) as part, exportable(loaded.model) as linears:
        specs = _graphs(loaded)
        generation = _generation(loaded) if writes_text else None
        entries = {}
        with track(progress or Silent(), "Exporting", sum(_work(spec) for spec in specs)) as tracked:
            for spec in specs:
                entries[spec.name] = _export_graph(spec, loaded, linears, part)
                tracked.advance(_work(spec), spec.name)
        if tables:
            write_rows(part / EMBEDDING, TENSOR, tables)
        elif embedding is not None:
            save_file(embedding, part / EMBEDDING)
        _write_runtime_files(loaded, part)
        if recipe is not None and not isinstance(checkpoint, LoadedModel):
            shutil.copyfile(checkpoint / RECIPE, part / RECIPE)
        if generation is None:
            textless = _action_manifest if loaded.family.acts else _encoder_manifest
            textless(loaded, recipe, entries).model_copy(update={"checkpoint": source}).write(part)
            return
        in_place = all(spec.module.in_place for spec in specs if isinstance(spec.module, Decoder))
        manifest = _manifest(loaded, recipe, entries, generation, in_place=in_place)
        further = {"checkpoint": source, "picture": write_preprocessing(loaded, part, IR_VERSION)}
        manifest.model_copy(update=further).write(part)


def _generation(loaded: LoadedModel) -> GenerationSettings:
    return settings_of(loaded.model, loaded.family.config, loaded.processor.tokenizer)


def _graphs(loaded: LoadedModel) -> list[GraphSpec]:
    """The graphs of a model; of a vision encoder alone for the size that its image processor gives pictures."""
    if not isinstance(loaded.family, VisionEncoder):
        return loaded.family.graphs(loaded.model)
    return [loaded.family.encoder_graph(loaded.model, loaded.family.picture_size(loaded.processor))]


def _embedding_table(embedding: nn.Module) -> dict[str, Tensor]:
    """What stands for every token in `inputs_embeds`, as it is stored; Gemma multiplies its weights by a number."""
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(embedding, QuantizedEmbedding):
        scales = embedding.scales.float()
        return {TENSOR: embedding.codes, SCALES: scales if scale is None else scales * scale.float()}
    weight = embedding.get_parameter("weight").detach()
    return {TENSOR: (weight if scale is None else weight.float() * scale.float()).contiguous()}


def _layered_tables(model: Any) -> list[Tensor]:  # noqa: ANN401 - transformers' own classes
    """Both embeddings of a token as they are stored, where a model has a second one for its layers, as Gemma 4.

    The second one is far larger than the rest of the model, so that it must not become float32. The graphs multiply.
    """
    second = second_embedding(model)
    if second is None:
        return []
    first = model.get_input_embeddings().weight.detach()
    dtype = torch.promote_types(first.dtype, second.weight.dtype)
    return [table.to(dtype)[: len(first)] for table in (first, second.weight.detach())]


def _work(spec: GraphSpec) -> float:
    return sum(1 for _ in spec.module.modules())


def _export_graph(spec: GraphSpec, loaded: LoadedModel, linears: Mapping[str, PlainLinear], folder: Path) -> GraphEntry:
    """Trace, fill, check and save one graph."""
    model = trace_graph(spec)
    divide_by_roots(model)
    attach_plain_linears(model, linears)
    layers = quantized_linears(loaded.model)
    attach_head(model, {name: layers.pop(name) for name in heads_of(loaded.model, layers)})
    attach_layers(model, layers)
    attach_attention(model)
    name_nodes(model, spec.module, loaded.model)
    attach_cached_attention(model)
    attach_linear_attention(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "qe-edge", VERSION
    model.graph.name = spec.name
    file = f"{spec.name}.onnx"
    save_graph(model, folder / file, kept_inline=KEPT_INLINE)
    try:
        onnx.checker.check_model(str(folder / file), full_check=True)
    except (ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"The exported graph '{spec.name}' is not valid ONNX: {str(error).splitlines()[0]}",
            "Use the versions of torch, onnx and onnxscript in constraints.txt.",
        ) from error
    return GraphEntry(
        file=file,
        inputs=tuple(tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
        profiles=spec.profiles,
    )


def _write_runtime_files(loaded: LoadedModel, folder: Path) -> None:
    """Configuration, generation settings, tokenizer, image processor, and the chat template in parts."""
    config = json.loads(loaded.family.config.to_json_string(use_diff=True))
    config.pop("quantization_config", None)  # the weights are in the graphs
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if getattr(loaded.model, "generation_config", None) is not None:
        text = loaded.model.generation_config.to_json_string()
        (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
    loaded.family.save_processor(loaded.processor, folder)
    if loaded.family.writes_text:
        chat = chat_segments(loaded.family, loaded.processor)
        (folder / CHAT).write_text(chat.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _named(recipe: Recipe | None) -> str:
    return "none" if recipe is None else f"{recipe.method} {recipe.scheme}"


def _encoder_manifest(loaded: LoadedModel, recipe: Recipe | None, entries: dict[str, GraphEntry]) -> EncoderManifest:
    return EncoderManifest(
        format_version=FORMAT_VERSION,
        model_type=loaded.family.config.model_type,
        quantization=_named(recipe),
        graphs=entries,
    )


def _action_manifest(loaded: LoadedModel, recipe: Recipe | None, entries: dict[str, GraphEntry]) -> ActionManifest:
    text = loaded.family.config.vlm_config.text_config
    return ActionManifest(
        format_version=FORMAT_VERSION,
        model_type=loaded.family.config.model_type,
        quantization=_named(recipe),
        graphs=entries,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def _manifest(
    loaded: LoadedModel,
    recipe: Recipe | None,
    entries: dict[str, GraphEntry],
    generation: GenerationSettings,
    *,
    in_place: bool,
) -> Manifest:
    config: Any = loaded.family.config
    text = config.get_text_config()
    first = layer_config(text, 0)
    return Manifest(
        format_version=FORMAT_VERSION,
        model_type=config.model_type,
        quantization=_named(recipe),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        image_token_id=loaded.family.image_token_id,
        max_context=context_of(text),
        generation=generation,
        kv=KVLayout(
            layers=sum(state.part == "key" for state in layer_states(text)),
            heads=first.num_key_value_heads,
            head_dim=head_width(first),
            in_place=in_place,
        ),
        graphs=entries,
    )
