"""InternVL2 in its authors' layout: converted, it computes what an independent implementation of that layout does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from qe_edge.demo import model_path
from qe_edge.models.conversion import END, IMAGE, START, STOP, convert_model
from qe_edge.models.internlm2_tokenizer import read_internlm2_tokenizer
from qe_edge.models.loading import load_model
from qe_edge.system.errors import ModelError, NumericalError
from tests.models.conversations import CASES, ODD, SQUARE, torch_logits
from tests.reference import internvl2

SIDE, PATCH = 56, 14
VISION, LAYERS, VOCABULARY = 2, 2, 600
HEADS, KV_HEADS, WIDTH, HIDDEN = 6, 2, 16, 96
SIZES = internvl2.Sizes(VISION, 2, PATCH, LAYERS, HEADS, KV_HEADS, 1e6, 1e-5)
TOKENS = ["<|plugin|>", END, "<|im_start|>", START, STOP, IMAGE]


def write_sentencepiece(path: Path) -> int:
    """A SentencePiece model of bytes and a few merged words; returns its number of pieces."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = False
    words = ["\u2581", "h", "a", "t", "w", "\u2581w", "ha", "hat", "what", "\u2581what", "i", "s", "is", "\u2581is"]
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{number:02X}>", 6) for number in range(256))]
    for score, (piece, kind) in enumerate([*kinds, *((word, 1) for word in words), ("[UNUSED_TOKEN_0]", 1)]):
        model.pieces.add(piece=piece, score=-float(score), type=kind)
    path.write_bytes(model.SerializeToString())
    return len(model.pieces)


def config_of(text: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {
        "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "max_dynamic_patch": 4,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat" if text == "internlm2" else "Hermes-2",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": {
            "model_type": text,
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0} if text == "internlm2" else None,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": VISION,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "norm_type": "layer_norm",
            "qkv_bias": True,
        },
        **changes,
    }


