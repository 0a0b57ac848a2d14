"""Decoding against Hugging Face's `generate` and warpers, slow beams, enumeration, closed forms and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from kexue.decoding import (
    PrefixTrie,
    SelfTerminatingHead,
    decode,
    eos_floor,
    expected_length,
    fundamental_matrix,
    greedy_limit,
    mean_length_limit,
    repetition_index,
    survival,
    termination_probability,
    truncate,
)

F64 = torch.float64
PENALTIES = (0.0, 1.0, 0.6, -1.0)
HF_STOPS = {"full": True, "heuristic": False, "bound": "never"}


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    a, b = a.detach(), b.detach()
    assert a.numel() == 0 or float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


class Hashed:
    """A random model in which every prefix has its own distribution; token 0 ends. Its state is a hash of the prefix."""

    def __init__(self, vocab: int, seed: int, floor: float = 0.0, damp: float = 0.0, size: int = 1009) -> None:
        gen = torch.Generator().manual_seed(seed)
        logits = 1.5 * torch.randn(size, vocab, dtype=F64, generator=gen)
        logits[:, 0] -= damp
        p = logits.softmax(-1) * (1 - floor)
        p[:, 0] += floor
        self.table, self.size, self.calls = p.log(), size, 0

    def __call__(self, tokens, state):
        self.calls += 1
        hashed = torch.zeros(len(tokens), dtype=torch.int64) if state is None else state["hash"][0]
        for token in tokens.T:
            hashed = (hashed * 37 + token + 1) % self.size
        return self.table[hashed], {"hash": (hashed, None), "kind": "hashed", "n": 1}

    def log_p(self, prefix) -> list[float]:
        hashed = 0
        for token in prefix:
            hashed = (hashed * 37 + token + 1) % self.size
        return self.table[hashed].tolist()

    def total(self, prompt, tokens) -> float:
        return sum(self.log_p([*prompt, *tokens[:i]])[token] for i, token in enumerate(tokens))


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]
    total: float

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] == 0

    def score(self, penalty: float) -> float:
        return self.total / len(self.tokens) ** penalty


def slow_beam(model, prompt, width, max_len, penalty, stop):
    """Beam search with lists, as the text of the article says it; returns the best hypothesis and the steps."""
    live, pool = [Hypothesis((), 0.0)], []
    for t in range(1, max_len + 1):
        options = [
            Hypothesis((*h.tokens, token), h.total + gain)
            for h in live if not h.ended for token, gain in enumerate(model.log_p([*prompt, *h.tokens]))
        ]
        if stop == "slots":
            options += [h for h in live if h.ended]
        options.sort(key=lambda h: -h.total)
        if stop == "slots":
            live = options[:width]
            if all(h.ended for h in live):
                return max(live, key=lambda h: h.score(penalty)), t
            continue
        pool += [h for h in options[:width] if h.ended]
        pool = sorted(pool, key=lambda h: -h.score(penalty))[:width]
        live = [h for h in options if not h.ended][:width]
        longest = max_len if penalty > 0 and stop != "heuristic" else t
        hope = live[0].total / longest**penalty
        full = len(pool) == width
        if t < max_len and (
            (stop == "full" and full)
            or (stop in ("heuristic", "bound") and full and pool[-1].score(penalty) >= hope)
            or (stop == "best" and pool and pool[0].score(penalty) >= hope)
        ):
            return pool[0], t
    if stop != "slots":
        pool += [h for h in options[:width] if not h.ended]
    return max(live if stop == "slots" else pool, key=lambda h: h.score(penalty)), max_len


# ----------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1,
                        pad_token_id=1, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        model.lm_head.weight[1].mul_(0.65)
    return model


class Cached:
    """Hugging Face's cache as a state: an object of its own that offers `index_select`."""

    def __init__(self, cache) -> None:
        self.cache = cache

    def index_select(self, _, index):
        self.cache.reorder_cache(index)
        return self


def cached_step(model):
    def step(tokens, state):
        out = model(tokens, past_key_values=state and state.cache, use_cache=True)
        return out.logits, Cached(out.past_key_values)

    return step


def prompts(seed: int, batch: int = 6, n: int = 3, low: int = 2, high: int = 9) -> torch.Tensor:
    return torch.randint(low, high, (batch, n), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, max_len, **options):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_len,
                          return_dict_in_generate=True, output_scores=True, **options)


def test_greedy_is_hugging_faces(gpt2):
    mixed = []
    for seed in range(4):
        prompt = prompts(seed)
        ours = decode(cached_step(gpt2), prompt, max_len=10, eos=1)
        theirs = generate(gpt2, prompt, 10, do_sample=False)
        new = theirs.sequences[:, 3:]
        assert torch.equal(ours.tokens[:, 0], new)
        per_token = gpt2.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
        inside = torch.arange(new.shape[1]) < ours.lengths
        close(ours.log_probs[:, 0], (per_token * inside).sum(-1), 1e-5)
        close(ours.scores, ours.log_probs, 0)
        mixed += ours.ended.flatten().tolist()
    assert 0 < sum(mixed) < len(mixed)


@pytest.mark.parametrize("stop", HF_STOPS)
def test_beams_are_hugging_faces(gpt2, stop):
    mixed = []
    for width, penalty in itertools.product((2, 3, 5), PENALTIES):
        prompt = prompts(width)
        options = {"width": width, "length_penalty": penalty, "stop": stop}
        ours = decode(cached_step(gpt2), prompt, max_len=9, eos=1, strategy="beam", **options)
        theirs = generate(gpt2, prompt, 9, do_sample=False, num_beams=width, num_return_sequences=width,
                          length_penalty=penalty, early_stopping=HF_STOPS[stop])
        assert torch.equal(ours.tokens, theirs.sequences[:, 3:].view(len(prompt), width, -1))
        close(ours.scores, theirs.sequences_scores.view(len(prompt), width), 1e-5)
        close(ours.log_probs, ours.scores * ours.lengths**penalty, 1e-5)
        mixed += ours.ended.flatten().tolist()
    assert 0.2 < sum(mixed) / len(mixed) < 0.999


