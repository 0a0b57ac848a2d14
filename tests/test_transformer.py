"""The Transformer against Hugging Face's GPT-2, BERT and T5, torch's own layers, formulas by hand, and itself in other ways."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention, RoFormerSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from kexue.attention import attention, linear_attention
from kexue.decoding import decode
from kexue.numerics import PeakMemory
from kexue.transformer import (
    Config,
    EncoderDecoder,
    FeedForward,
    MultiHeadAttention,
    RelativeBias,
    ResidualStack,
    Transformer,
    causal_mask,
    deepnorm_constants,
    from_hf_bert,
    from_hf_gpt2,
    from_hf_t5,
    padding_mask,
    prefix_mask,
    relative_bucket,
    rotary,
    sinusoids,
)

F64 = torch.float64
V = 37
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=seeded(seed))


def ids(*shape: int, seed: int = 0, low: int = 2, high: int = V) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=seeded(seed))


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= tol * max(1e-6, float(b.abs().max()))


def randomise(module: nn.Module, std: float = 0.2, seed: int = 0) -> nn.Module:
    """All parameters at random, the gains of norms near 1, so that a swapped or forgotten one shows."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(0, std, generator=generator)
            if "norm" in name.lower() or ".ln_" in name or "inner" in name or "outer" in name or "final" in name:
                p.add_(name.endswith("weight"))
    return module


def small(**options) -> Transformer:
    settings = {"d": 12, "layers": 2, "heads": 3, "vocab": V, "max_len": 16} | options
    return randomise(Transformer(Config(**settings)).to(F64)).eval()


# ------------------------------------------------------------------------------------------ Hugging Face

SIZES = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1}
T5_SIZES = {"vocab_size": V, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}


def hf_gpt2(cls=GPT2LMHeadModel, **options):
    return cls(GPT2Config(n_positions=20, n_embd=24, n_layer=3, n_head=4, **SIZES | options))


def hf_bert(cls=BertForMaskedLM, **options):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    extra = {"add_pooling_layer": False} if cls is BertModel else {}
    return cls(BertConfig(max_position_embeddings=20, vocab_size=V, **sizes | options), **extra)


def hf_t5(cls=T5ForConditionalGeneration, config=T5Config, untied=False, **options):
    model = cls(config(**T5_SIZES | options))
    if untied:
        model.lm_head.weight = nn.Parameter(torch.empty(V, 24))
        model.config.tie_word_embeddings = False
    return model


