"""The results of a validation as data: the content of report.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qe_edge.budget.accounting import Amount, Count, FileSize, ModelBits
from qe_edge.validate.energy import NO_RAILS, Energy, Sentence

REPORT_VERSION: Literal[2] = 2

Split = Literal["calibration", "heldout"]
Role = Literal["original", "quantized", "engine"]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[list[Share], Field(max_length=1024)]  # of experts


class Part(BaseModel):
    """Base of every part of the report; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(Part):
    """The machine that the validation ran on.

    Attributes:
        system: Operating system and architecture.
        processor: Name of the CPU.
        cores: Logical cores.
        memory_bytes: Installed memory.
        libraries: Version of every library that matters.
    """

    system: str
    processor: str
    cores: Count
    memory_bytes: Count
    libraries: dict[str, str]


class EvaluationData(Part):
    """The held-out questions.

    Attributes:
        source: Name of the source.
        samples: Number of questions used.
        kinds: Number of questions of every kind ("open", "yesno", "" for unknown).
        sha256: Hash of the samples.
    """

    source: str
    samples: Count
    kinds: dict[str, Count]
    sha256: str


class TokenErrors(Part):
    """Relative output error `||y - y_hat||_F / ||y||_F`; None where there was no such token.

    Attributes:
        all: Error over all tokens.
        vision: Error over tokens that stand for picture patches.
        text: Error over text tokens.
        tokens: Number of tokens measured.
    """

    all: Amount | None
    vision: Amount | None
    text: Amount | None
    tokens: Count


class LayerErrors(Part):
    """Errors of one quantized layer on the input that the original layer gets.

    Attributes:
        name: Dotted name.
        group: "visual", "merger" or "language".
        calibration: Errors on the calibration samples; None if these could not be read again.
        heldout: Errors on the held-out samples.
    """

    name: str
    group: str
    calibration: TokenErrors | None
    heldout: TokenErrors


class StreamErrors(Part):
    """Errors of the hidden states that leave a block when the whole quantized model runs on its own stream.

    Attributes:
        name: Dotted name of the block.
        group: "visual", "merger" or "language".
        heldout: Errors on the held-out samples.
    """

    name: str
    group: str
    heldout: TokenErrors


class RoutingLoad(Part):
    """Share of held-out tokens that each routed expert serves.

    Attributes:
        layers: The layer, or the siblings that share one router.
        group: "visual", "merger" or "language".
        all: Share of every expert, over all tokens; sums to one.
        vision: Shares over picture tokens, or None.
        text: Shares over text tokens, or None.
    """

    layers: Annotated[list[str], Field(min_length=1)]
    group: str
    all: Annotated[Shares, Field(min_length=1)]
    vision: Shares | None
    text: Shares | None


class Accuracy(Part):
    """Exact answers by greedy generation.

    Attributes:
        correct: Right answers of every kind of question.
        total: Questions of every kind.
    """

    correct: dict[str, Count]
    total: dict[str, Count]

    @model_validator(mode="after")
    def _check(self) -> Accuracy:
        if any(right > self.total.get(kind, 0) for kind, right in self.correct.items()):
            raise ValueError("more answers are right than there are questions")
        return self

    def share(self, kind: str | None = None) -> float | None:
        """Accuracy on one kind of question, or on all; None if there is no such question."""
        kinds = self.total if kind is None else [kind]
        total = sum(self.total.get(name, 0) for name in kinds)
        return sum(self.correct.get(name, 0) for name in kinds) / total if total else None


class Distance(Part):
    """Teacher-forced distance of predicted distributions from the original model's.

    Attributes:
        kl: Mean KL(original || this) in nats per position.
        top1: Share of positions with the same most likely token.
        positions: Number of positions.
    """

    kl: float | None
    top1: Share | None
    positions: Count


class Contender(Part):
    """One of the models that are compared.

    Attributes:
        role: "original", "quantized" (PyTorch) or "engine".
        runtime: Name of its runtime, for example "PyTorch, float32".
        accuracy: Accuracy on the held-out questions.
        shuffled: Accuracy on the same questions with exchanged pictures; None if not measured.
        answer_tokens: Distance on the tokens of the reference answers; None for the original.
        text_tokens: Distance on all text tokens; None for the original.
        size: Bytes of the files of its folder, or None for a model from the hub.
    """

    role: Role
    runtime: str
    accuracy: Accuracy
    shuffled: Accuracy | None
    answer_tokens: Distance | None
    text_tokens: Distance | None
    size: Count | None


class EngineAgreement(Part):
    """The engine against the quantized PyTorch model.

    Attributes:
        same_answers: Share of questions with the same greedy answer.
        logits_error: Relative error of the logits `||l_e - l_q||_F / ||l_q||_F`.
    """

    same_answers: Share
    logits_error: Amount


class Timing(Part):
    """Milliseconds over several repeats.

    Attributes:
        median: Median.
        lower: First quartile.
        upper: Third quartile.
        repeats: Number of measurements.
        p90: 90th percentile; None in earlier reports.
        p99: 99th percentile; None in earlier reports.
    """

    median: Amount
    lower: Amount
    upper: Amount
    repeats: Count
    p90: Amount | None = None
    p99: Amount | None = None


