"""Information of Gaussian encoders: closed forms, a float64 reference, bounds, blocks, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util
from jax.sharding import PartitionSpec as P
from scipy import special, stats

from rlib.information import gaussian, gaussian_information, kolchinsky_bound, normal_log_density
from rlib.parallel import make_mesh

pytestmark = pytest.mark.slow

ESTIMATORS = ("mc", "jensen")


def case(m=12, d=3, classes=3, seed=0):
    """z, mean, sd, labels."""
    draw = np.random.default_rng(seed)
    mean, sd = draw.normal(size=(m, d)), draw.uniform(0.3, 2.0, size=(m, d))
    z = mean + sd * draw.normal(size=(m, d))
    floats = (jnp.asarray(x, jnp.float32) for x in (z, mean, sd))
    return *floats, jnp.asarray(draw.integers(classes, size=m))


def reference(z, mean, sd, labels=None, estimator="mc"):
    """The equations, class by class, in float64."""
    z, mean, sd = (np.asarray(x, np.float64) for x in (z, mean, sd))
    labels = np.zeros(len(z)) if labels is None else np.asarray(labels)
    total = 0.0
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        log_p = np.array(
            [[stats.norm.logpdf(z[i], mean[j], sd[j]).sum() for j in rows] for i in rows]
        )
        if estimator == "mc":
            marginal = special.logsumexp(log_p, axis=1) - np.log(len(rows))
        else:
            marginal = log_p.mean(axis=1)
        total += len(rows) / len(z) * np.mean(np.diagonal(log_p) - marginal)
    return total


def expected(mean, estimator, points=40):
    """Mean over the noise of points on a line with sd 1, by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(points)
    mean = np.asarray(mean, np.float64)[:, None]
    one = functools.partial(gaussian_information, estimator=estimator)
    values = jax.vmap(lambda e: one(mean + e, jnp.asarray(mean), jnp.ones_like(mean)))(
        jnp.asarray(x)
    )
    return float(values @ (w / w.sum()))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_against_the_equations(estimator, labelled):
    z, mean, sd, labels = case()
    labels = labels if labelled else None
    found = gaussian_information(z, mean, sd, labels, estimator=estimator)
    assert found == pytest.approx(reference(z, mean, sd, labels, estimator), rel=1e-4)


def test_expectations_of_two_and_four_points():
    with jax.enable_x64(True):
        assert expected([0.0, 10.0], "mc") == pytest.approx(np.log(2), abs=1e-4)
        assert expected([0.0, 10.0], "jensen") == pytest.approx(25.0, rel=1e-9)
        assert expected([0.0, 1.0], "mc") == pytest.approx(0.1114215, abs=1e-6)
        assert expected([0.0, 1.0], "jensen") == pytest.approx(0.25, rel=1e-9)
        assert expected([0.0, 20.0, 40.0, 60.0], "mc") == pytest.approx(np.log(4), abs=1e-6)
        assert expected([0.0, 20.0, 40.0, 60.0], "jensen") == pytest.approx(500.0, rel=1e-9)


def test_the_bound_of_pairs():
    apart = kolchinsky_bound(jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)))
    assert apart == pytest.approx(-np.log((1 + np.exp(-0.5)) / 2), abs=1e-6)
    # Equal means, sd 1 and 2: the divergences are log 2 - 3/8 and 3/2 - log 2.
    wider = kolchinsky_bound(jnp.zeros((2, 1)), jnp.array([[1.0], [2.0]]))
    a, b = np.log(2) - 3 / 8, 3 / 2 - np.log(2)
    by_hand = -np.mean([np.log((1 + np.exp(-a)) / 2), np.log((1 + np.exp(-b)) / 2)])
    assert wider == pytest.approx(by_hand, abs=1e-6)


def test_an_encoder_that_ignores_its_input_keeps_nothing():
    z, mean, sd, labels = case()
    mean, sd = jnp.broadcast_to(mean[:1], mean.shape), jnp.broadcast_to(sd[:1], sd.shape)
    found = [gaussian_information(z, mean, sd, labels, estimator=e) for e in ESTIMATORS]
    np.testing.assert_allclose([*found, kolchinsky_bound(mean, sd)], 0, atol=1e-5)


def test_order_of_the_three_and_the_limit():
    _, mean, sd, _ = case(m=8, d=2)
    noise = jax.random.normal(jax.random.key(0), (4000, *mean.shape))
    one = lambda e, estimator: gaussian_information(mean + sd * e, mean, sd, estimator=estimator)
    mc, jensen = (jax.jit(jax.vmap(functools.partial(one, estimator=e)))(noise) for e in ESTIMATORS)
    assert jnp.all(mc <= jensen + 1e-5)  # on every draw
    assert jnp.all(mc <= np.log(8) + 1e-5)
    between = kolchinsky_bound(mean, sd)
    error = 3 * jnp.std(mc) / np.sqrt(len(mc))
    assert mc.mean() - error <= between <= jensen.mean()


def test_conditional_on_what_decides_the_encoder():
    labels = jnp.arange(12) % 3
    mean = 100.0 * labels[:, None].astype(jnp.float32)
    z = mean + jax.random.normal(jax.random.key(0), mean.shape)
    sd = jnp.ones_like(mean)
    assert gaussian_information(z, mean, sd, labels) == pytest.approx(0, abs=1e-5)
    assert gaussian_information(z, mean, sd) == pytest.approx(np.log(3), abs=1e-5)
    assert kolchinsky_bound(mean, sd, labels) == pytest.approx(0, abs=1e-5)