@pytest.mark.parametrize("renormalize", [False, True])
def test_constrained_beams_are_hugging_faces(gpt2, renormalize):
    trie = PrefixTrie([[2, 3], [2, 3, 4], [5], [5, 6, 7, 8], [6, 6], [2, 8, 8, 3]], vocab=9, eos=1)
    for seed in range(3):
        prompt = prompts(seed)
        ours = decode(cached_step(gpt2), prompt, max_len=6, eos=1, strategy="beam", width=3, allowed=trie.allowed,
                      renormalize=renormalize, stop="bound")
        theirs = generate(
            gpt2, prompt, 6, do_sample=False, num_beams=3, num_return_sequences=3, length_penalty=0.0, early_stopping="never",
            prefix_allowed_tokens_fn=lambda _, ids: trie.children(ids[3:].tolist()) or [1], renormalize_logits=renormalize,
        )
        assert torch.equal(ours.tokens[:, 0], theirs.sequences[:, 3:].view(6, 3, -1)[:, 0, : ours.tokens.shape[-1]])
        close(ours.scores[:, 0], theirs.sequences_scores.view(6, 3)[:, 0], 1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (7, 0.5), (1, None), (None, 1e-9), (None, 0.999)])
def test_truncation_is_hugging_faces(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 50, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2
    theirs = logits
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(truncate(logits, top_k, top_p), theirs)


def test_our_transformers_are_steps(gpt2):
    from transformers import T5Config, T5ForConditionalGeneration

    from kexue.transformer import from_hf_gpt2, from_hf_t5

    prompt = prompts(0)
    ours = from_hf_gpt2(gpt2)

    def no_cache(tokens, seen):
        seen = tokens if seen is None else torch.cat([seen, tokens], 1)
        return ours(seen), seen

    for options in ({}, {"strategy": "beam", "width": 3, "length_penalty": 0.7, "stop": "full"}):
        cached, hf = (decode(step, prompt, max_len=9, eos=1, **options) for step in (ours.step, cached_step(gpt2)))
        whole = decode(no_cache, prompt, max_len=9, eos=1, **options)
        assert torch.equal(cached.tokens, hf.tokens)
        assert torch.equal(cached.tokens, whole.tokens)
        close(cached.scores, hf.scores, 1e-5)
        close(cached.scores, whole.scores, 1e-5)
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(
        vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=1,
        pad_token_id=0,
    )).eval()
    with torch.no_grad():
        for parameter in t5.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    pair, source = from_hf_t5(t5), prompts(1, batch=5, n=7)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 7, 1])[:, None]
    found = decode(pair.step, torch.zeros(5, 1, dtype=torch.int64), state=pair.start(source, mask), max_len=8, eos=1,
                   strategy="beam", width=3, length_penalty=1.0, stop="heuristic")
    theirs = t5.generate(source, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, num_beams=3,
                         num_return_sequences=3)
    inside = torch.arange(found.tokens.shape[-1]) < found.lengths[..., None]
    assert torch.equal(found.tokens * inside, theirs[:, 1:].view(5, 3, -1) * inside)
    assert bool(found.ended.any())


# ---------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("stop", ["slots", "full", "heuristic", "bound", "best"])
def test_beams_are_the_slow_ones(stop):
    ends = []
    for seed, width, penalty in itertools.product(range(4), (1, 2, 3, 5), PENALTIES):
        model = Hashed(4, seed, damp=1.5)
        prompt = prompts(seed, batch=3, n=2, high=4)
        found = decode(model, prompt, max_len=7, eos=0, strategy="beam", width=width, length_penalty=penalty, stop=stop)
        assert model.calls == int(found.steps.max())
        for i in range(3):
            best, steps = slow_beam(model, prompt[i].tolist(), width, 7, penalty, stop)
            tokens = found.tokens[i, 0, : int(found.lengths[i, 0])].tolist()
            assert tokens == list(best.tokens)
            assert int(found.steps[i]) == steps
            assert bool(found.ended[i, 0]) == best.ended
            assert math.isclose(float(found.scores[i, 0]), best.score(penalty), rel_tol=1e-12)
            ends.append(best.ended)
    assert 0 < sum(ends) < len(ends)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("stop", ["bound", "best"])
def test_full_width_is_the_best_of_all_sequences(stop, penalty):
    max_len = 4
    for seed in range(8):
        model = Hashed(3, seed)
        every = [
            Hypothesis(t, model.total([1], t)) for n in range(1, max_len + 1) for t in itertools.product(range(3), repeat=n)
            if 0 not in t[:-1] and (t[-1] == 0 or n == max_len)
        ]
        every.sort(key=lambda h: -h.score(penalty))
        found = decode(model, torch.tensor([[1]]), max_len=max_len, eos=0, strategy="beam", width=48, length_penalty=penalty,
                       stop=stop)
        there = int((found.lengths > 0).sum())
        assert there == len(every) if stop == "bound" else there > 0
        for i in range(there if stop == "bound" else 1):
            assert found.tokens[0, i, : int(found.lengths[0, i])].tolist() == list(every[i].tokens)
            assert math.isclose(float(found.scores[0, i]), every[i].score(penalty), rel_tol=1e-12)
        assert bool((found.scores[0, there:] == -math.inf).all())
        assert not bool(found.ended[0, there:].any())


def test_greedy_is_beam_one_is_top_one_sampling():
    for seed in range(20):
        model, prompt = Hashed(5, seed, floor=0.1), prompts(seed, batch=4, n=2, high=5)
        runs = [
            decode(model, prompt, max_len=12, eos=0),
            decode(model, prompt, max_len=12, eos=0, strategy="beam"),
            decode(model, prompt, max_len=12, eos=0, strategy="sample", top_k=1),
        ]
        for run in runs:
            assert torch.equal(run.tokens, runs[0].tokens)
            assert torch.equal(run.lengths, runs[0].lengths)
            assert torch.equal(run.ended, runs[0].ended)
            close(run.log_probs, runs[0].log_probs)
        assert bool((runs[2].scores == 0).all())
        for row, length, ended in zip(runs[0].tokens[:, 0], runs[0].lengths[:, 0], runs[0].ended[:, 0], strict=True):
            assert (row == 0).nonzero()[:1].flatten().tolist() == ([int(length) - 1] if ended else [] if length == 12 else None)
            assert bool((row[int(length) :] == 0).all())


