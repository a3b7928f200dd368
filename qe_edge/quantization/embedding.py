"""The token embedding in 8 bits. In a small model with a large vocabulary it is most of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.models.exactness import note_own_head
from qe_edge.models.groups import set_module
from qe_edge.models.loading import LoadedModel
from qe_edge.system.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.recipes.recipe import Recipe

REMEDY = "Leave --embedding out."


def embedding_of(model: PreTrainedModel, recipe: Recipe) -> tuple[str, nn.Embedding]:
    """Dotted name and module of a model's token embedding, which a recipe rounds.

    Args:
        model: The model; weights are not read.
        recipe: The recipe; its head decides whether a matrix that is head and embedding may be rounded.

    Raises:
        RecipeError: If there is none, or the head is the same matrix and stays as it is.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> name, embedding = embedding_of(load_model("demo").model, make_recipe(head="int4", embedding="int8"))
        >>> name, embedding.embedding_dim
        ('model.language_model.embed_tokens', 256)
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or head is None:
        raise RecipeError("The model has no token embedding that could be quantized.", REMEDY)
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise RecipeError(
            "The model has a second embedding, whose rows lie beside the first one's in one file and of one type.",
            REMEDY,
        )
    if recipe.head_grid is None and getattr(head, "weight", None) is embedding.weight:
        raise RecipeError(
            "The model's head is the same matrix as its embedding. With a head in full precision, an embedding in INT8 "
            "would be one more matrix.",
            f"Add --head int4. Or: {REMEDY}",
        )
    return next(name for name, module in model.named_modules() if module is embedding), embedding


def quantize_embedding(loaded: LoadedModel, recipe: Recipe) -> None:
    """Replace the token embedding by rows of INT8 codes, in place. The head is replaced before, if at all.

    Args:
        loaded: The model.
        recipe: The recipe.

    Raises:
        RecipeError: As `embedding_of`.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> loaded = load_model("demo")
        >>> quantize_embedding(loaded, make_recipe(head="int4", embedding="int8"))
        >>> loaded.model.get_input_embeddings()
        QuantizedEmbedding(512, 256, bits=8)
    """
    name, embedding = embedding_of(loaded.model, recipe)
    with loaded.stored.held(name, embedding):
        rounded = QuantizedEmbedding.of(embedding)
    set_module(loaded.model, name, rounded)
    note_own_head(loaded.model, loaded.family)
