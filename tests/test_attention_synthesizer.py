"""Synthetic logits against loops, torch's own attention, Kronecker products and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from kexue.attention import (
    DenseLogits,
    DotLogits,
    FactorizedDenseLogits,
    FactorizedRandomLogits,
    LogitMixture,
    QueryLogits,
    RandomLogits,
    SynthesizerAttention,
    attention,
    factor_logits,
)
from kexue.transformer import Config, FeedForward, MultiHeadAttention, ResidualStack, Transformer, causal_mask

F64 = torch.float64
D, HEADS, N = 12, 3, 6


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tol * max(1.0, float(b.detach().abs().max()))


MAKE = {
    "dot": lambda: DotLogits(D, HEADS, generator=gen()),
    "query": lambda: QueryLogits(D, HEADS, N, generator=gen()),
    "dense": lambda: DenseLogits(D, HEADS, N, generator=gen()),
    "dense2": lambda: DenseLogits(D, HEADS, N, hidden=5, generator=gen()),
    "kron": lambda: FactorizedDenseLogits(D, HEADS, 2, 3, generator=gen()),
    "tile": lambda: FactorizedDenseLogits(D, HEADS, 2, 3, hidden=5, layout="tile", generator=gen()),
    "random": lambda: RandomLogits(HEADS, N, generator=gen()),
    "fixed": lambda: RandomLogits(HEADS, N, trainable=False, generator=gen()),
    "factorised": lambda: FactorizedRandomLogits(HEADS, N, 2, generator=gen()),
    "mixture": lambda: LogitMixture(RandomLogits(HEADS, N, generator=gen()), DotLogits(D, HEADS, generator=gen())),
}
CONSTANT = ("random", "fixed", "factorised")


def make(kind: str) -> nn.Module:
    logits = MAKE[kind]().double()
    for i, p in enumerate(logits.parameters()):  # biases too
        p.data.normal_(generator=gen(i + 10))
    return logits


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_shapes_and_heads(kind, batch):
    logits = make(kind)
    out = logits(tokens(*batch, N, D))
    assert out.shape == (*(() if kind in CONSTANT else batch), HEADS, N, N)
    assert logits.heads == HEADS
    assert out.dtype == F64


@pytest.mark.parametrize("kind", MAKE)
def test_a_shorter_input_uses_the_beginning(kind):
    logits, x = make(kind), tokens(2, N, D)
    close(logits(x[:, : N - 2]), logits(x)[..., : N - 2, : N - 2])


def test_dot_logits_are_those_of_attention():
    logits, x = DotLogits(D, 1, d_head=4, bias=True, generator=gen()).double(), tokens(5, D)
    q, k = logits.q(x), logits.k(x)
    close(attention(q, k, x, return_weights=True)[1], logits(x)[0].softmax(-1))


@pytest.mark.parametrize("hidden", [None, 5])
def test_dense_logits_by_loops(hidden):
    logits, x = make("dense" if hidden is None else "dense2"), tokens(N, D)
    rows, out = logits.rows, logits(x)
    for h in range(HEADS):
        for i in range(N):
            if hidden is None:
                row = rows.up.weight[h * N : (h + 1) * N] @ x[i] + rows.up.bias[h * N : (h + 1) * N]
            else:
                inner = rows.up.weight[h * 5 : (h + 1) * 5] @ x[i] + rows.up.bias[h * 5 : (h + 1) * 5]
                row = inner.clamp(min=0) @ rows.down[h] + rows.shift[h, 0]
            close(out[h, i], row)


def test_query_logits_by_loops():
    logits, x = make("query"), tokens(N, D)
    out, width = logits(x), D // HEADS
    for h in range(HEADS):
        keys = x @ logits.k.weight[h * width : (h + 1) * width].mT
        close(out[h], logits.queries[h] @ keys.mT / math.sqrt(width))


def test_factorised_dense_is_a_kronecker_product_row_by_row():
    logits, x = make("kron"), tokens(N, D)
    alpha, beta = logits.rows(x)
    assert (alpha.shape, beta.shape) == ((HEADS, N, 2), (HEADS, N, 3))
    for h in range(HEADS):
        for i in range(N):
            close(logits(x)[h, i], torch.kron(alpha[h, i], beta[h, i]))


@settings(max_examples=40, deadline=None)
@given(a=st.integers(1, 12), b=st.integers(1, 12), seed=st.integers(0, 99))
def test_factor_logits(a, b, seed):
    alpha, beta = torch.randn(2, 3, a, generator=gen(seed)), torch.randn(2, 3, b, generator=gen(seed + 1))
    j = torch.arange(a * b)
    close(factor_logits(alpha, beta), alpha[..., j // b] * beta[..., j % b])
    close(factor_logits(alpha, beta, "tile"), alpha[..., j % a] * beta[..., j % b])
    assert torch.unique(factor_logits(alpha, beta, "tile"), dim=-1).shape[-1] == math.lcm(a, b)
    assert torch.unique(factor_logits(alpha, beta), dim=-1).shape[-1] == a * b


def test_random_logits():
    assert not list(RandomLogits(2, 5, trainable=False).parameters())
    assert "logits" in RandomLogits(2, 5, trainable=False).state_dict()
    assert RandomLogits(2, 5).logits.requires_grad
    large = RandomLogits(4, 100, std=3.0, generator=gen()).logits
    assert abs(float(large.detach().std()) - 3) < 0.1
    for rank in (1, 4, 16):
        B = FactorizedRandomLogits(2, 100, rank, std=3.0, generator=gen())(torch.zeros(100, 1))
        assert torch.linalg.matrix_rank(B[0]) == rank
        assert abs(float(B.detach().std()) - 3) < 1.5


def test_factorised_random_logits_are_left_times_right():
    logits = make("factorised")
    out = logits(tokens(N, D))
    for h in range(HEADS):
        close(out[h], logits.left[h] @ logits.right[h].mT)


@pytest.mark.parametrize("kind", ["dense2", "dot", "factorised", "kron"])
def test_a_generator_decides(kind):
    first, again = MAKE[kind](), MAKE[kind]()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))


# ----------------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize("signed", [False, True])
def test_mixture_is_geometric(signed):
    parts = make("random"), make("dot")
    mixture, x = LogitMixture(*parts, signed=signed).double(), tokens(2, N, D)
    close(mixture.weights.detach(), torch.full((2,), 0.5, dtype=F64))
    mixture.free.data = torch.tensor([2.0, -1.0], dtype=F64)
    weights = mixture.weights.detach()
    assert abs(float(weights.sum()) - 1) < 1e-12
    expected = torch.tensor([2.0, -1.0], dtype=F64)
    close(weights, expected if signed else expected.softmax(0))
    A = [part(x).softmax(-1) for part in parts]
    product = A[0] ** weights[0] * A[1] ** weights[1]
    close(mixture(x).softmax(-1), product / product.sum(-1, keepdim=True))


def test_mixture_knows_its_limits():
    mixture = LogitMixture(RandomLogits(2, 9), RandomLogits(2, 7), DotLogits(4, 2))
    assert (mixture.max_len, mixture.d) == (7, 4)
    assert LogitMixture(DotLogits(4, 2)).max_len is None
    with pytest.raises(ValueError, match="n = 8 positions, max_len is 7"):
        mixture(torch.zeros(8, 4))


# ------------------------------------------------------------------------------------------------- layer


def test_the_layer_is_multi_head_attention_under_dot_logits():
    logits = DotLogits(D, HEADS, bias=True, generator=gen())
    layer, other = SynthesizerAttention(D, logits, generator=gen()).double(), MultiHeadAttention(D, HEADS).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=gen(7))
        other.qkv.weight.copy_(torch.cat([logits.q.weight, logits.k.weight, layer.v.weight]))
        other.qkv.bias.copy_(torch.cat([logits.q.bias, logits.k.bias, layer.v.bias]))
        other.out.load_state_dict(layer.out.state_dict())
    x = tokens(2, N, D)
    keep = torch.rand(2, 1, N, N, generator=gen()) < 0.6
    keep |= torch.eye(N, dtype=torch.bool)
    for mask in (None, keep, tokens(HEADS, N, N)):
        close(layer(x, mask=mask), other(x, mask=mask))
    layer.causal = other.causal = True
    close(layer(x), other(x))
    close(layer(x, mask=keep), other(x, mask=keep))


@pytest.mark.parametrize("kind", MAKE)
def test_the_layer_by_loops(kind):
    layer, x = SynthesizerAttention(D, make(kind), d_head=5, generator=gen()).double(), tokens(2, N, D)
    out, weights = layer(x, return_weights=True)
    A = layer.logits(x).softmax(-1)
    close(weights, A)
    for b in range(2):
        parts = []
        for h in range(HEADS):
            values = x[b] @ layer.v.weight[5 * h : 5 * h + 5].mT + layer.v.bias[5 * h : 5 * h + 5]
            parts.append((A if A.ndim == 3 else A[b])[h] @ values)
        close(out[b], torch.cat(parts, -1) @ layer.out.weight.mT + layer.out.bias)
    close(layer(x), out)


@pytest.mark.parametrize("kind", MAKE)
def test_causal_layers_do_not_look_ahead(kind):
    layer, x = SynthesizerAttention(D, make(kind), causal=True).double(), tokens(2, N, D)
    other = x.clone()
    other[:, 4:] += 1
    close(layer(x)[:, :4], layer(other)[:, :4])
    weights = layer(x, return_weights=True)[1]
    assert bool((weights.triu(1) == 0).all())
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    plain = SynthesizerAttention(D, layer.logits).double()
    plain.load_state_dict(layer.state_dict())
    close(plain(x, mask=causal_mask(N)), layer(x))


@pytest.mark.parametrize("kind", MAKE)
def test_padding_is_as_if_it_were_not_there(kind):
    layer, x = SynthesizerAttention(D, make(kind)).double(), tokens(2, N, D)
    mask = torch.arange(N) < torch.tensor([[N], [4]])
    out = layer(x, mask=mask[:, None, None])
    close(out[0], layer(x[0]))
    close(out[1, :4], layer(x[1, :4]))
    close(layer(x, mask=torch.where(mask, 0.0, -math.inf).double()[:, None, None]), out)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, N))
def test_symmetries(seed, n):
    x, p = tokens(n, D, seed=seed), torch.randperm(n, generator=gen(seed))
    out = {kind: SynthesizerAttention(D, make(kind), generator=gen()).double() for kind in ("dot", "query")}
    close(out["dot"](x[p]), out["dot"](x)[p])
    close(out["query"](x[p]), out["query"](x))
    for kind in ("dense", "dense2", "kron"):
        logits = make(kind)
        close(logits(x[p]), logits(x)[:, p])


@pytest.mark.parametrize("kind", ["dense2", "kron", "factorised", "mixture", "query"])
def test_gradients(kind):
    layer, x = SynthesizerAttention(D, make(kind), causal=True).double(), tokens(N, D).requires_grad_()
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert gradcheck(run, (x, *parameters))


def test_it_stands_in_a_residual_stack():
    mixer = SynthesizerAttention(D, make("dense"), generator=gen())
    stack = ResidualStack([mixer, FeedForward(D, 2 * D)], D).double()
    x, mask = tokens(3, N, D), torch.arange(N) < 4
    h = x + mixer(F.layer_norm(x, (D,)), mask=mask)
    expected = F.layer_norm(h + stack.sublayers[1](F.layer_norm(h, (D,))), (D,))
    branches = [lambda h: mixer(h, mask=mask), stack.sublayers[1]]
    close(stack(x, branches=branches), expected)
    assert stack(x).shape == x.shape


def test_many_layers_in_one_vmap():
    layers = [SynthesizerAttention(D, DenseLogits(D, HEADS, N, generator=gen(s)), generator=gen(s)) for s in range(3)]
    state, x = torch.func.stack_module_state(layers), torch.randn(3, 2, N, D, generator=gen())
    out = torch.func.vmap(lambda p, b, x: torch.func.functional_call(layers[0], (p, b), (x,)))(*state, x)
    for layer, one, y in zip(layers, x, out):
        assert torch.allclose(layer(one), y, atol=1e-5)


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "dot"])
def test_a_longer_input_is_refused(kind):
    with pytest.raises(ValueError, match="n = 7 positions, max_len is 6"):
        make(kind)(tokens(N + 1, D))


def test_dot_logits_have_no_limit():
    assert make("dot")(tokens(50, D)).shape == (HEADS, 50, 50)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DotLogits(10, 3), ValueError, "d should be divisible by heads, got d = 10 and heads = 3"),
        (lambda: QueryLogits(10, 3, 5), ValueError, "d should be divisible by heads"),
        (lambda: SynthesizerAttention(10, RandomLogits(3, 5)), ValueError, "d should be divisible by heads"),
        (lambda: DotLogits(8, 0), ValueError, "heads should be an integer >= 1, got 0"),
        (lambda: DotLogits(8, 2, d_head=0), ValueError, "d_head should be"),
        (lambda: DenseLogits(8, 2, 0), ValueError, "max_len should be an integer >= 1, got 0"),
        (lambda: DenseLogits(8, 2, 5, hidden=0), ValueError, "hidden should be"),
        (lambda: DenseLogits(0, 2, 5), ValueError, "d should be"),
        (lambda: FactorizedDenseLogits(8, 2, 0, 5), ValueError, "a should be"),
        (lambda: FactorizedDenseLogits(8, 2, 4, 2.5), ValueError, "b should be"),
        (lambda: FactorizedDenseLogits(8, 2, 4, 2, layout="row"), ValueError, "layout should be one of 'kron', 'tile'"),
        (lambda: RandomLogits(2, 5, std=-1.0), ValueError, "std should be"),
        (lambda: RandomLogits(2, 0), ValueError, "max_len should be"),
        (lambda: QueryLogits(8, 2, 0), ValueError, "max_len should be"),
        (lambda: FactorizedRandomLogits(2, 5, 0), ValueError, "rank should be"),
        (lambda: FactorizedRandomLogits(2, 5, 2, std=math.nan), ValueError, "std should be"),
        (lambda: LogitMixture(), ValueError, "parts is empty"),
        (lambda: LogitMixture(RandomLogits(2, 5), RandomLogits(3, 5)), ValueError, r"same number of heads, got \[2, 3\]"),
        (lambda: LogitMixture(DotLogits(4, 2), DotLogits(6, 2)), ValueError, r"one width d, got \[4, 6\]"),
        (lambda: LogitMixture(nn.Linear(2, 2)), TypeError, "parts should be a logits module.*got Linear"),
        (lambda: SynthesizerAttention(8, "random"), TypeError, "logits should be a logits module.*got str"),
        (lambda: SynthesizerAttention(8, DotLogits(4, 2)), ValueError, "tokens of width 4, the layer has d = 8"),
        (lambda: factor_logits(torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, "beta: expected shape"),
        (lambda: factor_logits(torch.zeros(3), torch.zeros(3), "both"), ValueError, "layout should be"),
        (lambda: make("dense")(tokens(0, D)), ValueError, "expected n >= 1"),
        (lambda: make("dense")(tokens(N, D + 1)), ValueError, r"x: expected shape \(..., n, d=12\), got \(6, 13\)"),
        (lambda: make("random")(tokens(N)), ValueError, "x: expected shape"),
        (lambda: make("dot")([1.0]), TypeError, "x should be a torch tensor"),
        (lambda: SynthesizerAttention(D, make("dense"))(tokens(N, 5)), ValueError, "x: expected shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("position", ["learned", "relative"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "boolean", "floating", "per head"])
def test_in_a_transformer_it_sees_what_self_attention_saw(position, causal, kind):
    torch.manual_seed(0)
    model = Transformer(Config(d=D, layers=2, heads=HEADS, vocab=7, max_len=N, causal=causal, position=position)).double()
    words = torch.randint(7, (3, N))
    mask = {"none": None, "boolean": (torch.arange(N) < N - 2).expand(3, 1, 1, N) | torch.eye(N, dtype=torch.bool),
            "floating": torch.randn(3, 1, N, N, dtype=F64), "per head": torch.randn(HEADS, N, N, dtype=F64)}[kind]
    expected, traced = model(words, mask=mask), model.trace(words, mask=mask)
    first = model.stack.sublayers[0]
    same = SynthesizerAttention(D, DotLogits(D, HEADS, bias=True)).double()
    with torch.no_grad():
        for name, value in first.qkv.named_parameters():
            for ours, part in zip((same.logits.q, same.logits.k, same.v), value.chunk(3), strict=True):
                ours.get_parameter(name).copy_(part)
        same.out.load_state_dict(first.out.state_dict())
    model.stack.sublayers[0] = same
    torch.testing.assert_close(model(words, mask=mask), expected)
    torch.testing.assert_close(model.trace(words, mask=mask).weights[0], traced.weights[0])
    with pytest.raises(ValueError, match="SynthesizerAttention keeps no cache"):
        model.step(words)


def test_bad_masks_and_logits():
    layer, x = SynthesizerAttention(D, make("random"), causal=True).double(), tokens(2, N, D)
    with pytest.raises(ValueError, match="mask: expected a shape that broadcasts"):
        layer(x, mask=torch.ones(N, N + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean or floating"):
        layer(x, mask=torch.ones(N, N, dtype=torch.long))
    with pytest.raises(TypeError, match="mask should be a torch tensor"):
        layer(x, mask=[True])
    with pytest.raises(ValueError, match="NaN or \\+infinity"):
        layer(x, mask=torch.full((N, N), math.inf, dtype=F64))
    with pytest.raises(ValueError, match="mask leaves 1 queries without any key"):
        layer(x, mask=torch.arange(N) > 0)  # causal: the first query of each head has only itself
    with pytest.raises(ValueError, match="without any key"):
        layer(x, mask=torch.full((N, N), -math.inf, dtype=F64))

    class Wrong(nn.Module):
        heads = HEADS

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="logits: expected shape"):
        SynthesizerAttention(D, Wrong()).double()(x)
