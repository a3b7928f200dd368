"""Options of Quant Experts, and their values for a layer of a given shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from qe_edge.methods.base import MethodOptions
from qe_edge.reconstruction.factors import AdapterDtype
from qe_edge.reconstruction.ranks import scale_rank
from qe_edge.reconstruction.refinement import Refinement
from qe_edge.reconstruction.shares import GLOBAL_SHARE
from qe_edge.system.errors import RecipeError

MAX_SHARE = 0.5  # adapter parameters relative to the layer's own


class QuantExpertsOptions(MethodOptions):
    """Options of Quant Experts.

    Attributes:
        shared_rank: Rank r_s of the shared expert.
        routed_rank: Rank r_r of every routed expert.
        experts: Number N_r of routed experts; 0 for none.
        important_channels: Important channels k per token.
        shrink: Shrink ranks, k and the number of experts on small layers (see `shrink_to_layer`).
        assignment: Tokens that share an expert at first: tokens with the same important channels ("cooccurrence",
            paper), or tokens of the same modality, and inside it with the same important channels ("modality", see
            `reconstruction.modality`).
        expert_weighting: Weighting of the routed experts' fit.
        rho: Share of all tokens in every expert's covariance.
        em_steps: Polishing rounds of token assignment and fit.
        router: Initialisation of the router.
        independent_channels: Treatment of the channels that are important to most tokens in the main branch: "scale"
            divides them (paper), "drop" leaves them to the shared expert.
        guard_independent_channels: Leave these channels out only where that does not raise the calibration error.
        rounding: Rule that chooses the main branch's codes. The correction works with each of them.
        clip: Search the range of every scale ("nearest" and "gptq").
        shrinkage: Tokens with uncorrelated channels that are added to the Gram matrix, as a multiple of the layer's
            inputs (`reconstruction.shrinkage`); "auto" takes what serves best where one half of the tokens predicts the
            other.
        polish: Rounds in which codes and scales of "gptq" are chosen again, each given all others
            (`reconstruction.polishing`).
        token_power: Power of the gradients' magnitudes that weighs tokens in Gram matrices, as in VLMQ; 0 weighs all
            tokens alike.
        match: Quantize layers one after the other for the outputs that the original model has, as `methods.loaq` does.
        adapter_dtype: Storage of the low-rank factors.
        stack_siblings: Treat layers that read the same input (q/k/v, gate/up) as one.
        rotate: Rotate the language model, where it is quantized, before anything is measured, as `methods.quarot` does.
            None rotates it only inside a budget: routing looks at large channels, and a rotation spreads them.
        tokens: Calibration tokens kept per layer for experts and router.
        refine: Train by gradient descent, kept where it helps (`reconstruction.refinement`): "router" the router alone,
            "all" the routed factors and the router (paper).
        refine_epochs: Epochs.
        refine_iterations: Steps of an epoch.
        refine_rate: Initial learning rate.
        refine_batch: Tokens of a step.
        refine_tau: Temperature of the routing loss.
        refine_alpha: Weight of the regression loss.
        refine_beta: Weight of the routing loss.
    """

    renamed: ClassVar[dict[str, str]] = {
        "cs_mode": "independent_channels",
        "cs_guard": "guard_independent_channels",
    }
    renamed_values: ClassVar[dict[str, dict[str, str]]] = {
        "router": {"tri": "triangle"},
        "expert_weighting": {"condmean": "conditional_mean", "lqeromega": "lqer_omega"},
    }
    shared_rank: int = Field(32, ge=0, le=512)
    routed_rank: int = Field(32, ge=0, le=512)
    experts: int = Field(8, ge=0, le=64)
    important_channels: int = Field(32, ge=0, le=1024)
    shrink: bool = True
    assignment: Literal["cooccurrence", "modality"] = "cooccurrence"
    expert_weighting: Literal["gram", "conditional_mean", "omega", "lqer_omega", "mask"] = "gram"
    rho: float = Field(GLOBAL_SHARE, ge=0, lt=1)
    em_steps: int = Field(3, ge=0, le=50)
    router: Literal["ridge", "triangle"] = "ridge"
    independent_channels: Literal["drop", "scale"] = "drop"
    guard_independent_channels: bool = True
    rounding: Literal["nearest", "awq", "gptq"] = "gptq"
    clip: bool = True
    shrinkage: Annotated[float, Field(ge=0, le=100)] | Literal["auto"] = 0.0
    polish: int = Field(0, ge=0, le=100)
    token_power: float = Field(0.0, ge=0, le=2)
    match: bool = False
    adapter_dtype: AdapterDtype = "int8"
    stack_siblings: bool = True
    rotate: bool | None = None
    tokens: int = Field(8192, ge=1, le=1 << 20)
    refine: Literal["none", "router", "all"] = "none"
    refine_epochs: int = Field(16, ge=0, le=1000)
    refine_iterations: int = Field(100, ge=0, le=10000)
    refine_rate: float = Field(1e-4, gt=0, le=1)
    refine_batch: int = Field(256, ge=1, le=1 << 16)
    refine_tau: float = Field(1.0, gt=0)
    refine_alpha: float = Field(1.0, ge=0)
    refine_beta: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _options_go_together(self) -> QuantExpertsOptions:
        if self.match and self.token_power:
            raise RecipeError(
                "With 'match' tokens are weighed by the norm that follows, and not by gradients ('token_power') too.",
                "Leave one of the two out.",
            )
        if self.assignment == "modality" and self.expert_weighting not in ("gram", "conditional_mean"):
            raise RecipeError(
                f"The expert weighting '{self.expert_weighting}' reads clusters of channels, which 'modality' lacks.",
                "Choose expert_weighting 'gram' or 'conditional_mean', or assignment 'cooccurrence'.",
            )
        return self

    def refinement(self) -> Refinement | None:
        """Settings of the refinement; None for none."""
        if self.refine == "none":
            return None
        return Refinement(
            factors=self.refine == "all",
            epochs=self.refine_epochs,
            iterations=self.refine_iterations,
            rate=self.refine_rate,
            tau=self.refine_tau,
            alpha=self.refine_alpha,
            beta=self.refine_beta,
            batch=self.refine_batch,
        )


@dataclass(frozen=True)
class LayerSize:
    """Ranks, number of experts and important channels for one layer."""

    shared_rank: int
    routed_rank: int
    experts: int
    important_channels: int


def shrink_to_layer(options: QuantExpertsOptions, out_features: int, in_features: int) -> LayerSize:
    """Ranks, experts and k for a layer of `[out, in]`.

    With `side = min(out, in)` below 1152, ranks and k scale by `side / 1152`, rounded down to a multiple of 8 and at
    least 8. Then experts are halved until shared and routed adapters together hold at most half as many parameters as
    the layer. A single expert counts as none. Always `k (experts + 1) <= in` and ranks `<= side`.

    Example:
        >>> shrink_to_layer(QuantExpertsOptions(), 4096, 4096)
        LayerSize(shared_rank=32, routed_rank=32, experts=8, important_channels=32)
        >>> shrink_to_layer(QuantExpertsOptions(), 256, 256)
        LayerSize(shared_rank=8, routed_rank=8, experts=4, important_channels=8)
    """
    side = min(out_features, in_features)
    shared, routed, k = options.shared_rank, options.routed_rank, options.important_channels
    experts = options.experts if routed else 0
    if options.shrink:
        shared, routed, k = (scale_rank(value, side) for value in (shared, routed, k))
        while experts and (shared + experts * routed) * (out_features + in_features) > MAX_SHARE * (
            out_features * in_features
        ):
            experts //= 2
        if experts == 1:
            experts = 0
    k = min(k, in_features // (experts + 1))
    return LayerSize(min(shared, side), min(routed, side) if experts else 0, experts, k)
