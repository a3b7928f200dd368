"""The recipe: every choice that determines a quantized checkpoint, validated before any work starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qe_edge.budget.model import Budget
from qe_edge.methods import METHODS, Method
from qe_edge.numerics.grids import WeightGrid
from qe_edge.numerics.schemes import Scheme, get_scheme
from qe_edge.system.errors import QEError, QENotice, RecipeError, UnknownNameError, shown, shown_name

MODULES = ("language", "visual", "merger", "action")
HEADS = {"int4": WeightGrid(4, 32)}  # grids of a language model's head
EMBEDDINGS = ("int8",)  # codes of a row of the token embedding, with one scale


class CalibrationSpec(BaseModel):
    """Which calibration data was (or is to be) used.

    Attributes:
        source: "demo", a folder, a JSONL file, or another registered source.
        samples: Number of image-question-answer samples.
        sha256: Hash of the drawn samples; filled in by the quantizer so that a run can be checked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field("demo", max_length=4096)
    samples: int = Field(128, ge=1, le=1 << 20)
    sha256: str | None = None

    @property
    def asks(self) -> bool:
        """Whether somebody chose the number of samples; otherwise it is the default."""
        return "samples" in self.model_fields_set


class Recipe(BaseModel):
    """Complete description of a quantization.

    Attributes:
        method: Name in the method registry.
        scheme: Name of a precision scheme, for example "w4a8".
        modules: Which parts of the model are quantized.
        preset: Named defaults of the method, for example "paper".
        options: The method's own options, over the preset's.
        head: Grid of the language model's head, "int4", or "none" to leave it in its own precision.
        embedding: Codes of the token embedding, "int8", or "none" to leave it in its own precision.
        flow: "parallel" takes every layer's calibration input from the original model; "sequential" from the already
            quantized blocks before it (as GPTQ does).
        budget: Effective bits per weight to spend over the layers; without, the method's options size each alone.
        calibration: The calibration data.
        seed: Seed of everything that is drawn at random.

    Example:
        >>> recipe = make_recipe(method="gptq", scheme="w4a16")
        >>> recipe.resolved().options, recipe.get_scheme().weight.group_size
        ({'damping': 0.01}, 128)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str = "qe"
    scheme: str = "w4a8"
    modules: tuple[str, ...] = ("language",)
    preset: str = "default"
    options: dict[str, Any] = Field(default_factory=dict)
    head: str = "none"
    embedding: str = "none"
    flow: Literal["parallel", "sequential"] = "parallel"
    budget: Budget = Field(default_factory=Budget)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    seed: int = Field(0, ge=0, lt=1 << 63)  # what torch's generators take

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, values: Any) -> Any:  # noqa: ANN401 - whatever the user wrote
        if not isinstance(values, dict):
            return values
        current = current_spelling(values)
        before, now = values.get("options"), current.get("options")
        if isinstance(before, dict) and isinstance(now, dict):
            old = [_pair(key, value) for key, value in before.items() if now.get(key, None) != value]
            new = [_pair(key, value) for key, value in now.items() if before.get(key, None) != value]
            if old:
                warnings.warn(
                    f"Earlier names of options are read: {', '.join(old)}. Write {', '.join(new)}.",
                    QENotice,
                    stacklevel=2,
                )
        return current

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        METHODS.check(self.method)
        scheme = get_scheme(self.scheme)
        if not self.modules:
            raise RecipeError("No module is selected.", f"Choose at least one of {', '.join(MODULES)}.")
        for module in self.modules:
            if module not in MODULES:
                raise UnknownNameError("module", module, MODULES)
        if self.head not in ("none", *HEADS):
            raise UnknownNameError("head", self.head, ("none", *HEADS))
        if self.embedding not in ("none", *EMBEDDINGS):
            raise UnknownNameError("embedding", self.embedding, ("none", *EMBEDDINGS))
        if self.head != "none" and "language" not in self.modules:
            raise RecipeError(
                "The head is rounded on what the language model hands it, and that is not among the modules.",
                "Add language to --modules, or leave --head out.",
            )
        method = self.build_method()
        method.check_scheme(scheme)
        if not method.spends_budget and self.budget:
            raise RecipeError(
                f"The method '{self.method}' cannot spend a budget: its options alone give its size.",
                "Use --method qe with --bits or --read-bits.",
            )
        return self

    def build_method(self) -> Method[Any]:
        """The method of this recipe with its options resolved: defaults, then preset, then `options`."""
        kind = METHODS[self.method]
        if self.preset not in kind.presets:
            raise UnknownNameError(f"preset of method {self.method}", self.preset, kind.presets)
        return kind(_validate(kind.Options, {**kind.presets[self.preset], **self.options}, "options."))

    @property
    def rotates(self) -> bool:
        """Whether the language model is rotated first."""
        return self.build_method().rotates(self.modules, budget=bool(self.budget))

    def check_exportable(self) -> None:
        """Refuse a method whose results no graph can hold.

        Raises:
            RecipeError: Naming the parts that no graph can hold.
        """
        reason = self.build_method().torch_only
        if reason:
            raise RecipeError(
                f"The result of the method '{self.method}' cannot be exported: {reason} have no place in the operator.",
                "Quantize with 'qe-edge quantize', and load the checkpoint with qe_edge.load_quantized in PyTorch.",
            )

    def get_scheme(self) -> Scheme:
        """The scheme that `scheme` names."""
        return get_scheme(self.scheme)

    @property
    def grids(self) -> list[WeightGrid]:
        """Grids that a layer's weights may get: the scheme's own, or those among which a budget chooses."""
        scheme = self.get_scheme()
        return scheme.budget_grids() if self.budget else [scheme.weight]

    @property
    def head_grid(self) -> WeightGrid | None:
        """Grid of the language model's head, None where it stays as it is."""
        return HEADS.get(self.head)

    def resolved(self) -> Recipe:
        """The same recipe with every option of the method written out, for storing beside the result."""
        return self.model_copy(update={"options": self.build_method().options.model_dump(mode="json")})


