"""One Transformer for the whole book: a decoder, an encoder, or both, by a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from kexue import _validate
from kexue.attention import SynthesizerAttention
from kexue.transformer.layers import (
    Core,
    FeedForward,
    MultiHeadAttention,
    RelativeBias,
    Scale,
    View,
    activations,
    causal_mask,
    relative_bucket,
    sinusoids,
    view,
)
from kexue.transformer.residual import NORMS, ResidualStack, deepnorm_constants, make_norm, placements

POSITIONS = ("learned", "sinusoidal", "rotary", "relative", "none")
HEADS = ("linear", "mlm", "none")
Cache = tuple[tuple[Tensor, ...], ...]
"""Per layer (keys, values), and with cross-attention also the memory's (keys, values): (..., heads, m, d_head) each."""


@dataclass(frozen=True)
class Config:
    """A Transformer's shape. GPT-2: the defaults with `causal=True, activation="gelu_tanh"`.

    Args:
        d: width. layers: blocks of attention (, cross-attention) and feed-forward. heads: attention heads.
        vocab: number of tokens; None: vectors go in and come out.
        d_ff: inner width of the feed-forward; default 4 d. d_head: width of a head; default d / heads.
        norm, alpha, norm_kind, eps: as in `ResidualStack`; eps is the one of every norm.
        gain: initial gain of the feed-forward, value and output matrices; default 1, with "deepnorm" the paper's.
        activation: name in `activations`. gated: gate the feed-forward. bias: biases in the linear layers.
        causal: hide the future. cross: attend to a memory too.
        attention, scale: kind of the self-attention and scale of both, as in `MultiHeadAttention`.
        position: "learned", "sinusoidal" (both added to the tokens), "rotary", "relative" (T5's bias) or "none".
        max_len: longest sequence; None: no limit (not for "learned").
        buckets, max_distance: of "relative", see `relative_bucket`.
        segments: number of segment (token type) embeddings. embed_norm: normalise the sum of the embeddings.
        head: "linear", "mlm" (BERT's: dense, activation, norm, linear) or "none" (the vectors come out).
        tied: the head shares the token table. head_bias: add one bias per token. logit_scale: factor before the head.
        dropout: probability on embeddings, attention weights, inner layers and branches.
        checkpoint: recompute activations, as in `ResidualStack` (2 or 3 sub-layers per layer).

    Raises:
        ValueError: numbers out of range, d not divisible by heads, unknown kinds (the message lists the known).
    """

    d: int
    layers: int
    heads: int
    vocab: int | None = None
    d_ff: int | None = None
    d_head: int | None = None
    norm: str | tuple[str, ...] = "pre"
    alpha: float | None = None
    gain: float | None = None
    norm_kind: str = "layer"
    eps: float = 1e-5
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    causal: bool = False
    cross: bool = False
    attention: str | Core = "softmax"
    scale: Scale = None
    position: str = "learned"
    max_len: int | None = 512
    buckets: int = 32
    max_distance: int = 128
    segments: int = 0
    embed_norm: bool = False
    head: str = "linear"
    tied: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    dropout: float = 0.0
    checkpoint: int = 0

    def __post_init__(self) -> None:
        for name in ("d", "layers", "heads"):
            _validate.integer(name, getattr(self, name), low=1)
        for name in ("vocab", "d_ff", "d_head", "max_len"):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), low=1)
        if self.d_head is None and self.d % self.heads:
            raise ValueError(f"d should be divisible by heads, got d = {self.d} and heads = {self.heads}; or give d_head")
        placements(self.norm)
        _validate.choice("norm_kind", self.norm_kind, NORMS)
        _validate.choice("activation", self.activation, activations)
        _validate.choice("position", self.position, POSITIONS)
        _validate.choice("head", self.head, HEADS)
        _validate.integer("segments", self.segments, low=0)
        _validate.integer("checkpoint", self.checkpoint, low=0)
        _validate.number("eps", self.eps, low=0.0)
        _validate.number("logit_scale", self.logit_scale)
        _validate.number("dropout", self.dropout, low=0.0, high=1.0)
        if not callable(self.attention):
            _validate.choice("attention", self.attention, ("softmax",))
        if self.position == "learned" and self.max_len is None:
            raise ValueError("max_len should be given for learned positions: it is the size of their table")
        if self.position == "sinusoidal" and self.d % 2:
            raise ValueError(f"sinusoidal positions need an even d, got {self.d}")
        if self.position == "rotary" and self.width % 2:
            raise ValueError(f"rotary positions need an even d_head, got {self.width}")
        if self.position == "relative":
            relative_bucket(
                torch.zeros(1, dtype=torch.long), bidirectional=not self.causal, buckets=self.buckets,
                max_distance=self.max_distance,
            )

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.d // self.heads if self.d_head is None else self.d_head

    @property
    def sublayers(self) -> int:
        """Residual sub-layers of the stack: 2 per layer, 3 with cross-attention."""
        return self.layers * (3 if self.cross else 2)


