r"""The three real models behind one interface: what each is calibrated on, and what is measured of it.

    python benchmarks/assemble_real_models.py smollm2 out/smollm2
    python benchmarks/assemble_real_models.py dinov2 out/dinov2
    python benchmarks/assemble_real_vlm.py out/vlm
    python benchmarks/real_models.py out --schemes w4a8 [--models smollm2 vlm dinov2] [--methods rtn qe]

`REAL_MODELS[name](folder)` makes a `RealModel`, whose `measure` compares a quantized model with the original in
float32. The original runs once, when the object is made; its outputs are kept.

| model | modules | measures |
| --- | --- | --- |
| smollm2 | language | `kl` in nats per token and `perplexity` on Wikipedia; `kl_news`, `perplexity_news` |
| vlm | language | `kl` in nats per answer token; `open`, `yesno`: share of questions answered rightly |
| dinov2 | visual | `cosine_loss`: 1 - mean of `cosine_cls` and `cosine_patches`; `probe`: mean of `probe_shape` and \
`probe_color`, the shares that a linear probe, trained on the original's features, reads rightly |
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qe_edge.budget.accounting import count_bits
from qe_edge.calibration.sources import load_evaluation, load_samples
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import CalibrationError, QEError
from qe_edge.validate.answers import batches
from qe_edge.validate.features import Features, LinearProbe, extract_features, mean_cosine
from qe_edge.validate.subjects import block_groups, in_float32
from qe_edge.validate.text import exact_answers, mean_kl, median_kl, perplexity, predict, sample_kl, text_windows

CALIBRATION = 128  # samples
QUESTIONS = 200  # questions of the vision-language model, two a picture of the encoder
WIKI_WINDOWS, NEWS_WINDOWS = 8, 4  # of 256 tokens
LABELS = ("shape", "color")
Measures = dict[str, float]
Losses = list[float]


@dataclass(frozen=True)
class RealModel:
    """A model with real weights, its calibration data and its measures.

    Attributes:
        name: Key in `REAL_MODELS`.
        folder: Folder of the original, as `quantize` takes it.
        modules: What is quantized.
        calibration: Calibration samples.
        original: The original's own values of the measures that are not comparisons.
        compare: Measures of a quantized model in float32, and its loss on every sample.
    """

    name: str
    folder: str
    modules: tuple[str, ...]
    calibration: list[Sample]
    original: Measures
    compare: Callable[[LoadedModel], tuple[Measures, Losses]] = field(repr=False)

    def measure(self, quantized: LoadedModel) -> Measures:
        """Measures of a quantized model by name; it computes in float32 from then on.

        Divergences and losses are 0 for the original itself; units are in the table above.
        """
        return self.judge(quantized)[0]

    def judge(self, quantized: LoadedModel) -> tuple[Measures, Losses]:
        """Measures by name, and the loss (`kl` or `cosine_loss`) on every window of Wikipedia, question or picture."""
        return self.compare(in_float32(quantized))


def smollm2(
    folder: Path,
    samples: int = CALIBRATION,
    questions: int = QUESTIONS,  # noqa: ARG001
    seed: int = 0,
) -> RealModel:
    """SmolLM2-135M-Instruct on running text; `questions` is not used."""
    loaded = in_float32(load_model(str(folder)))

    def windows(name: str, limit: int) -> list[Encoded]:
        texts = [sample.question for sample in load_samples(str(_data(folder, name)))]
        return text_windows(loaded.processor.tokenizer, texts, limit=limit)

    parts = {"": windows("evaluation", WIKI_WINDOWS), "_news": windows("news", NEWS_WINDOWS)}
    known = {suffix: predict(loaded, part, "text") for suffix, part in parts.items()}

    def compare(quantized: LoadedModel) -> tuple[Measures, Losses]:
        found = {suffix: predict(quantized, part, "text") for suffix, part in parts.items()}
        measures = {}
        for suffix, predicted in found.items():
            measures[f"kl{suffix}"] = mean_kl(known[suffix], predicted)
            measures[f"perplexity{suffix}"] = perplexity(predicted)
        return measures, sample_kl(known[""], found[""]).tolist()

    original = {f"perplexity{suffix}": perplexity(predicted) for suffix, predicted in known.items()}
    return RealModel("smollm2", str(folder), ("language",), _calibration(folder, samples, seed), original, compare)


def vlm(folder: Path, samples: int = CALIBRATION, questions: int = QUESTIONS, seed: int = 0) -> RealModel:
    """The assembled InternVL of 157 M parameters on held-out questions."""
    loaded = in_float32(load_model(str(folder)))
    asked = load_evaluation(str(_data(folder, "evaluation")))[:questions]
    encoded = [loaded.family.encode(loaded.processor, part, answers=True) for part in batches(asked)]
    known = predict(loaded, encoded, "answer")

    def compare(quantized: LoadedModel) -> tuple[Measures, Losses]:
        found = predict(quantized, encoded, "answer")
        divergences = {"kl": mean_kl(known, found), "kl_median": median_kl(known, found)}
        shares = _shares(asked, exact_answers(found, len(asked)))
        return {**divergences, **shares}, sample_kl(known, found).tolist()

    original = _shares(asked, exact_answers(known, len(asked)))
    return RealModel("vlm", str(folder), ("language",), _calibration(folder, samples, seed), original, compare)


def dinov2(folder: Path, samples: int = CALIBRATION, questions: int = QUESTIONS, seed: int = 0) -> RealModel:
    """DINOv2 ViT-S/14 on pictures: the probe answers `questions` about half as many, the cosine is of others."""
    pictures = max(questions // len(LABELS), 1)
    loaded = in_float32(load_model(str(folder)))
    seen = load_samples(str(_data(folder, "evaluation")), pictures)
    wanted = extract_features(loaded, seen)
    training, training_labels = _labelled(folder, "probe_train")
    tested, labels = _labelled(folder, "probe_test", pictures)
    probe = LinearProbe(extract_features(loaded, training), training_labels)

    def read(model: LoadedModel) -> Measures:
        shares = probe.accuracy(extract_features(model, tested), labels)
        single = {f"probe_{name}": share for name, share in shares.items()}
        return {"probe": sum(shares.values()) / len(shares), **single}

    def compare(quantized: LoadedModel) -> tuple[Measures, Losses]:
        found = extract_features(quantized, seen)
        cosines = mean_cosine(wanted, found)
        measures = {"cosine_loss": 1 - sum(cosines.values()) / len(cosines), **cosines, **read(quantized)}
        return measures, _picture_losses(wanted, found)

    return RealModel("dinov2", str(folder), ("visual",), _calibration(folder, samples, seed), read(loaded), compare)


REAL_MODELS: dict[str, Callable[..., RealModel]] = {"smollm2": smollm2, "vlm": vlm, "dinov2": dinov2}
"""Called with the assembled folder, perhaps numbers of calibration samples and questions, and the seed of the draw."""


def _data(folder: Path, name: str) -> Path:
    path = folder / "data" / f"{name}.jsonl"
    if not path.is_file():
        raise CalibrationError(
            f"There is no '{path}'.", "Make the folder with assemble_real_models.py or assemble_real_vlm.py."
        )
    return path


def _calibration(folder: Path, samples: int, seed: int) -> list[Sample]:
    return load_samples(str(_data(folder, "calibration")), samples, seed)


def _picture_losses(wanted: Features, found: Features) -> Losses:
    """1 - cosine of every picture, the mean of class token and patches."""
    pairs = [
        mean_cosine(*(Features(side.picture[row : row + 1], side.patches[row : row + 1]) for side in (wanted, found)))
        for row in range(len(wanted.picture))
    ]
    return [1 - sum(pair.values()) / len(pair) for pair in pairs]


def _shares(asked: Sequence[Sample], right: Sequence[bool]) -> Measures:
    """Share of right answers by kind of question."""
    kinds = {sample.kind for sample in asked}
    chosen = {
        kind: [bool(found) for sample, found in zip(asked, right, strict=True) if sample.kind == kind] for kind in kinds
    }
    return {kind: sum(found) / len(found) for kind, found in sorted(chosen.items())}


def _labelled(folder: Path, name: str, limit: int | None = None) -> tuple[list[Sample], dict[str, list[str]]]:
    """Pictures, each once, and the labels of all of them."""
    lines = load_evaluation(str(_data(folder, name)))
    known = {label: {line.image: line.answer or "" for line in lines if line.question == label} for label in LABELS}
    pictures = list(known[LABELS[0]])[:limit]
    labels = {label: [answers[picture] for picture in pictures] for label, answers in known.items()}
    return [Sample(picture, "") for picture in pictures], labels


def main() -> int:
    """Quantize and measure, one row a model, method and scheme; a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the assembled models lie, under their names")
    parser.add_argument("--models", nargs="+", choices=list(REAL_MODELS), default=list(REAL_MODELS))
    parser.add_argument("--methods", nargs="+", default=["rtn"])
    parser.add_argument("--schemes", nargs="+", default=["w4a8"])
    parser.add_argument("--samples", type=int, default=CALIBRATION, help="calibration samples (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="default: %(default)s")
    options = parser.parse_args()
    rows = []
    try:
        for name in options.models:
            real = REAL_MODELS[name](options.folder / name, options.samples, options.questions)
            rows.append({"model": name, "row": "original", **real.original})
            show(rows[-1])
            for scheme in options.schemes:
                for method in options.methods:
                    rows.append(_row(real, method, scheme))
                    show(rows[-1])
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"script": "real_models", "rows": rows}))
    return 0


def _row(real: RealModel, method: str, scheme: str) -> dict[str, str | float]:
    recipe = make_recipe(method=method, scheme=scheme, modules=real.modules)
    started = time.perf_counter()
    quantized, _ = quantize(real.folder, recipe, real.calibration)
    quantizing = time.perf_counter() - started
    bits = count_bits(quantized.model, block_groups(quantized)).total
    measures = real.measure(quantized)
    return {
        "model": real.name,
        "row": f"{method} {scheme}",
        "stored": bits.stored_bits,
        "read": bits.read_bits,
        **measures,
        "quantizing_s": quantizing,
        "measuring_s": time.perf_counter() - started - quantizing,
    }


def show(row: dict[str, str | float]) -> None:
    """One line of the table."""
    cells = [f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()]
    print("  ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
