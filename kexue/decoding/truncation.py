"""Restricting the next token: top-k, top-p, and the continuations that a prefix tree allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue import _validate


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
    check_truncation(top_k, top_p)
    for token in keep:
        _validate.integer("keep", token, low=0, high=vocab - 1)
    best = logits.detach().amax(-1)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("logits have rows with NaN or +inf, or with nothing but -inf")
    cut, inside = logits.detach(), None
    if top_k is not None and top_k < vocab:
        inside = _head(cut, cut.topk(top_k + 1).values, torch.full_like(best, top_k, dtype=torch.int64)[..., None])
        cut = cut.masked_fill(~inside, -math.inf)
    if top_p is not None and top_p < 1:
        falling = cut.sort(-1, descending=True).values
        mass = falling.softmax(-1, dtype=torch.float64).cumsum(-1)
        count = 1 + (mass[..., :-1] < top_p).sum(-1, keepdim=True)
        inside = _head(cut, falling, count)
    if inside is None:
        return logits
    if keep:
        inside[..., list(keep)] = True
    return logits.masked_fill(~inside, -math.inf)


def _head(logits: Tensor, falling: Tensor, count: Tensor) -> Tensor:
    """Where the first `count` (..., 1) logits stand, given them in falling order; among equals the earlier come first."""
    least = falling.gather(-1, count - 1)
    inside = logits >= least
    if bool((falling.gather(-1, count.clamp(max=falling.shape[-1] - 1)) == least).any()):  # a tie across the cut
        above = logits > least
        tied = inside & ~above
        inside = above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return inside


def check_truncation(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None:
        _validate.integer("top_k", top_k, low=1)
    if top_p is not None:
        _validate.number("top_p", top_p, low=0.0, high=1.0, open_low=True)


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
