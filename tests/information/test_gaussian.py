"""Information of Gaussian encoders: closed forms, a float64 reference, bounds, blocks, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util
from jax.sharding import PartitionSpec as P
from scipy import special, stats

from rlib.information import gaussian_information, kolchinsky_bound, normal_log_density, rows
from rlib.parallel import make_mesh

ESTIMATORS = ("mc", "jensen")


def case(m=16, d=3, classes=3, seed=0):
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


def values(z, mean, sd, labels, axis_name=None):
    """mc, mc given labels, jensen given labels, the bound of pairs given labels."""
    found = [
        gaussian_information(z, mean, sd, given, estimator=e, axis_name=axis_name)
        for e, given in (("mc", None), ("mc", labels), ("jensen", labels))
    ]
    return jnp.stack([*found, kolchinsky_bound(mean, sd, labels, axis_name=axis_name)])


def with_gradient(values=values):
    """The values and the gradient of their sum by the means, compiled."""

    def one(mean, z, sd, labels):
        found = values(z, mean, sd, labels)
        return jnp.sum(found), found

    compiled = jax.jit(jax.value_and_grad(one, has_aux=True))

    def run(z, mean, sd, labels):
        (_, found), gradient = compiled(mean, z, sd, labels)
        return np.asarray(found), np.asarray(gradient)

    return run


whole = with_gradient()


def test_against_the_equations():
    args = case()
    z, mean, sd, labels = args
    by_hand = [
        reference(z, mean, sd),
        reference(z, mean, sd, labels),
        reference(z, mean, sd, labels, "jensen"),
    ]
    np.testing.assert_allclose(whole(*args)[0][:3], by_hand, rtol=1e-4)


@jax.jit
def expectations(mean):
    """Means over the noise of points on a line with sd 1, by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(40)
    one = lambda e: jnp.stack(
        [
            gaussian_information(mean + e, mean, jnp.ones_like(mean), estimator=estimator)
            for estimator in ESTIMATORS
        ]
    )
    return jnp.asarray(w / w.sum()) @ jax.vmap(one)(jnp.asarray(x))


@pytest.mark.parametrize(
    ("points", "mc", "jensen"),
    [([0, 10], np.log(2), 25), ([0, 1], 0.1114215, 0.25), ([0, 20, 40, 60], np.log(4), 500)],
)
def test_expectations_of_two_and_four_points(points, mc, jensen):
    with jax.enable_x64(True):
        found = expectations(jnp.asarray(points, jnp.float64)[:, None])
    assert found[0] == pytest.approx(mc, abs=1e-4 if points[1] == 10 else 1e-6)
    assert found[1] == pytest.approx(jensen, rel=1e-9)


def test_the_bound_of_pairs():
    bound = jax.jit(kolchinsky_bound)
    apart = bound(jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)))
    assert apart == pytest.approx(-np.log((1 + np.exp(-0.5)) / 2), abs=1e-6)
    # Equal means, sd 1 and 2: the divergences are log 2 - 3/8 and 3/2 - log 2.
    wider = bound(jnp.zeros((2, 1)), jnp.array([[1.0], [2.0]]))
    a, b = np.log(2) - 3 / 8, 3 / 2 - np.log(2)
    by_hand = -np.mean([np.log((1 + np.exp(-a)) / 2), np.log((1 + np.exp(-b)) / 2)])
    assert wider == pytest.approx(by_hand, abs=1e-6)


def test_an_encoder_that_ignores_its_input_keeps_nothing():
    z, mean, sd, labels = case()
    mean, sd = jnp.broadcast_to(mean[:1], mean.shape), jnp.broadcast_to(sd[:1], sd.shape)
    np.testing.assert_allclose(whole(z, mean, sd, labels)[0], 0, atol=1e-5)