def shapes_of(text: str) -> dict[str, tuple[int, ...]]:
    """Tensors of the layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, 32),
        "vision_model.embeddings.position_embedding": (1, (SIDE // PATCH) ** 2 + 1, 32),
        "vision_model.embeddings.patch_embedding.weight": (32, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (32,),
        "mlp1.0.weight": (128,), "mlp1.0.bias": (128,),
        "mlp1.1.weight": (HIDDEN, 128), "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN), "mlp1.3.bias": (HIDDEN,),
        "language_model.model.norm.weight": (HIDDEN,),
    }  # fmt: skip
    linears = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
    for layer in range(VISION):
        name = f"vision_model.encoder.layers.{layer}."
        shapes |= {f"{name}{part}": (32,) for part in ("ls1", "ls2")}
        shapes |= {f"{name}{part}.{leaf}": (32,) for part in ("norm1", "norm2") for leaf in ("weight", "bias")}
        for part, shape in linears.items():
            shapes |= {f"{name}{part}.weight": shape, f"{name}{part}.bias": shape[:1]}
    for layer in range(LAYERS):
        name = f"language_model.model.layers.{layer}."
        if text == "internlm2":
            shapes[f"{name}attention.wqkv.weight"] = ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)
            shapes[f"{name}attention.wo.weight"] = (HIDDEN, HEADS * WIDTH)
            parts, norms = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"), ("attention_norm", "ffn_norm")
        else:
            for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                shapes[f"{name}self_attn.{part}_proj.weight"] = (heads * WIDTH, HIDDEN)
                shapes[f"{name}self_attn.{part}_proj.bias"] = (heads * WIDTH,)
            shapes[f"{name}self_attn.o_proj.weight"] = (HIDDEN, HEADS * WIDTH)
            parts = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{name}{part}.weight": (128, HIDDEN) for part in parts[:2]} | {
            f"{name}{parts[2]}.weight": (HIDDEN, 128)
        }
        shapes |= {f"{name}{norm}.weight": (HIDDEN,) for norm in norms}
    table, head = ("tok_embeddings", "output") if text == "internlm2" else ("embed_tokens", "lm_head")
    shapes |= dict.fromkeys(
        (f"language_model.model.{table}.weight", f"language_model.{head}.weight"), (VOCABULARY, HIDDEN)
    )
    return shapes


def write_original(folder: Path, text: str, **changes: Any) -> dict[str, Tensor]:  # noqa: ANN401 - any JSON value
    """A checkpoint in two files with random weights; returns them."""
    folder.mkdir()
    torch.manual_seed(0)
    state = {
        name: torch.rand(shape) + 0.5
        if ("norm" in name and "weight" in name) or "ls" in name
        else torch.randn(shape) * 0.15
        for name, shape in shapes_of(text).items()
    }
    (folder / "config.json").write_text(json.dumps(config_of(text, **changes)), encoding="utf-8")
    weights = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if text == "internlm2":
        first = write_sentencepiece(folder / "tokenizer.model")
        added = {str(first + number): {"content": token, "special": True} for number, token in enumerate(TOKENS)}
        added |= {
            str(number): {"content": token, "special": True} for number, token in enumerate(("<unk>", "<s>", "</s>"))
        }
        settings = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    else:
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        tokenizer.add_special_tokens({"additional_special_tokens": [START, STOP, IMAGE]})
        tokenizer.save_pretrained(folder)
    return state


@pytest.mark.parametrize("text", ["internlm2", "qwen2"])
def test_converted_models_compute_the_same(text: str, tmp_path: Path) -> None:
    state = {name: tensor.double() for name, tensor in write_original(tmp_path / "original", text).items()}
    convert_model(str(tmp_path / "original"), tmp_path / "converted")
    loaded = load_model(str(tmp_path / "converted"), torch.float32)
    image = loaded.family.config.image_token_id
    for case in ("square", "odd sizes", "several turns", "text only"):
        encoded = loaded.family.encode(loaded.processor, CASES[case], answers=True)
        pixels = encoded.pixels.get("pixel_values")
        features = torch.zeros(0, HIDDEN, dtype=torch.float64)
        if pixels is not None:
            features = internvl2.image_features(state, SIZES, torch.from_numpy(pixels).double())
        wanted = internvl2.logits(state, SIZES, torch.from_numpy(encoded.input_ids[0]), image, features).numpy()
        found = torch_logits(loaded, CASES[case])[0]
        assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5, case


@pytest.mark.parametrize(("text", "bos"), [("internlm2", "<s>"), ("qwen2", "")])
def test_prompts_are_those_of_the_original_code(text: str, bos: str, tmp_path: Path) -> None:
    write_original(tmp_path / "original", text)
    convert_model(str(tmp_path / "original"), tmp_path / "converted")
    loaded = load_model(str(tmp_path / "converted"))
    encoded = loaded.family.encode(loaded.processor, CASES["several turns"])
    prompt = loaded.processor.tokenizer.decode(encoded.input_ids[0])
    system = prompt.removeprefix(f"{bos}<|im_start|>system\n").partition("<|im_end|>")[0]
    assert "InternVL" in system
    turns = prompt.removeprefix(f"{bos}<|im_start|>system\n{system}<|im_end|>").replace(IMAGE, "")
    assert turns == (
        f"<|im_start|>user\n{START}{STOP}\nis there a{START}{STOP}\n red shape?<|im_end|>"
        f"<|im_start|>assistant\nyes<|im_end|>"
        f"<|im_start|>user\n{START}{STOP}\nand is there a blue shape in the third one?<|im_end|><|im_start|>assistant\n"
    )
    answered = loaded.family.encode(loaded.processor, [CASES["square"][0]], answers=True)
    assert answered.input_ids[0, -1] == loaded.processor.tokenizer.convert_tokens_to_ids(END)


def test_pictures_are_normalized_as_the_original_code_does(tmp_path: Path) -> None:
    write_original(tmp_path / "original", "internlm2")
    convert_model(str(tmp_path / "original"), tmp_path / "converted")
    loaded = load_model(str(tmp_path / "converted"))
    black = SQUARE.point(lambda _: 0)
    pixels = loaded.family.encode(loaded.processor, [CASES["square"][0].__class__(black, "what?")]).pixels[
        "pixel_values"
    ]
    assert np.allclose(pixels[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], atol=1e-6)
    tiles = loaded.family.encode(loaded.processor, [CASES["square"][0].__class__(ODD, "what?")]).pixels["pixel_values"]
    assert len(tiles) == 3  # 117 x 203: one by two, and a thumbnail


def test_the_sentencepiece_model_is_read(tmp_path: Path) -> None:
    first = write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = read_internlm2_tokenizer(tmp_path / "tokenizer.model", {str(first): {"content": END}})
    encoded = tokenizer.encode(f"what is\u00e9{END}")
    assert encoded.tokens == ["what", "\u2581is", "<0xC3>", "<0xA9>", END]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == f"what is\u00e9{END}"
    with pytest.raises(ModelError, match="follows no token"):
        read_internlm2_tokenizer(tmp_path / "tokenizer.model", {str(first + 1): {"content": END}})
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 50)
    with pytest.raises(ModelError, match="is no SentencePiece model"):
        read_internlm2_tokenizer(tmp_path / "tokenizer.model", {})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "internvl"}, "only OpenGVLab's layout"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"template": "phi3-chat"}, "phi3-chat"),
        ({"select_layer": -2}, "select_layer"),
        ({"use_thumbnail": False}, "no thumbnail"),
        ({"force_image_size": 112}, "112 pixels a side"),
        ({"llm_config": {**config_of("internlm2")["llm_config"], "model_type": "phi3"}}, "model_type"),
        ({"llm_config": {**config_of("internlm2")["llm_config"], "num_key_value_heads": 1}}, "rows"),
    ],
)
def test_what_is_not_converted(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_original(tmp_path / "original", "internlm2", **changes)
    with pytest.raises(ModelError, match=problem):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.0.attention.wqkv.weight", "vision_model.encoder.layers.0.attn.qkv.weight"]
)
@pytest.mark.parametrize("change", [lambda tensor: tensor[:-1].clone(), lambda _: torch.tensor(1.0)])
def test_fused_projections_of_another_size(change: Callable[[Tensor], Tensor], name: str, tmp_path: Path) -> None:
    write_original(tmp_path / "original", "internlm2")
    for path in (tmp_path / "original").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"Tensor '{re.escape(name)}' has \d+ rows"):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    write_original(tmp_path / "original", "internlm2")
    path = tmp_path / "original" / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=re.escape(name)):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_tokenizer_that_is_no_file(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever."""
    write_original(tmp_path / "original", "internlm2")
    path = tmp_path / "original" / "tokenizer.model"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="is not a file"):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")


