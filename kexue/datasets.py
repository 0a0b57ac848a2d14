"""Data sets generated for the book, and loaders of real formats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from datetime import date
from importlib import resources
from pathlib import Path
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


class LongTail(NamedTuple):
    """Indices of a long-tailed training set and of what is left over, all int64.

    Args:
        train: (sum of counts,) in random order. rest: (m,) items that no training set of this `n_max` uses, in order.
        classes: (K,) from the most frequent to the rarest. counts: (K,) in that order.
    """

    train: Tensor
    rest: Tensor
    classes: Tensor
    counts: Tensor


def long_tail(
    labels: Tensor, n_max: int, ratio: float, *, n_min: int = 1, generator: torch.Generator | None = None
) -> LongTail:
    r"""Draw a training set whose class sizes fall geometrically, the order of the classes being random.

    $$ n_r = \max(n_\text{min}, \operatorname{round}(n_\text{max}\,\text{ratio}^{-r/(K-1)})), \qquad r = 0, \dots, K-1 $$

    Of each class, `n_max` random items are set apart for training and the others are the rest, so that the rest is as
    balanced as the data and disjoint from the training set.

    Source: the long-tailed CIFAR of Cui et al., arXiv:1901.05555.

    Args:
        labels: int64 (N,), each class of 0, ..., K - 1 at least `n_max` times, K >= 1.
        n_max: size of the most frequent class, >= 1. ratio: of the largest to the smallest size, >= 1.
        n_min: least size, in [1, n_max].
        generator: source of randomness, on the CPU; default torch's global one.

    Raises:
        TypeError, ValueError: labels of wrong shape or dtype, negative, or too few of a class; a number out of range.

    Example:
        >>> long_tail(torch.arange(300) % 3, 90, 9).counts
        tensor([90, 30, 10])
    """
    _validate.shape("labels", labels, "N")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels should be int64 class numbers, got {labels.dtype}")
    _validate.integer("n_max", n_max, low=1)
    _validate.integer("n_min", n_min, low=1, high=n_max)
    _validate.number("ratio", ratio, low=1.0, high=float("inf"), open_high=True)
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError(f"labels should be class numbers >= 0, got {int(labels.min()) if len(labels) else 'none'}")
    sizes = torch.bincount(labels)
    if bool((sizes < n_max).any()):
        few = int(sizes.argmin())
        raise ValueError(f"class {few} has {int(sizes[few])} items, expected at least n_max = {n_max}")
    K = len(sizes)
    classes = torch.randperm(K, generator=generator)
    counts = torch.tensor([max(n_min, round(n_max * ratio ** (-r / max(1, K - 1)))) for r in range(K)])
    train, rest = [], []
    for label, count in zip(classes.tolist(), counts.tolist()):
        items = (labels == label).nonzero()[:, 0]
        items = items[torch.randperm(len(items), generator=generator)]
        train.append(items[:count])
        rest.append(items[n_max:])
    order = torch.randperm(int(counts.sum()), generator=generator)
    return LongTail(torch.cat(train)[order], torch.cat(rest).sort().values, classes, counts)


def dataset_descriptions() -> dict[str, str]:
    """The descriptions of data sets that come with scikit-learn: real English prose, some 40 kB, without a download.

    Source: the files `sklearn/datasets/descr/*.rst` of the version installed, unchanged; another version may have other
    texts. They are reStructuredText, with headings, tables, links and lists of references.

    Returns:
        {file name without ".rst": text}, sorted by name.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed. FileNotFoundError: it has no such files.
    """
    try:
        folder = resources.files("sklearn.datasets.descr")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("dataset_descriptions needs scikit-learn: pip install scikit-learn") from error
    files = {file.name[:-4]: file for file in folder.iterdir() if file.name.endswith(".rst")}
    if not files:
        raise FileNotFoundError(f"scikit-learn has no descriptions (*.rst) in {folder}")
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}


class Sentences(NamedTuple):
    """What `sentences` made of some texts, nothing left out.

    Args:
        kept: sentences of a length in the range, in their order; they neither begin nor end with a space or a full stop.
        short, long: those below and above the range, in their order.
        replaced: characters of the (lower-cased) texts that became a space, and how often; white space included.
    """

    kept: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...]
    replaced: dict[str, int]


def sentences(texts: str | Iterable[str], *, low: int = 20, high: int = 120) -> Sentences:
    """Cut texts into sentences of 28 characters: a-z, the full stop, the space.

    A text is put into lower case; every other character becomes a space, and runs of spaces become one; then it is cut
    at each full stop with a space beside it, which leaves. No letter is lost: each sentence is in `kept`, `short` or
    `long`, and what became a space, digits and letters with accents among it, is counted in `replaced`. Deterministic.

    Args:
        texts: one text or several. low, high: length of a sentence to keep, in characters, 1 <= low <= high.

    Returns:
        `Sentences`.

    Raises:
        TypeError: something that is no text. ValueError: a length out of range.

    Example:
        >>> sentences("Fisher (1936) had 150 flowers. See ref. Wow!", low=4)
        Sentences(kept=('fisher had flowers', 'see ref'), short=('wow',), long=(), replaced={' ': 7, '!': 1, ...})
    """
    _validate.integer("low", low, low=1)
    _validate.integer("high", high, low=low)
    kept: list[str] = []
    short: list[str] = []
    long: list[str] = []
    replaced: Counter[str] = Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        if not isinstance(text, str):
            raise TypeError(f"texts should be a str or several, got an item of type {type(text).__name__}")
        text = text.lower()
        replaced.update(re.findall(r"[^a-z.]", text))
        for sentence in re.split(r"[. ]*(?:\. | \.)[. ]*", re.sub(r"[^a-z.]+", " ", text).strip(" .")):
            if sentence:
                (short if len(sentence) < low else long if len(sentence) > high else kept).append(sentence)
    return Sentences(tuple(kept), tuple(short), tuple(long), dict(sorted(replaced.items())))


class Calendar(NamedTuple):
    """Posts of a blog in the order of their dates.

    Args:
        days: (n,) int64, days since 1970-01-01, not decreasing. ids: (n,) int64, all different, >= 1.
        indexed: (n,) bool, whether a partial index listed the post; False where nothing is known.
    """

    days: Tensor
    ids: Tensor
    indexed: Tensor


def blog_calendar(path: str | Path | None = None) -> Calendar:
    """Dates and archive numbers of all 1295 posts of kexue.fm from 2009-03-01 to 2025-12-16, or of another blog.

    Source: the blog's archive page as of 2025-12-16; facts only, no titles. The order within a day is the archive's. `indexed`
    is known for 2018 to 2024: which posts an incomplete list, of two of the blog's categories, had.

    Args:
        path: a CSV file with the heading `date,id,indexed`: ISO dates that do not decrease, whole numbers, 1, 0 or nothing.

    Raises:
        ValueError: a bad record, named by file and line. OSError: the file cannot be read.

    Example:
        >>> blog_calendar().ids[[0, 999]].tolist()
        [12, 7782]
    """
    source = resources.files("kexue") / "data" / "blog-calendar.csv" if path is None else Path(path)
    heading, *lines = source.read_text(encoding="utf-8").splitlines() or [""]
    if heading != "date,id,indexed":
        raise ValueError(f"{source.name}:1: expected the heading 'date,id,indexed', got {heading!r}")
    days: list[int] = []
    lines_of: dict[int, int] = {}
    indexed: list[bool] = []
    for number, line in enumerate(lines, 2):
        found = re.fullmatch(r"(\d{4}-\d\d-\d\d),([1-9]\d{0,17}),([01]?)", line, re.ASCII)
        if not found:
            raise ValueError(f"{source.name}:{number}: expected date,id,indexed such as 2020-09-29,7782,0, got {line!r}")
        try:
            day = date.fromisoformat(found[1]).toordinal() - date(1970, 1, 1).toordinal()
        except ValueError as error:
            raise ValueError(f"{source.name}:{number}: {found[1]} is no date: {error}") from error
        if days and day < days[-1]:
            raise ValueError(f"{source.name}:{number}: {found[1]} comes before the date above it; expected sorted dates")
        if int(found[2]) in lines_of:
            raise ValueError(f"{source.name}:{number}: id {found[2]} was in line {lines_of[int(found[2])]} already")
        days.append(day)
        lines_of[int(found[2])] = number
        indexed.append(found[3] == "1")
    if not days:
        raise ValueError(f"{source.name}: no records below the heading")
    return Calendar(torch.tensor(days), torch.tensor([*lines_of]), torch.tensor(indexed))
