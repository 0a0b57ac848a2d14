"""Row entropy, attention scales and the entropy of random directions, against scipy, torch and mpmath."""

from __future__ import annotations

import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kexue.attention import attention, attention_scale, softmax_entropy, sphere_entropy_rate, vmf_kl
from kexue.transformer import Config, Transformer

GENERATOR = torch.Generator().manual_seed(0)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=GENERATOR, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_entropy_is_scipys(size: float) -> None:
    logits = size * normal(3, 4, 17)
    expected = stats.entropy(logits.softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(softmax_entropy(logits).numpy(), expected, rtol=1e-9, atol=1e-13)
    law = torch.distributions.Categorical(logits=logits)
    np.testing.assert_allclose(softmax_entropy(logits), law.entropy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_entropy_along_any_axis(dim: int) -> None:
    logits = normal(3, 4, 5)
    expected = stats.entropy(logits.softmax(dim).numpy(), axis=dim)
    np.testing.assert_allclose(softmax_entropy(logits, dim=dim), expected, rtol=1e-12)


def test_masked_and_infinite_keys_are_as_if_absent() -> None:
    logits = normal(6, 9)
    keep = torch.ones(9, dtype=torch.bool)
    keep[[1, 5]] = False
    expected = softmax_entropy(logits[:, keep])
    torch.testing.assert_close(softmax_entropy(logits, mask=keep), expected)
    torch.testing.assert_close(softmax_entropy(logits.masked_fill(~keep, -math.inf)), expected)
    below = torch.ones(9, 9, dtype=torch.bool).tril()
    rows = softmax_entropy(logits[:, None].expand(6, 9, 9), mask=below)
    assert rows.shape == (6, 9)
    torch.testing.assert_close(rows[:, 3], softmax_entropy(logits[:, :4]))
    assert bool((rows[:, 0] == 0).all())
    several = softmax_entropy(logits, dim=1, mask=torch.stack([keep, ~keep])[:, None])  # a mask may add leading axes
    torch.testing.assert_close(several, torch.stack([expected, softmax_entropy(logits[:, ~keep])]))


def test_entropy_of_huge_logits_and_of_a_single_key() -> None:
    assert softmax_entropy(torch.tensor([1e30, -1e30, 0.0])).item() == 0
    assert softmax_entropy(torch.tensor([3e38, 3e38], dtype=torch.float32)).item() == pytest.approx(math.log(2))
    assert softmax_entropy(torch.tensor([[5.0]])).tolist() == [0.0]


def test_entropy_gradients() -> None:
    logits = normal(2, 6).requires_grad_()
    mask = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda x: softmax_entropy(x, mask=mask), logits)
    assert torch.autograd.gradgradcheck(softmax_entropy, logits)
    hidden = logits.detach().clone()
    hidden[:, 2] = -math.inf
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(softmax_entropy(hidden).sum(), hidden)
    p = hidden.detach().softmax(-1)
    h = softmax_entropy(hidden.detach()).unsqueeze(-1)
    torch.testing.assert_close(grad, torch.where(p > 0, -p * (p.log() + h), 0.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-200, 200), min_size=1, max_size=30), st.floats(-1e3, 1e3), st.floats(0, 5))
def test_entropy_properties(row: list[float], shift: float, more: float) -> None:
    logits = torch.tensor(row, dtype=torch.float64)
    entropy = softmax_entropy(logits)
    assert -1e-12 <= entropy.item() <= math.log(len(row)) + 1e-12
    torch.testing.assert_close(softmax_entropy(logits + shift), entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(softmax_entropy(logits.repeat(2)), entropy + math.log(2), rtol=1e-9, atol=1e-9)
    assert softmax_entropy((1 + more) * logits).item() <= entropy.item() + 1e-9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [0.0, 1.0]}, TypeError, "logits should be a torch tensor"),
        ({"logits": torch.arange(3)}, TypeError, "logits should have a floating dtype"),
        ({"logits": torch.tensor(1.0)}, ValueError, "dim should name one of the axes"),
        ({"dim": 2}, ValueError, "dim should name one of the axes"),
        ({"dim": 0.0}, ValueError, "dim should name one of the axes"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "no keys along dim -1"),
        ({"logits": torch.tensor([0.0, math.nan])}, ValueError, "1 entries that are NaN or .infinity"),
        ({"logits": torch.tensor([0.0, math.inf])}, ValueError, "1 entries that are NaN or .infinity"),
        ({"logits": torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]])}, ValueError, "1 rows have no key"),
        ({"mask": torch.tensor([[True, False, True], [False, False, False]])}, ValueError, "1 rows have no key"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask should be boolean"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
        ({"mask": True}, TypeError, "mask should be a torch tensor"),
    ],
)
def test_entropy_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        softmax_entropy(**{"logits": torch.zeros(2, 3), **change})


