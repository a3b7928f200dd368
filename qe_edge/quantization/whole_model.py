"""Training of all layers of a model together, on the original's predictions."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig

from qe_edge.calibration.sensitivity import predicts_tokens
from qe_edge.layers.linear import QELinear, QuantizedLinear
from qe_edge.layers.magnitudes import check_result
from qe_edge.methods.training import ModelTraining, TrainingOptions
from qe_edge.models.family import Block, Encoded
from qe_edge.models.groups import linear_groups, set_module
from qe_edge.models.loading import LoadedModel
from qe_edge.models.precision import make_float32, restore_dtypes
from qe_edge.numerics.schemes import Scheme
from qe_edge.quantization.walk import parameters_of
from qe_edge.recipes.recipe import Recipe
from qe_edge.reconstruction.trained_weights import TrainedWeight, soft_activation, train
from qe_edge.system.errors import ModelError, NumericalError, RecipeError
from qe_edge.system.progress import Progress

LARGEST = 1 << 30  # parameters of a model that is trained on a CPU, with a copy and two moments of each in float32
CERTAIN = 4  # tokens of a generated text that are the likeliest ones, before the others are drawn


class TrainedLinear(nn.Module):
    """A linear layer whose weight is being trained.

    Args:
        weight: Its weight.
        bias: `[out]` or None.
        bits: Of the activations.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid
        >>> from qe_edge.reconstruction.trained_weights import FreeWeight
        >>> layer = TrainedLinear(FreeWeight(torch.tensor([[0.6, 7.0]]), WeightGrid(4)), None, bits=0)
        >>> layer(torch.ones(1, 2)).tolist()
        [[8.0]]
    """

    def __init__(self, weight: TrainedWeight, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.trained = weight
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.bits = bits

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., in]`."""
        return functional.linear(soft_activation(x, self.bits), self.trained.decoded(), self.bias)


def train_model(
    loaded: LoadedModel,
    blocks: Sequence[Block],
    recipe: Recipe,
    batches: Sequence[Encoded],
    progress: Progress | None = None,
) -> dict[str, dict[str, QELinear]]:
    """The layers of a model's blocks, trained together; the model, which is all in memory, has them afterwards.

    Args:
        loaded: The model.
        blocks: Those that are quantized.
        recipe: The resolved recipe, with a method that trains a model.
        batches: Encoded calibration samples.
        progress: Where to report progress; all steps together count as the blocks' parameters.

    Returns:
        By the name of every block its layers by name.

    Raises:
        ModelError: If the model predicts no tokens, or is too large.
        RecipeError: If the recipe selects what the training does not reach.
        NumericalError: If the loss is not finite.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> loaded = load_model("demo")
        >>> batch = loaded.family.encode(loaded.processor, load_samples("demo", 2), answers=True)
        >>> blocks = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"]
        >>> recipe = make_recipe(method="dlqat", options={"steps": 1})
        >>> len(train_model(loaded, blocks, recipe, [batch])[blocks[0].name])
        7
    """
    method: Any = recipe.build_method()
    options = method.options
    _check(loaded, recipe, method)
    dtypes = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
    make_float32(loaded.model.modules())
    share = sum(parameters_of(block) for block in blocks) // options.steps  # before layers are exchanged
    loaded.model.requires_grad_(requires_grad=False)
    teacher = copy.deepcopy(loaded.model)
    if options.data == "generated":
        batches = written_texts(loaded, options.generated, options.length, options.batch, recipe.seed)
    names = {block.name: [name for group in linear_groups(block, ()) for name in group.names] for block in blocks}
    layers = {
        name: _put_trained(loaded.model, name, method, recipe.get_scheme(), recipe.seed)
        for part in names.values()
        for name in part
    }

    def report(step: int) -> None:
        if progress:
            progress.advance(share, f"training, step {step + 1} of {options.steps}")

    _train(loaded, teacher, layers.values(), batches, options, recipe.seed, report)
    finished = {block: {name: _finished(loaded.model, name) for name in part} for block, part in names.items()}
    restore_dtypes(loaded.model, dtypes)
    return finished


