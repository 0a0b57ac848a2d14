"""Generated data sets keep what they promise."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.datasets import associative_recall, dataset_descriptions, long_tail, sentences


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 10), st.integers(1, 20), st.integers(0, 2**31))
def test_every_question_has_its_answer_in_the_sequence(batch, pairs, spare, queries, seed):
    queries = min(queries, pairs)
    task = associative_recall(
        batch, pairs, vocabulary=pairs + spare, values=5, queries=queries, generator=torch.Generator().manual_seed(seed)
    )
    assert [tuple(x.shape) for x in task] == [(batch, pairs)] * 2 + [(batch, queries)] * 2
    for row in range(batch):
        memory = dict(zip(task.keys[row].tolist(), task.values[row].tolist()))
        assert len(memory) == pairs
        assert [memory[q] for q in task.queries[row].tolist()] == task.answers[row].tolist()
        assert len(set(task.queries[row].tolist())) == queries
    assert 0 <= int(task.keys.min()) <= int(task.keys.max()) < pairs + spare
    assert 0 <= int(task.values.min()) <= int(task.values.max()) < 5


def test_keys_values_and_questions_are_uniform_and_reproducible():
    task = associative_recall(4000, 4, vocabulary=8, values=4, queries=2, generator=torch.Generator().manual_seed(0))
    again = associative_recall(4000, 4, vocabulary=8, values=4, queries=2, generator=torch.Generator().manual_seed(0))
    assert all(bool((a == b).all()) for a, b in zip(task, again))
    asked = (task.keys[:, :, None] == task.queries[:, None, :]).any(-1).double().mean(0)
    for counts, share in ((task.keys.flatten().bincount(), 1 / 8), (task.values.flatten().bincount(), 1 / 4)):
        assert float((counts / counts.sum() - share).abs().max()) < 6 * (share / 16000) ** 0.5
    assert float((asked - 0.5).abs().max()) < 6 * 0.5 / 4000**0.5


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"pairs": 0}, {"pairs": 65}, {"queries": 0}, {"queries": 13}, {"values": 1}, {"vocabulary": 0}, {"batch": 2.0},
])
def test_sizes_out_of_range_are_named(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        associative_recall(**{"batch": 2, "pairs": 12, **sizes})


def slow_sentences(text):
    """Character by character: pieces end at a full stop beside anything but letters and full stops, or at the ends."""
    pieces, piece = [], ""
    marks = "".join(c if c in "abcdefghijklmnopqrstuvwxyz." else " " for c in text.lower())
    for token in marks.split():
        body = token.strip(".")
        if token.startswith("."):
            pieces, piece = [*pieces, piece], ""
        if body:
            piece = f"{piece} {body}" if piece else body
        if token.endswith("."):
            pieces, piece = [*pieces, piece], ""
    return [p for p in [*pieces, piece] if p]


@given(st.text(st.sampled_from("abZ. .,\n3é中"), max_size=60), st.integers(1, 6), st.integers(0, 6))
def test_sentences_are_the_slow_ones_and_lose_no_letter(text, low, more):
    made = sentences(text, low=low, high=low + more)
    slow = slow_sentences(text)
    assert list(made.kept) == [s for s in slow if low <= len(s) <= low + more]
    assert list(made.short) == [s for s in slow if len(s) < low]
    assert list(made.long) == [s for s in slow if len(s) > low + more]
    everything = made.kept + made.short + made.long
    assert Counter("".join(re.findall("[a-z]", text.lower()))) == Counter("".join(everything).replace(" ", "").replace(".", ""))
    assert sum(made.replaced.values()) == sum(c not in "abcdefghijklmnopqrstuvwxyz." for c in text.lower())
    assert all(re.fullmatch(r"[a-z]([a-z .]*[a-z])?", s) and ". " not in s and "  " not in s for s in everything)
    again = sentences(". ".join(everything), low=low, high=low + more)
    assert Counter(again.kept + again.short + again.long) == Counter(everything)


def test_several_texts_are_their_concatenation_and_nothing_is_nothing():
    one, two = sentences("A cat sat. On", low=1), sentences("the mat 7 times.", low=1)
    both = sentences(["A cat sat. On", "the mat 7 times."], low=1)
    assert both.kept == one.kept + two.kept == ("a cat sat", "on", "the mat times")
    assert sentences([]) == sentences("") == ((), (), (), {})


def test_descriptions_are_scikit_learns_files_unchanged():
    texts = dataset_descriptions()
    assert list(texts) == sorted(texts) and {"iris", "diabetes", "wine_data"} <= set(texts)
    folder = resources.files("sklearn.datasets.descr")
    assert all(text.encode() == (folder / f"{name}.rst").read_bytes().replace(b"\r\n", b"\n") for name, text in texts.items())
    made = sentences(texts.values())
    assert "the dataset is taken from fisher s paper" in made.kept
    assert 150 < len(made.kept) < 250 and 10_000 < sum(map(len, made.kept)) < 15_000
    assert made == sentences(dataset_descriptions().values())


def test_a_missing_scikit_learn_is_named(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(resources, "files", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        dataset_descriptions()
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match="no descriptions"):
        dataset_descriptions()


@pytest.mark.parametrize("sizes", [{"low": 0}, {"low": 2.0}, {"high": 19}, {"high": True}])
def test_bad_lengths_are_named(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        sentences("text", **sizes)


@pytest.mark.parametrize("texts", [[b"bytes"], ["text", None], b"bytes"])
def test_what_is_no_text_is_named(texts):
    with pytest.raises(TypeError, match="texts"):
        sentences(texts)


@given(st.integers(1, 6), st.integers(1, 20), st.floats(1, 50), st.integers(0, 2**31))
def test_long_tails_have_their_sizes_and_share_nothing_with_the_rest(K, n_max, ratio, seed):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(K * (n_max + 3))[torch.randperm(K * (n_max + 3), generator=gen)] % K
    drawn = long_tail(labels, n_max, ratio, generator=gen)
    sizes = torch.bincount(labels[drawn.train], minlength=K)
    assert sizes[drawn.classes].tolist() == drawn.counts.tolist()
    assert drawn.counts[0] == n_max and drawn.counts.tolist() == sorted(drawn.counts.tolist(), reverse=True)
    assert drawn.counts[-1] == (max(1, round(n_max / ratio)) if K > 1 else n_max)
    assert torch.bincount(labels[drawn.rest], minlength=K).tolist() == [3] * K
    both = torch.cat([drawn.train, drawn.rest])
    assert len(both.unique()) == len(both)
    again = long_tail(labels, n_max, ratio, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.train, long_tail(labels, n_max, ratio, generator=torch.Generator().manual_seed(1)).train)


def test_long_tail_of_the_chapters_and_a_floor():
    labels = torch.arange(2000) % 10
    assert long_tail(labels, 130, 50).counts.tolist() == [130, 84, 54, 35, 23, 15, 10, 6, 4, 3]
    assert long_tail(labels, 130, 50, n_min=20).counts.tolist() == [130, 84, 54, 35, 23, 20, 20, 20, 20, 20]


@pytest.mark.parametrize(
    ("labels", "numbers", "error", "message"),
    [
        (torch.zeros(2, 2).long(), (1, 1), ValueError, r"labels: expected shape \(N\)"),
        (torch.zeros(4), (1, 1), TypeError, r"labels should be int64 class numbers, got torch.float32"),
        (torch.tensor([-1, 0]), (1, 1), ValueError, r"labels should be class numbers >= 0, got -1"),
        (torch.zeros(0).long(), (1, 1), ValueError, r"labels should be class numbers >= 0, got none"),
        (torch.tensor([0, 0, 1]), (2, 1), ValueError, r"class 1 has 1 items, expected at least n_max = 2"),
        (torch.tensor([0, 1]), (0, 1), ValueError, r"n_max should be an integer >= 1, got 0"),
        (torch.tensor([0, 1]), (1, 0.5), ValueError, r"ratio should be a number in \[1.0, inf\), got 0.5"),
    ],
)
def test_bad_long_tails_are_named(labels, numbers, error, message):
    with pytest.raises(error, match=message):
        long_tail(labels, *numbers)
    with pytest.raises(ValueError, match=r"n_min should be an integer in \[1, 2\]"):
        long_tail(torch.zeros(5).long(), 2, 1, n_min=3)
