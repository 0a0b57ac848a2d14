"""Decoding with cache against `generate` of Hugging Face transformers: the same weights, the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from benchmarks.common import Row, race
from kexue.decoding import decode, truncate
from kexue.transformer import from_hf_gpt2

NEW = 64


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1000, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
                        pad_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = from_hf_gpt2(theirs).eval()
    for batch in (1, 32):
        prompt = torch.randint(1000, (batch, 16))
        yield _decode("greedy", ours, theirs, prompt, {}, {})
        beams = {"strategy": "beam", "width": 4, "stop": "full", "length_penalty": 1.0}
        yield _decode("beam 4", ours, theirs, prompt, beams, {"num_beams": 4, "early_stopping": True, "length_penalty": 1.0})
        yield _decode("top-p 0.9 sampling", ours, theirs, prompt, {"strategy": "sample", "top_p": 0.9},
                      {"do_sample": True, "top_p": 0.9, "top_k": 0})
    logits = torch.randn(32, 50_000)
    for name, options, warper in (
        ("top-k 50", {"top_k": 50}, TopKLogitsWarper(50)), ("top-p 0.9", {"top_p": 0.9}, TopPLogitsWarper(0.9)),
    ):
        yield race(f"{name} truncation, 32 x 50,000", lambda o=options: truncate(logits, **o), lambda w=warper: w(None, logits),
                   type(warper).__name__, note="checks for NaN and breaks ties")


def _decode(name: str, ours: Any, theirs: Any, prompt: torch.Tensor, options: dict[str, Any], peer: dict[str, Any]) -> Row:
    batch, n = prompt.shape

    def run() -> torch.Tensor:
        return decode(ours.step, prompt, max_len=NEW, **options).tokens[:, 0]

    def peer_run() -> torch.Tensor:
        mask = torch.ones_like(prompt)
        return theirs.generate(prompt, attention_mask=mask, max_new_tokens=NEW, **({"do_sample": False} | peer))[:, n:]

    assert peer.get("do_sample") or torch.equal(run(), peer_run())
    row = race(f"{name}, {batch} x {NEW} tokens, GPT-2 of 2 x 64", run, peer_run, "generate", repeats=5)
    tokens = batch * NEW
    same = "same tokens; " if not peer.get("do_sample") else ""
    return Row(row.task, row.peer, row.ours_s, row.peer_s,
               f"{same}{tokens / row.ours_s:,.0f} against {tokens / row.peer_s:,.0f} tokens/s")
