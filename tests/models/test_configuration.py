"""What config.json may say: bounds before anything is built, values that belong together, keys that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qe_edge.demo import model_path
from qe_edge.models.configuration import REMEDY, load_config, load_family
from qe_edge.models.family import Sample
from qe_edge.models.loading import shapes_only
from qe_edge.system.errors import ArtifactError, InputError, ModelError
from tests.models.model_files import PICTURE, Edit, copy_files, edit, plan
from tests.small_models import CONTEXT, write_small_dinov2, write_small_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dinov2(tmp_path_factory.mktemp("dinov2") / "model")


def _put(key: str, value: object) -> Edit:
    def change(table: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for parent in parents:
            table = table[parent]
        table[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("vocab_size", 12_000_000, "Key 'vocab_size' of"),
        ("vocab_size", 512.0, "valid integer"),
        ("hidden_size", "64", "valid integer"),
        ("hidden_size", -64, "greater than or equal to 1"),
        ("num_hidden_layers", 100_000, "less than or equal to 512"),
        ("max_position_embeddings", 10**12, "less than or equal to"),
        ("rms_norm_eps", float("nan"), "finite number"),
        ("rms_norm_eps", 0.0, "greater than 0"),
        ("dtype", "int8", "'float32', 'float16'"),
        ("num_labels", 10**9, "num_labels"),
        ("architectures", 14, "Key .architectures. of .* valid list"),
        ("architectures", [["LlamaForCausalLM"]], "valid string"),
        ("eos_token_id", [2, 4000], "eos_token_id 4000 is outside the vocabulary of 512"),
        ("pad_token_id", 512, "pad_token_id 512 is outside"),
        ("num_attention_heads", 5, "multiple of"),
        ("num_key_value_heads", 3, "no multiple of num_key_value_heads 3"),
        ("head_dim", 15, "RoPE requires an even rotary dimension"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_parameters.rope_theta"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "rope_parameters.rope_type"),
        ("hidden_act", "no such curve", "describes no model that can be built"),
        ("return_dict", False, "return_dict"),
        ("attn_implementation", "somebody/kernels", "implementation that is not transformers' own"),
        ("_attn_implementation", "flash_attention_2", "another attention than sdpa or eager; take this key out"),
        ("attn_implementation", "flex_attention", "'attn_implementation' asks for another attention"),
        ("_attn_implementation", {"": "paged"}, "'_attn_implementation' asks for another attention"),
        ("get_text_config", 5, "Key 'get_text_config' of .* is no setting of a model"),
    ],
)
def test_a_value_that_no_language_model_has(
    llama: Path, tmp_path: Path, key: str, value: object, complaint: str
) -> None:
    folder = copy_files(llama, tmp_path / "model")
    edit(folder / "config.json", _put(key, value))
    with pytest.raises(ModelError, match=complaint) as caught:
        shapes_only(load_family(str(folder)))
    assert "config.json" in str(caught.value)
    assert caught.value.remedy == REMEDY


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("vision_config.patch_size", 7_000, "Key 'vision_config.patch_size' of"),
        ("vision_config.spatial_merge_size", 2_000_000, "vision_config.spatial_merge_size"),
        ("vision_config.num_heads", 5, "vision encoder's number of heads 5"),
        ("vision_config.num_heads", 96, "width per head 2 is no multiple of 4"),
        ("vision_config.hidden_size", 128, "is not text_config.hidden_size 256"),
        ("vision_config.in_channels", 4, "in_channels"),
        ("text_config.rope_parameters.mrope_section", [4, 6], "mrope_section"),
        ("text_config.layer_types", ["full_attention"], "layer_types"),
        ("image_token_id", 9999, "image_token_id 9999 is outside the vocabulary"),
        ("text_config", 7, "text_config"),
    ],
)
def test_a_value_that_no_vision_language_model_has(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    folder = copy_files(model_path(), tmp_path / "model")
    edit(folder / "config.json", _put(key, value))
    with pytest.raises(ModelError, match=complaint):
        load_config(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("image_seq_length", 5, "image_seq_length is 5; a tile of the vision encoder becomes 4 tokens"),
        ("downsample_ratio", 0.3, "downsample_ratio 0.3 does not fit 4 patches"),
        ("vision_config.image_size", [57, 56], "image_size 57 is no multiple"),
        ("vision_config.image_size", [56], "need a height and a width"),
    ],
)
def test_tiles_that_do_not_fit(tiny_internvl: Path, tmp_path: Path, key: str, value: object, complaint: str) -> None:
    folder = copy_files(tiny_internvl, tmp_path / "model")
    edit(folder / "config.json", _put(key, value))
    with pytest.raises(ModelError, match=complaint):
        load_config(str(folder))


def test_a_vision_encoder_with_heads_that_do_not_share_its_width(dinov2: Path, tmp_path: Path) -> None:
    folder = copy_files(dinov2, tmp_path / "model")
    edit(folder / "config.json", _put("num_attention_heads", 3))
    with pytest.raises(ModelError, match="width 32 is no multiple of the vision encoder's number of heads 3"):
        load_config(str(folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "holds no JSON table"),
        ('{"model_type": ["llama"]}', "names no model_type"),
        ('{"model_type": "mamba\\u0007"}', r"is a 'mamba\\x07' model"),
        ('{"a":' * 3000, "not valid JSON"),
    ],
)
def test_a_file_that_describes_no_model(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=complaint):  # the class that the caller asks for
        load_config(str(tmp_path), ArtifactError)


def test_the_hubs_flat_layout_is_read(tmp_path: Path) -> None:
    folder = copy_files(model_path(), tmp_path / "model")
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flat = {**table.pop("text_config"), **table, "model_type": "qwen2_vl"}
    (folder / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    assert load_config(str(folder)).text_config.hidden_size == 256
    flat["vocab_size"] = 3_000_000
    (folder / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    with pytest.raises(ModelError, match="Key 'vocab_size'"):
        load_config(str(folder))


def test_a_dry_run_of_the_largest_sizes_takes_no_memory(llama: Path, tmp_path: Path) -> None:
    folder = copy_files(llama, tmp_path / "model")
    sizes = {"hidden_size": 2**16, "intermediate_size": 2**19, "vocab_size": 2**20, "num_attention_heads": 512}
    edit(folder / "config.json", lambda table: table.update(sizes, head_dim=128, num_key_value_heads=512))
    assert plan(folder, "llama").checkpoint_bytes > 2**37


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "llama"])
def test_a_text_beyond_the_context_is_refused(family: str, llama: Path, tiny_internvl: Path) -> None:
    source = {"qwen2_vl": model_path(), "internvl": tiny_internvl, "llama": llama}[family]
    found = load_family(str(source))
    context = {"qwen2_vl": 1024, "internvl": 512, "llama": CONTEXT}[family]
    sample = Sample(None if family == "llama" else PICTURE, "red " * context)
    with pytest.raises(InputError, match=f"tokens; the model reads {context}") as caught:
        found.encode(found.load_processor(str(source)), [sample])
    assert "pieces" in caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [("_attn_implementation", "eager"), ("attn_implementation", "sdpa"), ("_attn_implementation_autoset", True)],
)
def test_what_older_transformers_wrote_about_attention(llama: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = copy_files(llama, tmp_path / "model")
    edit(folder / "config.json", _put(key, value))
    assert shapes_only(load_family(str(folder))).config.vocab_size == 512
