"""The Transformer against Hugging Face's classes, forward and backward; the memory of 1,000 sub-layers and 1,000 layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from benchmarks.common import Row, race
from kexue.numerics import PeakMemory
from kexue.transformer import Config, FeedForward, ResidualStack, Transformer, from_hf_bert, from_hf_gpt2, from_hf_t5

VOCAB, BATCH, N = 5000, 2, 64
DEPTH, WIDTH, ROWS = 1000, 32, 1024


def backward(model: nn.Module, run: Callable[[], Tensor], targets: Tensor) -> None:
    """One forward and backward pass with a cross-entropy."""
    model.zero_grad()
    F.cross_entropy(run().flatten(0, 1), targets.flatten()).backward()


def step(checkpoint: int) -> Callable[[], None]:
    """Forward and backward through a deep stack of feed-forward layers."""
    torch.manual_seed(0)
    layers = [FeedForward(WIDTH, 2 * WIDTH, activation="relu") for _ in range(DEPTH)]
    stack = ResidualStack(layers, WIDTH, norm="deepnorm", checkpoint=checkpoint)
    x = torch.randn(ROWS, WIDTH)
    return lambda: stack(x).square().mean().backward()


def deep_transformer(checkpoint: int) -> Callable[[], None]:
    """Forward and backward through a Transformer of 1,000 layers: 2,000 sub-layers, attention included."""
    torch.manual_seed(0)
    config = Config(d=WIDTH, layers=DEPTH, heads=2, d_ff=2 * WIDTH, vocab=64, causal=True, norm="deepnorm", max_len=N)
    model = Transformer(replace(config, checkpoint=checkpoint))
    tokens = torch.randint(64, (16, N))
    return lambda: backward(model, lambda: model(tokens), tokens)


def held(run: Callable[[], None]) -> float:
    """Most MiB of tensors made during one run and alive at one time, gradients included."""
    with PeakMemory() as memory:
        run()
    return memory.peak / 2**20


def peak(run: Callable[[], None]) -> float:
    """Most MiB that torch holds at one time during the second run: the gradients are there before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    tokens, targets = torch.randint(2, VOCAB, (2, BATCH, N)).unbind()
    size: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **size))
    bert = BertForMaskedLM(
        BertConfig(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=VOCAB)
    )
    t5 = T5ForConditionalGeneration(T5Config(
        d_model=768, d_ff=2048, num_heads=12, num_layers=2, num_decoder_layers=2, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, vocab_size=VOCAB,
    ))
    ours_gpt2, ours_bert, ours_t5 = from_hf_gpt2(gpt2), from_hf_bert(bert), from_hf_t5(t5)
    pairs: list[tuple[nn.Module, Callable[[], Tensor], nn.Module, Callable[[], Tensor]]] = [
        (ours_gpt2, lambda: ours_gpt2(tokens), gpt2, lambda: gpt2(tokens, use_cache=False).logits),
        (ours_bert, lambda: ours_bert(tokens), bert, lambda: bert(tokens).logits),
        (
            ours_t5, lambda: ours_t5(tokens, targets),
            t5, lambda: t5(input_ids=tokens, decoder_input_ids=targets, use_cache=False).logits,
        ),
    ]
    note = f"4 layers, d = 768, 12 heads, batch {BATCH}, n = {N}, vocabulary {VOCAB}, float32"
    for ours, run, hf, peer in pairs:
        name = f"transformers {type(hf).__name__}"
        both = partial(backward, ours, run, targets), partial(backward, hf, peer, targets)
        yield race("Transformer, forward and backward", *both, name, repeats=9, note=note)
        with torch.no_grad():
            yield race("Transformer, forward", run, peer, name, repeats=9, note=note)
    kept = step(0)
    for checkpoint in (1, 32):
        saving = step(checkpoint)
        yield race(
            f"ResidualStack of {DEPTH}, checkpoint = {checkpoint}", saving, kept, "the same, all states kept", repeats=3,
            note=f"d = {WIDTH}, batch {ROWS}: peak {peak(saving):.0f} MiB against {peak(kept):.0f} MiB",
        )
    kept, saving = deep_transformer(0), deep_transformer(45)
    yield race(
        f"Transformer of {DEPTH} layers, checkpoint = 45", saving, kept, "the same, all states kept", repeats=3,
        note=f"d = {WIDTH}, 2 heads, batch 16, n = {N}, float32: peak {held(saving):.0f} MiB against {held(kept):.0f} MiB",
    )
