"""Refinement of routed experts and router by gradient descent, kept only where it helps (docs/method.md, section 9).

For a token with the remaining error `z = W x - (W_q Q_a(x_m) + L_SA L_SB x)`:

    d_i   = mean |z - L_RA^i L_RB^i x| / c        i = 1..N_r, c the mean |z| of the layer
    L_reg = min_i d_i                             (11) reaches the nearest expert's factors only
    L_cls = tau^2 KL(P || Q)                      (12) reaches the router only
    P     = softmax(-(d - mean d) / std d / tau)  (13) detached
    Q     = softmax(-(l - mean l) / tau)          (14) l = R |x|
    L     = alpha L_reg + beta L_cls              (15)

Everything else is frozen. The trained factors are float32, and both factors of a rank are scaled to the same norm.
After training they are rounded to their storage. The result is taken only if it lowers the squared error of the routed
output on held-out tokens, with the rounded factors and the expert that the float16 router picks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qe_edge.layers.linear import Adapters
from qe_edge.reconstruction.routed_factors import (
    RoutedFactors,
    largest_up,
    real_factors,
    routed_factors,
    store_routed,
)
from qe_edge.reconstruction.shares import GLOBAL_SHARE

RUNS, HELD_OUT_EVERY = 100, 10  # the token sample is cut into runs, of which every tenth is held out
SMALLEST_SPREAD = 1e-6  # added to the standard deviation of eq. 13
LARGEST_GRADIENT = 1.0  # norm, of the router and of the factors apart
CHUNK = 2048


@dataclass(frozen=True)
class Refinement:
    """Settings of the refinement. The defaults are the paper's settings, as far as it states them.

    Attributes:
        factors: Train the routed factors too, not the router alone.
        epochs: Epochs.
        iterations: Steps of an epoch.
        rate: Initial learning rate of AdamW; it falls to 0 along a cosine.
        tau: Temperature of eq. 13 and 14.
        alpha: Weight of eq. 11.
        beta: Weight of eq. 12.
        batch: Tokens of a step, drawn at random.
    """

    factors: bool
    epochs: int = 16
    iterations: int = 100
    rate: float = 1e-4
    tau: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    batch: int = 256


def held_out_tokens(count: int) -> Tensor:
    """The tokens that are held out, bool `[count]`.

    The tokens are cut into 100 runs, and every tenth run is held out. So a token is mostly on the side of its
    neighbours, which are much like it.

    Example:
        >>> held = held_out_tokens(1000)
        >>> int(held.sum()), held.nonzero()[:3, 0].tolist()
        (100, [90, 91, 92])
    """
    return torch.arange(count) * RUNS // max(count, 1) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def refine(
    adapters: Adapters, tokens: Tensor, target: Tensor, gram: Tensor, settings: Refinement, seed: int
) -> Adapters:
    """Train the routed part of stored adapters; the same adapters come back where that does not help.

    Args:
        adapters: Adapters with a router; others come back as they are.
        tokens: `[n, in]` float32 in the order of the calibration samples.
        target: `[n, out]` float32 that the whole correction should add: `W x - W_q Q_a(x_m)`.
        gram: `[in, in]` float64 `X^T X / T`.
        settings: Settings of the training.
        seed: Seed of the batches.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tokens, error = torch.randn(1000, 8), torch.randn(4, 8)
        >>> down, up, router = torch.zeros(2, 8), torch.randn(4, 2), torch.rand(2, 8).half()
        >>> adapters = Adapters(down, up, None, None, rank_shared=0, rank_routed=1, num_experts=2, router=router)
        >>> settings = Refinement(factors=True, epochs=1, iterations=50, rate=0.1)
        >>> gram = (tokens.T @ tokens).double() / 1000
        >>> better = refine(adapters, tokens, tokens @ error.T, gram, settings, seed=0)
        >>> routed_error(better, tokens, tokens @ error.T) < routed_error(adapters, tokens, tokens @ error.T)
        True
    """
    if adapters.router is None or not adapters.rank_routed:
        return adapters
    held = held_out_tokens(len(tokens))
    left = target - shared_output(adapters, tokens)
    scale = float(left[~held].abs().mean()) if (~held).any() else 0.0
    if not held.any() or not scale > 0:
        return adapters
    task = _Task(tokens[~held], left[~held] / scale, settings, seed)
    experts = routed_factors(adapters, tokens.shape[1])
    bounds = largest_up(adapters)
    routed, router = task.train(replace(experts, down=experts.down / scale), adapters.router.float(), bounds)
    largest = torch.finfo(adapters.router.dtype).max
    refined = replace(adapters, router=router.clamp(-largest, largest).to(adapters.router.dtype))
    if settings.factors:
        grams = task.grams(routed, gram) if adapters.down.dtype == torch.uint8 else []
        refined = store_routed(refined, replace(routed, down=routed.down * scale), grams)
    before, after = (routed_error(one, tokens[held], left[held]) for one in (adapters, refined))
    return refined if after < before else adapters


def shared_output(adapters: Adapters, tokens: Tensor) -> Tensor:
    """The output `[n, out]` of the shared expert on `tokens` `[n, in]`.

    Example:
        >>> down, up = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [3.0]])
        >>> adapters = Adapters(down, up, None, None, rank_shared=1, rank_routed=0, num_experts=0, router=None)
        >>> shared_output(adapters, torch.tensor([[1.0, 2.0]]))
        tensor([[6., 9.]])
    """
    down, up = real_factors(adapters, tokens.shape[1])
    shared = adapters.rank_shared
    return (tokens @ down[:shared].T) @ up[:, :shared].T


def routed_error(adapters: Adapters, tokens: Tensor, left: Tensor) -> float:
    """Squared error of the stored routed experts, as routed, on `left` `[n, out]`, summed over tokens and outputs.

    Example:
        >>> down, up, router = torch.eye(2), torch.eye(2), torch.eye(2).half()  # expert i corrects channel i
        >>> adapters = Adapters(down, up, None, None, rank_shared=0, rank_routed=1, num_experts=2, router=router)
        >>> tokens = torch.tensor([[0.0, 5.0]])  # its lowest score is the first expert's, who adds nothing
        >>> routed_error(adapters, tokens, left=tokens)
        25.0
    """
    if adapters.router is None:
        raise ValueError("these adapters have no router")
    experts = routed_factors(adapters, tokens.shape[1])
    chosen = (tokens.abs() @ adapters.router.float().T).argmin(1)
    total = 0.0
    for expert in range(experts.experts):
        rows = chosen == expert
        error = left[rows] - experts.output(expert, tokens[rows])
        total += float(error.square().sum(dtype=torch.float64))
    return total


def distances(experts: RoutedFactors, tokens: Tensor, left: Tensor) -> Tensor:
    """`d` of eq. 11: mean absolute error of every expert on every token, `[n, experts]`.

    Example:
        >>> experts = RoutedFactors(up=torch.ones(2, 3, 1), down=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> tokens = torch.tensor([[2.0, 5.0]])
        >>> distances(experts, tokens, left=torch.full((1, 3), 5.0))
        tensor([[3., 0.]])
    """
    columns = [(left - experts.output(expert, tokens)).abs().mean(1) for expert in range(experts.experts)]
    return torch.stack(columns, dim=1)


def regression_loss(experts: RoutedFactors, tokens: Tensor, left: Tensor, nearest: Tensor) -> Tensor:
    """Eq. 11, mean over tokens, given every token's nearest expert: only that one is evaluated, and gets a gradient.

    Example:
        >>> experts = RoutedFactors(up=torch.ones(2, 3, 1), down=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> tokens, left = torch.tensor([[2.0, 5.0]]), torch.full((1, 3), 6.0)
        >>> regression_loss(experts, tokens, left, nearest=torch.tensor([1]))
        tensor(1.)
    """
    total = tokens.new_zeros(())
    for expert in range(experts.experts):
        rows = nearest == expert
        if rows.any():
            error = left[rows] - experts.output(expert, tokens[rows])
            total = total + error.abs().mean(1).sum()
    return total / len(tokens)


def wanted_routing(d: Tensor, tau: float) -> Tensor:
    """`P` of eq. 13 for distances `[n, experts]`; no gradient passes.

    Example:
        >>> wanted_routing(torch.tensor([[1.0, 3.0]]), tau=1.0)  # the nearer expert is the likelier one
        tensor([[0.8808, 0.1192]])
    """
    d = d.detach()
    centred = d - d.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt() + SMALLEST_SPREAD
    return torch.softmax(-centred / spread / tau, dim=1)


def log_routing(scores: Tensor, tau: float) -> Tensor:
    """`log Q` of eq. 14 for router scores `[n, experts]`.

    Example:
        >>> log_routing(torch.tensor([[1.0, 3.0]]), tau=1.0).exp()
        tensor([[0.8808, 0.1192]])
    """
    return torch.log_softmax(-(scores - scores.mean(1, keepdim=True)) / tau, dim=1)


def routing_loss(d: Tensor, scores: Tensor, tau: float) -> Tensor:
    """Eq. 12, mean over tokens.

    Example:
        >>> d = torch.tensor([[1.0, 3.0]])
        >>> right, wrong = torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 1.0]])
        >>> bool(routing_loss(d, right, tau=1.0) < routing_loss(d, wrong, tau=1.0))
        True
    """
    return tau**2 * torch.nn.functional.kl_div(log_routing(scores, tau), wanted_routing(d, tau), reduction="batchmean")


@dataclass(frozen=True)
class _Task:
    """Tokens to train on `[n, in]`, the remaining error there `[n, out]` in units of its mean, and the settings."""

    tokens: Tensor
    left: Tensor
    settings: Refinement
    seed: int

    def train(self, experts: RoutedFactors, router: Tensor, bounds: Tensor | None) -> tuple[RoutedFactors, Tensor]:
        """Trained experts and router `[experts, in]`.

        Args:
            experts: Experts to start from, in units of the mean error.
            router: Router to start from.
            bounds: `[out]`, largest magnitudes that entries of `up` may take; None for no limit.
        """
        settings = self.settings
        balance = _balance(experts)
        masters = [experts.up * balance.unsqueeze(1), experts.down / balance.unsqueeze(2)]
        limit = None if bounds is None else bounds.reshape(1, -1, 1) * balance.unsqueeze(1)
        groups = [[router.clone().requires_grad_()]]
        if settings.factors:
            masters = [master.requires_grad_() for master in masters]
            groups.append(masters)
        current = RoutedFactors(*masters)
        known = None if settings.factors else self._all_distances(experts)
        optimizer = torch.optim.AdamW([one for group in groups for one in group], lr=settings.rate, weight_decay=0.0)
        steps = settings.epochs * settings.iterations
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            rows = torch.randint(len(self.tokens), (settings.batch,), generator=generator)
            optimizer.zero_grad()
            with torch.enable_grad():
                self._loss(current, groups[0][0], rows, known).backward()  # type: ignore[no-untyped-call] # torch has no types here
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            if limit is not None and settings.factors:
                with torch.no_grad():
                    masters[0].clamp_(-limit, limit)
        up, down = (master.detach() for master in masters)
        trained = RoutedFactors(up / balance.unsqueeze(1), down * balance.unsqueeze(2))
        return trained, groups[0][0].detach()

    def grams(self, experts: RoutedFactors, gram: Tensor) -> list[Tensor]:
        """For every expert the Gram matrix `[in, in]` of the tokens nearest to it, with a share of `gram`."""
        nearest = self._all_distances(experts).argmin(1)
        found = []
        for expert in range(experts.experts):
            own = self.tokens[nearest == expert].double()
            mixed = (1.0 - GLOBAL_SHARE) * (own.T @ own) / len(own) + GLOBAL_SHARE * gram if len(own) else gram
            found.append(mixed)
        return found

    def _loss(self, experts: RoutedFactors, router: Tensor, rows: Tensor, known: Tensor | None) -> Tensor:
        """Eq. 15 on some tokens; with the distances of all tokens known, factors are frozen and eq. 11 constant."""
        tokens, settings = self.tokens[rows], self.settings
        if known is not None:
            return settings.beta * routing_loss(known[rows], tokens.abs() @ router.T, settings.tau)
        left = self.left[rows]
        with torch.no_grad():
            d = distances(experts, tokens, left)
        regression = regression_loss(experts, tokens, left, d.argmin(1))
        return settings.alpha * regression + settings.beta * routing_loss(d, tokens.abs() @ router.T, settings.tau)

    def _all_distances(self, experts: RoutedFactors) -> Tensor:
        parts = [slice(start, start + CHUNK) for start in range(0, len(self.tokens), CHUNK)]
        with torch.no_grad():
            return torch.cat([distances(experts, self.tokens[part], self.left[part]) for part in parts])


def _balance(experts: RoutedFactors) -> Tensor:
    """Factors `[experts, rank]` for `up`, and divisors for `down`, that give both the same norm in every rank."""
    ratio = experts.down.norm(dim=2) / experts.up.norm(dim=1)
    usable = torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, 1.0).sqrt()