def test_a_batch_is_its_prompts():
    model, prompt = Hashed(4, 3, floor=0.15), prompts(0, batch=6, n=2, high=4)
    for options in ({}, {"strategy": "beam", "width": 3}, {"strategy": "beam", "width": 3, "stop": "slots"}):
        together = decode(model, prompt, max_len=9, eos=0, **options)
        for i in range(6):
            alone = decode(model, prompt[i : i + 1], max_len=9, eos=0, **options)
            n = alone.tokens.shape[-1]
            assert torch.equal(alone.tokens[0], together.tokens[i, :, :n])
            assert torch.equal(alone.lengths[0], together.lengths[i])
            assert torch.equal(alone.scores[0] == -math.inf, together.lengths[i] == 0)
            close(alone.scores[0].exp(), together.scores[i].exp())
            assert int(alone.steps) == int(together.steps[i])


def test_what_is_cut_is_reported_and_no_eos_cuts_all():
    model = Hashed(4, 1)
    found = decode(model, prompts(0, high=4), max_len=5)
    assert found.tokens.shape == (6, 1, 5)
    assert not bool(found.ended.any())
    assert bool((found.lengths == 5).all())
    beams = decode(model, prompts(0, high=4), max_len=5, strategy="beam", width=2)
    assert not bool(beams.ended.any())
    assert bool((beams.scores[:, 0] >= found.scores[:, 0]).all())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 1, "keep_eos": True}])
def test_samples_have_the_truncated_distribution(options):
    model, n, length = Hashed(3, 5), 20_000, 3
    generator = torch.Generator().manual_seed(0)
    found = decode(model, torch.tensor([[1]]), max_len=length, eos=0, strategy="sample", width=n, generator=generator, **options)
    cut = {"top_k": options.get("top_k"), "top_p": options.get("top_p"), "keep": [0] if options.get("keep_eos") else []}
    exact = {}
    for n_tokens in range(1, length + 1):
        for tokens in itertools.product(range(3), repeat=n_tokens):
            if 0 in tokens[:-1] or not (tokens[-1] == 0 or n_tokens == length):
                continue
            log_q = 0.0
            for i, token in enumerate(tokens):
                row = torch.tensor(model.log_p([1, *tokens[:i]]), dtype=F64) / options.get("temperature", 1.0)
                log_q += float(truncate(row, **cut).log_softmax(-1)[token])
            exact[tokens] = log_q
    assert math.isclose(sum(map(math.exp, exact.values())), 1, rel_tol=1e-12)
    counts: dict[tuple[int, ...], int] = dict.fromkeys(exact, 0)
    for row, size, score, log_p in zip(*(x[0].tolist() for x in (found.tokens, found.lengths, found.scores, found.log_probs)),
                                       strict=True):
        tokens = tuple(row[:size])
        counts[tokens] += 1
        assert math.isclose(score, exact[tokens], abs_tol=1e-12)
        assert math.isclose(log_p, model.total([1], tokens), rel_tol=1e-12)
    for tokens, log_q in exact.items():
        q = math.exp(log_q)
        assert abs(counts[tokens] / n - q) <= 6 * math.sqrt(q * (1 - q) / n) + 1e-12


def test_truncated_samples_never_end_unless_eos_is_kept():
    """Article 7500: with .6, .3 and .1 for eos, top-2 sampling never ends; with eos kept the mean length is 1 / .1."""
    log_p = torch.tensor([0.6, 0.3, 0.1], dtype=F64).log()
    runs = [
        decode(lambda tokens, s: (log_p.expand(len(tokens), 3), s), torch.zeros(1, 1, dtype=torch.int64), max_len=400, eos=2,
               strategy="sample", width=4000, top_k=2, keep_eos=keep, generator=torch.Generator().manual_seed(0))
        for keep in (False, True)
    ]
    assert not bool(runs[0].ended.any())
    assert bool(runs[1].ended.all())
    lengths = runs[1].lengths[0].double()
    assert abs(float(lengths.mean()) - 10) <= 6 * math.sqrt(90 / 4000)


def test_samples_of_many_prompts_keep_to_their_own():
    model, prompt = Hashed(5, 2, floor=0.1), prompts(4, batch=5, n=2, high=5)
    found = decode(model, prompt, max_len=9, eos=0, strategy="sample", width=4, generator=torch.Generator().manual_seed(0))
    for i, j in itertools.product(range(5), range(4)):
        tokens = found.tokens[i, j, : int(found.lengths[i, j])].tolist()
        assert math.isclose(float(found.log_probs[i, j]), model.total(prompt[i].tolist(), tokens), rel_tol=1e-12)
        assert (0 in tokens) == bool(found.ended[i, j])
    close(found.scores, found.log_probs)


def test_mean_surprise_of_samples_is_the_entropy():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=F64)
    found = decode(lambda tokens, s: (p.log().expand(len(tokens), 4), s), torch.tensor([[1]]), max_len=1, strategy="sample",
                   width=40_000, generator=torch.Generator().manual_seed(1))
    surprise = -found.log_probs[0]
    assert abs(float(surprise.mean()) - scipy.stats.entropy(p.numpy())) < 6 * float(surprise.std()) / 200


