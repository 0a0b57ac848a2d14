"""Decoding: one `decode` for any model and strategy, truncation, prefix trees, and what makes a decoder stop.

A model enters as a step function `step(tokens, state) -> (logits, state)`: called first with the whole prompt
(batch, n) and the initial state, then with one token per row, (rows, 1). Logits are (rows, vocab), or
(rows, n, vocab), of which the last position counts. The state is any nest of tuples, lists and dicts of tensors with
*the batch as first axis* (a Transformer's list of (key, value) pairs, an RNN's vector): rows come and go, and
everything that belongs to a row has to be in it. Numbers, strings and None in it are shared by all rows; any other
object has to offer `index_select(0, index)`, as tensors do, and return the state of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue import _validate

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Allowed = Callable[[Tensor, Tensor], Tensor]
INF = math.inf


# ------------------------------------------------------------------------------------------------ decode


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
    _truncation(top_k, top_p)
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


# ---------------------------------------------------------------------------------------------- truncate


def truncate(logits: Tensor, top_k: int | None = None, top_p: float | None = None, keep: Sequence[int] = ()) -> Tensor:
    r"""Logits with -inf outside the head of the distribution: the k likeliest, then the smallest head of mass >= p.

    .. math:: \mathcal V_t = \{v_1,\dots,v_m\}, \qquad m = \min\big(k,\ \min\{j: q_1+\dots+q_j \ge p\}\big)

    with v_1, v_2, ... in order of falling probability, the earlier token first among equals, and q the distribution
    renormalised over the k. A head of exactly the mass p is enough (article 7500 asks for more than p).

    Source: Fan et al., arXiv:1805.04833 (top-k); Holtzman et al., arXiv:1904.09751 (top-p); `keep` = eos is the
    repair of Welleck et al., arXiv:2002.02492. Unlike Hugging Face's warper, exactly k tokens are left when there are ties.

    Args:
        logits: (..., vocab); -inf is allowed.
        top_k: >= 1; more than vocab is all. top_p: in (0, 1]; 1 is all. None: no truncation.
        keep: tokens that keep their logits in any case.

    Returns:
        (..., vocab).

    Raises:
        TypeError, ValueError: bad options, logits that are no floating tensor, or NaN, +inf or a row of -inf in them.

    Complexity: O(vocab) per row for top-k, O(vocab log vocab) for top-p.
    """
    vocab = _validate.shape("logits", logits, "...", "vocab")["vocab"]
    _validate.floating(logits=logits)
    _truncation(top_k, top_p)
    for token in keep:
        _validate.integer("keep", token, low=0, high=vocab - 1)
    best = logits.detach().amax(-1)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("logits have rows with NaN or +inf, or with nothing but -inf")
    cut, inside = logits.detach(), None
    if top_k is not None and top_k < vocab:
        inside = _head(cut, cut.topk(top_k + 1).values, torch.full_like(best, top_k, dtype=torch.int64)[..., None])
        cut = cut.masked_fill(~inside, -INF)
    if top_p is not None and top_p < 1:
        falling = cut.sort(-1, descending=True).values
        mass = falling.softmax(-1, dtype=torch.float64).cumsum(-1)
        count = 1 + (mass[..., :-1] < top_p).sum(-1, keepdim=True)
        inside = _head(cut, falling, count)
    if inside is None:
        return logits
    if keep:
        inside[..., list(keep)] = True
    return logits.masked_fill(~inside, -INF)


def _head(logits: Tensor, falling: Tensor, count: Tensor) -> Tensor:
    """Where the first `count` (..., 1) logits stand, given them in falling order; among equals the earlier come first."""
    least = falling.gather(-1, count - 1)
    inside = logits >= least
    if bool((falling.gather(-1, count.clamp(max=falling.shape[-1] - 1)) == least).any()):  # a tie across the cut
        above = logits > least
        tied = inside & ~above
        inside = above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return inside


def _truncation(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None:
        _validate.integer("top_k", top_k, low=1)
    if top_p is not None:
        _validate.number("top_p", top_p, low=0.0, high=1.0, open_low=True)


# ------------------------------------------------------------------------------------------------- tries


class PrefixTrie:
    """A set of token sequences, each closed by eos, and what may follow each of their prefixes.

    Walking down the allowed tokens generates exactly the keys, also those that are prefixes of other keys: eos closes
    them. Storage: one node per distinct prefix. Insertion and look-up of a key: O(its length).

    Source: article 8802 of kexue.fm (whose code leaves eos out); De Cao et al., arXiv:2010.00904.

    Args:
        keys: sequences of tokens in [0, vocab), without eos.
        vocab: size of the vocabulary. eos: token that closes a key.

    Raises:
        ValueError: a token outside the vocabulary, or eos inside a key.

    Example:
        >>> trie = PrefixTrie([[1, 2], [1, 2, 3]], vocab=5, eos=0)
        >>> trie.children([1, 2]), [1] in trie, len(trie)
        ([0, 3], False, 2)
        >>> decode(step, prompt, max_len=9, eos=0, strategy="beam", width=4, allowed=trie.allowed)  # doctest: +SKIP
    """

    def __init__(self, keys: Iterable[Sequence[int]], *, vocab: int, eos: int) -> None:
        _validate.integer("vocab", vocab, low=1)
        _validate.integer("eos", eos, low=0, high=vocab - 1)
        self.vocab, self.eos = vocab, eos
        self._root: dict[int, Any] = {}
        self._keys = 0
        for key in keys:
            self.insert(key)

    def insert(self, key: Sequence[int]) -> None:
        """Add a key; one that is there already changes nothing."""
        for token in key:
            _validate.integer("token of a key", token, low=0, high=self.vocab - 1)
            if token == self.eos:
                raise ValueError(f"a key should not contain eos = {self.eos}, which closes it; got {list(key)}")
        node = self._root
        for token in key:
            node = node.setdefault(token, {})
        self._keys += self.eos not in node
        node[self.eos] = {}

    def children(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow a prefix, sorted; none if it is not one."""
        node: dict[int, Any] = self._root
        for token in prefix:
            if token not in node:
                return []
            node = node[token]
        return sorted(node)

    def keys(self, prefix: Sequence[int] = ()) -> Iterator[tuple[int, ...]]:
        """All keys that begin with `prefix`, in lexicographic order, eos first, without their eos."""
        open_ = [tuple(prefix)]
        while open_:
            head = open_.pop()
            following = self.children(head)
            if self.eos in following:
                yield head
            open_.extend((*head, token) for token in reversed(following) if token != self.eos)

    def allowed(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """The constraint of `decode`: after tokens (rows, t), which may follow, (rows, vocab) boolean."""
        mask = torch.zeros(len(tokens), self.vocab, dtype=torch.bool)
        for row, prefix in zip(mask, tokens.tolist(), strict=True):
            row[self.children(prefix)] = True
        return mask.to(tokens.device)

    def __contains__(self, key: Sequence[int]) -> bool:
        return self.eos in self.children(key)

    def __len__(self) -> int:
        """Number of keys."""
        return self._keys


# ------------------------------------------------------------------------------------------ heads that end


class SelfTerminatingHead(nn.Module):
    r"""Output layer whose eos probability has a floor that rises to 1, so that every decoder stops.

    .. math:: p_t(e) \ge 1-(1-\varepsilon)^t, \qquad p_t(v) = (1-p_t(e))\,\operatorname{softmax}(Wh_t+b)_v
              \quad (v \ne e,\ \text{softmax over } v \ne e)

    with :math:`a_t` the logit of eos, sigma the logistic function and t = 1 for the first position,

    .. math:: \text{st:}\quad 1-p_t(e) = \prod_{i\le t}(1-\varepsilon)\,\sigma(a_i), \qquad
              \text{nmst:}\quad 1-p_t(e) = (1-\varepsilon)^t\,\sigma(-a_t).

    st never lets the eos probability fall; nmst only keeps the floor. Note the sign: a large :math:`a_t` goes on in st
    and ends in nmst. Computed in the log domain, without cancellation.

    Source: article 7500 of kexue.fm, eqs. (3), (4), which counts positions from 0; Welleck et al., arXiv:2002.02492
    (st); Choi et al., arXiv:2210.00660 (nmst). The softmax over the other tokens leaves eos out; else nothing sums to 1.

    Args:
        d: width of the states. vocab: tokens, eos included. eos: its index. eps: in (0, 1).
        kind: "st" or "nmst".

    Raises:
        ValueError: eps outside (0, 1), eos outside the vocabulary, an unknown kind.
    """

    def __init__(
        self, d: int, vocab: int, eos: int, eps: float, kind: Literal["st", "nmst"] = "st", *,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _validate.integer("d", d, low=1)
        _validate.integer("vocab", vocab, low=2)
        _validate.integer("eos", eos, low=0, high=vocab - 1)
        _validate.choice("kind", kind, ("st", "nmst"))
        self.eos, self.kind, self._keep = eos, kind, _log_keep(eps)
        self.linear = nn.Linear(d, vocab, device=device, dtype=dtype)

    def forward(self, h: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next token at each position.

        Args:
            h: (batch, n, d) states. carry: (batch,) from the call on the positions before; None: there are none.

        Returns:
            (batch, n, vocab) log-probabilities, and the carry to go on with (a state for `decode`: batch first).

        Raises:
            TypeError, ValueError: mismatched shapes or dtypes, non-finite states.
        """
        sizes = _validate.shape("h", h, "batch", "n", "d", d=self.linear.in_features)
        _validate.floating(h=h, weight=self.linear.weight)
        _validate.finite(h=h)
        if carry is None:
            carry = h.new_zeros(sizes["batch"])
        _validate.shape("carry", carry, "batch", batch=sizes["batch"])
        logits = self.linear(h)
        at_eos = torch.arange(logits.shape[-1], device=h.device) == self.eos
        others = logits.masked_fill(at_eos, -INF).log_softmax(-1)
        if self.kind == "st":
            survive = carry[:, None] + (self._keep + F.logsigmoid(logits[..., self.eos])).cumsum(1)
            carry = survive[:, -1]
        else:
            t = carry[:, None] + torch.arange(1, sizes["n"] + 1, device=h.device, dtype=h.dtype)
            survive = self._keep * t + F.logsigmoid(-logits[..., self.eos])
            carry = t[:, -1]
        ends = (-survive.expm1()).log()
        return torch.where(at_eos, ends[..., None], others + survive[..., None]), carry


def greedy_limit(eps: float) -> int:
    r"""Steps after which greedy decoding of a self-terminating head has ended, whatever the parameters.

    .. math:: t^* = \lfloor \ln 2 / (-\ln(1-\varepsilon)) \rfloor + 1,

    the first t with :math:`1-(1-\varepsilon)^t > 1/2`. A beam of width k that stops by "full" or "slots" needs k - 1
    more, by "best" (without length penalty) none. Article 7500 of kexue.fm counts from 0.

    Raises:
        ValueError: eps outside (0, 1).
    """
    return math.floor(math.log(2) / -_log_keep(eps)) + 1


def mean_length_limit(eps: float) -> float:
    r"""Largest mean length, eos included, of samples from a self-terminating head, whatever the parameters.

    .. math:: E\,T \le \sum_{t\ge0}(1-\varepsilon)^{t(t+1)/2} \approx \sqrt{\pi/2\varepsilon}

    From eps = 1 - 1/e downward the sum is taken on the other side of Poisson's formula, where two terms suffice:
    with :math:`\lambda = -\ln(1-\varepsilon)`, :math:`e^{\lambda/8}\sqrt{\pi/2\lambda}\,(1-2e^{-2\pi^2/\lambda}+\dots)`.

    Raises:
        ValueError: eps outside (0, 1).
    """
    rate = -_log_keep(eps)
    if rate >= 1:
        return math.fsum(math.exp(-rate * t * (t + 1) / 2) for t in range(12))
    return math.exp(rate / 8) * math.sqrt(math.pi / (2 * rate)) * (1 - 2 * math.exp(-2 * math.pi**2 / rate))


def eos_floor(weight: Tensor, bias: Tensor, eos: int, radius: float) -> Tensor:
    r"""Lower bound of a softmax layer's eos probability over all states of bounded norm, so that sampling stops.

    .. math:: p(e) \ge \varepsilon = \Big[\sum_v \exp\big(B\,\|w_v-w_e\| + b_v-b_e\big)\Big]^{-1}, \qquad \|h\|\le B

    Samples then end after 1 / eps tokens in the mean at most. A layer norm has B = sqrt(d); with gain g and shift s,
    B = max |g| sqrt(d) + |s|.

    Source: Welleck et al., arXiv:2002.02492, theorem 3.3, which shows by compactness that some eps exists.

    Args:
        weight: (..., vocab, d). bias: (..., vocab). eos: index. radius: B >= 0.

    Returns:
        (...) the bound.

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite entries, eos outside the vocabulary, radius < 0.
    """
    vocab = _validate.shape("weight", weight, "...", "vocab", "d")["vocab"]
    _validate.shape("bias", bias, "...", "vocab", vocab=vocab)
    _validate.floating(weight=weight, bias=bias)
    _validate.finite(weight=weight, bias=bias)
    _validate.integer("eos", eos, low=0, high=vocab - 1)
    _validate.number("radius", radius, low=0.0)
    gap = radius * (weight - weight[..., eos, None, :]).norm(dim=-1) + bias - bias[..., eos, None]
    return (-gap.logsumexp(-1)).exp()


def _log_keep(eps: float) -> float:
    """log(1 - eps)."""
    _validate.number("eps", eps, low=0.0, high=1.0, open_low=True, open_high=True)
    return math.log1p(-eps)


# ------------------------------------------------------------------------------------------------ chains


def termination_probability(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Probability that a Markov chain is ever absorbed, from each state: the smallest solution h >= 0 of

    .. math:: h = Qh + b, \qquad h_{\text{absorbing}} = 1,

    with Q the transitions among the other states and b those into the absorbing ones. States that cannot reach one get
    0 and are left out of the linear system, which would be singular with them.

    Source: Kemeny and Snell, *Finite Markov chains*, ch. 3. A bigram model with truncation is such a chain.

    Args:
        P: (..., n, n) transition probabilities, rows sum to 1. The rows of absorbing states are not used.
        absorbing: their indices; for a language model, eos.

    Returns:
        (..., n), 1 at the absorbing states.

    Raises:
        TypeError, ValueError: rows that are not stochastic, indices outside, a system singular up to rounding.

    Complexity: O(n^3) per matrix.
    """
    P, ends, reach = _chain(P, absorbing)
    into = P[..., ends].sum(-1)
    return _solve(P, reach & ~ends, into[..., None])[..., 0].clamp(0, 1).masked_fill(ends, 1.0)


def expected_length(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Mean number of steps to absorption, from each state: (I - Q)^{-1} 1, infinite where absorption is not certain.

    Arguments, errors and cost as of `termination_probability`. Returns (..., n), 0 at the absorbing states. For a
    language model it is the mean number of tokens, eos included, after a given token.
    """
    P, ends, reach = _chain(P, absorbing)
    lost = _reach(P.masked_fill(ends[:, None], 0), ~reach)
    steps = _solve(P, ~lost & ~ends, torch.ones_like(P[..., :1]))[..., 0]
    return steps.masked_fill(lost, INF)


def fundamental_matrix(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Mean number of visits to each transient state before absorption, :math:`N = (I-Q)^{-1} = \sum_t Q^t`.

    Arguments and cost as of `termination_probability`. Returns (..., m, m), the transient states in their order, the
    start included in the count.

    Raises:
        ValueError: also if some state cannot reach an absorbing one.
    """
    P, ends, reach = _chain(P, absorbing)
    if not bool(reach.all()):
        raise ValueError(f"I - Q is singular: {int((~reach).sum())} states cannot reach an absorbing one")
    inner = (~ends).nonzero()[:, 0]
    return _solve(P, reach & ~ends, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P))[
        ..., inner[:, None], inner
    ]


def survival(P: Tensor, absorbing: int | Sequence[int], steps: int) -> Tensor:
    r"""P(T > t) for t = 0, ..., steps: the probability not to be absorbed by then, :math:`Q^t 1`, from each state.

    Arguments and errors as of `termination_probability`; `steps` >= 0. Returns (..., n, steps + 1), 0 at the absorbing
    states, in O(steps n^2).
    """
    _validate.integer("steps", steps, low=0)
    P, ends, _ = _chain(P, absorbing)
    alive = torch.ones_like(P[..., :1]).masked_fill(ends[:, None], 0)
    Q = P.masked_fill(ends[:, None] | ends, 0)
    out = [alive]
    for _ in range(steps):
        out.append(Q @ out[-1])
    return torch.cat(out, -1)


def repetition_index(P: Tensor) -> Tensor:
    r"""How much a bigram model repeats itself: expected number of immediate repetitions, summed over starting tokens.

    .. math:: R = \sum_{k\ge1}\operatorname{tr}(P\circ P)^k = \operatorname{tr}\,M(I-M)^{-1}, \qquad M = P\circ P

    with the entrywise product: :math:`[(P\circ P)^k]_{ww}` is the probability that k tokens from w on come twice, and w
    again. R is no probability and may exceed 1; R / n is the expected count from a uniform start. Infinite where a cycle
    of sure transitions exists.

    Source: article 8128 of kexue.fm; Fu et al., arXiv:2012.14660, who write P^{2k} for the entrywise square.

    Args:
        P: (..., n, n) >= 0, rows sum to at most 1 (eos left out).

    Returns:
        (...) R >= 0.

    Raises:
        TypeError, ValueError: entries or row sums that are no probabilities, a system singular up to rounding.
    """
    n = _validate.shape("P", P, "...", "n", "n")["n"]
    _validate.stochastic("P", P, sub=True)
    sure = (P >= 1).to(P.dtype)
    path = torch.ones_like(P[..., :1])
    for _ in range(n):
        path = sure @ path
    cyclic = path.amax((-2, -1)) > 0
    M = (P * P).masked_fill(cyclic[..., None, None], 0)
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    R = torch.linalg.solve(eye - M, M).diagonal(dim1=-2, dim2=-1).sum(-1)
    return R.masked_fill(cyclic, INF)


def _chain(P: Tensor, absorbing: int | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix, which states are absorbing (n,), and which can reach one (..., n)."""
    n = _validate.shape("P", P, "...", "n", "n")["n"]
    _validate.stochastic("P", P)
    indices = [absorbing] if isinstance(absorbing, int) else list(absorbing)
    if not indices:
        raise ValueError("absorbing is empty")
    for index in indices:
        _validate.integer("absorbing", index, low=0, high=n - 1)
    ends = torch.zeros(n, dtype=torch.bool, device=P.device)
    ends[indices] = True
    return P, ends, _reach(P, ends.expand(P.shape[:-1]))


def _reach(P: Tensor, target: Tensor) -> Tensor:
    """Which states (..., n) have a path of positive probability to the target (..., n), or lie in it."""
    edges = (P > 0).to(P.dtype)
    while True:
        further = target | ((edges @ target[..., None].to(P.dtype))[..., 0] > 0)
        if torch.equal(further, target):
            return target
        target = further


def _solve(P: Tensor, inner: Tensor, right: Tensor) -> Tensor:
    """(I - Q)^{-1} right on the states `inner` (..., n), 0 elsewhere; the diagonal 1 - P_ii from what leaves i."""
    Q = P.masked_fill(~(inner[..., None] & inner[..., None, :]), 0)
    own = torch.eye(P.shape[-1], dtype=torch.bool, device=P.device)
    leaves = P.masked_fill(own, 0).sum(-1).masked_fill(~inner, 1)
    A = torch.diag_embed(leaves) - Q.masked_fill(own, 0)
    out, info = torch.linalg.solve_ex(A, right.masked_fill(~inner[..., None], 0))
    if bool(info.any()) or not bool(torch.isfinite(out).all()):
        raise ValueError("P: absorption is so slow that the linear system is singular up to rounding")
    return out
