"""Data sets generated for the book, and loaders of real formats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kexue import _validate


class Recall(NamedTuple):
    """A batch of associative recall, all int64: keys, values (batch, pairs); queries, answers (batch, queries)."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    answers: Tensor


def associative_recall(
    batch: int, pairs: int, *, vocabulary: int = 64, values: int = 16, queries: int = 8, generator: torch.Generator | None = None
) -> Recall:
    """Draw (key, value) pairs and ask for the values of some of the keys again.

    Keys are distinct within a sequence and uniform in the vocabulary; values are independent and uniform;
    queries are distinct positions of the sequence, uniform. Guessing is right once in `values` times.

    Source: the task of Ba et al., arXiv:1610.06258, section 4.1, and of "Zoology", arXiv:2312.04927, without the text around it.

    Args:
        batch: sequences, >= 1. pairs: 1 to `vocabulary`. queries: 1 to `pairs`.
        vocabulary: number of keys. values: number of values, >= 2.
        generator: source of randomness, on the CPU; default torch's global one.

    Raises:
        ValueError: a size out of range.

    Example:
        >>> task = associative_recall(2, 4, queries=3)
        >>> bool((task.values[task.keys == task.queries[:, :1]] == task.answers[:, 0]).all())
        True
    """
    _validate.integer("batch", batch, low=1)
    _validate.integer("vocabulary", vocabulary, low=1)
    _validate.integer("pairs", pairs, low=1, high=vocabulary)
    _validate.integer("queries", queries, low=1, high=pairs)
    _validate.integer("values", values, low=2)
    keys = torch.rand(batch, vocabulary, generator=generator).argsort(-1)[:, :pairs]
    drawn = torch.randint(values, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator).argsort(-1)[:, :queries]
    return Recall(keys, drawn, keys.gather(-1, asked), drawn.gather(-1, asked))
