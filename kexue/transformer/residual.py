"""The residual stack: any sub-layers, four placements of the norm, one scale of the identity path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from kexue import _validate

Branch = Callable[[Tensor], Tensor]
PLACEMENTS = ("pre", "post", "both", "none", "deepnorm")
NORMS = ("layer", "rms")


def make_norm(kind: str, d: int, *, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """Layer normalisation ("layer") or root-mean-square normalisation ("rms") of the last axis, of size d."""
    _validate.choice("norm_kind", kind, NORMS)
    cls = nn.LayerNorm if kind == "layer" else nn.RMSNorm
    return cls(d, eps=eps, elementwise_affine=affine)


def deepnorm_constants(
    sublayers: int, *, optimizer: str = "sgd", convention: str = "paper", alpha: float | None = None, decoder: int = 0
) -> tuple[float, float]:
    r"""Residual weight and initial gain that keep the first update independent of the depth M = `sublayers`.

    With K trained matrices per sub-layer that share the gain (the paper counts K = 2, the article K = 1):

    ===========  ===========================  ==============  ========================
    optimizer    condition                    alpha           gain
    ===========  ===========================  ==============  ========================
    "sgd"        K M (gain / alpha)^2 = 1     M^(1/4)         K^(-1/2) M^(-1/4)
    "adam"       K M gain / alpha = 1         M^(1/2)         K^(-1) M^(-1/2)
    "lamb"       K M gain^2 / alpha = 1       1               K^(-1/2) M^(-1/2)
    ===========  ===========================  ==============  ========================

    "adam" stands for optimisers that step by the sign of the gradient, "lamb" for those whose steps are also
    proportional to the size of the matrix. An encoder or a decoder-only model of N layers has M = 2N residual
    sub-layers, a decoder with cross-attention 3N. The gain belongs to the feed-forward, value and output matrices;
    queries and keys keep gain 1. Learnable gains and shifts of norms, and biases, are not covered: freeze them, or
    divide their learning rate by M.

    Source: article 8978 of kexue.fm ("article"); Wang et al., *DeepNet*, arXiv:2203.00555, figure 2 ("paper": sgd only;
    its count is carried over to the other optimisers here). The encoder's constants follow from the paper's decoder,
    whose bound they multiply; the paper rounds their factors to 0.81 and 0.87.

    Args:
        sublayers: M >= 1. optimizer: "sgd", "adam" or "lamb". convention: "paper" (K = 2) or "article" (K = 1).
        alpha: fix the residual weight, > 0, and solve the condition for the gain alone; 1 suits Pre Norm.
        decoder: layers, >= 1, of the decoder that reads this stack, an encoder with M even; 0: nobody does. "sgd" only.

    Returns:
        (alpha, gain).

    Raises:
        ValueError: numbers out of range, an unknown name, `decoder` with an odd M, another optimiser or an `alpha`.

    Example:
        >>> deepnorm_constants(16)
        (2.0, 0.3535533905932738)
        >>> deepnorm_constants(16, optimizer="adam", convention="article")
        (4.0, 0.25)
        >>> deepnorm_constants(16, convention="article", alpha=1.0)
        (1.0, 0.25)
    """
    _validate.integer("sublayers", sublayers, low=1)
    _validate.choice("convention", convention, ("paper", "article"))
    _validate.choice("optimizer", optimizer, ("sgd", "adam", "lamb"))
    _validate.integer("decoder", decoder, low=0)
    M, K = float(sublayers), 2 if convention == "paper" else 1
    if decoder:
        if optimizer != "sgd" or alpha is not None or sublayers % 2:
            raise ValueError(
                f"decoder is for an encoder with an even number of sub-layers, optimizer 'sgd' and no alpha; got sublayers = "
                f"{sublayers}, optimizer = {optimizer!r}, alpha = {alpha!r}"
            )
        outer, inner = deepnorm_constants(3 * decoder, convention=convention)
        alpha = (M * decoder * inner**2 / outer) ** 0.25
        return alpha, 1 / (alpha * K**0.5)
    if alpha is None:
        alpha = {"sgd": M**0.25, "adam": M**0.5, "lamb": 1.0}[optimizer]
    _validate.number("alpha", alpha, low=0.0, open_low=True)
    gain = {"sgd": alpha / (K * M) ** 0.5, "adam": alpha / (K * M), "lamb": (alpha / (K * M)) ** 0.5}[optimizer]
    return alpha, gain


class ResidualStack(nn.Module):
    r"""L residual sub-layers, one after the other, and where their norms stand.

    .. math:: x_{l+1} = N^\text{out}_l\bigl(\alpha x_l + F_l(N^\text{in}_l(x_l))\bigr)

    ==========  =====================================================================================
    "pre"       :math:`N^\text{out} = 1`; a last norm follows the stack (GPT-2, T5)
    "post"      :math:`N^\text{in} = 1` (the first Transformer, BERT)
    "deepnorm"  "post" with :math:`\alpha = L^{1/4}` unless `alpha` is given; see `deepnorm_constants`
    "both"      both norms
    "none"      neither
    ==========  =====================================================================================

    Source: articles 8978 and 9009 of kexue.fm; Xiong et al., arXiv:2002.04745; Wang et al., arXiv:2203.00555.

    Args:
        sublayers: L >= 1 modules F: (..., d) -> (..., d) of the same shape.
        d: width, >= 1.
        norm: a placement, or a sequence of them that the sub-layers take in turn: ("none", "both") is GPT2_ML's block.
            The norm after the stack is there if the last sub-layer's placement is "pre".
        alpha: weight of the identity path; default 1 ("deepnorm": see there).
        norm_kind: "layer" or "rms". eps: added to the variance. affine: learn a gain (and with "layer" a shift).
        dropout: probability on each branch, in [0, 1].
        checkpoint: keep for the backward pass only every `checkpoint`-th state and recompute the rest; 0 keeps all.
            Gradients are the same; L ** 0.5 costs least memory, for about one more forward pass of time.

    Raises:
        ValueError: no sub-layers, unknown placements or kinds, numbers out of range.

    Example:
        >>> stack = ResidualStack([nn.Linear(8, 8) for _ in range(1000)], 8, norm="deepnorm", checkpoint=32)
        >>> stack(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        sublayers: Iterable[nn.Module],
        d: int,
        *,
        norm: str | Sequence[str] = "pre",
        alpha: float | None = None,
        norm_kind: str = "layer",
        eps: float = 1e-5,
        affine: bool = True,
        dropout: float = 0.0,
        checkpoint: int = 0,
    ) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        count = len(self.sublayers)
        if count == 0:
            raise ValueError("sublayers is empty: a residual stack needs at least one")
        _validate.integer("d", d, low=1)
        _validate.integer("checkpoint", checkpoint, low=0)
        _validate.number("dropout", dropout, low=0.0, high=1.0)
        places = placements(norm)
        if count % len(places):
            raise ValueError(f"norm gives {len(places)} placements in turn, which does not divide {count} sub-layers")
        if alpha is None:
            alpha = deepnorm_constants(count)[0] if "deepnorm" in places else 1.0
        _validate.number("alpha", alpha)

        def norms(*where: str) -> nn.ModuleList:
            return nn.ModuleList(
                make_norm(norm_kind, d, eps=eps, affine=affine) if places[i % len(places)] in where else nn.Identity()
                for i in range(count)
            )

        self.d, self.alpha, self.checkpoint = d, float(alpha), checkpoint
        self.inner = norms("pre", "both")
        self.outer = norms("post", "both", "deepnorm")
        self.final = make_norm(norm_kind, d, eps=eps, affine=affine) if places[-1] == "pre" else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    @overload
    def forward(
        self, x: Tensor, *, branches: Sequence[Branch] | None = None, groups: Sequence[Sequence[int]] | None = None,
        skip: Iterable[int] = (), return_states: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, branches: Sequence[Branch] | None = None, groups: Sequence[Sequence[int]] | None = None,
        skip: Iterable[int] = (), return_states: Literal[True],
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self,
        x: Tensor,
        *,
        branches: Sequence[Branch] | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        skip: Iterable[int] = (),
        return_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        r"""Run the stack; `groups` runs some sub-layers in parallel instead of one after the other.

        .. math:: x \leftarrow N^\text{out}_{\max G}\Bigl(\alpha x + \sum_{l \in G} F_l(N^\text{in}_l(x))\Bigr)
                  \quad\text{for each group } G

        Args:
            x: (..., d).
            branches: L functions to apply in place of `sublayers` (they may close over masks and caches).
            groups: ordered partition of the indices 0..L-1 without `skip`; default: each alone, in order.
            skip: indices of sub-layers left out.
            return_states: also return the states before the first, between and after the last group.

        Returns:
            (..., d), or with `return_states` also the list of states, of which the last lacks the norm after the stack.

        Raises:
            TypeError, ValueError: a wrong shape, groups that are not a partition, a branch that changes the shape.
        """
        _validate.shape("x", x, "...", "d", d=self.d)
        run = self.sublayers if branches is None else branches
        if len(run) != len(self.sublayers):
            raise ValueError(f"branches: expected {len(self.sublayers)} functions, got {len(run)}")
        order = self._order(groups, skip)
        states = [x]
        if self.checkpoint and torch.is_grad_enabled() and not return_states:
            for start in range(0, len(order), self.checkpoint):
                x = recompute(self._run, x, order[start : start + self.checkpoint], run, use_reentrant=False)
        else:
            x = self._run(x, order, run, states if return_states else None)
        out = self.final(x)
        return (out, states) if return_states else out

    def _run(
        self, x: Tensor, order: Sequence[Sequence[int]], run: Sequence[Branch] | nn.ModuleList,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        for group in order:
            branch = self._branch(group[0], x, run)
            for i in group[1:]:
                branch = branch + self._branch(i, x, run)
            x = self.outer[max(group)](torch.add(self.dropout(branch), x, alpha=self.alpha))
            if states is not None:
                states.append(x)
        return x

    def _branch(self, i: int, x: Tensor, run: Sequence[Branch] | nn.ModuleList) -> Tensor:
        out = run[i](self.inner[i](x))
        if out.shape != x.shape:
            raise ValueError(f"sub-layer {i} should keep the shape {tuple(x.shape)}, got {tuple(out.shape)}")
        return out

    def _order(self, groups: Sequence[Sequence[int]] | None, skip: Iterable[int]) -> Sequence[Sequence[int]]:
        count, skipped = len(self.sublayers), set(skip)
        if groups is None and not skipped:
            return [(i,) for i in range(count)]
        if not skipped <= set(range(count)):
            raise ValueError(f"skip should hold indices of the {count} sub-layers, got {sorted(skipped)}")
        kept = [i for i in range(count) if i not in skipped]
        if groups is None:
            return [(i,) for i in kept]
        if sorted(i for group in groups for i in group) != kept or not all(groups):
            raise ValueError(f"groups should be a partition of {kept} into non-empty groups, got {[list(g) for g in groups]}")
        return groups


def placements(norm: str | Sequence[str]) -> tuple[str, ...]:
    """The placements that the sub-layers take in turn, checked."""
    places = (norm,) if isinstance(norm, str) else tuple(norm)
    for place in places or ("",):
        _validate.choice("norm", place, PLACEMENTS)
    return places