class Trace(NamedTuple):
    """Everything between input and output of a Transformer.

    Args:
        states: the stream before, between and after the residual sub-layers: sublayers + 1 of (..., n, d).
        weights: per layer the attention weights (..., heads, n, m). cross_weights: those on the memory, if any.
        hidden: (..., n, d) after the last norm.
    """

    states: list[Tensor]
    weights: list[Tensor]
    cross_weights: list[Tensor]
    hidden: Tensor


class Transformer(nn.Module):
    r"""Embeddings, a residual stack of attention and feed-forward layers, and a head.

    With the right `Config` it computes what GPT-2, BERT and either half of T5 compute: `from_hf_gpt2`, `from_hf_bert`
    and `from_hf_t5` carry the weights over. `stack` is the `ResidualStack`; its sub-layers are, per layer, attention,
    cross-attention (if any) and feed-forward.

    Source: Vaswani et al., *Attention is all you need*, arXiv:1706.03762.

    Args:
        config: the shape. generator: of the initial weights (Xavier normal, biases 0, tables of variance 1/d).

    Example:
        >>> model = Transformer(Config(d=32, layers=2, heads=4, vocab=50, causal=True))
        >>> logits, cache = model(torch.randint(50, (8, 10)), return_cache=True)     # (8, 10, 50)
        >>> logits, cache = model(torch.randint(50, (8, 1)), cache=cache, return_cache=True)
    """

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.tokens = nn.Embedding(c.vocab, c.d) if c.vocab is not None else None
        self.positions = nn.Embedding(c.max_len, c.d) if c.position == "learned" and c.max_len is not None else None
        self.segments = nn.Embedding(c.segments, c.d) if c.segments else None
        self.embed_norm = make_norm(c.norm_kind, c.d, eps=c.eps) if c.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(c.dropout)
        self.relative = (
            RelativeBias(c.heads, bidirectional=not c.causal, buckets=c.buckets, max_distance=c.max_distance)
            if c.position == "relative" else None
        )
        attention = partial(
            MultiHeadAttention, c.d, c.heads, d_head=c.d_head, bias=c.bias, scale=c.scale, dropout=c.dropout
        )
        sublayers: list[nn.Module] = []
        for _ in range(c.layers):
            sublayers.append(attention(causal=c.causal, rotary=c.position == "rotary", kind=c.attention))
            if c.cross:
                sublayers.append(attention(cross=True))
            d_ff = 4 * c.d if c.d_ff is None else c.d_ff
            sublayers.append(
                FeedForward(c.d, d_ff, activation=c.activation, gated=c.gated, bias=c.bias, dropout=c.dropout)
            )
        self.stack = ResidualStack(
            sublayers, c.d, norm=c.norm, alpha=c.alpha, norm_kind=c.norm_kind, eps=c.eps, dropout=c.dropout,
            checkpoint=c.checkpoint,
        )
        self.transform: nn.Module | None = None
        self.head: nn.Linear | None = None
        if c.vocab is not None and c.head != "none":
            if c.head == "mlm":
                act = activations[c.activation]
                self.transform = nn.Sequential(nn.Linear(c.d, c.d), _Pointwise(act), make_norm(c.norm_kind, c.d, eps=c.eps))
            self.head = nn.Linear(c.d, c.vocab, bias=c.head_bias)
            if c.tied and self.tokens is not None:
                self.head.weight = self.tokens.weight
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew: Xavier normal with `config.gain`, queries and keys with gain 1; biases 0, norms 1."""
        c = self.config
        deep = "deepnorm" in placements(c.norm)
        gain = c.gain if c.gain is not None else deepnorm_constants(c.sublayers)[1] if deep else 1.0
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, c.d**-0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                if module is not self.head:
                    nn.init.xavier_normal_(module.weight, generator=generator)
                elif not c.tied:
                    module.weight.normal_(0, c.d**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for sublayer in self.stack.sublayers:
            if isinstance(sublayer, FeedForward):
                for p in sublayer.up.weight.chunk(2 if sublayer.gated else 1):
                    nn.init.xavier_normal_(p, gain, generator=generator)
                nn.init.xavier_normal_(sublayer.down.weight, gain, generator=generator)
            elif isinstance(sublayer, MultiHeadAttention):
                heads = (sublayer.q.weight, *sublayer.kv.weight.chunk(2)) if sublayer.cross else sublayer.qkv.weight.chunk(3)
                for p, g in zip(heads, (1.0, 1.0, gain), strict=True):
                    nn.init.xavier_normal_(p, g, generator=generator)
                nn.init.xavier_normal_(sublayer.out.weight, gain, generator=generator)

    # ---------------------------------------------------------------------------------------- running it

    @overload
    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None, positions: Tensor | None = None,
        memory: Tensor | None = None, memory_mask: Tensor | None = None, cache: Cache | None = None,
        return_cache: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, segments: Tensor | None = None, positions: Tensor | None = None,
        memory: Tensor | None = None, memory_mask: Tensor | None = None, cache: Cache | None = None,
        return_cache: Literal[True],
    ) -> tuple[Tensor, Cache]: ...
    def forward(self, tokens: Tensor, *, return_cache: bool = False, **inputs: Any) -> Tensor | tuple[Tensor, Cache]:
        """Logits of the next (or, without `causal`, the same) token; the vectors themselves where there is no head.

        Args:
            tokens: (..., n) integers in [0, vocab), or (..., n, d) vectors in their place. n >= 1.
            mask: broadcastable to (..., heads, n, m), boolean (True: may attend) or floating (added to the logits, in
                nats); causality comes on top. See `padding_mask`, `prefix_mask`.
            segments: (..., n) integers in [0, config.segments); default 0.
            positions: broadcastable to (..., n), integers; default: counted from the length of the cache.
            memory: (..., s, d) with `cross`; not needed if the cache has it.
            memory_mask: broadcastable to (..., heads, n, s).
            cache: keys and values of the m - n earlier positions, from an earlier call. It is not changed.
            return_cache: also return the cache that includes these n positions.

        Returns:
            (..., n, vocab), or with `return_cache` also the cache.

        Raises:
            TypeError, ValueError: mismatched shapes or dtypes, tokens out of range, a sequence longer than max_len, a mask
                that does not broadcast or leaves a query nothing to attend to, a missing or superfluous memory.

        Complexity: O(layers n (d^2 + d d_ff + m d)) time.
        """
        hidden, present, _ = self._run(tokens, keep=return_cache, **inputs)
        out = self.logits(hidden)
        return (out, present) if return_cache else out

    def hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """The vectors (..., n, d) before the head; same arguments as `forward`."""
        return self._run(tokens, **inputs)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head alone: (..., d) -> (..., vocab), or unchanged where there is none."""
        if self.head is None:
            return hidden
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        if self.transform is not None:
            hidden = self.transform(hidden)
        return self.head(hidden)

    def trace(self, tokens: Tensor, **inputs: Any) -> Trace:
        """States and attention weights on the way; same arguments as `forward`, softmax attention only."""
        if callable(self.config.attention):
            raise ValueError("trace needs softmax attention: another kind has no weights to show")
        hidden, _, trace = self._run(tokens, traced=True, **inputs)
        return trace._replace(hidden=hidden)

    def step(self, tokens: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """One step of decoding, for `kexue.decoding.decode`: (rows, n) new tokens -> logits (rows, vocab) of the next.

        The state is the cache (None at first); its tensors have the rows as first axis.
        """
        hidden, present, _ = self._run(tokens, cache=state, keep=True)
        return self.logits(hidden[..., -1, :]), present

    def _run(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
        keep: bool = False,
        traced: bool = False,
    ) -> tuple[Tensor, Cache, Trace]:
        c = self.config
        past = _length(cache, c)
        x, positions = self._embed(tokens, segments, positions, past)
        n, batch = x.shape[-2], x.shape[:-2]
        if cache is not None and cache[0][0].shape[:-3] != batch:
            raise ValueError(f"cache is of a batch {tuple(cache[0][0].shape[:-3])}, tokens of a batch {tuple(batch)}")
        shape = torch.Size([*batch, c.heads, n, past + n])
        bias = None if self.relative is None else self.relative(n, past + n)
        seen = view(shape, like=x, mask=mask, bias=bias, causal=c.causal, scale=c.scale, kind=c.attention)
        seen_memory = self._memory(shape, memory, memory_mask, cache, x) if c.cross else _refuse_memory(memory, memory_mask)
        kept: list[tuple[Tensor, ...]] = [()] * c.layers
        trace = Trace([], [], [], x)

        def attend(i: int, module: MultiHeadAttention, h: Tensor) -> Tensor:
            cross = module.cross
            old = None if cache is None else (cache[i][2], cache[i][3]) if cross else (cache[i][0], cache[i][1])
            out, keys, values, weights = module.attend(
                h, memory, seen_memory if cross else seen, past=old, positions=positions, return_weights=traced
            )
            if keep:
                kept[i] = (*kept[i][:2], keys, values) if cross else (keys, values)
            if weights is not None:
                (trace.cross_weights if cross else trace.weights).append(weights)
            return out

        def synthesize(module: SynthesizerAttention, h: Tensor) -> Tensor:
            if keep or cache is not None:
                raise ValueError("a SynthesizerAttention keeps no cache: call the model on whole sequences")
            everyone = view(shape, like=x, mask=mask, bias=bias, causal=c.causal)
            known = causal_mask(n).to(x.device) if everyone.causal else everyone.mask
            out, weights = module(h, mask=known, return_weights=True)
            if traced:
                trace.weights.append(weights)
            return out

        per_layer = c.sublayers // c.layers
        branches: list[Callable[[Tensor], Tensor]] = [
            partial(attend, i // per_layer, sub) if isinstance(sub, MultiHeadAttention)
            else partial(synthesize, sub) if isinstance(sub, SynthesizerAttention) else sub
            for i, sub in enumerate(self.stack.sublayers)
        ]
        if traced:
            hidden, states = self.stack(x, branches=branches, return_states=True)
            return hidden, tuple(kept), trace._replace(states=states)
        return self.stack(x, branches=branches), tuple(kept), trace

    def _embed(
        self, tokens: Tensor, segments: Tensor | None, positions: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor]:
        """The vectors that enter the stack, and their positions."""
        c = self.config
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            n = _validate.shape("tokens", tokens, "...", "n", "d", d=c.d)["n"]
            _validate.floating(tokens=tokens, **{"the model's weights": next(self.parameters())})
            _validate.finite(tokens=tokens)
            x = tokens
        elif self.tokens is None:
            raise TypeError(f"tokens should be vectors (..., n, d={c.d}), as the configuration has no vocab")
        else:
            n = _validate.shape("tokens", tokens, "...", "n")["n"]
            _in_range("tokens", tokens, c.vocab or 0)
            x = self.tokens(tokens)
        if n < 1:
            raise ValueError(f"tokens: expected n >= 1 positions, got shape {tuple(tokens.shape)}")
        if c.max_len is not None and past + n > c.max_len:
            raise ValueError(f"the sequence has {past + n} positions ({past} of them in the cache), max_len is {c.max_len}")
        if positions is None:
            positions = torch.arange(past, past + n, device=x.device)
        elif c.position in ("relative", "none"):
            raise ValueError(f'positions have no meaning with position = "{c.position}"')
        else:
            try:
                torch.broadcast_to(positions, x.shape[:-1])
            except (RuntimeError, TypeError):
                got = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
                raise ValueError(f"positions: expected a shape that broadcasts to {tuple(x.shape[:-1])}, got {got}") from None
            if self.positions is not None:
                _in_range("positions", positions, self.positions.num_embeddings)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif c.position == "sinusoidal":
            x = x + sinusoids(positions.to(x.dtype), c.d)
        if self.segments is not None:
            if segments is None:
                x = x + self.segments.weight[0]
            else:
                _validate.shape("segments", segments, *tokens.shape[: x.ndim - 1])
                _in_range("segments", segments, c.segments)
                x = x + self.segments(segments)
        elif segments is not None:
            raise ValueError("segments were given, but config.segments is 0")
        return self.dropout(self.embed_norm(x)), positions

    def _memory(
        self, shape: torch.Size, memory: Tensor | None, memory_mask: Tensor | None, cache: Cache | None, x: Tensor
    ) -> View:
        if memory is not None:
            s = _validate.shape("memory", memory, *shape[:-3], "s", "d", d=self.config.d)["s"]
            _validate.floating(memory=memory, tokens=x)
        elif cache is not None:
            s = cache[0][2].shape[-2]
        else:
            raise ValueError("memory should be given: the configuration has cross-attention")
        return view(torch.Size([*shape[:-1], s]), like=x, mask=memory_mask, scale=self.config.scale)


class _Pointwise(nn.Module):
    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x)


class EncoderDecoder(nn.Module):
    """Two Transformers, the second of which attends to what the first makes of the source.

    Source: Vaswani et al., arXiv:1706.03762; Raffel et al., arXiv:1910.10683 (T5).

    Args:
        encoder: without head and not causal. decoder: causal, with `cross`, of the same width.
        shared: one token table for both.

    Raises:
        ValueError: halves that do not fit.
    """

    def __init__(self, encoder: Transformer, decoder: Transformer, *, shared: bool = True) -> None:
        super().__init__()
        e, d = encoder.config, decoder.config
        if encoder.head is not None or e.cross or not d.cross or e.d != d.d:
            raise ValueError(
                f"expected an encoder without head and cross-attention and a decoder with cross-attention of one width, got "
                f"encoder (head={e.head!r}, cross={e.cross}, d={e.d}) and decoder (cross={d.cross}, d={d.d})"
            )
        if shared:
            if encoder.tokens is None or decoder.tokens is None or e.vocab != d.vocab:
                raise ValueError(f"a shared token table needs one vocab, got {e.vocab} and {d.vocab}")
            encoder.tokens = decoder.tokens
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self, source: Tensor, target: Tensor, *, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (..., n, vocab) of the tokens after each of `target` (..., n), given `source` (..., s).

        Args:
            source, target: tokens or vectors, as in `Transformer.forward`.
            source_mask: (..., s) boolean, True where there is a token. target_mask: broadcastable to (..., heads, n, n).
        """
        memory, seen, _ = self.start(source, source_mask)
        return self.decoder(target, mask=target_mask, memory=memory, memory_mask=seen)

    def start(self, source: Tensor, source_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, None]:
        """Encode the source: the state with which `step` begins."""
        seen = None
        if source_mask is not None:
            _validate.shape("source_mask", source_mask, *source.shape[: source.ndim - source.is_floating_point()])
            if source_mask.dtype != torch.bool:
                raise TypeError(f"source_mask should be boolean, got {source_mask.dtype}")
            seen = source_mask[..., None, None, :]
        return self.encoder(source, mask=seen), seen, None

    def step(
        self, tokens: Tensor, state: tuple[Tensor, Tensor | None, Cache | None]
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None, Cache | None]]:
        """One step of decoding, for `kexue.decoding.decode`, from the state of `start`: logits (rows, vocab)."""
        memory, seen, cache = state
        hidden, present, _ = self.decoder._run(tokens, memory=memory, memory_mask=seen, cache=cache, keep=True)
        return self.decoder.logits(hidden[..., -1, :]), (memory, seen, present)


# --------------------------------------------------------------------------------------------- plumbing


def _length(cache: Cache | None, c: Config) -> int:
    """Positions in the cache, after a look at its form."""
    if cache is None:
        return 0
    size = 4 if c.cross else 2
    if not isinstance(cache, Sequence) or len(cache) != c.layers or any(len(layer) != size for layer in cache):
        raise ValueError(f"cache: expected {c.layers} layers of {size} tensors, as an earlier call returned")
    return _validate.shape("cache[0][0]", cache[0][0], "...", "heads", "m", "d_head", heads=c.heads, d_head=c.width)["m"]


def _in_range(name: str, ids: Tensor, size: int) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} should be integers, got {ids.dtype}")
    if ids.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(ids.shape)}")
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} should lie in [0, {size - 1}], got values from {low} to {high}")


def _refuse_memory(memory: Tensor | None, memory_mask: Tensor | None) -> View:
    if memory is not None or memory_mask is not None:
        raise ValueError("memory was given, but the configuration has no cross-attention")
    return View()
