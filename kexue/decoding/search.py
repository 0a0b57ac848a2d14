"""One `decode` for any model and strategy: greedy, beam search, sampling.

A model enters as a step function `step(tokens, state) -> (logits, state)`: called first with the whole prompt
(batch, n) and the initial state, then with one token per row, (rows, 1). Logits are (rows, vocab), or
(rows, n, vocab), of which the last position counts. The state is any nest of tuples, lists and dicts of tensors with
*the batch as first axis* (a Transformer's list of (key, value) pairs, an RNN's vector): rows come and go, and
everything that belongs to a row has to be in it. Numbers, strings and None in it are shared by all rows; any other
object has to offer `index_select(0, index)`, as tensors do, and return the state of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue import _validate
from kexue.decoding.truncation import check_truncation, truncate

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Allowed = Callable[[Tensor, Tensor], Tensor]
INF = math.inf


class Decoded(NamedTuple):
    """What `decode` found: `width` hypotheses per prompt, of a beam the best first.

    Args:
        tokens: (batch, width, n) generated tokens without the prompt, eos included; filled up with eos (0 without one).
        lengths: (batch, width) generated tokens, eos included; 0 where a beam found fewer than `width` hypotheses.
        ended: (batch, width) True: ended by eos. False: cut at `max_len` (or, with length 0, not there).
        log_probs: (batch, width) log-probability of the tokens under the model itself, in nats.
        scores: (batch, width) what the strategy went by, in nats: of a beam, the total over length ** length_penalty
            (-inf where there is no hypothesis); of a sample, the log-probability under what it was drawn from.
        steps: (batch,) steps until the strategy had its answer; for a beam possibly more than any length.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    scores: Tensor
    steps: Tensor


_STOPS = ("best", "bound", "heuristic", "full", "slots")