def test_samples_repeat_with_their_generator():
    model = Hashed(5, 0, floor=0.1)
    draws = [
        decode(model, prompts(0, high=5), max_len=9, eos=0, strategy="sample", width=3,
               generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_states_of_many_kinds_follow_their_rows():
    class Pair(NamedTuple):
        total: torch.Tensor
        extra: list

    def step(tokens, state):
        total = state.total + tokens.sum(-1)
        assert torch.equal(state.extra[0]["double"], 2 * state.total)
        logits = torch.stack([(total % 5 == 4).double() * 9, torch.sin(total.double()), torch.cos(3 * total.double())], -1)
        return logits, Pair(total, [{"double": 2 * total}, None, torch.tensor(3.0), "name"])

    start = torch.tensor([3, 0, 1, 2])
    state = Pair(start, [{"double": 2 * start}, None, torch.tensor(3.0), "name"])
    prompt = torch.ones(4, 1, dtype=torch.int64)
    for options in ({}, {"strategy": "beam", "width": 3}, {"strategy": "beam", "width": 2, "stop": "slots"}):
        found = decode(step, prompt, max_len=8, eos=0, state=state, **options)
        for i in range(4):
            for tokens, size, log_p in zip(found.tokens[i].tolist(), found.lengths[i].tolist(), found.log_probs[i], strict=True):
                total, expected = int(start[i]) + 1, 0.0
                for token in tokens[:size]:
                    row = torch.tensor([9.0 * (total % 5 == 4), math.sin(total), math.cos(3 * total)], dtype=F64)
                    expected += float(row.log_softmax(-1)[token])
                    total += token
                assert size == 0 or math.isclose(float(log_p), expected, rel_tol=1e-9)


def test_iid_model_never_ends_in_small_beams():
    """Article 7500: (.6, .3, .1 for eos): which widths end within 60 steps, by three rules."""
    log_p = torch.tensor([0.6, 0.3, 0.1], dtype=F64).log()
    ended = {}
    for stop in ("best", "full", "slots"):
        runs = [decode(lambda tokens, s: (log_p.expand(len(tokens), 3), s), torch.zeros(1, 1, dtype=torch.int64), max_len=60,
                       eos=2, strategy="beam", width=width, stop=stop) for width in range(1, 9)]
        ended[stop] = [int(run.ended.sum()) for run in runs]
        assert [int(run.steps) for run in runs] == ([60, 60, *[5] * 6] if stop == "best" else [60] * 8)
    assert ended == {"best": [0, 0, 1, 1, 2, 3, 3, 4], "full": [0, 0, 1, 1, 2, 3, 3, 4], "slots": [0, 0, 0, 0, 1, 1, 2, 2]}


def test_gradients_are_off_and_half_precision_is_ranked_in_single():
    weight = torch.randn(4, 4, requires_grad=True)
    found = decode(lambda tokens, s: (weight[tokens[:, -1]], s), torch.tensor([[1]]), max_len=3)
    assert not found.scores.requires_grad
    found = decode(lambda tokens, s: (weight[tokens[:, -1]].to(torch.bfloat16), s), torch.tensor([[1]]), max_len=3)
    assert found.scores.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ truncate


@settings(max_examples=100)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=8), st.integers(1, 9), st.floats(1e-6, 1.0), st.integers(0, 7))
def test_truncation_keeps_the_smallest_head(values, k, p, kept):
    logits = torch.tensor(values, dtype=F64)
    n = len(values)
    order = sorted(range(n), key=lambda i: (-values[i], i))
    assert torch.isfinite(truncate(logits, k)).nonzero()[:, 0].tolist() == sorted(order[:k])
    head = torch.isfinite(truncate(logits, top_p=p))
    q = logits.softmax(-1)
    size = int(head.sum())
    assert head.nonzero()[:, 0].tolist() == sorted(order[:size])
    assert float(q[order[:size]].sum()) >= p - 1e-12
    assert float(q[order[: size - 1]].sum()) < p + 1e-12
    both = torch.isfinite(truncate(logits, k, p))
    nested = torch.isfinite(truncate(truncate(logits, k), top_p=p))
    assert torch.equal(both, nested)
    token = kept % n
    assert torch.isfinite(truncate(logits, k, p, [token])).nonzero()[:, 0].tolist() == sorted(
        {token, *both.nonzero()[:, 0].tolist()})
    batch = torch.stack([logits, logits.flip(0)])[:, None]
    assert torch.equal(truncate(batch, k, p)[0, 0], truncate(logits, k, p))


def test_truncation_at_its_edges():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=F64).log()
    assert torch.isfinite(truncate(p, top_p=0.5)).tolist() == [True, False, False]  # exactly the mass p is enough
    assert torch.isfinite(truncate(p, top_p=0.75)).tolist() == [True, True, False]
    assert torch.isfinite(truncate(p, top_k=2)).tolist() == [True, True, False]
    assert torch.equal(truncate(p, 9, 1.0), p)
    tail = torch.tensor([0.0, -40.0, -80.0])
    assert torch.equal(truncate(tail, top_p=1.0), tail)
    assert truncate(torch.tensor([0.0, -math.inf, -1.0]), 3).tolist() == [0.0, -math.inf, -1.0]
    logits = torch.randn(5, dtype=F64, requires_grad=True)
    truncate(logits, 2).softmax(-1)[logits.argmax()].backward()
    assert int((logits.grad != 0).sum()) == 2


# --------------------------------------------------------------------------------------------------- tries


@settings(max_examples=60)
@given(st.sets(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1, max_size=12))
def test_a_trie_is_its_keys(keys):
    trie = PrefixTrie([*keys, *keys], vocab=4, eos=0)
    assert list(trie.keys()) == sorted(keys)
    assert len(trie) == len(keys)
    for n in range(5):
        for prefix in itertools.product((1, 2, 3), repeat=n):
            assert (prefix in trie) == (prefix in keys)
            inside = [key for key in keys if key[:n] == prefix]
            following = sorted({(*key, 0)[n] for key in inside})
            assert trie.children(prefix) == following
            assert list(trie.keys(prefix)) == sorted(inside)
            assert trie.allowed(torch.tensor([prefix], dtype=torch.int64)).tolist() == [[v in following for v in range(4)]]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("stop", ["best", "slots"])
def test_a_wide_constrained_beam_is_exact_and_samples_are_keys(stop, renormalize):
    rng = np.random.default_rng(0)
    for seed in range(10):
        keys = {tuple(rng.integers(1, 5, rng.integers(0, 5)).tolist()) for _ in range(8)}
        trie, model = PrefixTrie(keys, vocab=5, eos=0), Hashed(5, seed)

        def score(key, trie=trie, model=model):
            total = 0.0
            for i, token in enumerate((*key, 0)):
                row = model.log_p([1, *key[:i]])
                norm = math.log(sum(math.exp(row[v]) for v in trie.children(key[:i]))) if renormalize else 0
                total += row[token] - norm
            return total

        options = {"max_len": 6, "eos": 0, "allowed": trie.allowed}
        beam = {"strategy": "beam", "width": len(keys), "stop": stop}
        found = decode(model, torch.tensor([[1]]), renormalize=renormalize, **beam, **options)
        best = max(keys, key=score)
        assert found.tokens[0, 0, : int(found.lengths[0, 0])].tolist() == [*best, 0]
        assert math.isclose(float(found.scores[0, 0]), score(best), rel_tol=1e-9)
        raw = decode(model, torch.tensor([[1]]), **beam, **options)
        both = {tuple(t[:n]): float(p) for run in (found, raw) for t, n, p in zip(
            run.tokens[0].tolist(), run.lengths[0].tolist(), run.log_probs[0], strict=True) if n}
        for tokens, log_p in both.items():
            assert math.isclose(log_p, model.total([1], tokens), rel_tol=1e-9)
        samples = decode(model, torch.tensor([[1]]), strategy="sample", width=40, **options)
        for row, size in zip(samples.tokens[0].tolist(), samples.lengths[0].tolist(), strict=True):
            assert tuple(row[: size - 1]) in keys
        greedy = decode(model, torch.tensor([[1]]), renormalize=renormalize, **options)
        key = tuple(greedy.tokens[0, 0, : int(greedy.lengths) - 1].tolist())
        assert math.isclose(float(greedy.scores), score(key), rel_tol=1e-9, abs_tol=1e-12)


