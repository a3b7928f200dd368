"""A report with every part filled in, made by hand."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from qe_edge.budget.accounting import BitCount, FileSize, LayerBits, ModelBits
from qe_edge.validate.energy import Energy
from qe_edge.validate.schema import (
    Accuracy,
    Answer,
    Artifact,
    Contender,
    Distance,
    EngineAgreement,
    EvaluationData,
    Example,
    Latency,
    LayerErrors,
    Machine,
    Report,
    RoutingLoad,
    StreamErrors,
    TargetState,
    Timing,
    TokenErrors,
)

VISION, TEXT = "model.visual.blocks.0.mlp.fc1", "model.layers.0.mlp.down_proj"


BITS = BitCount(weights=1000, codes=3000, scales=100, adapters=800, router=200, read=4600)
ENERGY = Energy(
    joules=1.25, above_idle=0.75, idle_watts=5.0, answers=4, samples=200, rails=["VDD_IN"], notices=["A rail went."]
)


def make_report() -> Report:
    return Report(
        qe_edge="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        model="some-model",
        model_type="qwen2_vl",
        recipe={"method": "qe", "scheme": "w3a16", "modules": ["language", "visual"], "preset": "default"},
        artifacts=[
            Artifact(stage="original", name="some-model", digest=None),
            Artifact(stage="checkpoint", name="checkpoint", digest="1" * 64),
        ],
        machine=Machine(system="Linux", processor="CPU", cores=2, memory_bytes=2**34, libraries={"torch": "2"}),
        evaluation=EvaluationData(source="demo", samples=100, kinds={"open": 50, "yesno": 50}, sha256="0" * 64),
        bits=make_bits(),
        sizes=[
            FileSize(stage="original", name="model.safetensors", size=6000),
            *(FileSize(stage="checkpoint", name=f"{number}.json", size=10 - number) for number in range(9)),
        ],
        layers=make_layers(),
        stream=[StreamErrors(name="model.visual.blocks.0", group="visual", heldout=make_layers()[0].heldout)],
        routing=[
            RoutingLoad(layers=[VISION], group="visual", all=[0.25, 0.75], vision=[0.25, 0.75], text=None),
            RoutingLoad(layers=[TEXT], group="language", all=[1.0, 0.0], vision=[1.0, 0.0], text=[0.5, 0.5]),
        ],
        contenders=make_contenders(),
        engine=EngineAgreement(same_answers=0.995, logits_error=3e-7),
        latency=make_latency(),
        targets=[
            TargetState(name="cpu", size=1000, validated=True),
            TargetState(name="rtx", size=2000, validated=False),
        ],
        examples=[make_example()],
        notes=["Something to know."],
    )


def make_bits() -> ModelBits:
    return ModelBits(
        layers=[LayerBits(name=VISION, group="visual", bits=BITS), LayerBits(name=TEXT, group="language", bits=BITS)],
        groups={"visual": BITS, "language": BITS},
        total=BITS,
        parameters=3000,
        model_bytes=2000,
    )


def make_layers() -> list[LayerErrors]:
    errors = TokenErrors(all=0.012, vision=0.02, text=0.01, tokens=100)
    seen = TokenErrors(all=0.003, vision=0.003, text=None, tokens=64)
    return [
        LayerErrors(name=VISION, group="visual", calibration=None, heldout=seen),
        LayerErrors(name=TEXT, group="language", calibration=errors, heldout=errors),
    ]


def make_contenders() -> list[Contender]:
    accuracy = Accuracy(correct={"open": 41, "yesno": 37}, total={"open": 50, "yesno": 50})
    blind = Accuracy(correct={"open": 11, "yesno": 33}, total={"open": 50, "yesno": 50})
    distance = Distance(kl=0.00123, top1=0.99, positions=200)
    return [
        Contender(
            role=role,
            runtime="PyTorch",
            accuracy=accuracy,
            shuffled=blind,
            answer_tokens=measured,
            text_tokens=measured,
            size=6000,
        )
        for role, measured in (("original", None), ("quantized", distance), ("engine", distance))
    ]


def make_latency() -> list[Latency]:
    timing = Timing(median=12.5, lower=11.0, upper=14.0, repeats=20, p90=15.5, p99=17.25)
    return [
        Latency(
            runtime=runtime,
            setting=setting,
            steps=dict.fromkeys(steps, timing),
            prompt_tokens=34,
            threads=2,
            peak_bytes=400_000_000,
            tokens_per_second=78.5,
            energy=energy,
        )
        for runtime, setting, steps, energy in (
            (
                "onnxruntime",
                "accuracy level 0",
                ("encode", "visual", "merger", "prefill", "first_token", "decode"),
                ENERGY,
            ),
            ("pytorch", "float32", ("first_token", "decode"), "The power rails went."),
        )
    ]


def make_example() -> Example:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, format="PNG")
    return Example(
        picture=base64.b64encode(data.getvalue()).decode(),
        question="what color is the shape?",
        reference="red",
        kind="open",
        answers=[
            Answer(role="original", text="red", correct=True),
            Answer(role="quantized", text="blue", correct=False),
        ],
    )


@pytest.fixture
def report() -> Report:
    return make_report()
