"""Weights of Hugging Face transformers' GPT-2, BERT and T5, name by name: every tensor is used, or the load fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kexue import _validate
from kexue.transformer.model import Config, EncoderDecoder, Transformer

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


class _Source:
    """A state dict from which each tensor is taken by name; what is left over is an error."""

    def __init__(self, model: Any, *classes: str) -> None:
        name = type(model).__name__
        _validate.choice("model", name, classes)
        self.tensors: dict[str, Tensor] = dict(model.state_dict())
        self.root = ""

    def at(self, *roots: str) -> None:
        """Take the first of the roots that the names begin with ("" always does)."""
        self.root = next(root for root in roots if any(name.startswith(root) for name in self.tensors))

    def take(self, name: str, *, absolute: bool = False) -> Tensor:
        full = name if absolute else self.root + name
        if full not in self.tensors:
            raise ValueError(f"the model has no tensor {full!r}")
        return self.tensors.pop(full)

    def linear(self, ours: str, *theirs: str, bias: bool = True, transposed: bool = False) -> dict[str, Tensor]:
        """One linear layer of ours from one or several of theirs, stacked."""
        weights = [self.take(f"{name}.weight") for name in theirs]
        state = {f"{ours}.weight": torch.cat([w.mT for w in weights] if transposed else weights)}
        if bias:
            state[f"{ours}.bias"] = torch.cat([self.take(f"{name}.bias") for name in theirs])
        return state

    def same(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that has to equal one that is already there."""
        if not torch.equal(self.take(name, absolute=True), tensor):
            raise ValueError(f"{name!r} should be tied, but has values of its own")

    def fill(self, model: nn.Module, state: dict[str, Tensor], ignore: Iterable[str]) -> None:
        """Load the state into the model, and complain of anything left or missing."""
        left = [name for name in self.tensors if not name.startswith(tuple(ignore))]
        if left:
            raise ValueError(f"no place for {', '.join(left)}; name what may be dropped by `ignore`")
        missing, unexpected = model.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ValueError(f"weights without a source: {missing}; without a place: {unexpected}")


def _norm(ours: str, theirs: str, source: _Source, *, bias: bool = True) -> dict[str, Tensor]:
    return {f"{ours}.{part}": source.take(f"{theirs}.{part}") for part in (("weight", "bias") if bias else ("weight",))}