def test_a_constraint_sees_its_prompt():
    only = torch.tensor([1, 2, 3])

    def allowed(tokens, prompts):
        assert tokens.shape[0] == len(prompts)
        return torch.nn.functional.one_hot(torch.where(tokens.shape[1] >= 1 + prompts, 0, only[prompts]), 4).bool()

    for options in ({}, {"strategy": "beam", "width": 2}, {"strategy": "beam", "width": 2, "stop": "slots"},
                    {"strategy": "sample", "width": 2}):
        found = decode(Hashed(4, 0), torch.ones(3, 1, dtype=torch.int64), max_len=6, eos=0, allowed=allowed, **options)
        assert found.tokens[:, 0].tolist() == [[1, 0, 0, 0], [2, 2, 0, 0], [3, 3, 3, 0]]
        assert found.lengths[:, 0].tolist() == [2, 3, 4]
        assert found.steps.tolist() == [2, 3, 4]


# --------------------------------------------------------------------------------------- heads that end


def slow_head(head, h, kind, eps):
    """p_t by the definition, in probabilities."""
    logits = h @ head.linear.weight.T + head.linear.bias
    out = torch.zeros_like(logits)
    for b in range(len(h)):
        product = 1.0
        for t in range(h.shape[1]):
            a = logits[b, t, head.eos].sigmoid()
            product = product * (1 - eps) * a if kind == "st" else product
            survive = product if kind == "st" else (1 - eps) ** (t + 1) * (1 - a)
            others = logits[b, t].exp()
            others[head.eos] = 0
            out[b, t] = survive * others / others.sum()
            out[b, t, head.eos] = 1 - survive
    return out


@pytest.mark.parametrize("kind", ["st", "nmst"])
def test_head_is_its_definition(kind):
    torch.manual_seed(0)
    head = SelfTerminatingHead(4, 6, eos=2, eps=0.03, kind=kind, dtype=F64)
    h = torch.randn(3, 7, 4, dtype=F64) * 3
    log_p, carry = head(h)
    close(log_p.exp(), slow_head(head, h, kind, 0.03))
    close(log_p.exp().sum(-1), torch.ones(3, 7, dtype=F64))
    first, middle = head(h[:, :3])
    second, end = head(h[:, 3:], middle)
    close(torch.cat([first, second], 1), log_p)
    close(end, carry)
    x = h.clone().requires_grad_()
    assert gradcheck(lambda x: head(x)[0].masked_fill(head(x)[0] < -30, 0), (x,))


def test_heads_keep_their_floor_only_st_is_monotone_and_nothing_cancels():
    torch.manual_seed(1)
    eps, n = 0.01, 2000
    t = torch.arange(1, n + 1, dtype=F64)
    for kind in ("st", "nmst"):
        head = SelfTerminatingHead(3, 5, eos=0, eps=eps, kind=kind, dtype=F64)
        log_p = head(torch.randn(4, n, 3, dtype=F64) * 40)[0].detach()
        assert bool(torch.isfinite(log_p).all())
        ends = log_p[..., 0].exp()
        assert bool((ends >= -torch.expm1(t * math.log1p(-eps)) - 1e-12).all())
        rises = bool((ends.diff(dim=1) >= -1e-15).all())
        assert rises == (kind == "st")
        survive = log_p[..., 1:].logsumexp(-1)
        assert float(survive[:, -1].max()) < -20  # far below what 1 - p(e) could show


@pytest.mark.parametrize(("eps", "limit"), [(0.1, 7), (0.3, 2), (0.6, 1), (0.01, 69), (1e-3, 693), (1e-4, 6932)])
def test_greedy_ends_at_its_limit_and_not_before(eps, limit):
    assert greedy_limit(eps) == limit
    exact = [t for t in range(max(1, limit - 2), limit + 2) if 1 - (1 - Fraction(eps)) ** t > Fraction(1, 2)]
    assert exact[0] == limit
    if limit > 100:
        return
    for kind, sign in (("st", 1), ("nmst", -1)):  # the worst case: all that is left on one token
        head = SelfTerminatingHead(1, 2, eos=0, eps=eps, kind=kind, dtype=F64)
        with torch.no_grad():
            head.linear.weight.zero_()
            head.linear.bias.copy_(torch.tensor([sign * 60.0, 0.0]))
        prompt = torch.ones(1, 1, dtype=torch.int64)
        step = lambda tokens, carry, head=head: head(torch.zeros(*tokens.shape, 1, dtype=F64), carry)  # noqa: E731
        found = decode(step, prompt, max_len=limit + 5, eos=0)
        assert found.ended.tolist() == [[True]]
        assert found.lengths.tolist() == [[limit]]
        if eps == 0.6:  # one token: the k-th sentence needs k steps
            for width, stop in itertools.product((1, 2, 3, 4), ("full", "slots")):
                assert int(decode(step, prompt, max_len=9, eos=0, strategy="beam", width=width, stop=stop).steps) == width
            assert int(decode(step, prompt, max_len=9, eos=0, strategy="beam", width=4).steps) == 1