class Latency(Part):
    """Speed, memory and energy of one runtime on one question at a time.

    Attributes:
        runtime: "onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx" or "pytorch".
        setting: Distinguishes runs of the same runtime, for example "accuracy level 4".
        steps: Timings by step: encode (pictures prepared, prompt tokenized), visual, merger, prefill, first_token (all
            of these), decode (from one token to the next).
        prompt_tokens: Length of the prompt, picture included.
        threads: Threads used.
        peak_bytes: Peak resident memory of the process that ran nothing else.
        tokens_per_second: Tokens after the first, by the mean of their times; None in earlier reports.
        energy: Energy of an answer, or why there is none, which is "no power rails" on most machines; None in earlier
            reports.
    """

    runtime: str
    setting: str
    steps: dict[str, Timing]
    prompt_tokens: Count
    threads: Count
    peak_bytes: Count
    tokens_per_second: Amount | None = None
    energy: Energy | Sentence | None = None

    @model_validator(mode="after")
    def _check(self) -> Latency:
        missing = sorted({"first_token", "decode"} - self.steps.keys())
        if missing:
            raise ValueError(f"the step '{missing[0]}' is missing")
        return self

    @property
    def measured_energy(self) -> Energy | None:
        """The energy, where it was measured."""
        return self.energy if isinstance(self.energy, Energy) else None

    @property
    def energy_problem(self) -> str:
        """Why a board with power rails has no energy, else ""."""
        return self.energy if isinstance(self.energy, str) and self.energy != NO_RAILS else ""


class Answer(Part):
    """The answer of one model.

    Attributes:
        role: The model.
        text: Its answer.
        correct: Whether it is the reference answer.
    """

    role: Role
    text: str
    correct: bool


class Example(Part):
    """A held-out question with its answers.

    Attributes:
        picture: PNG in base64, or None for a text-only question.
        question: The question.
        reference: The reference answer.
        kind: "open", "yesno" or "".
        answers: Answers of all models.
    """

    picture: str | None
    question: str
    reference: str
    kind: str
    answers: list[Answer]


class TargetState(Part):
    """A build target whose files exist.

    Attributes:
        name: Name in the target table.
        size: Bytes of its files.
        validated: Whether this report's engine rows ran on it.
        plugin_nodes: How many nodes of its engines the TensorRT plugin runs.
    """

    name: str
    size: Count
    validated: bool
    plugin_nodes: Count = 0


class Artifact(Part):
    """A folder that was measured.

    Attributes:
        stage: The stage of the pipeline that wrote it.
        name: Its name without the folders above it; for the original, its name in the report.
        digest: SHA-256 of its description, which has the hashes of its files; None where the original has none.
    """

    stage: Literal["original", "checkpoint", "onnx", "engines"]
    name: str
    digest: str | None


class Report(Part):
    """Everything that `validate` found.

    Attributes:
        version: Version of this format.
        qe_edge: Version of QE-Edge that made it.
        created: UTC time, ISO 8601.
        model: Name of the original model as given.
        model_type: Its model type, for example "qwen2_vl".
        recipe: The resolved recipe of the checkpoint.
        artifacts: The folders that were measured, by their digests.
        machine: The machine that this ran on.
        evaluation: The held-out data.
        bits: Bits per weight.
        sizes: Files of every stage.
        layers: Errors of every quantized layer.
        stream: Error of the hidden states along the model.
        routing: Load of the routed experts.
        contenders: Accuracy and distance, original first.
        engine: Engine against PyTorch, or None if there is no engine.
        latency: Speed of the engine, in ONNX Runtime at every accuracy level.
        targets: The targets that were built.
        examples: Some questions with all answers.
        notes: Gaps of this report.
    """

    version: Literal[2] = REPORT_VERSION
    qe_edge: str
    created: str
    model: str
    model_type: str
    recipe: dict[str, Any]
    artifacts: list[Artifact]
    machine: Machine
    evaluation: EvaluationData
    bits: ModelBits
    sizes: list[FileSize]
    layers: list[LayerErrors]
    stream: list[StreamErrors]
    routing: list[RoutingLoad]
    contenders: list[Contender]
    engine: EngineAgreement | None
    latency: Annotated[list[Latency], Field(max_length=64)]
    targets: list[TargetState]
    examples: list[Example]
    notes: list[str]

    @model_validator(mode="after")
    def _check(self) -> Report:
        modules = self.recipe.get("modules")
        names = [self.recipe.get("method"), self.recipe.get("scheme"), *(modules if isinstance(modules, list) else [0])]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("the recipe has no method, scheme and modules")
        roles = [row.role for row in self.contenders]
        if roles[:2] != ["original", "quantized"] or len(roles) != len(set(roles)):
            raise ValueError("the contenders are not the original, the quantized model and an engine")
        if any(not layer.bits.weights for layer in self.bits.layers):
            raise ValueError("a quantized layer has no weights")
        return self

    def contender(self, role: Role) -> Contender | None:
        """The row of one model."""
        return next((row for row in self.contenders if row.role == role), None)