def test_a_linear_encoder_of_a_gaussian_input():
    """I = log(1 + a^2 / s^2) / 2; the estimate comes from below as samples grow."""
    a, s = 2.0, 1.0
    exact = 0.5 * np.log(1 + a**2 / s**2)

    def estimate(m, key):
        x, noise = jax.random.normal(key, (2, m, 1))
        return gaussian_information(a * x + s * noise, a * x, jnp.full((m, 1), s))

    means, errors = [], []
    for m, repeats in ((4, 1000), (20, 1000), (400, 50)):
        keys = jax.random.split(jax.random.key(m), repeats)
        found = jax.jit(jax.vmap(functools.partial(estimate, m)))(keys)
        means.append(float(found.mean()))
        errors.append(float(found.std()) / np.sqrt(repeats))
    assert means[0] < means[1] < exact
    assert means[2] == pytest.approx(exact, abs=3 * errors[2] + 1 / 400)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_against_finite_differences(estimator):
    with jax.enable_x64(True):
        z, mean, sd, labels = case(m=6, d=2)
        noise = (z - mean) / sd

        def value(mean, log_sd):
            sd = jnp.exp(log_sd)
            return gaussian_information(mean + sd * noise, mean, sd, labels, estimator=estimator)

        args = [jnp.asarray(x, jnp.float64) for x in (mean, jnp.log(sd))]
        test_util.check_grads(jax.jit(value), args, order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


@jax.jit
def value_and_gradient(mean, sd, labels):
    value = lambda mean: gaussian_information(mean + 0.5 * sd, mean, sd, labels)
    return jax.value_and_grad(value)(mean)


@pytest.mark.parametrize(
    ("mean", "sd", "labels", "expected"),
    [
        ([[1.0]], 1.0, [0], 0.0),  # a batch of one
        ([[1.0], [1.0], [1.0]], 1.0, [0, 0, 0], 0.0),  # the same sample again and again
        ([[1.0], [2.0], [3.0]], 1.0, [0, 1, 2], 0.0),  # no two of one label
        ([[1.0], [2.0], [3.0]], 0.0, [0, 0, 0], np.log(3)),  # sd 0, floored
    ],
)
def test_degenerate_samples_have_defined_values_and_gradients(mean, sd, labels, expected):
    mean = jnp.array(mean)
    value, gradient = value_and_gradient(mean, jnp.full(mean.shape, sd), jnp.array(labels))
    assert value == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_an_input_that_is_not_finite_is_not_hidden():
    mean = jnp.array([[1.0], [jnp.nan]])
    value, _ = value_and_gradient(mean, jnp.ones((2, 1)), jnp.zeros(2, int))
    assert jnp.isnan(value)


def test_errors():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="choose"):
        gaussian_information(x, x, x, estimator="binned")
    with pytest.raises(ValueError, match=r"sd \(4, 1\)"):
        gaussian_information(x, x, x[:, :1])
    with pytest.raises(ValueError, match="no samples"):
        kolchinsky_bound(x[:0], x[:0])
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        kolchinsky_bound(x, x, jnp.zeros(3, int))


def values(z, mean, sd, labels, axis_name=None):
    found = [
        gaussian_information(z, mean, sd, given, estimator=e, axis_name=axis_name)
        for e in ESTIMATORS
        for given in (None, labels)
    ]
    return jnp.stack([*found, kolchinsky_bound(mean, sd, labels, axis_name=axis_name)])


def test_blocks_are_the_whole(monkeypatch):
    z, mean, sd, labels = case(m=37)

    def all_and_gradient():
        one = lambda mean: (jnp.sum(all := values(z, mean, sd, labels)), all)
        return jax.jit(jax.value_and_grad(one, has_aux=True))(mean)

    (_, whole), gradient = all_and_gradient()
    monkeypatch.setattr(gaussian, "BLOCKED_ABOVE", 16)
    monkeypatch.setattr(gaussian, "PAIRS_AT_ONCE", 100)  # two samples a block, one in the last
    (_, blocked), blocked_gradient = all_and_gradient()
    np.testing.assert_allclose(blocked, whole, rtol=1e-5)
    np.testing.assert_allclose(blocked_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_eight_shards_are_one():
    args, mesh = case(m=16), make_mesh({"data": 8})
    shard = jax.jit(
        jax.shard_map(
            functools.partial(values, axis_name="data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
    )
    np.testing.assert_allclose(shard(*args), jax.jit(values)(*args), rtol=1e-5)
    by_mean = lambda f: jax.grad(lambda mean: jnp.sum(f(args[0], mean, *args[2:])))
    np.testing.assert_allclose(
        jax.jit(by_mean(shard))(args[1]), jax.jit(by_mean(values))(args[1]), rtol=1e-4, atol=1e-5
    )


def test_log_density():
    z, mean, sd, _ = case()
    found = normal_log_density(z, mean, sd)
    np.testing.assert_allclose(found, stats.norm.logpdf(z, mean, sd).sum(axis=1), rtol=1e-5)
