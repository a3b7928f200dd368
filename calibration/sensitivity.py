"""Gradients of the loss at the outputs of linear layers: the cost of an error there, by modality.

There is one backward pass per calibration batch. Blocks run in float32 one at a time: each is read if it is on disk,
converted, run and put back, and once more when the gradient comes back to it. Memory holds the parts of the model that
are not on disk, one block in float32 with its activations, and the hidden states between the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from qe_edge.calibration.recompute import BlockWeights, recomputed
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.models.family import Encoded
from qe_edge.models.loading import LoadedModel
from qe_edge.models.precision import in_float32
from qe_edge.models.streaming import patched
from qe_edge.models.tables import head_in_parts, read_by_rows, tables_of
from qe_edge.system.device import CPU, to_device
from qe_edge.system.errors import ArtifactError, CalibrationError, ModelError, NumericalError
from qe_edge.system.progress import Progress, Silent, track

IMAGE, ANSWER = 1, 2  # kinds of tokens besides 0, any other
LossKind = Literal["answers", "predictions"]


@dataclass(frozen=True)
class Sensitivity:
    """Gradients of the loss L at one linear layer's output y, over valid calibration tokens.

    L is summed over samples and over the tokens of their reference answers, or over all text tokens of a sample without
    an answer. It is the cross-entropy ("answers"), or stands for the divergence from the model itself ("predictions",
    see `fisher_factor`). For a vision encoder it stands for the squared distance of its features, each of length 1: of
    the class token if there is one, and the mean over the patches.

    Attributes:
        vision: Mean of |dL/dy| over image tokens and outputs (MBQ); 0 without such tokens.
        answer: The same over tokens of the reference answers; 0 at layers that see none, as in the vision encoder.
        energy: Sum over tokens of (dL/dy)^2, per sample and output: (tokens / samples) * mean(channels). It makes
            layers comparable that see different numbers of tokens. Multiplied with an error (mean square per token,
            summed over outputs) it gives twice the loss per sample that the error costs to second order, if errors and
            gradients of different tokens and outputs are uncorrelated.
        channels: `[out]` float32, mean of (dL/dy)^2 over tokens: the diagonal Fisher information of the outputs.
        tokens: Number of tokens that were averaged over.
        token_energy: `[tokens]` float32, sum of (dL/dy)^2 over outputs of every token, in the order of the batches.
    """

    vision: float
    answer: float
    energy: float
    channels: np.ndarray
    tokens: int
    token_energy: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def predicts_tokens(loaded: LoadedModel) -> bool:
    """Whether a model predicts tokens; a lone vision encoder does not.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> predicts_tokens(load_model("demo"))
        True
    """
    return loaded.model.get_output_embeddings() is not None


def output_gradients(
    loaded: LoadedModel,
    batches: Sequence[Encoded],
    names: Sequence[str],
    progress: Progress | None = None,
    *,
    loss: LossKind = "answers",
    seed: int = 0,
    device: torch.device = CPU,
) -> dict[str, Sensitivity]:
    """Sensitivities of the linear layers `names` on calibration batches; the model is left as it was.

    All tokens of the vision encoder and of the merger count as image tokens.

    Args:
        loaded: The model, in any precision; computed in float32.
        batches: Encoded with answers.
        names: Dotted names of linear layers inside the family's blocks.
        progress: Where to report progress.
        loss: The loss of the reference answers, or of the model's own predictions.
        seed: Seed of the random numbers that "predictions" need.
        device: Where the model runs: what is outside its blocks as a whole, and each block when its turn comes.

    Raises:
        ModelError: If the loss is of answers and the model predicts no tokens, or a name is no linear layer of a block.
        CalibrationError: If no sample has a token to predict.
        NumericalError: If gradients are not finite, or a layer got none.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.models.loading import load_model
        >>> loaded, name = load_model("demo"), "model.language_model.layers.0.mlp.down_proj"
        >>> batch = loaded.family.encode(loaded.processor, load_samples("demo", 2), answers=True)
        >>> output_gradients(loaded, [batch], [name])[name].channels.shape
        (256,)
    """
    if loss == "answers" and not predicts_tokens(loaded):
        raise ModelError(
            "This model predicts no tokens, so there is no loss to take gradients of.",
            "Choose a method without gradients, for example qe, aser or gptq.",
        )
    meters = {name: _Meter(in_language) for name, in_language in _linears_of_blocks(loaded, names).items()}
    samples = sum(len(encoded.input_ids) for encoded in batches)
    with (
        _measuring(loaded, meters, device),
        track(progress or Silent(), "Measuring gradients", len(batches)) as tracked,
    ):
        for number, encoded in enumerate(batches):
            for meter in meters.values():
                meter.begin(encoded)
            generator = torch.Generator(device).manual_seed(seed + number) if loss == "predictions" else None
            value = _loss(loaded, encoded, generator, device)
            if value is not None:
                _check_finite(value, batches, number)
                if value.requires_grad:  # a batch without pictures does not reach the vision encoder
                    torch.autograd.backward(value)
            tracked.advance(1, "gradients")
    if all(meter.tokens == 0 for meter in meters.values()):
        raise CalibrationError("No calibration sample has a token to predict.", "Use samples with text and answers.")
    return {name: meter.finish(name, samples) for name, meter in meters.items()}


def _check_finite(loss: Tensor, batches: Sequence[Encoded], number: int) -> None:
    """Refuse a loss of batch `number` that is NaN or infinite.

    Raises:
        NumericalError: Naming the samples of the batch.
    """
    if bool(torch.isfinite(loss)):
        return
    first = sum(len(one.input_ids) for one in batches[:number]) + 1
    last = first + len(batches[number].input_ids) - 1
    raise NumericalError(
        f"The loss on calibration samples {first} to {last} is NaN or infinite.",
        "Check the model in its original precision and these samples.",
    )


def labels_of(encoded: Encoded) -> np.ndarray:
    """Tokens of the loss, bool `[batch, sequence]`: the answer, or without one all text but the first token.

    Example:
        >>> ids, valid = np.array([[5, 9, 7, 8]]), np.ones((1, 4), np.int64)
        >>> image, answer = np.array([[0, 1, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> labels_of(Encoded(ids, valid, image, answer))
        array([[False, False, False,  True]])
    """
    valid = encoded.attention_mask.astype(bool)
    text = valid & ~encoded.image_mask
    answered = encoded.answer_mask.any(1, keepdims=True)
    labels: np.ndarray = np.where(answered, encoded.answer_mask, text)
    labels[:, 0] = False
    labels[:, 1:] &= valid[:, :-1]  # the first token has nothing that predicts it
    return labels


def token_kinds(encoded: Encoded) -> np.ndarray:
    """1 on image tokens, 2 on answer tokens, 0 elsewhere; int8 `[batch, sequence]`.

    Example:
        >>> ids, valid = np.array([[5, 9, 7, 8]]), np.ones((1, 4), np.int64)
        >>> image, answer = np.array([[0, 1, 0, 0]], bool), np.array([[0, 0, 0, 1]], bool)
        >>> token_kinds(Encoded(ids, valid, image, answer))
        array([[0, 1, 0, 2]], dtype=int8)
    """
    return np.where(encoded.image_mask, IMAGE, np.where(encoded.answer_mask, ANSWER, 0)).astype(np.int8)


def fisher_factor(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector v of every prediction p with E[v v^T] = diag(p) - p p^T, the Fisher matrix of its logits.

    To second order the divergence from p is half of `d^T (diag(p) - p p^T) d` for a change d of the logits. So the mean
    squares of the gradients of `v . logits` are the diagonal of the Gauss-Newton matrix. Reference answers play no
    part. The gradients of the cross-entropy would vanish on samples that the model answers well, and the few samples
    that it gets wrong would decide alone.

    Args:
        logits: `[n, vocabulary]`.
        generator: Generator of the random numbers, on the device of the logits.

    Returns:
        `[n, vocabulary]` float32.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]]).expand(100_000, 2)
        >>> factors = fisher_factor(logits, torch.Generator().manual_seed(0)).double()
        >>> (factors.T @ factors / len(factors)).round(decimals=2)  # diag(p) - p p^T for p = [0.5, 0.5]
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]], dtype=torch.float64)
    """
    likely = logits.detach().double().softmax(-1)
    drawn = torch.randn(likely.shape, dtype=torch.float64, device=likely.device, generator=generator) * likely.sqrt()
    return (drawn - likely * drawn.sum(-1, keepdim=True)).float()


def save_sensitivities(path: Path, found: dict[str, Sensitivity]) -> None:
    """Write sensitivities to a safetensors file.

    Example:
        >>> one = Sensitivity(vision=0.1, answer=0.4, energy=1.0, channels=np.ones(4, np.float32), tokens=9)
        >>> save_sensitivities(Path("gradients.safetensors"), {"layers.0.mlp": one})
        >>> list(load_sensitivities(Path("gradients.safetensors")))
        ['layers.0.mlp']
    """
    tensors = {f"{name}.channels": one.channels for name, one in found.items()}
    tensors |= {f"{name}.token_energy": one.token_energy for name, one in found.items()}
    for name, one in found.items():
        tensors[f"{name}.scalars"] = np.array([one.vision, one.answer, one.energy, one.tokens], np.float64)
    save_file(tensors, path)


def load_sensitivities(path: Path) -> dict[str, Sensitivity]:
    """Read a file of `save_sensitivities`.

    Raises:
        ArtifactError: If the file is damaged.

    Example:
        >>> one = Sensitivity(vision=0.1, answer=0.4, energy=1.0, channels=np.ones(4, np.float32), tokens=9)
        >>> save_sensitivities(Path("one.safetensors"), {"mlp": one})
        >>> load_sensitivities(Path("one.safetensors"))["mlp"].answer
        0.4
    """
    header = check_safetensors(path)
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in header}
    try:
        found = {}
        for name, values in tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind == "channels":
                vision, answer, energy, tokens = (float(value) for value in tensors[f"{layer}.scalars"])
                energies = tensors[f"{layer}.token_energy"]
                found[layer] = Sensitivity(vision, answer, energy, values, int(tokens), energies)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"'{path}' holds no sensitivities.", "Delete it and run again.") from error
    return found


class _Meter:
    """Sums over the gradients at one layer's output."""

    def __init__(self, in_language: bool) -> None:
        self.in_language = in_language
        self.tokens = 0
        self._squares: Tensor | None = None
        self._magnitude = dict.fromkeys((IMAGE, ANSWER), 0.0)
        self._count = dict.fromkeys((IMAGE, ANSWER), 0)
        self._valid: Tensor | None = None
        self._kinds: Tensor | None = None
        self._token_energy: list[Tensor] = []  # of every batch; zero where no gradient comes

    def begin(self, encoded: Encoded) -> None:
        """Set the masks of the next batch. Packed patches need none: all of them are image tokens."""
        if self.in_language:
            self._valid = torch.from_numpy(encoded.attention_mask).bool().reshape(-1)
            self._kinds = torch.from_numpy(token_kinds(encoded)).reshape(-1)
            self._token_energy.append(torch.zeros(int(self._valid.sum())))

    def add(self, gradient: Tensor) -> None:
        """Add the gradient `[..., out]` of one call."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        kinds = torch.full((len(rows),), IMAGE, dtype=torch.int8)
        if self._valid is not None and self._kinds is not None:
            rows, kinds = rows[self._valid.to(rows.device)], self._kinds[self._valid]
        square = rows.square()
        squares, energy = square.sum(0, dtype=torch.float64).cpu(), square.sum(1).cpu()
        if self.in_language:
            self._token_energy[-1] += energy
        else:
            self._token_energy.append(energy)
        self._squares = squares if self._squares is None else self._squares + squares
        self.tokens += len(rows)
        for kind in (IMAGE, ANSWER):
            chosen = rows[(kinds == kind).to(rows.device)]
            self._magnitude[kind] += float(chosen.abs().sum(dtype=torch.float64))
            self._count[kind] += chosen.numel()

    def finish(self, name: str, samples: int) -> Sensitivity:
        """The means."""
        if self._squares is None or not bool(torch.isfinite(self._squares).all()):
            what = "no gradient" if self._squares is None else "gradients that are NaN or infinite"
            raise NumericalError(
                f"The loss gives '{name}' {what}.",
                "Check the model in its original precision and the calibration data.",
            )
        channels = (self._squares / self.tokens).numpy()
        return Sensitivity(
            vision=self._magnitude[IMAGE] / max(self._count[IMAGE], 1),
            answer=self._magnitude[ANSWER] / max(self._count[ANSWER], 1),
            energy=float(channels.mean()) * self.tokens / samples,
            channels=channels.astype(np.float32),
            tokens=self.tokens,
            token_energy=torch.cat(self._token_energy).numpy(),
        )


def _linears_of_blocks(loaded: LoadedModel, names: Sequence[str]) -> dict[str, bool]:
    """For every name whether it lies in the language model.

    Raises:
        ModelError: If it is no linear layer of a block.
    """
    blocks = loaded.family.blocks(loaded.model)
    modules = dict(loaded.model.named_modules())
    found = {}
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block.name}.")), None)
        if block is None or not isinstance(modules.get(name), nn.Linear):
            raise ModelError(f"'{name}' is no linear layer of the model's blocks.", "Give names of linear layers.")
        found[name] = block.group == "language"
    return found


def _loss(
    loaded: LoadedModel, encoded: Encoded, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """The loss summed over the label tokens of a batch; with a generator the loss of predictions. None without any."""
    inputs = to_device(loaded.family.torch_inputs(encoded), device)
    if generator and not predicts_tokens(loaded):
        return _feature_loss(loaded, inputs, generator)
    labels = labels_of(encoded)
    if not labels.any():
        return None
    rows, columns = (torch.from_numpy(index) for index in np.nonzero(labels))
    length = labels.shape[1]
    keep = length - int(columns.min()) + 1  # logits from the position before the first label on
    logits = loaded.model(**inputs, use_cache=False, logits_to_keep=keep).logits
    predicted: Tensor = logits[rows, columns - 1 - (length - keep)].float()
    if generator:
        return (predicted * fisher_factor(predicted, generator)).sum()
    wanted = torch.from_numpy(encoded.input_ids)[rows, columns].to(predicted.device)
    return nn.functional.cross_entropy(predicted, wanted, reduction="sum")


def _feature_loss(loaded: LoadedModel, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """A random projection of an encoder's features: mean squares of its gradients are those of their distance."""
    states = loaded.model(**inputs).last_hidden_state.float()
    drawn = torch.randn(states.shape, device=states.device, generator=generator)
    first = int(loaded.family.class_token)
    drawn[:, first:] /= max(states.shape[1] - first, 1) ** 0.5
    return (nn.functional.normalize(states, dim=-1) * drawn).sum()


@contextmanager
def _measuring(loaded: LoadedModel, meters: dict[str, _Meter], device: torch.device) -> Iterator[None]:
    """Blocks run in float32 on a device and are run again for their gradients; the layers of `meters` report theirs."""
    blocks = loaded.family.blocks(loaded.model)
    wanted = {block.name for block in blocks if any(name.startswith(f"{block.name}.") for name in meters)}

    def hook(meter: _Meter) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def note(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(meter.add)  # type: ignore[no-untyped-call] # torch has no types here

        return note

    with ExitStack() as stack:
        parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in parameters])
        for parameter in parameters:
            parameter.requires_grad_(False)
        streamed = {id(module) for block in blocks for module in block.module.modules()}
        streamed.update(id(module) for module in tables_of(loaded.model).values())
        stack.enter_context(read_by_rows(loaded.model, loaded.stored))
        stack.enter_context(head_in_parts(loaded.model, loaded.stored))
        stack.enter_context(in_float32([m for m in loaded.model.modules() if id(m) not in streamed], device))
        modules = dict(loaded.model.named_modules())
        for name, meter in meters.items():
            stack.callback(modules[name].register_forward_hook(hook(meter)).remove)
        weights = BlockWeights(loaded, device)
        replaced = [(block.module, recomputed(weights, block, wanted=block.name in wanted)) for block in blocks]
        stack.enter_context(patched(replaced))
        stack.enter_context(torch.enable_grad())
        yield