# ------------------------------------------------------------------------------------------------ scale


def test_scales_by_hand() -> None:
    assert attention_scale(4096, 64, "sqrt") == 1 / 8
    assert attention_scale(4096, 64, "logn") == pytest.approx(12 / 9 / 8)
    assert attention_scale(4096, 64, "sqrtlogn") == pytest.approx(math.sqrt(12 / 9) / 8)
    assert attention_scale(16, 4, "logn", n0=2) == pytest.approx(2.0)
    assert attention_scale(1, 64) == 0.0
    assert attention_scale(8, 64, clamp=True) == 1 / 8
    assert attention_scale(4096, 64, clamp=True) == attention_scale(4096, 64)


@pytest.mark.parametrize("kind", ["sqrt", "logn", "sqrtlogn"])
@pytest.mark.parametrize("clamp", [False, True])
def test_tensor_and_number_agree(kind: str, clamp: bool) -> None:
    n = torch.arange(1, 700)[:, None]
    scales = attention_scale(n.double(), 24, kind, n0=100, clamp=clamp)
    assert scales.shape == (699, 1) and scales.dtype == torch.float64
    expected = [attention_scale(i, 24, kind, n0=100, clamp=clamp) for i in range(1, 700)]
    np.testing.assert_allclose(scales[:, 0], expected, rtol=1e-14)
    assert attention_scale(n, 24, kind).dtype == torch.get_default_dtype()
    assert attention_scale(n.half(), 24, kind).dtype == torch.float16


@pytest.mark.parametrize("kind", ["sqrt", "logn", "sqrtlogn"])
def test_at_n0_it_is_the_default_of_torch(kind: str) -> None:
    q, k, v = normal(3, 1, 512, 64)
    ours = F.scaled_dot_product_attention(q, k, v, scale=attention_scale(512, 64, kind))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n should be an integer >= 1, got 0"),
        ({"n": 2.5}, ValueError, "n should be an integer >= 1"),
        ({"n": torch.tensor([3, 0])}, ValueError, "n has 1 entries"),
        ({"n": torch.tensor([3.0, math.nan, math.inf])}, ValueError, "n has 2 entries"),
        ({"n": torch.tensor([True])}, TypeError, "n should hold real numbers"),
        ({"d": 0}, ValueError, "d should be an integer >= 1"),
        ({"n0": 1}, ValueError, "n0 should be a number"),
        ({"n0": math.inf}, ValueError, "n0 should be a number"),
        ({"kind": "log"}, ValueError, "kind should be one of 'sqrt', 'logn', 'sqrtlogn', got 'log'"),
    ],
)
def test_scale_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_scale(**{"n": 5, "d": 4, **arguments})


def test_causal_rows_in_a_transformer() -> None:
    """Each position's weights are those of its own length, alone and in the model, with and without a cache."""
    scale = partial(attention_scale, d=4, kind="logn", n0=5)
    config = Config(d=8, layers=1, heads=2, vocab=11, causal=True, position="none", scale=scale)
    model = Transformer(config, generator=torch.Generator().manual_seed(1)).double().eval()
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(tokens)
        for m in (1, 5, 9):
            torch.testing.assert_close(model(tokens[:, :m])[:, -1], whole[:, m - 1])
        first, cache = model(tokens[:, :6], return_cache=True)
        rest, _ = model(tokens[:, 6:], cache=cache, return_cache=True)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole)
        plain = Transformer(Config(d=8, layers=1, heads=2, vocab=11, causal=True, position="none")).double().eval()
        plain.load_state_dict(model.state_dict())
        usual = plain(tokens)
    torch.testing.assert_close(whole[:, 4], usual[:, 4])  # n0 = 5 keys
    assert (whole[:, 8] - usual[:, 8]).abs().max() > 1e-4


def test_scale_of_rows_in_attention() -> None:
    q, k, v = normal(3, 7, 4)
    seen = torch.arange(1, 8).double()[:, None]
    out = attention(q, k, v, scale=attention_scale(seen, 4, "sqrtlogn", n0=3), causal=True)
    for i in range(1, 8):
        scale = attention_scale(i, 4, "sqrtlogn", n0=3)
        alone = F.scaled_dot_product_attention(q[None, i - 1 : i], k[None, :i], v[None, :i], scale=scale)
        torch.testing.assert_close(out[i - 1], alone[0, 0])


