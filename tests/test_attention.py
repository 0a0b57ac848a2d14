"""Attention against torch's own, the masked quadratic form, loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from kexue.attention import (
    LinearAttentionState,
    attention,
    efficient_attention,
    feature_maps,
    linear_attention,
    similarity_attention,
)
from kexue.numerics import PeakMemory

F64 = torch.float64
POSITIVE = ["elu1", "cos", "taylor2"]


def draw(*shape: int, seed: int = 0, count: int = 3, dtype: torch.dtype = F64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(count))


def qkv(batch: tuple[int, ...], n: int, d: int, d_v: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = draw(*batch, n, d, seed=seed, count=2)
    return q, k, draw(*batch, n, d_v, seed=seed + 1, count=1)[0]


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


# ------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("batch", [(), (3,), (2, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(batch, causal):
    q, k, v = qkv(batch, 9, 4, 5, seed=1)
    for scale in (None, 0.3):
        oracle = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        close(attention(q, k, v, causal=causal, scale=scale), oracle)
    each = torch.linspace(0.1, 2, q.shape[-2], dtype=q.dtype)[:, None]
    oracle = F.scaled_dot_product_attention(each * q, k, v, is_causal=causal, scale=1.0)
    close(attention(q, k, v, causal=causal, scale=each), oracle)


def test_attention_with_masks_is_torchs():
    q, k, v = qkv((2, 3), 7, 4, 4, seed=2)
    keep = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    keep |= torch.eye(7, dtype=torch.bool)
    (bias,) = draw(3, 7, 7, count=1)
    close(attention(q, k, v, mask=keep), F.scaled_dot_product_attention(q, k, v, attn_mask=keep))
    close(attention(q, k, v, mask=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    past = torch.ones(7, 7, dtype=torch.bool).tril()
    close(attention(q, k, v, mask=keep, causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=keep & past))
    close(
        attention(q, k, v, mask=bias, causal=True),
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~past, -math.inf)),
    )


def test_attention_weights_average_the_values():
    q, k, v = qkv((2,), 6, 3, 4, seed=3)
    out, weights = attention(q, k, v, causal=True, return_weights=True)
    close(weights.sum(-1), torch.ones(2, 6, dtype=F64))
    assert bool((weights.triu(1) == 0).all())
    close(out, weights @ v)


def test_the_last_queries_of_a_cache_see_all_of_it():
    q, k, v = qkv((2,), 8, 3, 4, seed=4)
    close(attention(q[:, 5:], k, v, causal=True), attention(q, k, v, causal=True)[:, 5:])


def test_attention_is_differentiable_twice():
    q, k, v = (x.requires_grad_() for x in qkv((), 4, 3, 2, seed=5))
    assert gradcheck(lambda *x: attention(*x, causal=True), (q, k, v))
    assert gradgradcheck(lambda *x: attention(*x, causal=True), (q, k, v))


# ------------------------------------------------------------------------------- similarities and features


def test_similarity_attention_of_exponentials_is_softmax_attention():
    q, k, v = qkv((2,), 6, 3, 4, seed=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    close(similarity_attention((q @ k.mT).exp(), v), attention(q, k, v, scale=1.0))
    close(similarity_attention((q @ k.mT).exp(), v, mask), attention(q, k, v, scale=1.0, causal=True))


SIMILARITIES = {
    "elu1": lambda q, k: float(sum((F.elu(a) + 1) * (F.elu(b) + 1) for a, b in zip(q, k))),
    "relu": lambda q, k: float(sum(max(a, 0) * max(b, 0) for a, b in zip(q, k))),
    "cos": lambda q, k: 1 + float(q @ k) / math.sqrt(float(q @ q) * float(k @ k)),
    "taylor2": lambda q, k: 1 + float(q @ k) + float(q @ k) ** 2 / 2,
}


@pytest.mark.parametrize("name", sorted(feature_maps))
def test_features_multiply_to_their_similarity(name):
    assert set(SIMILARITIES) == set(feature_maps)
    x, y = draw(5, 4, seed=7, count=2)
    products = feature_maps[name](x) @ feature_maps[name](y).mT
    close(products, torch.tensor([[SIMILARITIES[name](a, b) for b in y] for a in x], dtype=F64))


@pytest.mark.parametrize(("name", "width"), [("elu1", 64), ("relu", 64), ("cos", 65), ("taylor2", 2145)])
def test_number_of_features(name, width):
    assert feature_maps[name](torch.zeros(3, 64)).shape == (3, width)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_similarities_of_positive_maps_stay_positive(seed, scale):
    x, y = draw(6, 5, seed=seed, count=2)
    for name, low in {"elu1": 0.0, "cos": -1e-15, "taylor2": 0.5 - 1e-9 * scale**4}.items():
        assert float((feature_maps[name](scale * x) @ feature_maps[name](scale * y).mT).min()) >= low


def test_elu1_keeps_what_elu_plus_one_rounds_away():
    x = torch.tensor([-90.0, -30.0, -1.0, 0.0, 2.0], dtype=torch.float32)
    close(feature_maps["elu1"](x), torch.tensor([math.exp(-90), math.exp(-30), math.exp(-1), 1.0, 3.0]), 1e-7)
    assert float(feature_maps["elu1"](x[:1])) > 0 == float(F.elu(x[0]) + 1)


def test_cos_ignores_length_and_takes_zero_as_orthogonal():
    x, y = draw(4, 3, seed=8, count=2)
    phi = feature_maps["cos"]
    close(phi(5 * x), phi(x))
    close(phi(torch.zeros_like(x)) @ phi(y).mT, torch.ones(4, 4, dtype=F64))


# ----------------------------------------------------------------------------------------------- linear


def quadratic(q, k, v, name, causal):
    similarity = feature_maps[name](q) @ feature_maps[name](k).mT
    mask = torch.ones(similarity.shape[-2:], dtype=torch.bool).tril() if causal else None
    return similarity_attention(similarity, v, mask)


@settings(deadline=None)
@given(
    st.sampled_from(POSITIVE), st.booleans(), st.sampled_from([(), (2,), (2, 3)]),
    st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 25), st.integers(0, 2**31),
)
def test_linear_attention_is_the_masked_quadratic_form_at_any_chunk(name, causal, batch, n, d, d_v, chunk, seed):
    d += name == "cos"  # in one dimension 1 + cos is 0 or 2, and a row can be all zero
    q, k, v = qkv(batch, n, d, d_v, seed)
    expected = quadratic(q, k, v, name, causal)
    noise = 1e-12 * (1 + n / float((feature_maps[name](q) @ feature_maps[name](k).mT).diagonal(dim1=-2, dim2=-1).min()))
    close(linear_attention(q, k, v, name, causal=causal, chunk=chunk), expected, max(1e-11, noise))


def test_linear_attention_is_the_loop():
    q, k, v = qkv((), 11, 3, 2, seed=9)
    phi = feature_maps["elu1"]
    S, z = torch.zeros(3, 2, dtype=F64), torch.zeros(3, dtype=F64)
    rows = []
    for i in range(11):
        S = S + torch.outer(phi(k[i]), v[i])
        z = z + phi(k[i])
        rows.append((phi(q[i]) @ S) / (phi(q[i]) @ z))
    close(linear_attention(q, k, v, causal=True, chunk=4), torch.stack(rows))
    close(linear_attention(q[-1:], k, v), rows[-1].unsqueeze(0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["elu1", "relu", "cos", "taylor2"])
def test_gradients_by_finite_differences(name, causal):
    q, k, v = (x.requires_grad_() for x in qkv((), 5, 3, 2, seed=10))
    assert gradcheck(lambda *x: linear_attention(*x, name, causal=causal, chunk=2, eps=0.1 * (name == "relu")), (q, k, v))


@pytest.mark.parametrize("attend", [
    lambda q, k, v: linear_attention(q, k, v, causal=True, chunk=4),
    lambda q, k, v: linear_attention(q, k, v, "taylor2", causal=True, chunk=3, normalize=False),
    lambda q, k, v: efficient_attention(q, k, v, causal=True, chunk=4),
    lambda q, k, v: attention(q, k, v, causal=True),
])
def test_causal_forms_see_their_present_and_not_their_future(attend):
    q, k, v = qkv((2,), 10, 3, 2, seed=11)
    before = attend(q, k, v)
    for at in (0, 3, 4, 9):
        k2, v2 = k.clone(), v.clone()
        k2[:, at] += 1.0
        v2[:, at] -= 1.0
        change = (attend(q, k2, v2) - before).abs().amax((0, 2))
        assert bool((change[:at] == 0).all())
        assert bool((change[at:] > 1e-6).all())


@pytest.mark.parametrize("name", POSITIVE)
def test_order_of_the_keys_matters_only_if_causal(name):
    q, k, v = qkv((), 12, 4, 3, seed=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    out = linear_attention(q, k, v, name)
    close(linear_attention(q, k[order], v[order], name), out)
    close(linear_attention(q[order], k, v, name), out[order])
    close(efficient_attention(q[order], k[order], v[order]), efficient_attention(q, k, v)[order])
    causal = linear_attention(q, k, v, name, causal=True)
    assert float((linear_attention(q, k[order], v[order], name, causal=True) - causal).abs().max()) > 0.1


@pytest.mark.parametrize("attend", [
    lambda q, k, v: linear_attention(q, k, v, "cos", causal=True, chunk=3),
    lambda q, k, v: linear_attention(q, k, v, "taylor2"),
    lambda q, k, v: efficient_attention(q, k, v, causal=True, chunk=3),
    lambda q, k, v: efficient_attention(q, k, v),
    lambda q, k, v: attention(q, k, v),
])
def test_a_batch_is_its_items_and_shared_keys_broadcast(attend):
    q, k, v = qkv((2, 3), 7, 4, 5, seed=13)
    out = attend(q, k, v)
    for i in range(2):
        for j in range(3):
            close(attend(q[i, j], k[i, j], v[i, j]), out[i, j])
    close(attend(q, k[:, :1], v[:, :1]), attend(q, k[:, :1].expand(2, 3, 7, 4), v[:, :1].expand(2, 3, 7, 5)))


def test_values_stay_in_their_hull_and_constants_are_kept():
    q, k, v = qkv((3,), 9, 4, 2, seed=14)
    for out in (linear_attention(q, k, v), linear_attention(q, k, v, "cos"), efficient_attention(q, k, v)):
        assert bool((out <= v.amax(-2, keepdim=True) + 1e-12).all())
        assert bool((out >= v.amin(-2, keepdim=True) - 1e-12).all())
    for causal in (False, True):
        close(linear_attention(q, k, torch.ones_like(v), "taylor2", causal=causal), torch.ones_like(v))
        close(efficient_attention(q, k, torch.ones_like(v), causal=causal), torch.ones_like(v))


@pytest.mark.parametrize("normalize", [False, True])
def test_prefill_and_decoding_are_one_pass(normalize):
    q, k, v = qkv((2,), 13, 4, 3, seed=15)
    options = {"causal": True, "chunk": 4, "normalize": normalize, "eps": 0.5}
    whole, end = linear_attention(q, k, v, "taylor2", return_state=True, **options)
    out, state = linear_attention(q[:, :6], k[:, :6], v[:, :6], "taylor2", return_state=True, **options)
    rows = [out]
    for i in range(6, 13):
        one, state = linear_attention(
            *(x[:, i : i + 1] for x in (q, k, v)), "taylor2", state=state, return_state=True, **options
        )
        rows.append(one)
    close(torch.cat(rows, -2), whole)
    close(state.S, end.S)
    close(state.z, end.z)
    assert state.S.shape == (2, 15, 3)
    assert state.z.shape == (2, 15)


def test_update_and_read_by_hand():
    q, k, v = qkv((2,), 8, 4, 3, seed=16)
    phi = feature_maps["elu1"]
    empty = LinearAttentionState(torch.zeros(2, 4, 3, dtype=F64), torch.zeros(2, 4, dtype=F64))
    state = empty.update(phi(k[:, :5]), v[:, :5]).update(phi(k[:, 5:]), v[:, 5:])
    close(state.read(phi(q)), linear_attention(q, k, v))
    close(state.read(phi(q), normalize=False), (phi(q) @ phi(k).mT) @ v)
    close(state.read(phi(q), eps=2.0), ((phi(q) @ phi(k).mT) @ v) / ((phi(q) @ phi(k).mT).sum(-1, keepdim=True) + 2))
    assert float(empty.S.abs().max()) == 0
    close(linear_attention(q, k[:, 5:], v[:, 5:], state=empty.update(phi(k[:, :5]), v[:, :5])), linear_attention(q, k, v))


def test_normalize_and_eps():
    q, k, v = qkv((), 9, 3, 2, seed=17)
    similarity = (feature_maps["relu"](q) @ feature_maps["relu"](k).mT).tril()
    close(linear_attention(q, k, v, "relu", causal=True, normalize=False), similarity @ v)
    expected = similarity @ v / (similarity.sum(-1, keepdim=True) + 0.1)
    close(linear_attention(q, k, v, "relu", causal=True, eps=0.1, chunk=4), expected)


def test_any_function_can_be_the_map():
    q, k, v = qkv((), 6, 3, 2, seed=18)
    expected = similarity_attention(q.exp() @ k.exp().mT, v, torch.ones(6, 6, dtype=torch.bool).tril())
    close(linear_attention(q, k, v, torch.exp, causal=True), expected)


# -------------------------------------------------------------------------------------------- efficient


def prefix_loop(q, k, v):
    return torch.cat([q[..., i : i + 1, :].softmax(-1) @ (k[..., : i + 1, :].softmax(-2).mT @ v[..., : i + 1, :])
                      for i in range(q.shape[-2])], -2)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.floats(0.1, 300.0), st.integers(0, 2**31))
def test_causal_efficient_attention_is_the_prefix_loop(n, chunk, scale, seed):
    q, k, v = qkv((2,), n, 4, 3, seed)
    close(efficient_attention(q, scale * k, v, causal=True, chunk=chunk), prefix_loop(q, scale * k, v))


def test_efficient_attention_is_two_softmaxes():
    q, k, v = qkv((2,), 9, 4, 3, seed=19)
    close(efficient_attention(q, k, v), (q.softmax(-1) @ k.softmax(-2).mT) @ v)
    assert bool(torch.isfinite(efficient_attention(q, 1e4 * k, v, causal=True)).all())


@pytest.mark.parametrize("causal", [False, True])
def test_efficient_gradients_by_finite_differences(causal):
    q, k, v = (x.requires_grad_() for x in qkv((), 5, 3, 2, seed=20))
    assert gradcheck(lambda *x: efficient_attention(*x, causal=causal, chunk=2), (q, k, v))


# ---------------------------------------------------------------------------------------------- resources


@pytest.mark.parametrize("name", ["elu1", "cos", "taylor2"])
def test_memory_is_linear_and_never_n_times_the_state(name):
    heads, d, chunk = 2, 16, 32
    width = feature_maps[name](torch.zeros(1, d)).shape[-1]
    for n in (512, 4096):
        q, k, v = draw(heads, n, d, dtype=torch.float32)
        with PeakMemory() as memory:
            linear_attention(q, k, v, name, causal=True, chunk=chunk)
        result, step = 2 * n * (d + 1), width * d + chunk * (width + d + chunk)
        assert memory.peak <= 4 * heads * (result + 5 * step) < 4 * heads * n * width * d / 3


def test_arithmetic_is_linear_in_length():
    counts = []
    for n in (512, 1024):
        with FlopCounterMode(display=False) as flops:
            linear_attention(*draw(n, 16), causal=True, chunk=32)
        counts.append(flops.get_total_flops())
    assert counts[1] == 2 * counts[0] == 2 * 512 * (2 * 2 * 32 * 16 + 2 * 2 * 16 * 16)


# ------------------------------------------------------------------------------------------------- errors

GOOD = dict(zip("qkv", qkv((2,), 4, 3, 2, seed=21)))


@pytest.mark.parametrize("attend", [attention, linear_attention, efficient_attention])
@pytest.mark.parametrize(("change", "error", "message"), [
    ({"k": torch.zeros(2, 4, 5, dtype=F64)}, ValueError, r"k: expected shape \(\.\.\., m, d=3\), got \(2, 4, 5\)"),
    ({"v": torch.zeros(2, 5, 2, dtype=F64)}, ValueError, r"v: expected shape \(\.\.\., m=4, d_v\), got \(2, 5, 2\)"),
    ({"q": torch.zeros(3, 4, 3, dtype=F64)}, ValueError, "leading axes do not broadcast"),
    ({"q": torch.zeros(2, 0, 3, dtype=F64)}, ValueError, "q is empty"),
    ({"v": torch.full((2, 4, 2), float("nan"), dtype=F64)}, ValueError, "v has 16 non-finite"),
    ({"k": torch.full((2, 4, 3), float("inf"), dtype=F64)}, ValueError, "k has 24 non-finite"),
    ({"q": torch.zeros(2, 4, 3)}, TypeError, "expected the same"),
    ({"q": torch.zeros(2, 4, 3, dtype=torch.int64)}, TypeError, "q should have a floating dtype"),
    ({"q": [[1.0]]}, TypeError, "q should be a torch tensor"),
])
def test_bad_tensors_are_named(attend, change, error, message):
    with pytest.raises(error, match=message):
        attend(**{**GOOD, **change})


@pytest.mark.parametrize("attend", [linear_attention, efficient_attention])
def test_chunks_and_lengths(attend):
    for chunk in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match="chunk should be an integer >= 1"):
            attend(**GOOD, causal=True, chunk=chunk)
    with pytest.raises(ValueError, match="needs one key per query, got 4 keys and 3 queries"):
        attend(GOOD["q"][:, :3], GOOD["k"], GOOD["v"], causal=True)


def test_linear_attention_refuses_bad_options():
    with pytest.raises(ValueError, match="feature_map should be one of 'elu1', 'relu', 'cos', 'taylor2', got 'elu'"):
        linear_attention(**GOOD, feature_map="elu")
    with pytest.raises(ValueError, match="eps"):
        linear_attention(**GOOD, eps=-1.0)
    with pytest.raises(ValueError, match=r"feature_map should turn .* got torch.float64 \(2, 1\)"):
        linear_attention(**GOOD, feature_map=lambda x: x.sum(-1))
    with pytest.raises(ValueError, match=r"state.S: expected shape \(\.\.\., D=3, d_v=2\), got \(2, 5, 2\)"):
        linear_attention(**GOOD, state=LinearAttentionState(torch.zeros(2, 5, 2, dtype=F64), torch.zeros(2, 3, dtype=F64)))
    with pytest.raises(ValueError, match="the result of linear_attention has"):
        linear_attention(*(1e90 * GOOD[x] for x in "qkv"), feature_map="taylor2", eps=1.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 64])
def test_zero_denominators_are_errors_and_eps_mends_them(causal, chunk):
    k = draw(1, 5, seed=22, count=1)[0]
    v = torch.ones(1, 2, dtype=F64)
    for q, name in ((-k, "cos"), (-3 * k, "cos"), (-k.abs(), "relu")):
        with pytest.raises(ValueError, match=r"1 of 1 denominators vanish .* query \(0,\)"):
            linear_attention(q, k, v, name, causal=causal, chunk=chunk)
        assert bool(torch.isfinite(linear_attention(q, k, v, name, causal=causal, chunk=chunk, eps=1e-6)).all())
        state = LinearAttentionState(torch.zeros(6, 2, dtype=F64), torch.zeros(6, dtype=F64))
        if name == "cos":
            with pytest.raises(ValueError, match="denominators vanish"):
                state.update(feature_maps[name](k), v).read(feature_maps[name](q))
    with pytest.raises(ValueError, match="denominators vanish"):  # negative
        linear_attention(k, -k, v, lambda x: x, causal=causal, chunk=chunk)


def test_small_positive_denominators_are_no_error():
    q = torch.tensor([[0.0, -80.0]])
    k = torch.tensor([[-80.0, 0.0]])
    v = torch.tensor([[3.0]])
    close(linear_attention(q, k, v), v, 1e-6)
    close(linear_attention(q, k, v, torch.exp, causal=True), v, 1e-6)


def test_masks_are_checked():
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(2, 4, 4\), got \(3, 4\)"):
        attention(**GOOD, mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask leaves 1 queries"):
        attention(**GOOD, mask=torch.tensor([True, True, False, True]).unsqueeze(-1).expand(4, 4))
    with pytest.raises(ValueError, match="mask leaves 1 queries"):
        attention(**GOOD, causal=True, mask=torch.tensor([False, True, True, True]))
    with pytest.raises(ValueError, match="at least as many keys"):
        attention(GOOD["q"], GOOD["k"][:, :2], GOOD["v"][:, :2], causal=True)
    with pytest.raises(ValueError, match="scale"):
        attention(**GOOD, scale=float("nan"))
    with pytest.raises(ValueError, match=r"scale: expected a shape that broadcasts to .*1\), got"):
        attention(**GOOD, scale=torch.ones(1, 7))
    with pytest.raises(ValueError, match="scale has 1 non-finite"):
        attention(**GOOD, scale=torch.tensor(float("inf")).to(GOOD["q"]))
    with pytest.raises(TypeError, match="mask should be boolean"):
        similarity_attention(torch.ones(4, 4, dtype=F64), torch.ones(4, 2, dtype=F64), torch.ones(4, 4, dtype=F64))
    similarity = torch.ones(4, 4, dtype=F64)
    similarity[2, 1] = -3
    with pytest.raises(ValueError, match=r"1 of 4 denominators vanish .* query \(2,\)"):
        similarity_attention(similarity, torch.ones(4, 2, dtype=F64))