def _activation(name: str) -> str:
    _validate.choice("the model's activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]


def _require(config: Any, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"{name} = {getattr(config, name)!r} is not supported, only {value!r}")


def from_hf_gpt2(model: Any, *, ignore: Iterable[str] = ()) -> Transformer:
    """The `Transformer` equal to a `GPT2Model` (vectors out) or `GPT2LMHeadModel` (logits out).

    Source: Radford et al., *Language models are unsupervised multitask learners*, 2019.

    Args:
        model: of Hugging Face transformers, with random or pretrained weights; its tensors are copied.
        ignore: beginnings of names of tensors that may be dropped; without it each tensor has to find its place.

    Returns:
        A Transformer of the same dtype, without dropout, that gives the same outputs and gradients.

    Raises:
        ValueError: another class, an option that has no counterpart, a tensor too many or too few.
    """
    source = _Source(model, "GPT2Model", "GPT2LMHeadModel")
    hf = model.config
    _require(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    source.at("transformer.", "")
    tied = type(model).__name__ == "GPT2LMHeadModel" and model.lm_head.weight is model.get_input_embeddings().weight
    state = {"tokens.weight": source.take("wte.weight"), "positions.weight": source.take("wpe.weight")}
    for i in range(hf.n_layer):
        a, f = 2 * i, 2 * i + 1
        state |= _norm(f"stack.inner.{a}", f"h.{i}.ln_1", source)
        state |= source.linear(f"stack.sublayers.{a}.qkv", f"h.{i}.attn.c_attn", transposed=True)
        state |= source.linear(f"stack.sublayers.{a}.out", f"h.{i}.attn.c_proj", transposed=True)
        state |= _norm(f"stack.inner.{f}", f"h.{i}.ln_2", source)
        state |= source.linear(f"stack.sublayers.{f}.up", f"h.{i}.mlp.c_fc", transposed=True)
        state |= source.linear(f"stack.sublayers.{f}.down", f"h.{i}.mlp.c_proj", transposed=True)
    state |= _norm("stack.final", "ln_f", source)
    head = type(model).__name__ == "GPT2LMHeadModel"
    if head:
        state["head.weight"] = source.take("lm_head.weight", absolute=True)
    ours = Transformer(Config(
        d=hf.n_embd, layers=hf.n_layer, heads=hf.n_head, vocab=hf.vocab_size, d_ff=hf.n_inner, max_len=hf.n_positions,
        eps=hf.layer_norm_epsilon, activation=_activation(hf.activation_function), causal=True,
        scale=None if hf.scale_attn_weights else 1.0, head="linear" if head else "none", tied=tied,
    )).to(state["tokens.weight"])
    source.fill(ours, state, ignore)
    return ours


def from_hf_bert(model: Any, *, ignore: Iterable[str] = ()) -> Transformer:
    """The `Transformer` equal to a `BertModel` (vectors out) or `BertForMaskedLM` / `BertLMHeadModel` (logits out).

    A pooler has no place here: build `BertModel(config, add_pooling_layer=False)`, or pass `ignore=["pooler."]`.
    BERT's attention mask (batch, n) of ones and zeros is `mask=attention_mask[:, None, None].bool()` here.

    Source: Devlin et al., arXiv:1810.04805.

    Args, Returns, Raises: as in `from_hf_gpt2`.
    """
    source = _Source(model, "BertModel", "BertForMaskedLM", "BertLMHeadModel", "BertForPreTraining")
    hf = model.config
    _require(hf, position_embedding_type="absolute", add_cross_attention=False)
    source.at("bert.", "")
    state = {
        "tokens.weight": source.take("embeddings.word_embeddings.weight"),
        "positions.weight": source.take("embeddings.position_embeddings.weight"),
        "segments.weight": source.take("embeddings.token_type_embeddings.weight"),
    } | _norm("embed_norm", "embeddings.LayerNorm", source)
    for i in range(hf.num_hidden_layers):
        a, f, layer = 2 * i, 2 * i + 1, f"encoder.layer.{i}"
        state |= source.linear(f"stack.sublayers.{a}.qkv", *(f"{layer}.attention.self.{x}" for x in ("query", "key", "value")))
        state |= source.linear(f"stack.sublayers.{a}.out", f"{layer}.attention.output.dense")
        state |= _norm(f"stack.outer.{a}", f"{layer}.attention.output.LayerNorm", source)
        state |= source.linear(f"stack.sublayers.{f}.up", f"{layer}.intermediate.dense")
        state |= source.linear(f"stack.sublayers.{f}.down", f"{layer}.output.dense")
        state |= _norm(f"stack.outer.{f}", f"{layer}.output.LayerNorm", source)
    head, tied = source.root == "bert.", False
    if head:
        source.root = "cls.predictions."
        state |= source.linear("transform.0", "transform.dense") | _norm("transform.2", "transform.LayerNorm", source)
        state["head.weight"], state["head.bias"] = source.take("decoder.weight"), source.take("bias")
        source.same("cls.predictions.decoder.bias", state["head.bias"])
        tied = model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    ours = Transformer(Config(
        d=hf.hidden_size, layers=hf.num_hidden_layers, heads=hf.num_attention_heads, vocab=hf.vocab_size,
        d_ff=hf.intermediate_size, max_len=hf.max_position_embeddings, norm="post", eps=hf.layer_norm_eps, embed_norm=True,
        segments=hf.type_vocab_size, activation=_activation(hf.hidden_act), causal=hf.is_decoder,
        head="mlm" if head else "none", tied=tied, head_bias=head,
    )).to(state["tokens.weight"])
    source.fill(ours, state, ignore)
    return ours


def from_hf_t5(model: Any, *, ignore: Iterable[str] = ()) -> EncoderDecoder:
    """The `EncoderDecoder` equal to a `T5Model` (vectors out), `T5ForConditionalGeneration` or its mT5 twin (logits out).

    The norms compute in the dtype of their input; Hugging Face's T5 takes the mean square in float32 even of float64.
    The decoder's input is the labels shifted right behind `decoder_start_token_id`; shift them yourself.

    Source: Raffel et al., arXiv:1910.10683; Xue et al., arXiv:2010.11934 (mT5).

    Args, Returns, Raises: as in `from_hf_gpt2`.
    """
    source = _Source(
        model, "T5Model", "T5ForConditionalGeneration", "MT5Model", "MT5ForConditionalGeneration"
    )
    hf = model.config
    head = type(model).__name__.endswith("Generation")
    tied = head and model.lm_head.weight is model.shared.weight
    shared = source.take("shared.weight")
    state = {"encoder.tokens.weight": shared, "decoder.tokens.weight": shared}
    for half in ("encoder", "decoder"):
        source.same(f"{half}.embed_tokens.weight", shared)
        relative = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state[f"{half}.relative.table.weight"] = source.take(relative)
        cross = half == "decoder"
        per_layer = 3 if cross else 2
        for i in range(hf.num_decoder_layers if cross else hf.num_layers):
            for j in range(per_layer):
                ours, theirs = f"{half}.stack.sublayers.{per_layer * i + j}", f"{half}.block.{i}.layer.{j}"
                state |= _norm(f"{half}.stack.inner.{per_layer * i + j}", f"{theirs}.layer_norm", source, bias=False)
                if j == 0:
                    names = [f"{theirs}.SelfAttention.{x}" for x in "qkv"]
                    state |= source.linear(f"{ours}.qkv", *names, bias=False)
                    state |= source.linear(f"{ours}.out", f"{theirs}.SelfAttention.o", bias=False)
                elif j < per_layer - 1:
                    state |= source.linear(f"{ours}.q", f"{theirs}.EncDecAttention.q", bias=False)
                    state |= source.linear(f"{ours}.kv", *(f"{theirs}.EncDecAttention.{x}" for x in "kv"), bias=False)
                    state |= source.linear(f"{ours}.out", f"{theirs}.EncDecAttention.o", bias=False)
                else:
                    up = ("wi_0", "wi_1") if hf.is_gated_act else ("wi",)
                    state |= source.linear(f"{ours}.up", *(f"{theirs}.DenseReluDense.{x}" for x in up), bias=False)
                    state |= source.linear(f"{ours}.down", f"{theirs}.DenseReluDense.wo", bias=False)
        state |= _norm(f"{half}.stack.final", f"{half}.final_layer_norm", source, bias=False)
    if head:
        state["decoder.head.weight"] = source.take("lm_head.weight")
    scaled = head and getattr(hf, "scale_decoder_outputs", False)

    def half_of(layers: int, *, decoder: bool) -> Transformer:
        return Transformer(Config(
            d=hf.d_model, layers=layers, heads=hf.num_heads, vocab=hf.vocab_size, d_ff=hf.d_ff, d_head=hf.d_kv, max_len=None,
            norm_kind="rms", eps=hf.layer_norm_epsilon, activation=_activation(hf.dense_act_fn), gated=hf.is_gated_act,
            bias=False, scale=1.0, position="relative", buckets=hf.relative_attention_num_buckets,
            max_distance=hf.relative_attention_max_distance, causal=decoder, cross=decoder,
            head="linear" if decoder and head else "none", tied=tied, logit_scale=hf.d_model**-0.5 if scaled else 1.0,
        ))

    result = EncoderDecoder(half_of(hf.num_layers, decoder=False), half_of(hf.num_decoder_layers, decoder=True)).to(shared)
    source.fill(result, state, ignore)
    return result