# ------------------------------------------------------------------------------------ random directions


def test_rate_is_the_saddle_point() -> None:
    lam = torch.logspace(-8, 8, 50, dtype=torch.float64)
    with mpmath.workdps(60):
        for x, g in zip(lam.tolist(), sphere_entropy_rate(lam).tolist()):
            c = (mpmath.sqrt(1 + 4 * mpmath.mpf(x) ** 2) - 1) / (2 * mpmath.mpf(x))  # lam (1 - c^2) = c
            assert g == pytest.approx(float(-mpmath.log(1 - c * c) / 2), rel=1e-13)
    assert sphere_entropy_rate(1.0).item() == pytest.approx(math.log((1 + math.sqrt(5)) / 2) / 2, rel=1e-15)
    assert sphere_entropy_rate(0.0).item() == 0
    assert sphere_entropy_rate(torch.zeros(2, 3)).shape == (2, 3)


def bessel(kappa: float, d: int) -> float:
    with mpmath.workdps(60):
        x, nu = mpmath.mpf(kappa), mpmath.mpf(d) / 2 - 1
        i = mpmath.besseli(nu, x, maxterms=10**7)
        mean = mpmath.besseli(nu + 1, x, maxterms=10**7) / i
        return float(x * mean - mpmath.log(mpmath.gamma(nu + 1) * (2 / x) ** nu * i))


@pytest.mark.parametrize("d", [2, 3, 8, 64, 1023, 1024, 20000])
@pytest.mark.parametrize("kappa", [1e-6, 1e-2, 1.0, 30.0, 500.0, 3000.0, 9000.0])
def test_kl_is_mpmaths(kappa: float, d: int) -> None:
    assert vmf_kl(kappa, d).item() == pytest.approx(bessel(kappa, d), rel=2e-12)


@pytest.mark.parametrize("d", [3, 8, 64])
def test_kl_is_scipys(d: int) -> None:
    for kappa in (0.5, 8.0, 40.0):
        law = stats.vonmises_fisher([1.0] + [0.0] * (d - 1), kappa)
        area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        assert vmf_kl(kappa, d).item() == pytest.approx(area - law.entropy(), rel=1e-9)


def test_kl_joins_its_branches_and_goes_far() -> None:
    for d in (2, 64, 4096):
        kappa = torch.logspace(2, 5.5, 400, dtype=torch.float64)
        value = vmf_kl(kappa, d)
        assert bool((value.diff() > 0).all())
        curve = value.log().diff(n=2).abs()
        assert curve.max() < 1e-3  # no jump where the series hands over
    assert vmf_kl(0.0, 5).item() == 0
    assert vmf_kl(torch.tensor([[0.0, 1.0], [8.0, 1e4]]), 64).shape == (2, 2)
    far = vmf_kl(1e8, 9) - vmf_kl(1e7, 9)  # (d - 1)/2 log kappa
    assert far.item() == pytest.approx(4 * math.log(10), rel=1e-6)
    assert vmf_kl(torch.tensor([]), 9).shape == (0,)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1e5), st.integers(2, 3000))
def test_kl_properties(kappa: float, d: int) -> None:
    kl = vmf_kl(kappa, d).item()
    assert 0 <= kl <= min(kappa, kappa**2 / (2 * d)) * (1 + 1e-9)
    rate = d * sphere_entropy_rate(kappa / d).item()
    assert abs(kl - rate) <= max(0.5 * math.log(1 + kappa) + 0.5, 1e-9)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_random_directions_refuse(value: float) -> None:
    with pytest.raises(ValueError, match="kappa should be a number"):
        vmf_kl(value, 4)
    with pytest.raises(ValueError, match="kappa has 1 entries"):
        vmf_kl(torch.tensor([1.0, value]), 4)
    with pytest.raises(ValueError, match="lam should be a number"):
        sphere_entropy_rate(value)
    with pytest.raises(ValueError, match="lam has 1 entries"):
        sphere_entropy_rate(torch.tensor([1.0, value]))


def test_random_directions_refuse_other_input() -> None:
    with pytest.raises(ValueError, match="d should be an integer >= 2, got 1"):
        vmf_kl(1.0, 1)
    with pytest.raises(ValueError, match="kappa should be a number"):
        vmf_kl("1", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kappa should hold real numbers"):
        vmf_kl(torch.tensor([True]), 3)
    with pytest.raises(TypeError, match="lam should hold real numbers"):
        sphere_entropy_rate(torch.tensor([1j]))