@pytest.fixture(autouse=True)
def t5_norm_in_its_own_dtype(monkeypatch):
    """Hugging Face's T5 takes mean squares in float32 even of float64: 5e-8 off. The oracle is the formula in one dtype."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for norm in (T5LayerNorm, MT5LayerNorm):
        monkeypatch.setattr(norm, "forward", forward)


def gpt2_pair(dtype, **options):
    hf = randomise(hf_gpt2(**options)).to(dtype).eval()
    tokens, keep = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    keep[0, 6:] = 0
    ours = from_hf_gpt2(hf)
    targets = tokens.masked_fill(keep == 0, -100)
    out = ours(tokens, mask=keep[:, None, None].bool())
    result = hf(tokens, attention_mask=keep, labels=targets)
    loss = F.cross_entropy(out[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    want_loss = F.cross_entropy(result.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    close(result.loss.float(), want_loss.float(), 1e-6)  # theirs is in float32 whatever the model is in
    return hf, ours, from_hf_gpt2, out, result.logits, loss, want_loss, keep


def bert_pair(dtype, **options):
    hf = randomise(hf_bert(**options)).to(dtype).eval()
    tokens, segments, targets, keep = ids(3, 9), ids(3, 9, low=0, high=2), ids(3, 9, seed=1), torch.ones(3, 9, dtype=torch.long)
    keep[1, 5:] = 0
    targets = targets.masked_fill(keep == 0, -100)
    ours = from_hf_bert(hf)
    out = ours(tokens, segments=segments, mask=keep[:, None, None].bool())
    result = hf(tokens, token_type_ids=segments, attention_mask=keep, labels=targets)
    loss = F.cross_entropy(out.flatten(0, 1), targets.flatten())
    return hf, ours, from_hf_bert, out, result.logits, loss, result.loss, keep


def t5_pair(dtype, **options):
    hf = randomise(hf_t5(**options)).to(dtype).eval()
    source, target, labels = ids(2, 150), ids(2, 140, seed=1), ids(2, 140, seed=2)  # beyond the last bucket
    keep = torch.ones(2, 150, dtype=torch.long)
    keep[1, 100:] = 0
    ours = from_hf_t5(hf)
    out = ours(source, target, source_mask=keep.bool())
    result = hf(input_ids=source, attention_mask=keep, decoder_input_ids=target, labels=labels)
    return hf, ours, from_hf_t5, out, result.logits, F.cross_entropy(out.flatten(0, 1), labels.flatten()), result.loss, None


LAYOUTS = {
    "gpt2": (gpt2_pair, {}),
    "gpt2 wide": (gpt2_pair, {"n_inner": 30, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "gpt2 untied and unscaled": (gpt2_pair, {"tie_word_embeddings": False, "scale_attn_weights": False}),
    "bert": (bert_pair, {}),
    "bert causal": (bert_pair, {"is_decoder": True, "hidden_act": "silu"}),
    "t5": (t5_pair, {}),
    "t5.1.1": (t5_pair, {"feed_forward_proj": "gated-gelu", "untied": True}),
    "mt5": (t5_pair, {"cls": MT5ForConditionalGeneration, "config": MT5Config}),
    "t5 of other buckets": (t5_pair, {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 50}),
}


@pytest.mark.filterwarnings("ignore:.*is_decoder.*")
@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_loss_and_gradients_are_hugging_faces(layout, dtype):
    pair, options = LAYOUTS[layout]
    hf, ours, convert, out, want, loss, want_loss, keep = pair(dtype, **options)
    seen = slice(None) if keep is None else keep.bool()
    close(out[seen], want[seen], TOL[dtype])
    close(loss, want_loss, TOL[dtype])
    loss.backward()
    want_loss.backward()
    with torch.no_grad():  # the gradients, put where the weights were, go through the same door
        for p in hf.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    moved = dict(convert(hf).named_parameters())
    assert len(moved) == len(list(ours.named_parameters())) > 10
    for name, p in ours.named_parameters():
        close(p.grad, moved[name], TOL[dtype])


def test_vectors_states_and_weights_are_hugging_faces():
    tokens = ids(2, 7)
    hf = randomise(hf_gpt2(GPT2Model, attn_implementation="eager")).to(F64).eval()
    ours = from_hf_gpt2(hf)
    result = hf(tokens, output_hidden_states=True, output_attentions=True)
    trace = ours.trace(tokens)
    close(ours(tokens), result.last_hidden_state)
    close(trace.hidden, result.last_hidden_state)
    for got, want in zip(trace.states[::2], (*result.hidden_states[:-1], trace.states[-1]), strict=True):
        close(got, want)  # Hugging Face's last state is the normalised one
    for got, want in zip(trace.weights, result.attentions, strict=True):
        close(got, want)
    hf = randomise(hf_bert(BertModel, attn_implementation="eager")).to(F64).eval()
    result = hf(tokens, output_hidden_states=True, output_attentions=True)
    trace = from_hf_bert(hf).trace(tokens)
    for got, want in zip(trace.states[::2], result.hidden_states, strict=True):
        close(got, want)
    hf = randomise(hf_t5(T5Model)).to(F64).eval()
    close(from_hf_t5(hf)(tokens, tokens), hf(input_ids=tokens, decoder_input_ids=tokens).last_hidden_state)


def test_pretrained_parts_without_a_place_are_named():
    hf = hf_bert(BertForPreTraining)
    with pytest.raises(ValueError, match=r"no place for bert\.pooler\.dense\.weight, .*cls\.seq_relationship\.weight"):
        from_hf_bert(hf)
    hf.eval()
    tokens = ids(2, 5)
    close(from_hf_bert(hf, ignore=["bert.pooler.", "cls.seq_relationship."])(tokens), hf(tokens).prediction_logits, 1e-5)
    with pytest.raises(ValueError, match="'GPT2LMHeadModel', got 'BertForPreTraining'"):
        from_hf_gpt2(hf)
    with pytest.raises(ValueError, match=r"scale_attn_by_inverse_layer_idx = True is not supported"):
        from_hf_gpt2(hf_gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match=r"activation should be one of 'gelu'.*got 'mish'"):
        from_hf_gpt2(hf_gpt2(activation_function="mish"))
    strange = hf_gpt2()
    strange.transformer.h[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no place for transformer\.h\.0\.extra\.weight"):
        from_hf_gpt2(strange)
    del strange.transformer.h[0].extra, strange.transformer.h[1].ln_2
    with pytest.raises(ValueError, match=r"no tensor 'transformer\.h\.1\.ln_2\.weight'"):
        from_hf_gpt2(strange)


def test_a_loaded_model_is_a_copy():
    hf = hf_gpt2()
    ours, tokens = from_hf_gpt2(hf).eval(), ids(1, 4)
    before = ours(tokens)
    randomise(hf)
    assert torch.equal(ours(tokens), before)
    assert ours.head.weight is ours.tokens.weight


def test_decoding_is_generate():
    hf = randomise(hf_gpt2(pad_token_id=1)).to(F64).eval()
    prompt = ids(3, 4)
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None)
    close(decode(from_hf_gpt2(hf).step, prompt, max_len=10).tokens[:, 0], want[:, 4:])
    hf = randomise(hf_t5(decoder_start_token_id=0), 0.5).to(F64).eval()
    ours = from_hf_t5(hf)
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[2, 2:] = False
    start = torch.zeros(3, 1, dtype=torch.long)
    want = hf.generate(prompt, attention_mask=keep.long(), max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    found = decode(ours.step, start, max_len=8, state=ours.start(prompt, keep)).tokens[:, 0]
    assert len(set(found.flatten().tolist())) > 3
    close(found, want[:, 1:])


# ------------------------------------------------------------------------------------------ torch's layers


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_block_is_torchs_encoder_layer(norm, activation):
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation=activation, norm_first=norm == "pre", batch_first=True, dtype=F64
    )
    randomise(theirs)
    ours = Transformer(Config(d=12, layers=1, heads=3, d_ff=20, norm=norm, activation=activation, position="none")).to(F64)
    where = "inner" if norm == "pre" else "outer"
    names = {
        "self_attn.in_proj_": "stack.sublayers.0.qkv.", "self_attn.out_proj.": "stack.sublayers.0.out.",
        "linear1.": "stack.sublayers.1.up.", "linear2.": "stack.sublayers.1.down.",
        "norm1.": f"stack.{where}.0.", "norm2.": f"stack.{where}.1.",
    }

    def translate(state):
        found = {}
        for name, x in state.items():
            ((old, new),) = ((old, new) for old, new in names.items() if name.startswith(old))
            found[new + name[len(old) :]] = x
        return found

    ours.load_state_dict(translate(theirs.state_dict()), strict=norm == "post")
    x = draw(2, 7, 12)
    hidden = torch.rand(2, 7, generator=seeded(3)) < 0.3
    out, want = ours.stack.final(theirs(x, src_key_padding_mask=hidden)), ours(x, mask=~hidden[:, None, None])
    close(out, want)
    out.square().sum().backward()
    moved = translate({name: p.grad for name, p in theirs.named_parameters()})
    ours.zero_grad()
    ours(x, mask=~hidden[:, None, None]).square().sum().backward()
    for name, grad in moved.items():
        close(dict(ours.named_parameters())[name].grad, grad, 1e-10)


def test_attention_is_torchs_multihead():
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=F64)
    randomise(theirs)
    ours = MultiHeadAttention(12, 3).to(F64)
    ours.load_state_dict({
        "qkv.weight": theirs.in_proj_weight, "qkv.bias": theirs.in_proj_bias, "out.weight": theirs.out_proj.weight,
        "out.bias": theirs.out_proj.bias,
    })
    x = draw(2, 5, 12)
    bias = draw(5, 5, seed=1).masked_fill(~causal_mask(5), -math.inf)
    close(ours(x, mask=bias), theirs(x, x, x, attn_mask=bias)[0])
    crossed = MultiHeadAttention(12, 3, cross=True).to(F64)
    q, kv = theirs.in_proj_weight.split([12, 24])
    q_bias, kv_bias = theirs.in_proj_bias.split([12, 24])
    crossed.load_state_dict({
        "q.weight": q, "q.bias": q_bias, "kv.weight": kv, "kv.bias": kv_bias, "out.weight": theirs.out_proj.weight,
        "out.bias": theirs.out_proj.bias,
    })
    memory = draw(2, 8, 12, seed=2)
    close(crossed(x, memory), theirs(x, memory, memory)[0])


# --------------------------------------------------------------------------------------- the residual stack


def branches(count: int, d: int = 6) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(d, d, dtype=F64), nn.Tanh()) for _ in range(count)]


def test_placements_by_hand():
    x, fs = draw(3, 6), branches(4)

    def N(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    def run(step):
        y = x
        for f in fs:
            y = step(y, f)
        return y

    def stack(norm, **options):
        return ResidualStack(fs, 6, norm=norm, affine=False, **options)(x)

    close(stack("pre"), N(run(lambda y, f: y + f(N(y)))))
    close(stack("pre", alpha=0.5), N(run(lambda y, f: 0.5 * y + f(N(y)))))
    close(stack("post"), run(lambda y, f: N(y + f(y))))
    close(stack("deepnorm"), run(lambda y, f: N(4**0.25 * y + f(y))))
    close(stack("deepnorm", alpha=3.0), run(lambda y, f: N(3 * y + f(y))))
    close(stack("both"), run(lambda y, f: N(y + f(N(y)))))
    close(stack("none"), run(lambda y, f: y + f(y)))
    y = x
    for a, f in zip(fs[::2], fs[1::2], strict=True):  # GPT2_ML: the attention's residual keeps the stream, un-normalised
        h = y + a(y)
        y = N(h + f(N(h)))
    close(stack(("none", "both")), y)
    rms = run(lambda y, f: y + f(y * (y.square().mean(-1, keepdim=True) + 1e-3).rsqrt()))
    close(stack("pre", norm_kind="rms", eps=1e-3), rms * (rms.square().mean(-1, keepdim=True) + 1e-3).rsqrt())


def test_pre_norm_telescopes():
    stack = ResidualStack(branches(8), 6, affine=False)
    x = draw(3, 6)
    out, states = stack(x, return_states=True)
    assert len(states) == 9
    assert states[0] is x
    close(states[-1], x + sum(f(F.layer_norm(s, (6,))) for f, s in zip(stack.sublayers, states, strict=False)))
    close(out, F.layer_norm(states[-1], (6,)))


def test_groups_and_skips():
    stack = ResidualStack(branches(4), 6, affine=False)
    x = draw(3, 6)
    f, N = stack.sublayers, lambda x: F.layer_norm(x, (6,))
    close(stack(x, groups=[[0], [1], [2], [3]]), stack(x))
    y = x + f[0](N(x))
    close(stack(x, groups=[[0], [1, 2], [3]]), N((z := y + f[1](N(y)) + f[2](N(y))) + f[3](N(z))))
    close(stack(x, skip=[1, 2]), N(y + f[3](N(y))))
    close(stack(x, skip={3}, groups=[[0], (2, 1)]), N(y + f[1](N(y)) + f[2](N(y))))
    post = randomise(ResidualStack(stack.sublayers, 6, norm="post").to(F64))
    y = post.outer[0](x + f[0](x))
    close(post(x, groups=[[0], [3, 1, 2]]), post.outer[3](y + f[1](y) + f[2](y) + f[3](y)))
    for bad in ([[0], [1], [2]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3], []], [[0, 1, 2, 4]]):
        with pytest.raises(ValueError, match="groups should be a partition of"):
            stack(x, groups=bad)
    with pytest.raises(ValueError, match="skip should hold indices of the 4 sub-layers"):
        stack(x, skip=[4])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parallel_layers_are_one_wide_layer(gated, bias):
    layers = [randomise(FeedForward(6, width, gated=gated, bias=bias).to(F64), seed=width) for width in (5, 8, 3)]
    wide, x = FeedForward.parallel(layers), draw(4, 6)
    assert wide.d_ff == 16
    close(wide(x), sum(f(x) for f in layers))
    with pytest.raises(ValueError, match="layers should share"):
        FeedForward.parallel([layers[0], FeedForward(6, 5, gated=not gated, bias=bias)])
    with pytest.raises(ValueError, match="layers is empty"):
        FeedForward.parallel([])


@pytest.mark.parametrize("checkpoint", [1, 3, 7, 100])
def test_recomputed_activations_give_the_same_gradients(checkpoint):
    plain = small(dropout=0.3, layers=4, causal=True, norm="deepnorm").train()
    saving = Transformer(dataclasses.replace(plain.config, checkpoint=checkpoint)).to(F64).train()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        torch.manual_seed(1)
        model(ids(2, 6)).square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_recomputation_saves_memory():
    def peak(model, x: torch.Tensor) -> int:
        model(x).sum().backward()
        with PeakMemory() as memory:
            model(x).sum().backward()
        return memory.peak

    def stack(checkpoint: int) -> int:
        layers = [FeedForward(8, 16) for _ in range(64)]
        return peak(ResidualStack(layers, 8, norm="deepnorm", checkpoint=checkpoint), torch.randn(256, 8))

    def transformer(checkpoint: int) -> int:
        config = Config(d=8, layers=12, heads=2, d_ff=16, causal=True, position="none", checkpoint=checkpoint)
        return peak(Transformer(config), torch.randn(32, 16, 8))

    assert stack(8) < stack(1) < stack(0) / 4
    assert transformer(4) < transformer(0) / 3


def test_a_thousand_sublayers_stay_finite():
    torch.manual_seed(0)
    alpha, gain = deepnorm_constants(1000)
    layers = [FeedForward(8, 16, activation="relu", bias=False) for _ in range(1000)]
    for f in layers:
        nn.init.xavier_normal_(f.up.weight, gain)
        nn.init.xavier_normal_(f.down.weight, gain)
    stack, x = ResidualStack(layers, 8, norm="deepnorm", checkpoint=32), torch.randn(4, 8, requires_grad=True)
    assert stack.alpha == alpha == 1000**0.25
    y = stack(x)
    y[:, 0].sum().backward()
    assert float(F.cosine_similarity(F.layer_norm(x, (8,)), y).detach().min()) > 0.9
    assert 0.3 < float(x.grad.norm()) < 10


def test_deepnorm_constants():
    for N, alpha, beta in ((6, 1.861, 0.3799), (18, 2.449, 0.2887), (100, 3.761, 0.1880), (1000, 6.687, 0.1057)):
        a, b = deepnorm_constants(2 * N)
        assert (a, b) == (pytest.approx(alpha, abs=5e-4), pytest.approx(beta, abs=5e-5))
        assert a == pytest.approx((2 * N) ** 0.25, rel=1e-14)
        assert b == pytest.approx((8 * N) ** -0.25, rel=1e-14)
    for M in (1, 10, 1000):
        for K, convention in ((1, "article"), (2, "paper")):
            a, b = deepnorm_constants(M, convention=convention)
            assert (K * M * (b / a) ** 2, K * (a * b) ** 2) == (pytest.approx(1), pytest.approx(1))
            a, b = deepnorm_constants(M, optimizer="adam", convention=convention)
            assert (K * M * b / a, K * a * b) == (pytest.approx(1), pytest.approx(1))
            a, b = deepnorm_constants(M, optimizer="lamb", convention=convention)
            assert (K * M * b**2 / a, a) == (pytest.approx(1), 1)


@settings(max_examples=50)
@given(M=st.integers(1, 10**6), alpha=st.floats(0.01, 100), convention=st.sampled_from(["paper", "article"]))
def test_deepnorm_constants_at_a_given_alpha(M, alpha, convention):
    K = 2 if convention == "paper" else 1
    powers = {"sgd": lambda b: (b / alpha) ** 2, "adam": lambda b: b / alpha, "lamb": lambda b: b * b / alpha}
    for optimizer, power in powers.items():
        a, b = deepnorm_constants(M, optimizer=optimizer, convention=convention, alpha=alpha)
        assert a == alpha
        assert K * M * power(b) == pytest.approx(1)
        own, gain = deepnorm_constants(M, optimizer=optimizer, convention=convention)
        assert deepnorm_constants(M, optimizer=optimizer, convention=convention, alpha=own) == (own, gain)


@pytest.mark.parametrize(("N", "L"), [(6, 6), (18, 18), (100, 100), (24, 6), (6, 48)])
def test_deepnorm_constants_of_an_encoder_are_the_published_ones(N, L):
    a, b = deepnorm_constants(2 * N, decoder=L)
    assert a == pytest.approx(0.81 * (N**4 * L) ** (1 / 16), rel=0.005 / 0.81)  # as figure 2 of the paper rounds
    assert b == pytest.approx(0.87 * (N**4 * L) ** (-1 / 16), rel=0.005 / 0.87)
    assert b == pytest.approx((N**4 * L) ** (-1 / 16) / 1.15, rel=0.002)  # as torchscale rounds
    a, b = deepnorm_constants(3 * L)
    assert (a, b) == (pytest.approx((3 * L) ** 0.25), pytest.approx((12 * L) ** -0.25))
    a, b = deepnorm_constants(2 * N, decoder=L, convention="article")
    assert a * b == pytest.approx(1)
    assert a == pytest.approx((2 * 3**-0.75 * N * L**0.25) ** 0.25)


# ---------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("buckets", [16, 32, 64])
@pytest.mark.parametrize("max_distance", [64, 100, 128, 512])
def test_buckets_are_t5s(bidirectional, buckets, max_distance):
    distance = torch.arange(-3000, 3001)
    want = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(relative_bucket(distance, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance), want)


def test_edges_of_buckets():
    def edges(bidirectional):
        bucket = relative_bucket(-torch.arange(1000), bidirectional=bidirectional)
        return [0, *(torch.nonzero(bucket.diff())[:, 0] + 1).tolist()]

    assert edges(True) == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert edges(False) == [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def test_relative_bias_is_toeplitz_and_cached():
    bias = randomise(RelativeBias(2, bidirectional=False))
    full = bias(9, 9)
    for i in range(8):
        assert torch.equal(full[:, 1:, 1:], full[:, :-1, :-1])
        assert torch.equal(bias(9 - i, 9), full[:, i:])
    want = bias.table(relative_bucket(torch.arange(9) - torch.arange(9)[:, None], bidirectional=False)).permute(2, 0, 1)
    assert torch.equal(full, want)


def test_sinusoids_and_rotations():
    t = torch.arange(50, dtype=F64)
    codes = sinusoids(t, 8)
    for i in range(4):
        close(codes[:, 2 * i], torch.sin(t / 10000 ** (2 * i / 8)))
        close(codes[:, 2 * i + 1], torch.cos(t / 10000 ** (2 * i / 8)))
    table = RoFormerSinusoidalPositionalEmbedding(50, 8)
    table._init_weight = None
    x = draw(2, 3, 50, 8)
    half = torch.cat([codes[:, 0::2], codes[:, 1::2]], -1)[None, None]
    q, _ = RoFormerSelfAttention.apply_rotary_position_embeddings(half, x, x)
    close(rotary(x, t), q)
    q, k = draw(2, 1, 8).unbind()
    products = [(rotary(q, torch.tensor([a])) * rotary(k, torch.tensor([a + 5]))).sum() for a in (0, 3, 1000)]
    for product in products[1:]:
        close(product, products[0], 1e-9)


def test_masks():
    assert torch.equal(causal_mask(3, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool())
    prefix = prefix_mask(5, 2)
    assert torch.equal(prefix, torch.tensor([[j < 2 or j <= i for j in range(5)] for i in range(5)]))
    mask = padding_mask(torch.tensor([[7, 8, 0], [0, 0, 9]]), 0)
    assert mask.shape == (2, 1, 3, 3)
    assert torch.equal(mask[0, 0], torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool())
    assert torch.equal(mask[1, 0], torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool())


# ---------------------------------------------------------------------------------- the same in other ways

VARIANTS = {
    "gpt2": {},
    "sinusoidal post": {"position": "sinusoidal", "norm": "post"},
    "rotary deepnorm": {"position": "rotary", "norm": "deepnorm", "norm_kind": "rms"},
    "relative gated": {"position": "relative", "gated": True, "scale": 1.0, "d_head": 5, "buckets": 6, "max_distance": 5},
    "no positions, log n": {"position": "none", "scale": lambda n: n.log() + 1},
    "explicit": {"attention": attention, "scale": 0.3},
    "gpt2_ml": {"norm": ("none", "both"), "embed_norm": True, "head_bias": True, "tied": False},
}


@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 8)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_is_the_full_pass(variant, cuts):
    model, tokens = small(causal=True, **VARIANTS[variant]), ids(2, 9)
    full, whole = model(tokens, return_cache=True)
    cache, parts = None, []
    for piece in tokens.tensor_split(sorted(cuts), -1):
        out, cache = model(piece, cache=cache, return_cache=True)
        parts.append(out)
    close(torch.cat(parts, -2), full)
    for ours, theirs in zip(cache, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_seen_before_its_time(variant):
    model, tokens = small(causal=True, **VARIANTS[variant]), ids(2, 9)
    out = model(tokens)
    for t in (0, 4, 8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] - 1) % V
        moved = (model(changed) - out).abs().amax((0, 2)) > 1e-9
        assert not moved[:t].any()
        assert moved[t:].all()


def test_a_bidirectional_model_sees_all():
    model, x = small(position="relative"), draw(5, 12)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.hidden(x).sum(-1), x).abs().amax(-1)
    assert (jacobian > 1e-9).all()
    prefix = torch.autograd.functional.jacobian(lambda x: model.hidden(x, mask=prefix_mask(5, 2)).sum(-1), x).abs().amax(-1)
    assert torch.equal(prefix > 1e-9, prefix_mask(5, 2))


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "relative", "rotary", "none"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_items(position, causal, side):
    model = small(position=position, causal=causal)
    items = [ids(n, seed=n) for n in (3, 7, 5)]
    batch = torch.zeros(3, 7, dtype=torch.long)
    where = [slice(len(item)) if side == "right" else slice(7 - len(item), 7) for item in items]
    positions = torch.zeros(3, 7, dtype=torch.long)
    for row, (item, place) in enumerate(zip(items, where, strict=True)):
        batch[row, place], positions[row, place] = item, torch.arange(len(item))
    options = {} if position in ("relative", "none") or side == "right" else {"positions": positions}
    out = model(batch, mask=padding_mask(batch, 0), **options)
    for row, (item, place) in enumerate(zip(items, where, strict=True)):
        close(out[row, place], model(item))
    if side == "right":
        out = model(batch, mask=(batch != 0)[:, None, None])
        for row, item in enumerate(items):
            close(out[row, : len(item)], model(item))


def seq2seq(**options) -> EncoderDecoder:
    encoder, decoder = small(head="none", **options), small(causal=True, cross=True, **options)
    return randomise(EncoderDecoder(encoder, decoder)).eval()


@pytest.mark.parametrize("position", ["learned", "relative"])
def test_encoder_decoder(position):
    model = seq2seq(position=position)
    assert model.encoder.tokens is model.decoder.tokens
    source, target = ids(2, 7), ids(2, 6, seed=1)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 4:] = False
    full = model(source, target, source_mask=keep)
    close(full[1], model(source[1, :4], target[1]))
    state, rows = model.start(source, keep), []
    for t in range(6):
        logits, state = model.step(target[:, t : t + 1], state)
        rows.append(logits)
    close(torch.stack(rows, 1), full)
    trace = model.decoder.trace(target, memory=model.encoder(source))
    assert len(trace.weights) == len(trace.cross_weights) == 2
    assert len(trace.states) == 7
    for weights, m in ((trace.weights[0], 6), (trace.cross_weights[1], 7)):
        assert weights.shape == (2, 3, 6, m)
        close(weights.sum(-1), torch.ones(2, 3, 6, dtype=F64))
    tokens = ids(2, 6, seed=3)
    _, cache = model.decoder(tokens, memory=model.encoder(source), return_cache=True)
    again = model.decoder(target[:, :1], cache=cache)
    close(again, model.decoder(target[:, :1], memory=model.encoder(source), cache=cache))


def test_fused_and_explicit_attention_agree_twice():
    fused = small(causal=True, position="relative", layers=1)
    explicit = Transformer(dataclasses.replace(fused.config, attention=attention)).to(F64)
    explicit.load_state_dict(fused.state_dict())
    tokens = ids(2, 6)
    for mask in (None, padding_mask(tokens.clone().index_fill(1, torch.tensor([0]), 0), 0), draw(2, 1, 6, 6)):
        a, b = fused(tokens, mask=mask), explicit(tokens, mask=mask)
        close(a, b)
        for p, q in zip(
            torch.autograd.grad(a.square().sum(), list(fused.parameters())),
            torch.autograd.grad(b.square().sum(), list(explicit.parameters())), strict=True,
        ):
            close(p, q, 1e-10)
    x = draw(3, 12)
    hessian = torch.autograd.functional.hessian(lambda x: explicit.hidden(x).square().sum() + explicit.hidden(x)[0, 0] ** 3, x)
    close(hessian.flatten(0, 1).flatten(1), hessian.flatten(0, 1).flatten(1).T, 1e-9)
    x = draw(2, 6, 12)
    layer = MultiHeadAttention(12, 3, causal=True, kind=linear_attention).to(F64)
    q, k, v = layer._split(layer.qkv(x), 3)
    close(layer(x), layer.out(linear_attention(q, k, v, causal=True).transpose(1, 2).flatten(2)))


def test_scale_by_the_keys_seen():
    x = draw(2, 6, 12)
    layer = MultiHeadAttention(12, 3, causal=True, scale=lambda n: n.log() / 7).to(F64)
    q, k, v = layer._split(layer.qkv(x), 3)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 2:, 1] = False
    rows = []
    for i in range(6):
        counts = torch.tensor([i + 1, i + 1 - (i >= 2)], dtype=F64)
        logits = (q[:, :, i : i + 1] @ k.mT)[..., : i + 1] * (counts.log() / 7)[:, None, None, None]
        rows.append(logits.masked_fill(~mask[:, :, i : i + 1, : i + 1], -math.inf).softmax(-1) @ v[:, :, : i + 1])
    close(layer(x, mask=mask), layer.out(torch.cat(rows, -2).transpose(1, 2).flatten(2)))
    layer = MultiHeadAttention(12, 3, scale=lambda n: 0.01 * n).to(F64)
    q, k, v = layer._split(layer.qkv(x), 3)
    close(layer(x), layer.out(F.scaled_dot_product_attention(q, k, v, scale=0.06).transpose(1, 2).flatten(2)))


def test_rotary_attention_turns_queries_and_keys_alone():
    x, layer = draw(2, 6, 12), MultiHeadAttention(12, 3, rotary=True, causal=True).to(F64)
    q, k, v = layer._split(layer.qkv(x), 3)
    t = torch.arange(6)
    close(layer(x), layer.out(attention(rotary(q, t), rotary(k, t), v, causal=True).transpose(1, 2).flatten(2)))
    model = small(causal=True, position="rotary", max_len=None)
    for shift in (1, 1000):
        close(model(ids(2, 6), positions=t + shift), model(ids(2, 6)), 1e-10)


def test_vectors_in_and_out():
    model, tokens = small(causal=True), ids(2, 5)
    close(model(model.tokens(tokens)), model(tokens))
    close(model.logits(model.hidden(tokens)[:, 2]), model(tokens)[:, 2])
    bare = Transformer(Config(d=12, layers=1, heads=3, position="none")).to(F64)
    assert bare(draw(2, 5, 12)).shape == (2, 5, 12)
    close(bare(draw(2, 5, 12))[1], bare(draw(2, 5, 12)[1]))
    scaled = small(logit_scale=0.5)
    close(scaled(tokens), 0.5 * functional_call(small(), dict(scaled.named_parameters()), tokens))


def test_dropout_is_for_training():
    model, tokens = small(dropout=0.5), ids(2, 5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    silent = randomise(Transformer(dataclasses.replace(model.config, dropout=0.0)).to(F64))
    close(silent(tokens), model.eval()(tokens))


def test_initial_weights():
    def std(x):
        return float(x.detach().std())

    config = Config(d=256, layers=2, heads=4, d_ff=512, vocab=1000, norm="deepnorm")
    model = Transformer(config, generator=seeded(1))
    gain = (4 * 4) ** -0.25  # M = 4 sub-layers
    for i in (0, 2):
        for w, g in zip(model.stack.sublayers[i].qkv.weight.chunk(3), (1, 1, gain), strict=True):
            assert std(w) == pytest.approx(g * (2 / 512) ** 0.5, rel=0.02)
        assert std(model.stack.sublayers[i].out.weight) == pytest.approx(gain * (2 / 512) ** 0.5, rel=0.02)
        for w in (model.stack.sublayers[i + 1].up.weight, model.stack.sublayers[i + 1].down.weight):
            assert std(w) == pytest.approx(gain * (2 / 768) ** 0.5, rel=0.02)
    assert std(model.tokens.weight) == pytest.approx(256**-0.5, rel=0.02)
    assert model.head.weight is model.tokens.weight
    twin = Transformer(config, generator=seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    other = Transformer(dataclasses.replace(config, norm="pre", tied=False, gain=0.1), generator=seeded(2))
    assert std(other.stack.sublayers[1].up.weight) == pytest.approx(0.1 * (2 / 768) ** 0.5, rel=0.02)
    assert std(other.head.weight) == pytest.approx(256**-0.5, rel=0.02)
    assert copy.deepcopy(other)(ids(1, 3)).shape == (1, 3, 1000)


# ---------------------------------------------------------------------------------------------- bad input

BAD_CONFIGS = {
    "layers should be an integer >= 1, got 0": {"layers": 0},
    "heads should be an integer >= 1": {"heads": 0},
    "d should be divisible by heads, got d = 12 and heads = 5": {"heads": 5},
    "norm should be one of 'pre', 'post', 'both', 'none', 'deepnorm', got 'sandwich'": {"norm": "sandwich"},
    "norm_kind should be one of 'layer', 'rms', got 'batch'": {"norm_kind": "batch"},
    "activation should be one of 'relu', 'gelu'.* got 'gleu'": {"activation": "gleu"},
    "position should be one of 'learned', 'sinusoidal', 'rotary', 'relative', 'none', got 'alibi'": {"position": "alibi"},
    "head should be one of 'linear', 'mlm', 'none'": {"head": "lm"},
    "attention should be one of 'softmax', got 'linear'": {"attention": "linear"},
    "max_len should be given for learned": {"max_len": None},
    "max_len should be an integer >= 1": {"max_len": 0},
    "dropout should be a number in": {"dropout": 1.5},
    "eps should be a number": {"eps": -1.0},
    "sinusoidal positions need an even d": {"position": "sinusoidal", "d": 9},
    "rotary positions need an even d_head, got 3": {"position": "rotary", "heads": 4},
    "buckets should be even": {"position": "relative", "buckets": 9},
    "max_distance should be an integer >= 9": {"position": "relative", "max_distance": 8},
    "dropout on the weights is for softmax": {"attention": attention, "dropout": 0.1},
    "norm gives 3 placements in turn, which does not divide 4": {"norm": ("pre", "post", "both")},
    "checkpoint should be an integer >= 0": {"checkpoint": -1},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configurations(message):
    with pytest.raises(ValueError, match=message):
        Transformer(Config(**{"d": 12, "layers": 2, "heads": 3, "vocab": V} | BAD_CONFIGS[message]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("message, error, inputs", [
    (r"mask: expected a shape that broadcasts to \(2, 3, 5, 5\), got \(4, 5\)", ValueError, {"mask": torch.ones(4, 5).bool()}),
    (r"mask: expected a shape that broadcasts", ValueError, {"mask": torch.zeros(2, 5, 5)}),
    ("mask leaves 1 queries without any key", ValueError, {"mask": torch.arange(5)[:, None].expand(5, 5) != 3}),
    ("mask leaves 1 queries without any key", ValueError,
     {"mask": torch.zeros(5, 5).index_fill(0, torch.tensor([3]), -math.inf)}),
    (r"mask has NaN or \+infinity", ValueError, {"mask": torch.full((5, 5), math.nan)}),
    ("mask should be boolean or floating, got torch.int64", TypeError, {"mask": torch.ones(5, 5, dtype=torch.long)}),
    ("mask should be a torch tensor", TypeError, {"mask": [True]}),
    ("memory was given, but the configuration has no cross", ValueError, {"memory": torch.zeros(2, 4, 12)}),
    ("segments were given, but config.segments is 0", ValueError, {"segments": torch.zeros(2, 5, dtype=torch.long)}),
    (r"positions: expected a shape that broadcasts to \(2, 5\), got \(3,\)", ValueError, {"positions": torch.arange(3)}),
    (r"positions should lie in \[0, 15\], got values from 12 to 16", ValueError, {"positions": torch.arange(12, 17)}),
    ("cache: expected 2 layers of 2 tensors", ValueError, {"cache": ((torch.zeros(1), torch.zeros(1)),)}),
    (r"cache\[0\]\[0\]: expected shape", ValueError, {"cache": ((torch.zeros(2, 3, 1, 5),) * 2,) * 2}),
])
def test_bad_inputs(message, error, inputs, causal):
    with pytest.raises(error, match=message):
        small(causal=causal)(ids(2, 5), **inputs)


def test_more_bad_inputs():
    model = small(causal=True)
    with pytest.raises(ValueError, match=r"the sequence has 17 positions \(0 of them in the cache\), max_len is 16"):
        model(ids(1, 17))
    _, cache = model(ids(1, 10), return_cache=True)
    with pytest.raises(ValueError, match=r"17 positions \(10 of them in the cache\)"):
        model(ids(1, 7), cache=cache)
    with pytest.raises(ValueError, match=r"tokens should lie in \[0, 36\], got values from 2 to 37"):
        model(torch.tensor([2, 37]))
    with pytest.raises(ValueError, match=r"tokens is empty: shape \(2, 0\)"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected n >= 1 positions"):
        model(torch.zeros(2, 0, 12, dtype=F64))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(\.\.\., n, d=12\), got \(2, 5, 11\)"):
        model(draw(2, 5, 11))
    with pytest.raises(TypeError, match=r"tokens should be integers, got torch\.bool"):
        model(torch.ones(2, 5).bool())
    with pytest.raises(TypeError, match="tokens should be a torch tensor"):
        model([1, 2])
    with pytest.raises(TypeError, match=r"tokens should be vectors \(\.\.\., n, d=12\)"):
        small(vocab=None)(ids(2, 5))
    with pytest.raises(ValueError, match='positions have no meaning with position = "relative"'):
        small(position="relative")(ids(2, 5), positions=torch.arange(5))
    with pytest.raises(ValueError, match="memory should be given"):
        small(cross=True)(ids(2, 5))
    with pytest.raises(ValueError, match=r"memory: expected shape \(2, s, d=12\), got \(3, 4, 12\)"):
        small(cross=True)(ids(2, 5), memory=draw(3, 4, 12))
    with pytest.raises(TypeError, match=r"tokens is torch\.float64 .*memory is torch\.float32"):
        small(cross=True)(ids(2, 5), memory=torch.zeros(2, 4, 12))
    with pytest.raises(ValueError, match=r"cache is of a batch \(1,\), tokens of a batch \(2,\)"):
        model(ids(2, 2), cache=cache)
    with pytest.raises(ValueError, match="tokens has 1 non-finite entries"):
        model(draw(2, 5, 12).index_put((torch.tensor(0),) * 3, torch.tensor(math.nan, dtype=F64)))
    with pytest.raises(TypeError, match=r"the model's weights is torch\.float64 .*tokens is torch\.float32"):
        model(torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match="trace needs softmax attention"):
        small(attention=attention).trace(ids(2, 5))
    with pytest.raises(ValueError, match=r"segments should lie in \[0, 1\]"):
        small(segments=2)(ids(2, 5), segments=ids(2, 5))
    with pytest.raises(ValueError, match=r"source_mask: expected shape \(2, 7\), got \(2, 6\)"):
        seq2seq()(ids(2, 7), ids(2, 3), source_mask=torch.ones(2, 6).bool())
    with pytest.raises(TypeError, match="source_mask should be boolean"):
        seq2seq()(ids(2, 7), ids(2, 3), source_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="mask leaves 1 queries"):
        seq2seq()(ids(2, 7), ids(2, 3), source_mask=torch.tensor([True, False])[:, None].expand(2, 7))
    with pytest.raises(ValueError, match="expected an encoder without head"):
        EncoderDecoder(small(), small(cross=True))
    with pytest.raises(ValueError, match="a shared token table needs one vocab, got 38 and 37"):
        EncoderDecoder(small(head="none", vocab=38), small(cross=True))
    with pytest.raises(ValueError, match="sublayers is empty"):
        ResidualStack([], 4)
    with pytest.raises(ValueError, match=r"sub-layer 1 should keep the shape \(3, 6\), got \(3, 1\)"):
        ResidualStack([nn.Linear(6, 6), nn.Linear(6, 1)], 6)(torch.ones(3, 6))
    with pytest.raises(ValueError, match="branches: expected 2 functions, got 1"):
        ResidualStack(branches(2), 6)(draw(3, 6), branches=[nn.Identity()])
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., d=6\), got \(3, 5\)"):
        ResidualStack(branches(2), 6)(draw(3, 5))
    with pytest.raises(ValueError, match="memory should be given for cross-attention"):
        MultiHeadAttention(12, 3, cross=True)(torch.ones(2, 5, 12))
    with pytest.raises(ValueError, match="kind should be one of 'softmax', got 'linear'"):
        MultiHeadAttention(12, 3, kind="linear")
    with pytest.raises(ValueError, match="sublayers should be an integer >= 1"):
        deepnorm_constants(0)
    with pytest.raises(ValueError, match="optimizer should be one of 'sgd', 'adam', 'lamb', got 'adamw'"):
        deepnorm_constants(4, optimizer="adamw")
    for alpha in (0.0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="alpha should be a number"):
            deepnorm_constants(4, alpha=alpha)
    with pytest.raises(ValueError, match="decoder should be an integer >= 0, got -1"):
        deepnorm_constants(4, decoder=-1)
    for wrong in ({"sublayers": 5}, {"sublayers": 4, "optimizer": "adam"}, {"sublayers": 4, "alpha": 1.0}):
        with pytest.raises(ValueError, match="decoder is for an encoder with an even number of sub-layers"):
            deepnorm_constants(**wrong, decoder=3)
    with pytest.raises(ValueError, match="convention should be one of 'paper', 'article'"):
        deepnorm_constants(4, convention="kexue")
    with pytest.raises(ValueError, match="an even width, got 3"):
        rotary(draw(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match=r"prefix should be an integer in \[0, 4\], got 5"):
        prefix_mask(4, 5)
