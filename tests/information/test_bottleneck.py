"""The self-consistent equations: monotone functional, limits, and a fit with a known answer."""

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from rlib import information


@pytest.fixture(scope="module")
def joint():
    draw = np.random.default_rng(0)
    return draw.dirichlet(np.ones(3), 8) * draw.dirichlet(np.ones(8))[:, None]


def informations(p_t_x, joint):
    """(I(X;T), I(T;Y)) in bits, in float64, from the definition."""
    p_x = joint.sum(axis=1)

    def mutual(p):
        outer = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
        inside = p > 0
        return (p[inside] * np.log2(p[inside] / outer[inside])).sum()

    return mutual(p_t_x * p_x[:, None]), mutual(p_t_x.T @ joint)


@pytest.mark.parametrize("beta", [0.5, 3.0, 30.0])
def test_the_functional_never_increases_and_the_informations_are_its_own(joint, beta):
    with jax.enable_x64(True):
        key = jax.random.key(1)
        state = information.information_bottleneck(joint, beta, 6, key, iterations=100)
    functional = np.asarray(state.functional)
    assert functional.dtype == np.float64
    assert (np.diff(functional) <= 1e-12).all()
    ixt, ity = informations(np.asarray(state.p_t_x), joint)
    assert float(state.ixt) == pytest.approx(ixt, abs=1e-9)
    assert float(state.ity) == pytest.approx(ity, abs=1e-9)
    assert ity <= ixt + 1e-9
    np.testing.assert_allclose(np.asarray(state.p_y_t).sum(axis=1), 1)


def test_the_equations_hold_at_the_end(joint):
    state = information.information_bottleneck(joint, 4.0, 6, jax.random.key(0), iterations=2000)
    p_t, p_y_t = (np.asarray(v, np.float64) for v in (state.p_t, state.p_y_t))
    p_y_x = joint / joint.sum(axis=1, keepdims=True)
    kl = (p_y_x[:, None] * np.log(p_y_x[:, None] / p_y_t)).sum(axis=-1)
    logits = np.log(np.maximum(p_t, 1e-30)) - 4.0 * kl
    expected = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(state.p_t_x, expected, atol=2e-3)


def test_up_to_beta_one_the_minimum_is_trivial(joint):
    state = information.information_bottleneck(joint, 0.9, 6, jax.random.key(2), iterations=2000)
    assert float(state.ixt) == pytest.approx(0, abs=1e-4)


def test_large_beta_with_sure_labels_keeps_the_label():
    """Also beside an input of probability 0, which no value of T can explain."""
    joint = np.vstack([np.eye(3)[np.arange(12) % 3] / 12, np.zeros(3)])
    state = information.information_bottleneck(joint, 100.0, 6, jax.random.key(0))
    assert float(state.ixt) == pytest.approx(np.log2(3), abs=1e-3)
    assert float(state.ity) == pytest.approx(np.log2(3), abs=1e-3)
    assert np.isfinite(state.p_t_x).all()


BETAS = np.geomspace(1.5, 60, 40)


@pytest.fixture(scope="module")
def bound(joint):
    return information.information_bound(joint, BETAS, iterations=300)


def test_the_bound_is_monotone_concave_and_above_random_starts(joint, bound):
    betas = BETAS
    assert (np.diff(bound, axis=0) >= -1e-3).all()
    for k in (10, 25):
        starts = [
            information.information_bottleneck(joint, betas[k], 8, jax.random.key(s))
            for s in range(3)
        ]
        best = min(float(s.ixt - betas[k] * s.ity) for s in starts)
        assert bound[k, 0] - betas[k] * bound[k, 1] <= best + 1e-2
    # Concave: through each point goes a line of slope 1 / beta that no other point is above.
    values = bound[:, 0] - betas[:, None] * bound[:, 1]
    assert (values >= np.diagonal(values)[:, None] - 5e-3).all()


def test_the_bound_takes_betas_in_any_order(joint, bound):
    down = information.information_bound(joint, BETAS[::-1], iterations=300)
    np.testing.assert_array_equal(bound, down[::-1])


def test_an_input_without_probability_changes_nothing(joint, bound):
    padded = np.vstack([joint, np.zeros(3)])
    found = information.information_bound(padded, BETAS, iterations=300)
    np.testing.assert_allclose(found[10:], bound[10:], atol=2e-3)


def divergence(beta, cells, p_y_x):
    """E_x KL[p(t|x) || p_beta(t|x)] in bits of a deterministic layer, sum by sum."""
    total = 0.0
    values = np.unique(cells)
    p_t = np.array([(cells == t).mean() for t in values])
    p_y_t = np.array([p_y_x[cells == t].mean(axis=0) for t in values])
    for t, p in zip(cells, p_y_x, strict=True):
        weight = p_t * np.exp(-beta * (p * np.log(p / p_y_t)).sum(axis=1))
        total -= np.log2(weight[values == t][0] / weight.sum())
    return total / len(cells)


def test_a_layers_beta_minimises_its_divergence():
    draw = np.random.default_rng(5)
    one = draw.uniform(0.05, 0.95, 60)
    soft = np.stack([1 - one, one], axis=1)
    cells = np.digitize(one + 0.15 * draw.normal(size=60), [0.3, 0.5, 0.7])
    fit = information.layer_beta(cells, soft)
    assert fit.divergence == pytest.approx(divergence(fit.beta, cells, soft), rel=1e-6)
    for other in (0.9 * fit.beta, 1.1 * fit.beta):
        assert divergence(other, cells, soft) > fit.divergence
    ixt, ity = informations(np.eye(4)[cells], soft / 60)
    assert (fit.ixt, fit.ity) == pytest.approx((ixt, ity))


def test_beta_of_pure_cells_is_undefined():
    sure = np.eye(2)[np.arange(8) % 2]
    fit = information.layer_beta(np.arange(8) % 4, sure)
    assert np.isnan(fit.beta)
    assert fit.divergence == pytest.approx(1.0)  # two cells a class
    assert (fit.ixt, fit.ity) == pytest.approx((2.0, 1.0))


def test_beta_does_not_overflow_where_cells_tell_all():
    one = np.linspace(1e-6, 1 - 1e-6, 32)
    fit = information.layer_beta(np.arange(32), np.stack([1 - one, one], axis=1))
    assert np.isfinite([fit.beta, fit.divergence]).all() and fit.divergence >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information.information_bound([[0.5, np.nan]], [1.0]), "finite"),
        (lambda: information.information_bound([[0.5, -0.1]], [1.0]), "negative"),
        (lambda: information.information_bound(np.eye(2), []), "betas"),
        (lambda: information.information_bound(np.eye(2), [2.0, np.inf]), "finite"),
        (
            lambda: information.information_bottleneck(np.eye(2), np.inf, 2, jax.random.key(0)),
            "finite",
        ),
        (
            lambda: information.information_bottleneck(np.eye(2), 2.0, 0, jax.random.key(0)),
            "num_t",
        ),
        (
            lambda: information.information_bottleneck(np.eye(2), 0.0, 2, jax.random.key(0)),
            "beta",
        ),
        (
            lambda: information.information_bottleneck(np.ones(3), 2.0, 2, jax.random.key(0)),
            "shape",
        ),
        (lambda: information.layer_beta(np.zeros(2, int), np.eye(3)), "row"),
        (lambda: information.layer_beta(np.zeros(2, int), np.full((2, 2), np.nan)), "finite"),
        (lambda: information.layer_beta(np.zeros(2, int), np.eye(2) / 2), "sums to 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
