"""Generated data sets keep what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.datasets import associative_recall


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