@pytest.mark.parametrize("eps", [0.2, 0.55])
def test_beams_end_within_their_limits(eps):
    limit, slack = greedy_limit(eps), []
    for seed, width, stop in itertools.product(range(5), (1, 2, 3, 5), ("best", "full", "slots")):
        torch.manual_seed(seed)
        head = SelfTerminatingHead(6, 4, eos=0, eps=eps, dtype=F64)
        table = torch.randn(101, 6, dtype=F64) * 4

        def step(tokens, state, head=head, table=table):
            hashed, carry = state
            hashed = (hashed * 37 + tokens[:, -1] + 1) % 101
            log_p, carry = head(table[hashed][:, None], carry)
            return log_p, (hashed, carry)

        start = (torch.arange(6), torch.zeros(6, dtype=F64))
        found = decode(step, torch.ones(6, 1, dtype=torch.int64), state=start, max_len=40, eos=0, strategy="beam", width=width,
                       stop=stop)
        assert bool(found.ended[:, 0].all())
        bound = limit if stop == "best" else limit + width - 1
        slack.append(bound - int(found.steps.max()))
    assert min(slack) == 0 if eps > 0.5 else min(slack) >= 0


@pytest.mark.parametrize("eps", [0.9, 0.64, 0.63, 0.5, 0.1, 1e-2, 1e-4])
def test_mean_length_limit_is_its_sum_and_is_attained(eps):
    t = np.arange(int(12 / math.sqrt(eps)) + 3, dtype=float)
    exact = math.fsum(np.exp(math.log1p(-eps) * t * (t + 1) / 2))
    assert math.isclose(mean_length_limit(eps), exact, rel_tol=1e-13)
    if eps >= 1e-2:
        gen = torch.Generator().manual_seed(0)

        def step(tokens, carry):
            t = torch.zeros(len(tokens), dtype=F64) + 1 if carry is None else carry + 1
            survive = t * math.log1p(-eps)
            return torch.stack([(-survive.expm1()).log(), survive], -1), t

        found = decode(step, torch.ones(1, 1, dtype=torch.int64), max_len=200, eos=0, strategy="sample", width=20_000,
                       generator=gen)
        lengths = found.lengths[0].double()
        assert bool(found.ended.all())
        assert abs(float(lengths.mean()) - exact) <= 6 * float(lengths.std()) / math.sqrt(20_000)


def test_eos_floor_holds_and_is_attained():
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=gen)  # noqa: E731
    weight, bias, radius = draw(3, 5, 4), draw(3, 5), 2.0
    h = draw(1000, 3, 4)
    h = radius * h / h.norm(dim=-1, keepdim=True)
    p = (torch.einsum("bcd,cvd->bcv", h, weight) + bias).softmax(-1)[..., 1]
    floor = eos_floor(weight, bias, 1, radius)
    assert floor.shape == (3,)
    assert bool((p >= floor).all())
    two = weight[:, :2]
    gap = two[:, 0] - two[:, 1]
    worst = radius * gap / gap.norm(dim=-1, keepdim=True)
    attained = (torch.einsum("cd,cvd->cv", worst, two) + bias[:, :2]).softmax(-1)[:, 1]
    close(eos_floor(two, bias[:, :2], 1, radius), attained)
    close(eos_floor(weight, bias, 1, 0.0), bias.softmax(-1)[:, 1])


# -------------------------------------------------------------------------------------------------- chains


def random_chain(n: int, seed: int, batch: tuple[int, ...] = ()) -> torch.Tensor:
    """Sparse rows, so that closed classes are common; state 0 absorbs."""
    rng = np.random.default_rng(seed)
    P = (0.1 + rng.random((*batch, n, n))) * (rng.random((*batch, n, n)) < 0.35)
    P[..., np.arange(n), (np.arange(n) + 1) % n] += P.sum(-1) == 0
    return torch.from_numpy(P / P.sum(-1, keepdims=True))


@settings(max_examples=60)
@given(st.integers(2, 7), st.integers(0, 2**31))
def test_chains_are_their_power_series_and_their_graph(n, seed):
    P = random_chain(n, seed)
    P[0] = torch.eye(n, dtype=F64)[0]
    path = torch.linalg.matrix_power(torch.eye(n, dtype=F64) + (P > 0).double(), n) > 0
    h = termination_probability(P, 0)
    close(h, torch.linalg.matrix_power(P, 2**26)[:, 0], 1e-6)
    assert torch.equal(h > 0, path[:, 0])
    lost = (path & ~path[:, 0]).any(-1)  # can reach a state that cannot reach the end
    length = expected_length(P, 0)
    assert torch.equal(length.isinf(), lost)
    close(h[~lost], torch.ones_like(h[~lost]), 1e-9)
    inside = ~lost & (torch.arange(n) > 0)
    Q = P[inside][:, inside]
    close(length[inside], torch.from_numpy(np.linalg.inv(np.eye(len(Q)) - Q.numpy()).sum(-1)), 1e-7)
    tail = survival(P, 0, 5)
    for t in range(6):
        close(tail[:, t], 1 - torch.linalg.matrix_power(P, t)[:, 0], 1e-12)
    if not lost.any():
        N = fundamental_matrix(P, 0)
        close(N.sum(-1), length[1:], 1e-9)
        close(N - P[1:, 1:] @ N, torch.eye(n - 1, dtype=F64), 1e-9)


def test_gamblers_ruin_in_closed_form_and_in_batches():
    n, chains = 8, []
    for up in (0.5, 0.3, 0.7):
        P = torch.zeros(n + 1, n + 1, dtype=F64)
        for i in range(1, n):
            P[i, i + 1], P[i, i - 1] = up, 1 - up
        P[0, 0] = P[n, n] = 1
        chains.append(P)
        i = torch.arange(n + 1, dtype=F64)
        r = (1 - up) / up
        win = i / n if up == 0.5 else (1 - r**i) / (1 - r**n)
        close(termination_probability(P, n), win)
        close(termination_probability(P, [0, n]), torch.ones(n + 1, dtype=F64))
        close(expected_length(P, [0, n]), i * (n - i) if up == 0.5 else (i - n * win) / (1 - 2 * up))
        assert expected_length(P, n).tolist() == [*[math.inf] * n, 0]
    both = torch.tensor([[1, 0, 0], [0, 1, 0], [0.25, 0.25, 0.5]], dtype=F64)
    assert termination_probability(both, [0, 1]).tolist() == [1, 1, 1]
    assert termination_probability(both, 1).tolist() == [0, 1, 0.5]
    batch = torch.stack(chains)[:, None]
    for function in (termination_probability, expected_length, fundamental_matrix, lambda P, a: survival(P, a, 4)):
        for got, P in zip(function(batch, [0, n]), chains, strict=True):
            close(got[0], function(P, [0, n]))
    close(fundamental_matrix(chains[0], [0, n])[3].sum(), expected_length(chains[0], [0, n])[4])