def test_a_token_beyond_the_embedding(tmp_path: Path) -> None:
    """Saving such a tokenizer would walk over two billion numbers."""
    write_original(tmp_path / "original", "qwen2")
    path = tmp_path / "original" / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    piece = next(iter(table["model"]["vocab"]))
    table["model"]["vocab"][piece] = 2**31
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ModelError, match="has number 2147483648"):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    write_original(tmp_path / "original", "internlm2")
    path = tmp_path / "original" / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    index = tmp_path / "original" / "model.safetensors.index.json"
    table = json.loads(index.read_text(encoding="utf-8"))
    tensors["extra.weight"] = torch.zeros(2)
    table["weight_map"]["extra.weight"] = path.name
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no tensor 'extra\.weight'"):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")
    dropped = "vision_model.encoder.layers.0.ls1"
    for name in ("extra.weight", dropped):
        tensors.pop(name, None), table["weight_map"].pop(name)
    other = tmp_path / "original" / "model-00002-of-00002.safetensors"
    rest = load_file(other)
    rest.pop(dropped, None)
    save_file(rest, other, metadata={"format": "pt"})
    save_file(tensors, path, metadata={"format": "pt"})
    index.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ModelError, match="lambda_1"):
        convert_model(str(tmp_path / "original"), tmp_path / "converted")


def test_a_tokenizer_that_no_file_can_hold(tmp_path: Path) -> None:
    write_original(tmp_path / "model", "qwen2")
    path = tmp_path / "model" / "tokenizer_config.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(table | {"errors": "half a pair: \ud800"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be written"):
        convert_model(str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