def written_texts(loaded: LoadedModel, count: int, length: int, batch: int, seed: int) -> list[Encoded]:
    """Texts that a model writes itself, `batch` at a time.

    Every text begins with a token drawn at random, goes on with the likeliest ones, and then with drawn ones.

    Args:
        loaded: The model, in memory.
        count: Number of texts.
        length: Tokens of each.
        batch: Texts of a batch.
        seed: Of everything that is drawn.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> batches = written_texts(load_model("demo"), count=3, length=12, batch=2, seed=0)
        >>> [encoded.input_ids.shape for encoded in batches]
        [(2, 12), (1, 12)]
    """
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    words = np.setdiff1d(np.arange(len(tokenizer)), special)
    first = np.random.default_rng(seed).choice(words, count)
    generate: Any = loaded.model.generate
    found = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, count, batch):
            ids = torch.from_numpy(first[start : start + batch]).unsqueeze(1)
            for drawn, end in ((False, 1 + CERTAIN), (True, length)):
                wanted = GenerationConfig(
                    do_sample=drawn,
                    top_k=0 if drawn else None,
                    max_new_tokens=end - ids.shape[1],
                    suppress_tokens=special,
                    pad_token_id=0,
                )
                ids = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=wanted)
            array = ids.numpy()
            none = np.zeros(array.shape, bool)
            found.append(Encoded(array, np.ones_like(array), none, none))
    return found


def _put_trained(model: nn.Module, name: str, method: ModelTraining[Any], scheme: Scheme, seed: int) -> TrainedLinear:
    linear = model.get_submodule(name)
    own = (seed + zlib.crc32(name.encode())) % 2**31
    weight = method.trainable(linear.get_parameter("weight").detach().float(), scheme, own)
    layer = TrainedLinear(weight, getattr(linear, "bias", None), scheme.activation_bits)
    set_module(model, name, layer)
    return layer


def _train(
    loaded: LoadedModel,
    teacher: nn.Module,
    layers: Iterable[nn.Module],
    batches: Sequence[Encoded],
    options: TrainingOptions,
    seed: int,
    report: Callable[[int], None],
) -> None:
    """Train layers of a model on what the original, `teacher`, predicts."""
    order = np.random.default_rng(seed).permutation(options.steps) % len(batches)

    def loss(step: int) -> Tensor:
        value = _distance(loaded, teacher, batches[order[step]])
        if not bool(torch.isfinite(value)):
            raise NumericalError(
                f"The training's loss is not finite in step {step + 1}.", "Choose a smaller option 'rate'."
            )
        report(step)
        return value

    train((moved for layer in layers for moved in layer.parameters()), loss, options.steps, options.rate)


def _finished(model: nn.Module, name: str) -> QELinear:
    """The layer as it is stored, which the model has from now on."""
    trained = model.get_submodule(name)
    if not isinstance(trained, TrainedLinear):
        raise TypeError(f"'{name}' is not being trained")
    result = QuantizedLinear(trained.trained.stored(), trained.bits)
    check_result(name, result)
    layer = QELinear(result, trained.bias)
    set_module(model, name, layer)
    return layer


def _distance(loaded: LoadedModel, teacher: nn.Module, encoded: Encoded) -> Tensor:
    """Cross-entropy with the original's predictions, mean over text tokens."""
    inputs = loaded.family.torch_inputs(encoded)
    counted = torch.from_numpy(encoded.attention_mask.astype(bool) & ~encoded.image_mask)
    with torch.no_grad():
        wanted = teacher(**inputs, use_cache=False).logits[counted].float().softmax(-1)
    found = loaded.model(**inputs, use_cache=False).logits[counted].float().log_softmax(-1)
    distance: Tensor = -(wanted * found).sum(-1).mean()
    return distance


def _check(loaded: LoadedModel, recipe: Recipe, method: ModelTraining[Any]) -> None:
    """Refuse what cannot be trained."""
    if not predicts_tokens(loaded):
        raise ModelError(
            "This model predicts no tokens, so there are no predictions to train on.",
            "Choose a method without training.",
        )
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    if size > LARGEST:
        raise ModelError(
            f"'{recipe.method}' trains the whole model on the CPU, and {size:.2g} parameters take too long.",
            "Choose a method that works layer by layer, for example lsq or loaq.",
        )
    if recipe.head_grid is not None:
        raise RecipeError(f"The method '{recipe.method}' does not round the head.", "Leave --head out.")
    if method.options.data == "generated" and set(recipe.modules) != {"language"}:
        raise RecipeError(
            "Text that the model writes itself reaches the language model alone.",
            "Leave --modules out, or train on the calibration samples: --set data=calibration.",
        )