def test_chains_are_what_decoding_does():
    rng = np.random.default_rng(3)
    P = torch.from_numpy(rng.dirichlet(np.full(6, 0.3), 6))
    P[1] = torch.tensor([0, 0.9, 0, 0.1, 0, 0], dtype=F64)
    P[3] = torch.tensor([0, 0.5, 0, 0.5, 0, 0], dtype=F64)  # 1 and 3 never end
    n, steps, start = 20_000, 60, 2
    found = decode(lambda tokens, s: (P[tokens[:, -1]].log(), s), torch.tensor([[start]]), max_len=steps, eos=0,
                   strategy="sample", width=n, generator=torch.Generator().manual_seed(0))
    tail = survival(P, 0, steps)[start]
    for t in (1, 2, 5, steps):
        late = float(((found.lengths > t) | ~found.ended).double().mean())
        assert abs(late - float(tail[t])) <= 6 * math.sqrt(float(tail[t] * (1 - tail[t])) / n) + 1e-12
    h = float(termination_probability(P, 0)[start])
    assert 0.1 < h < 0.9
    assert abs(float(tail[-1]) - (1 - h)) < 1e-3
    assert float(expected_length(P, 0)[start]) == math.inf


def test_slow_chains_are_exact():
    slow = 1e-14
    P = torch.tensor([[1, 0, 0], [slow, 1 - slow, 0], [0, 1, 0]], dtype=F64)
    close(expected_length(P, 0), torch.tensor([0, 1 / slow, 1 / slow + 1], dtype=F64), 1e-12)
    P[1, 1], P[1, 0] = 1.0, 1e-30
    close(termination_probability(P, 0), torch.ones(3, dtype=F64))
    P[1] = torch.tensor([1e-30, 0, 1])
    with pytest.raises(ValueError, match="singular up to rounding"):
        expected_length(P, 0)


def test_repetition_index_is_its_series_and_counts_repetitions():
    rng = np.random.default_rng(11)
    P = torch.from_numpy(rng.dirichlet(np.full(8, 0.3), (2, 8)) * 0.9)
    M, power, total = P * P, torch.eye(8, dtype=F64), torch.zeros(2, dtype=F64)
    for _ in range(400):
        power = power @ M
        total = total + power.diagonal(dim1=-2, dim2=-1).sum(-1)
    close(repetition_index(P), total)
    eigenvalues = torch.linalg.eigvals(M)
    close(repetition_index(P), (eigenvalues / (1 - eigenvalues)).sum(-1).real)
    cycle = torch.eye(3, dtype=F64).roll(1, 1)
    assert repetition_index(cycle).item() == math.inf
    assert repetition_index(torch.stack([cycle, 0.5 * cycle])).tolist() == [math.inf, pytest.approx(3 * (1 / 64) / (1 - 1 / 64))]
    assert repetition_index(torch.tensor([[0.0, 1], [0, 0]])).item() == 0  # sure, but no cycle


# ------------------------------------------------------------------------------------------------- errors

PROMPT = torch.ones(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"max_len": 0}, ValueError, "max_len should be an integer >= 1, got 0"),
    ({"width": 0, "strategy": "beam"}, ValueError, "width should be an integer >= 1, got 0"),
    ({"strategy": "beams"}, ValueError, "strategy should be one of 'greedy', 'beam', 'sample', got 'beams'"),
    ({"strategy": "beam", "stop": True}, ValueError, "stop should be one of 'best', 'bound', 'heuristic', 'full', 'slots'"),
    ({"strategy": "beam", "stop": "slots", "eos": None}, ValueError, "stop='slots' needs an eos"),
    ({"strategy": "beam", "length_penalty": math.nan}, ValueError, "length_penalty should be a number"),
    ({"strategy": "sample", "top_k": 0}, ValueError, "top_k should be an integer >= 1, got 0"),
    ({"strategy": "sample", "top_p": 0.0}, ValueError, r"top_p should be a number in \(0.0, 1.0\], got 0.0"),
    ({"strategy": "sample", "top_p": 1.1}, ValueError, r"top_p should be a number in \(0.0, 1.0\], got 1.1"),
    ({"strategy": "sample", "temperature": 0.0}, ValueError, r"temperature should be a number in \(0.0"),
    ({"strategy": "sample", "keep_eos": True, "eos": None}, ValueError, "keep_eos needs an eos"),
    ({"top_k": 3, "generator": torch.Generator()}, ValueError, "top_k, generator: no effect with strategy 'greedy'"),
    ({"width": 2}, ValueError, "width: no effect with strategy 'greedy', only with 'beam'"),
    ({"strategy": "sample", "length_penalty": 1.0}, ValueError, "length_penalty: no effect with strategy 'sample'"),
    ({"eos": -1}, ValueError, "eos should be an integer >= 0"),
    ({"eos": 4}, ValueError, "eos should be below the vocabulary's 4, got 4"),
    ({"prompt": torch.ones(2, 0, dtype=torch.int64)}, ValueError, "prompt is empty"),
    ({"prompt": torch.ones(3)}, ValueError, r"prompt: expected shape \(batch, n\), got \(3,\)"),
    ({"prompt": torch.ones(2, 1)}, TypeError, "prompt should be int64, got torch.float32"),
    ({"prompt": [[1]]}, TypeError, "prompt should be a torch tensor"),
    ({"step": lambda tokens, s: Hashed(4, 0)(tokens, s)[0]}, TypeError, r"step should return \(logits, state\), got Tensor"),
    ({"step": lambda tokens, s: (torch.zeros(4), s)}, ValueError, r"logits of step 1: expected shape \(rows=2, vocab\), got"),
    ({"step": lambda tokens, s: (tokens.expand(-1, 4), s)}, TypeError, "logits should have a floating dtype"),
    ({"allowed": lambda tokens, i: torch.ones(2, 3)}, ValueError, r"what allowed returns: expected shape \(2, 4\), got \(2, 3\)"),
    ({"allowed": lambda tokens, i: torch.ones(2, 4)}, TypeError, "allowed should return a boolean tensor"),
    ({"allowed": lambda tokens, i: (i < 1)[:, None].expand(-1, 4)}, ValueError,
     r"step 1: no token that is allowed has a positive probability after \[\] of prompt 1"),
])
def test_decode_refuses(options, error, message):
    call = {"step": Hashed(4, 0), "prompt": PROMPT, "max_len": 5, "eos": 0} | options
    with pytest.raises(error, match=message):
        decode(call.pop("step"), call.pop("prompt"), **call)