@torch.no_grad()
def decode(
    step: Step,
    prompt: Tensor,
    *,
    max_len: int,
    eos: int | None = None,
    state: Any = None,
    strategy: Literal["greedy", "beam", "sample"] = "greedy",
    width: int = 1,
    length_penalty: float = 0.0,
    stop: Literal["best", "bound", "heuristic", "full", "slots"] = "best",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    keep_eos: bool = False,
    allowed: Allowed | None = None,
    renormalize: bool = False,
    generator: torch.Generator | None = None,
) -> Decoded:
    r"""Continue a batch of prompts, token by token, until eos or `max_len`.

    .. math:: y_t = \arg\max p(\cdot\mid y_{<t}), \qquad y_t \sim q(\cdot\mid y_{<t}), \qquad
              \arg\max_y \textstyle\sum_t \log p(y_t\mid y_{<t}) \big/ |y|^{\text{length\_penalty}}

    for greedy decoding, sampling (q: p tempered, then truncated) and, within what a beam of `width` sees, beam search.
    No gradient is recorded.

    Source: article 7500 of kexue.fm; Freitag and Al-Onaizan, arXiv:1702.01806 (beams); Fan et al., arXiv:1805.04833
    (top-k); Holtzman et al., arXiv:1904.09751 (top-p). Beams agree with `generate` of Hugging Face transformers, except
    that one prompt makes one row in the first step, and that the default is the textbook's search, not theirs.

    A beam may stop by five rules. Under "slots" finished hypotheses keep competing for the `width` places, and it ends
    when they hold all of them. Under the others they go to a pool of the `width` best, and `width` live ones go on:

    ============= ============================================================== ==================
    `stop`        until                                                          `early_stopping`
    ============= ============================================================== ==================
    "best"        no live hypothesis can beat the best of the pool               (none)
    "bound"       none can beat any of a full pool                               "never"
    "heuristic"   the same, if they were as short as now (wrong for penalties > 0) False
    "full"        the pool is full                                               True
    ============= ============================================================== ==================

    Args:
        step: the model, see the head of this module.
        prompt: (batch, n >= 1) int64. Prompts of other lengths: another call, or a mask in the state.
        max_len: most tokens to generate, >= 1. What is cut there competes with what has ended.
        eos: token that ends a sequence; None: everything is cut at `max_len`.
        state: of the model before the prompt, batch first.
        strategy: "greedy", "beam" or "sample".
        width: hypotheses per prompt: beams, or independent samples.
        length_penalty: in [-10, 10]; more prefers longer hypotheses; 0 ranks by total, 1 by mean per token. Beam only.
        stop: the rule above. Beam only.
        temperature: > 0, divides log-probabilities. Sampling only, like the next three.
        top_k, top_p, keep_eos: see `truncate`; with `keep_eos` the eos is never cut away, so sampling stays consistent.
        allowed: constraint `allowed(tokens, prompts) -> (rows, vocab)` boolean, from the tokens generated so far
            (rows, t) and the index (rows,) of each row's prompt; `PrefixTrie.allowed` is one.
        renormalize: rank by probabilities renormalised over the allowed tokens, as constrained decoders often do,
            instead of the model's own. (Samples always come from the renormalised ones.)
        generator: source of the samples.

    Returns:
        `Decoded`. Whether a sequence ended or was cut is in `ended`, always.

    Raises:
        TypeError, ValueError: bad arguments, an option of another strategy, logits of a wrong shape or with NaN or +inf
            or nothing but -inf (the step is named), a state whose first axis is not the batch, nothing allowed.

    Complexity: max_len calls of `step` at most, on batch * width rows (sequences that are done leave the batch), and
    O(vocab) per row and step beside, with top-p O(vocab log vocab).

    Example:
        >>> table = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])  # bigrams; 2 ends
        >>> decode(lambda tokens, state: (table[tokens[:, -1]].log(), state), torch.tensor([[0]]), max_len=9, eos=2).tokens
        tensor([[[1, 2]]])
    """
    sizes = _validate.shape("prompt", prompt, "batch", "n")
    if prompt.dtype != torch.int64:
        raise TypeError(f"prompt should be int64, got {prompt.dtype}")
    if 0 in sizes.values():
        raise ValueError(f"prompt is empty: shape {tuple(prompt.shape)}")
    _validate.choice("strategy", strategy, ("greedy", "beam", "sample"))
    _validate.choice("stop", stop, _STOPS)
    _validate.integer("max_len", max_len, low=1)
    _validate.integer("width", width, low=1)
    if eos is not None:
        _validate.integer("eos", eos, low=0)
    _validate.number("length_penalty", length_penalty, low=-10.0, high=10.0)
    _validate.number("temperature", temperature, low=0.0, high=1e6, open_low=True)
    check_truncation(top_k, top_p)
    idle = {
        "beam": {"width": width > 1 and strategy == "greedy", "length_penalty": length_penalty != 0, "stop": stop != "best"},
        "sample": {
            "temperature": temperature != 1, "top_k": top_k is not None, "top_p": top_p is not None, "keep_eos": keep_eos,
            "generator": generator is not None,
        },
    }
    for kind, given in idle.items():
        if strategy != kind and any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{names}: no effect with strategy {strategy!r}, only with {kind!r}")
    if (keep_eos or stop == "slots") and eos is None:
        raise ValueError(f"{'keep_eos' if keep_eos else 'stop=' + repr(stop)} needs an eos, got None")
    model = _Model(step, state, eos, allowed, renormalize)
    if strategy == "beam":
        return _beam(model, prompt, width, max_len, float(length_penalty), stop)

    def pick(log_p: Tensor) -> tuple[Tensor, Tensor]:
        if strategy == "greedy":
            value, token = log_p.max(-1)
            return token, value
        hot = (log_p - log_p.amax(-1, keepdim=True)) / temperature
        log_q = truncate(hot, top_k, top_p, (eos,) if keep_eos and eos is not None else ()).log_softmax(-1)
        token = torch.multinomial(log_q.exp(), 1, generator=generator)
        return token[:, 0], log_q.gather(1, token)[:, 0]

    return _walk(model, prompt, width, max_len, pick)