def current_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with the names that its method's options have now; what is no recipe stays as it is.

    Example:
        >>> current_spelling({"method": "qe", "options": {"router": "tri"}})
        {'method': 'qe', 'options': {'router': 'triangle'}}
    """
    method, options = values.get("method", "qe"), values.get("options")
    if not isinstance(options, Mapping) or not isinstance(method, str) or method not in METHODS:
        return dict(values)
    return {**values, "options": METHODS[method].Options.respelled(options)}


def _pair(key: str, value: object) -> str:
    return f"'{shown_name(key)}: {shown_name(value)}'"


def make_recipe(**values: object) -> Recipe:
    """Validate keyword values to a `Recipe`.

    Raises:
        UnknownNameError: For an unknown key, method, scheme, module or preset; the nearest valid one is named.
        RecipeError: For a value of the wrong type or range.

    Example:
        >>> recipe = make_recipe(method="qe", scheme="w4a8", options={"shared_rank": 64}, budget={"bits": 4.5})
        >>> recipe.options, recipe.budget.bits
        ({'shared_rank': 64}, 4.5)
        >>> make_recipe(method="qe", shceme="w4a8")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.UnknownNameError: There is no recipe key 'shceme'. Did you mean 'scheme'? Known:
        budget, calibration, embedding, flow, head, method, modules, options, preset, scheme, seed.
    """
    recipe: Recipe = _validate(Recipe, values, "")
    return recipe


def _validate(kind: type[Any], values: dict[str, Any], prefix: str) -> Any:  # noqa: ANN401 - pydantic's own generic
    """Pydantic validation whose first error becomes one clear sentence."""
    unknown = [key for key in values if key not in kind.model_fields]
    if unknown:
        raise UnknownNameError("recipe key", prefix + unknown[0], [prefix + name for name in kind.model_fields])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, QEError):
            raise cause from error
        where = prefix + ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UnknownNameError("recipe key", where, _sibling_keys(kind, first["loc"], prefix)) from error
        raise RecipeError(
            f"Recipe key '{shown_name(where)}' is wrong: {first['msg']} (got {shown(first.get('input'))}).",
            "Correct the value.",
        ) from error


def _sibling_keys(kind: type[BaseModel], location: tuple[int | str, ...], prefix: str) -> list[str]:
    """Valid keys beside the one at `location`, written with their full path."""
    for part in location[:-1]:
        annotation = kind.model_fields[str(part)].annotation if str(part) in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind, prefix = annotation, f"{prefix}{part}."
    return [prefix + name for name in kind.model_fields]