@pytest.mark.parametrize("options", [{}, {"strategy": "beam", "width": 2}, {"strategy": "sample"}])
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
def test_bad_logits_are_named_with_their_step(options, bad):
    calls = itertools.count(1)

    def step(tokens, state):
        logits = torch.zeros(len(tokens), 4)
        if next(calls) == 3:
            logits[-1] = torch.tensor([0, 0, 0, float(bad)]) if bad != "all -inf" else -math.inf
        return logits, state

    with pytest.raises(ValueError, match=r"step 3: logits of 1 of . rows \(first: .\) have NaN or \+inf, or nothing but -inf"):
        decode(step, PROMPT, max_len=5, **options)


def test_states_that_are_not_batch_first_are_refused():
    for state, error, message in (
        (torch.zeros(3, 2), ValueError, r"state: tensors should have the batch first, expected \(2, \.\.\.\), got \(3, 2\)"),
        ([object()], TypeError, "state: expected tensors in tuples, lists and dicts, or an index_select, got object"),
    ):
        with pytest.raises(error, match=message):
            decode(lambda tokens, s: (torch.zeros(len(tokens), 4), s), PROMPT, max_len=3, strategy="beam", width=2, state=state)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((torch.zeros(4), 0), ValueError, "top_k should be an integer >= 1, got 0"),
    ((torch.zeros(4), True), ValueError, "top_k"),
    ((torch.zeros(4), None, 0.0), ValueError, r"top_p should be a number in \(0.0, 1.0\]"),
    ((torch.zeros(4), None, math.nan), ValueError, "top_p"),
    ((torch.zeros(4), 1, None, [4]), ValueError, r"keep should be an integer in \[0, 3\], got 4"),
    ((torch.full((2, 4), math.nan), 1), ValueError, "logits have rows with NaN"),
    ((torch.full((2, 4), -math.inf), 1), ValueError, "nothing but -inf"),
    ((torch.zeros(4, dtype=torch.int64), 1), TypeError, "logits should have a floating dtype"),
])
def test_truncate_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        truncate(*arguments)


def test_tries_refuse():
    with pytest.raises(ValueError, match=r"token of a key should be an integer in \[0, 3\], got 4"):
        PrefixTrie([[4]], vocab=4, eos=0)
    with pytest.raises(ValueError, match=r"a key should not contain eos = 0, which closes it; got \[1, 0\]"):
        PrefixTrie([[1, 0]], vocab=4, eos=0)
    with pytest.raises(ValueError, match="eos"):
        PrefixTrie([], vocab=4, eos=4)
    with pytest.raises(ValueError, match="step 1: no token that is allowed"):
        decode(Hashed(4, 0), PROMPT, max_len=3, eos=0, strategy="beam", width=2, allowed=PrefixTrie([], vocab=4, eos=0).allowed)


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1, math.nan, True])
def test_eps_lies_between_zero_and_one(eps):
    for function in (greedy_limit, mean_length_limit, lambda eps: SelfTerminatingHead(2, 3, 0, eps)):
        with pytest.raises(ValueError, match=r"eps should be a number in \(0.0, 1.0\)"):
            function(eps)


def test_heads_refuse():
    with pytest.raises(ValueError, match="kind should be one of 'st', 'nmst', got 'x'"):
        SelfTerminatingHead(2, 3, 0, 0.1, "x")
    with pytest.raises(ValueError, match="eos"):
        SelfTerminatingHead(2, 3, 3, 0.1)
    head = SelfTerminatingHead(2, 3, 0, 0.1)
    with pytest.raises(ValueError, match=r"h: expected shape \(batch, n, d=2\)"):
        head(torch.zeros(1, 4, 3))
    with pytest.raises(TypeError, match="expected the same"):
        head(torch.zeros(1, 4, 2, dtype=F64))
    with pytest.raises(ValueError, match="h has 8 non-finite"):
        head(torch.full((1, 4, 2), math.nan))
    with pytest.raises(ValueError, match=r"carry: expected shape \(batch=1\)"):
        head(torch.zeros(1, 4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="radius"):
        eos_floor(torch.zeros(3, 2), torch.zeros(3), 0, -1.0)
    with pytest.raises(ValueError, match="eos"):
        eos_floor(torch.zeros(3, 2), torch.zeros(3), 3, 1.0)


@pytest.mark.parametrize(
    "function", [termination_probability, expected_length, fundamental_matrix, lambda P, a: survival(P, a, 2)],
)
def test_chains_refuse(function):
    P = torch.tensor([[1.0, 0], [0.5, 0.5]])
    for bad, absorbing, error, message in (
        (P.double() * 0.9, 0, ValueError, "P: rows should sum to 1, found a sum of 0\\.9"),
        (torch.tensor([[1.0, 0], [1.5, -0.5]]), 0, ValueError, "P has 1 negative entries"),
        (torch.full((2, 2), math.nan), 0, ValueError, "P has 4 non-finite"),
        (torch.ones(2, 3), 0, ValueError, r"P: expected shape \(\.\.\., n, n\)"),
        (P.long(), 0, TypeError, "P should have a floating dtype"),
        (P, 2, ValueError, r"absorbing should be an integer in \[0, 1\], got 2"),
        (P, [], ValueError, "absorbing is empty"),
    ):
        with pytest.raises(error, match=message):
            function(bad, absorbing)


def test_fundamental_matrices_and_tails_refuse():
    stuck = torch.eye(2)
    with pytest.raises(ValueError, match="I - Q is singular: 1 states cannot reach an absorbing one"):
        fundamental_matrix(stuck, 0)
    with pytest.raises(ValueError, match="steps should be an integer >= 0, got -1"):
        survival(stuck, 0, -1)
    with pytest.raises(ValueError, match="rows should sum to at most 1"):
        repetition_index(torch.ones(2, 2))