class _Model:
    """The step function with its state, its rows, and all checks of what it returns."""

    def __init__(self, step: Step, state: Any, eos: int | None, allowed: Allowed | None, renormalize: bool) -> None:
        self.step, self.state, self.eos, self.allowed, self.renormalize = step, state, eos, allowed, renormalize
        self.calls = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (rows, vocab) of what follows `tokens` (rows, n)."""
        self.calls += 1
        out = self.step(tokens, self.state)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"step should return (logits, state), got {type(out).__name__}")
        logits, self.state = out
        if isinstance(logits, Tensor) and logits.dim() == 3:
            logits = logits[:, -1]
        vocab = _validate.shape(f"logits of step {self.calls}", logits, "rows", "vocab", rows=len(tokens))["vocab"]
        _validate.floating(logits=logits)
        if self.eos is not None and self.eos >= vocab:
            raise ValueError(f"eos should be below the vocabulary's {vocab}, got {self.eos}")
        log_p = logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
        if log_p.sum().isnan():
            bad = log_p.isnan().any(-1).nonzero()[:, 0].tolist()
            raise ValueError(f"step {self.calls}: logits of {len(bad)} of {len(log_p)} rows (first: {bad[0]}) have NaN or +inf, "
                             "or nothing but -inf")
        return log_p

    def constrain(self, log_p: Tensor, tokens: Tensor, prompts: Tensor) -> Tensor:
        """-inf for what is not allowed after `tokens` (rows, t)."""
        assert self.allowed is not None
        mask = self.allowed(tokens, prompts)
        _validate.shape("what allowed returns", mask, *log_p.shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"allowed should return a boolean tensor, got {mask.dtype}")
        log_p = log_p.masked_fill(~mask, -INF)
        if bool((stuck := log_p.amax(-1) == -INF).any()):
            row = int(stuck.nonzero()[0, 0])
            raise ValueError(f"step {self.calls}: no token that is allowed has a positive probability after "
                             f"{tokens[row].tolist()} of prompt {int(prompts[row])}")
        return log_p.log_softmax(-1) if self.renormalize else log_p

    def select(self, index: Tensor, rows: int) -> None:
        """Keep these of the `rows` rows, in this order."""
        if len(index) != rows or not torch.equal(index, torch.arange(rows, device=index.device)):
            self.state = _select(self.state, index, rows)


def _select(state: Any, index: Tensor, rows: int) -> Any:
    if isinstance(state, Tensor) and state.dim():
        if len(state) != rows:
            raise ValueError(f"state: tensors should have the batch first, expected ({rows}, ...), got {tuple(state.shape)}")
        return state.index_select(0, index)
    if state is None or isinstance(state, (Tensor, int, float, str)):
        return state
    if isinstance(state, dict):
        return {key: _select(value, index, rows) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        parts = [_select(part, index, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if hasattr(state, "index_select"):
        return state.index_select(0, index)
    raise TypeError(f"state: expected tensors in tuples, lists and dicts, or an index_select, got {type(state).__name__}")


def _walk(
    model: _Model, prompt: Tensor, width: int, max_len: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Decoded:
    """Rows that do not see each other; each leaves with its eos."""
    log_p = model(prompt)
    batch = len(prompt)
    model.select(torch.arange(batch, device=prompt.device).repeat_interleave(width), batch)
    log_p = log_p.repeat_interleave(width, 0)
    rows = torch.arange(batch * width, device=prompt.device)
    tokens = prompt.new_full((len(rows), max_len), model.eos or 0)
    lengths, ended = torch.full_like(rows, max_len), torch.zeros_like(rows, dtype=torch.bool)
    log_probs = log_p.new_zeros(2, len(rows))
    for t in range(1, max_len + 1):
        token, score = pick(log_p if model.allowed is None else model.constrain(log_p, tokens[rows, : t - 1], rows // width))
        gain = torch.stack([log_p.gather(1, token[:, None])[:, 0], score])
        tokens[rows, t - 1] = token
        log_probs[:, rows] += gain
        if model.eos is not None and bool((stop := token == model.eos).any()):
            lengths[rows[stop]], ended[rows[stop]] = t, True
            keep = (~stop).nonzero()[:, 0]
            model.select(keep, len(rows))
            rows, token = rows[keep], token[keep]
        if t == max_len or not len(rows):
            break
        log_p = model(token[:, None])
    shape = (batch, width)
    lengths = lengths.view(shape)
    log_prob, score = log_probs.view(2, *shape)
    return Decoded(tokens[:, :t].reshape(*shape, t), lengths, ended.view(shape), log_prob, score, lengths.amax(1))


class _Hypotheses(NamedTuple):
    """Some hypotheses of each prompt in work, (items, n, ...); scores are totals while they live, normalised in a pool."""

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    scores: Tensor

    def take(self, order: Tensor) -> _Hypotheses:
        """Those at `order` (items, m) along the second axis."""
        tokens = self.tokens.gather(1, order[..., None].expand(-1, -1, self.tokens.shape[-1]))
        return _Hypotheses(tokens, *(x.gather(1, order) for x in self[1:]))

    def items(self, keep: Tensor) -> _Hypotheses:
        return _Hypotheses(*(x[keep] for x in self))


def _beam(model: _Model, prompt: Tensor, width: int, max_len: int, penalty: float, stop: str) -> Decoded:
    log_p = model(prompt)
    batch = len(prompt)

    def blank(n: int) -> _Hypotheses:
        none, zero = log_p.new_full((batch, n), -INF), prompt.new_zeros(batch, n)
        return _Hypotheses(prompt.new_full((batch, n, max_len), model.eos or 0), zero, zero.bool(), none, none.clone())

    found, steps = blank(width), prompt.new_full((batch,), max_len)
    pool, live = blank(width), blank(1)  # one row per prompt: copies of it would stay copies
    live = live._replace(log_probs=torch.zeros_like(live.scores), scores=torch.zeros_like(live.scores))
    items = torch.arange(batch, device=prompt.device)
    for t in range(1, max_len + 1):
        rows = live.scores.numel()
        offsets = torch.arange(0, rows, rows // len(items), device=prompt.device)[:, None]
        grown, parents = _grow(model, live, log_p, items, t, width if stop == "slots" else 2 * width)
        if stop == "slots":
            live = grown
            pool = live._replace(scores=live.scores / live.lengths.clamp(min=1).to(log_p.dtype) ** penalty)
            done = (live.ended | (live.scores == -INF)).all(1)
        else:
            first = _Hypotheses(*(x[:, :width] for x in grown))
            if bool((closes := first.ended | (t == max_len)).any()):
                entry = first._replace(scores=(first.scores / t**penalty).masked_fill(~closes, -INF))
                pool = _Hypotheses(*(torch.cat(pair, 1) for pair in zip(pool, entry, strict=True)))
                pool = pool.take(pool.scores.topk(width).indices)
            alive = grown.scores.masked_fill(grown.ended, -INF).topk(width)
            live, parents = grown.take(alive.indices)._replace(scores=alive.values), parents.gather(1, alive.indices)
            live = live._replace(ended=torch.zeros_like(live.ended))
            done = _settled(alive.values[:, 0], pool.scores, penalty, t, max_len, stop)
        if t == max_len:
            done = torch.ones_like(done)
        source, token = offsets + parents, live.tokens[:, :, t - 1]
        if bool(done.any()):
            for all_items, these in zip(found, pool, strict=True):
                all_items[items[done]] = these[done]
            steps[items[done]] = t
            keep = ~done
            items, source, token = items[keep], source[keep], token[keep]
            pool, live = pool.items(keep), live.items(keep)
        if not len(items):
            break
        model.select(source.flatten(), rows)
        log_p = model(token.reshape(-1, 1))
    found = found.take(found.scores.argsort(dim=1, descending=True, stable=True))
    there = found.scores > -INF
    lengths = found.lengths * there
    return Decoded(
        found.tokens[:, :, : max(1, int(lengths.max()))].masked_fill(~there[..., None], model.eos or 0), lengths,
        found.ended & there, found.log_probs.masked_fill(~there, -INF), found.scores, steps,
    )


def _grow(
    model: _Model, live: _Hypotheses, log_p: Tensor, items: Tensor, t: int, count: int
) -> tuple[_Hypotheses, Tensor]:
    """The `count` best continuations of each item's live hypotheses, and the index of the one that each continues."""
    n, k = live.scores.shape
    vocab = log_p.shape[-1]
    frozen = live.ended.flatten()
    ranked = log_p
    if model.allowed is not None:
        open_rows = ((live.scores.flatten() > -INF) & ~frozen).nonzero()[:, 0]
        ranked = torch.full_like(log_p, -INF)
        ranked[open_rows] = model.constrain(
            log_p[open_rows], live.tokens.flatten(0, 1)[open_rows, : t - 1], items.repeat_interleave(k)[open_rows]
        )
    if bool(frozen.any()):  # keeps its total, through one candidate
        at_eos = F.one_hot(torch.tensor(model.eos, device=log_p.device), vocab).bool()
        stay = torch.where(at_eos, 0.0, -INF).to(log_p.dtype)
        ranked, log_p = (torch.where(frozen[:, None], stay, x) for x in (ranked, log_p))
    value, index = (live.scores[..., None] + ranked.view(n, k, vocab)).flatten(1).topk(min(count, k * vocab))
    value, index = F.pad(value, (0, count - value.shape[1]), value=-INF), F.pad(index, (0, count - index.shape[1]))
    parents, token = index // vocab, index % vocab
    old = live.take(parents)
    tokens = old.tokens
    tokens[:, :, t - 1] = token
    log_probs = old.log_probs + log_p.view(n, -1).gather(1, index)
    ended = old.ended | (token == model.eos) if model.eos is not None else old.ended
    return _Hypotheses(tokens, torch.where(old.ended, old.lengths, t), ended, log_probs, value), parents


def _settled(best: Tensor, pool: Tensor, penalty: float, t: int, max_len: int, stop: str) -> Tensor:
    """Which items are done, from the best live total (items,) and the pool's scores (items, width), sorted."""
    if stop == "full":
        done = pool[:, -1] > -INF
    else:
        attainable = best / (max_len if penalty > 0 and stop != "heuristic" else t) ** penalty
        done = attainable <= pool[:, 0 if stop == "best" else -1]
    return done | (best == -INF)