def test_order_of_the_three_and_the_limit():
    _, mean, sd, _ = case(m=8, d=2)
    noise = np.random.default_rng(0).normal(size=(4000, *mean.shape)).astype(np.float32)

    @jax.jit
    def three(noise):
        one = lambda e: [
            gaussian_information(mean + sd * e, mean, sd, estimator=name) for name in ESTIMATORS
        ]
        return *jax.vmap(one)(noise), kolchinsky_bound(mean, sd)

    mc, jensen, between = three(noise)
    assert jnp.all(mc <= jensen + 1e-5)  # on every draw
    assert jnp.all(mc <= np.log(8) + 1e-5)
    error = 3 * jnp.std(mc) / np.sqrt(len(mc))
    assert mc.mean() - error <= between <= jensen.mean()


def test_conditional_on_what_decides_the_encoder():
    labels = jnp.arange(16) % 4
    mean = jnp.broadcast_to(100.0 * labels[:, None], (16, 3))
    z = mean + np.random.default_rng(0).normal(size=mean.shape).astype(np.float32)
    mc, *given = whole(z, mean, jnp.ones_like(mean), labels)[0]
    np.testing.assert_allclose(given, 0, atol=1e-5)
    assert mc == pytest.approx(np.log(4), abs=1e-5)


def test_a_linear_encoder_of_a_gaussian_input():
    """I = log(1 + a^2 / s^2) / 2; the estimate comes from below as samples grow."""
    a, s = 2.0, 1.0
    exact = 0.5 * np.log(1 + a**2 / s**2)

    @jax.jit
    @jax.vmap
    def estimate(x, noise):
        return gaussian_information(a * x + s * noise, a * x, jnp.full_like(x, s))

    means, errors = [], []
    for m, repeats in ((4, 1000), (400, 50)):
        drawn = np.random.default_rng(m).normal(size=(2, repeats, m, 1))
        found = estimate(*drawn.astype(np.float32))
        means.append(float(found.mean()))
        errors.append(float(found.std()) / np.sqrt(repeats))
    assert means[0] + 3 * errors[0] < means[1]
    assert means[1] == pytest.approx(exact, abs=3 * errors[1] + 1 / 400)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        z, mean, sd, labels = case(m=6, d=2)
        noise = (z - mean) / sd

        @jax.jit
        def value(mean, log_sd):
            sd = jnp.exp(log_sd)
            found = values(mean + sd * noise, mean, sd, labels)
            return found @ jnp.array([1.0, -2.0, 3.0, -5.0])

        args = [jnp.asarray(x, jnp.float64) for x in (mean, jnp.log(sd))]
        test_util.check_grads(value, args, order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


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
    mean = jnp.array([[1.0], [jnp.nan], [2.0]])
    value, _ = value_and_gradient(mean, jnp.ones((3, 1)), jnp.zeros(3, int))
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


def test_half_precision_is_computed_in_float32():
    """float16 does not hold the floor of the sd."""
    mean = jnp.array([[1.0], [2.0], [3.0]], jnp.float16)
    value, gradient = value_and_gradient(mean, 0 * mean, jnp.zeros(3, int))
    assert value.dtype == jnp.float32
    assert value == pytest.approx(np.log(3), abs=1e-5)
    np.testing.assert_allclose(gradient, 0)


def test_blocks_are_the_whole(monkeypatch):
    args = case()
    monkeypatch.setattr(rows, "BLOCKED_ABOVE", 15)
    monkeypatch.setattr(rows, "PAIRS_AT_ONCE", 50)  # three samples a block, one in the last
    for blocked, expected in zip(with_gradient()(*args), whole(*args), strict=True):
        np.testing.assert_allclose(blocked, expected, rtol=1e-4, atol=1e-5)


def test_eight_shards_are_one():
    shard = jax.shard_map(
        functools.partial(values, axis_name="data"),
        mesh=make_mesh({"data": 8}),
        in_specs=P("data"),
        out_specs=P(),
    )
    args = case()
    for sharded, expected in zip(with_gradient(shard)(*args), whole(*args), strict=True):
        np.testing.assert_allclose(sharded, expected, rtol=1e-4, atol=1e-5)


def test_log_density():
    z, mean, sd, _ = case()
    found = normal_log_density(z, mean, sd)
    np.testing.assert_allclose(found, stats.norm.logpdf(z, mean, sd).sum(axis=1), rtol=1e-5)
