"""Gemma 4: prompts and patches as transformers' classes make them, and every family's checks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoTokenizer, Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.demo import model_path
from qe_edge.export.engine import EngineRequest, build_engine
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.opening import open_graph
from qe_edge.models.configuration import load_config
from qe_edge.models.family import Sample
from qe_edge.models.gemma4 import Gemma4
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.embedding import EMBEDDING, TokenEmbedding
from qe_edge.runtime.limits import EngineLimits, with_capacity, with_limits
from qe_edge.system.errors import ModelError
from tests.models.conversations import CASES, SQUARE, WIDE
from tests.models.families import FamilyChecks, Made, opened, token_errors
from tests.models.random_models import save_random_model

PATCH, TOKENS = 4, 70  # transformers' processor knows no fewer
START, IMAGE, STOP = "<|image>", "<|image|>", "<image|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "\n\n<|image|>\n\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS: dict[str, dict[str, Any]] = {
    "E2B": {  # two layers read the keys and values of the first two
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
    },
    "31B": {  # values are keys in full layers, which have fewer heads
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "use_bidirectional_attention": "vision",
    },
}


def write(folder: Path, kind: str, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": [START, IMAGE, STOP]})
    tokenizer.chat_template = TEMPLATE
    start, image, stop = (tokenizer.convert_tokens_to_ids(token) for token in (START, IMAGE, STOP))
    text = {
        "vocab_size": 528,
        "vocab_size_per_layer_input": 528,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "max_position_embeddings": 2048,
        "sliding_window": 10,  # less than a picture's tokens
        "final_logit_softcapping": 3.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 5,
        **TEXTS[kind],
        **changes,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "patch_size": PATCH,
        "position_embedding_size": 256,
        "use_clipped_linears": kind == "E2B",
        "standardize": kind == "31B",
    }
    ids = {"boi_token_id": start, "image_token_id": image, "eoi_token_id": stop}
    unused = {"video_token_id": 520, "audio_token_id": 521, "boa_token_id": 522, "eoa_token_index": 523}
    config = Gemma4Config(text_config=text, vision_config=vision, **ids, **unused)
    save_random_model(_random, config, tokenizer, folder, norms=(1, 3), attention=(0.2, 0.5))
    Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=TOKENS).save_pretrained(folder)
    return folder


def _random(config: Gemma4Config) -> Gemma4ForConditionalGeneration:
    """A model whose buffers change what it computes."""
    model = Gemma4ForConditionalGeneration(config)
    limits = {"input_min": -2.0, "input_max": 2.5, "output_min": -3.0, "output_max": 3.5}
    for name, buffer in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf in limits:
            buffer.fill_(limits[leaf])
        elif leaf in ("layer_scalar", "std_scale", "std_bias"):
            torch.nn.init.uniform_(buffer, 0.5, 0.9)
    return model


class TestE2B(FamilyChecks):
    linears = {"visual": 2 * 7, "merger": 1, "language": 2 * 9 + 2 * 7}  # noqa: RUF012
    unrotated = 4  # every layer: queries and keys turn before their heads come forward

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "gemma4", "E2B")

    @pytest.mark.slow
    def test_graphs_round_activations_alike(self, experts: tuple[LoadedModel, Path]) -> None:
        """A code of a picture that rounds otherwise moves every later token of this model; a text has none."""
        made = opened(experts[1])
        assert token_errors(made, CASES["text only"]).max() < 1e-5
        errors = token_errors(made, CASES["several turns"])
        assert errors.min() < 1e-6
        assert errors.max() < 0.5

    def test_prompts_are_those_of_transformers(self, original: LoadedModel) -> None:
        """The combined class wants a processor of sounds and one of videos; what it writes needs three names."""
        tokenizer, image_processor = original.processor.tokenizer, original.processor.image_processor
        names = SimpleNamespace(boi_token=START, image_token=IMAGE, eoi_token=STOP)
        pictures = [open_image(picture) for picture in (SQUARE, WIDE)]
        wanted = image_processor(images=pictures, return_tensors="np")
        encoded = original.family.encode(original.processor, [Sample((SQUARE, WIDE), "what differs?")])
        for name in ("pixel_values", "image_position_ids"):
            assert np.array_equal(encoded.pixels[name], wanted[name])
        parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what differs?"}]
        turns = [{"role": "user", "content": parts}]
        before, between, after = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).split(
            IMAGE
        )
        replaced: Any = Gemma4Processor.replace_image_token
        first, second = (replaced(names, wanted, number) for number in (0, 1))
        prompt = f"{before}{first}{between}{second}{after}"
        assert encoded.input_ids[0].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def test_the_file_of_embeddings_holds_both_as_they_are_stored(self, made: Made, original: LoadedModel) -> None:
        header = check_safetensors(made.onnx / EMBEDDING)
        first, second = 96, 4 * 32
        assert header == {"embedding": ("BF16", (528, first + second))}
        manifest = made.engine.manifest
        rows = TokenEmbedding(made.onnx, 528, first, manifest.embeds_width)(np.arange(528))
        text = original.model.get_decoder()
        assert np.array_equal(rows[:, :first], text.embed_tokens.weight.detach().numpy())
        assert np.array_equal(rows[:, first:], text.embed_tokens_per_layer.weight.detach().numpy())

    def test_layers_that_read_the_cache_of_others_have_none(self, made: Made) -> None:
        shapes = {spec.name: spec.shape for spec in made.engine.manifest.cache if spec.name.endswith("key")}
        assert shapes == {
            "past_key_values.0.key": ("batch", 2, "capacity", 16),
            "past_key_values.1.key": ("batch", 2, "capacity", 32),
        }

    @pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
    def test_tensorrt_rtx_builds_the_language_graph(self, made: Made, tmp_path: Path) -> None:
        """Windows, bounded logits, two widths of heads, layers without a cache."""
        small = with_limits(made.engine.manifest, EngineLimits(batch=1, context=64, prompt=32))
        entry = with_capacity(small, 64).graphs["language"]
        model = open_graph(made.onnx, entry)
        lower_for_tensorrt(model, capacity=64)
        ir.save(model, tmp_path / "language.onnx", external_data="language.onnx.data")
        paths = (tmp_path / name for name in ("language.onnx", "language.engine", "facts.json"))
        facts = build_engine(EngineRequest("tensorrt_rtx", *paths, entry.profiles, ((8, 6),)))
        assert facts.size == (tmp_path / "language.engine").stat().st_size > 100_000


class Test31B(FamilyChecks):
    linears = {"visual": 2 * 7, "merger": 1, "language": 3 * 7 - 2}  # noqa: RUF012
    cases = ("square", "two pictures", "several turns", "batch")
    # as of E2B, whose pictures see each other no more than texts
    test_quant_experts_and_its_checkpoint = None  # type: ignore[assignment]
    test_graphs_round_activations_alike = None  # type: ignore[assignment]
    test_validation = None  # type: ignore[assignment]

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "gemma4", "31B")

    def test_pictures_are_numbered_in_the_mask(self, original: LoadedModel) -> None:
        encoded = original.family.encode(original.processor, CASES["two pictures"])
        mask = original.family.graph_mask(encoded)
        assert sorted(set(mask[encoded.image_mask].tolist())) == [2, 3]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"enable_moe_block": True}, "Gemma 4 with experts cannot be quantized"),
        ({"use_bidirectional_attention": "all"}, "lets a token see later ones"),
        ({"vocab_size_per_layer_input": 500}, "vocab_size_per_layer_input 500 is below vocab_size 528"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], problem: str) -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], **changes}
    config = Gemma4Config(text_config={"vocab_size": 528, **text}, vision_config={})
    with pytest.raises(ModelError, match=problem):
        Gemma4(config)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("num_kv_shared_layers", 3, "num_kv_shared_layers 3 leaves a kind of layers without keys and values"),
        ("per_layer_config", {"1": {"head_dim": 32}}, "layers of one kind differ in their heads"),
        ("per_layer_config", {"1": {"skip": ["mlp"]}}, "is wrong: Extra inputs are not permitted"),
        ("pad_token_id", 999, "pad_token_id 999 is outside the vocabulary of 528"),
    ],
)
def test_settings_that_do_not_fit(key: str, value: object, problem: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "E2B")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"][key] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_config(str(folder))
