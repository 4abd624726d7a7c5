"""CS-IB's objective: its terms, the official script's bug, gradients, rivals, eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy import integrate, stats

from rlib import information
from rlib.parallel import make_mesh


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    x, t = draw.normal(size=(16, 5)), draw.normal(size=(16, 3))
    y = draw.normal(size=(16, 1))
    return x, y, y + 0.3 * draw.normal(size=y.shape), t


def official_divergence(x, y, yhat, sigma=1.0):
    """D_CS in bits as the script computes it: distances are sums over all axes but the last two
    of (batch, batch, features) for matrices, and for vectors over the batch itself."""

    def kernel(a, b):
        if a.ndim == 1:  # one "sample" of len(a) features against itself
            return np.full((len(a), len(a)), np.exp(-np.square(a - b).sum() / (2 * sigma**2)))
        return np.exp(-np.square(a[:, None] - b[None]).sum(axis=-1) / (2 * sigma**2))

    k = kernel(x, x)
    total = lambda other: ((k * other).sum(axis=1) / (k**2).sum(axis=1)).sum()
    within = np.log2(total(kernel(y, y))) + np.log2(total(kernel(yhat, yhat)))
    return within - 2 * np.log2(total(kernel(yhat, y)))


def test_the_official_variant_is_what_vectors_do_to_the_script(batch):
    x, y, yhat, _ = batch
    with jax.enable_x64(True):
        official = functools.partial(information.cs_ib_loss, *batch)
        loss, terms = official(0.5, variant="official")
        assert terms.prediction == pytest.approx(official_divergence(x, y[:, 0], yhat[:, 0]))
        squares = np.square(y - yhat).sum()
        assert terms.prediction == pytest.approx(squares / np.log(2), rel=1e-12)
        assert loss == pytest.approx(float(terms.prediction + 0.5 * terms.compression))
        _, intended = official(0.5)
        bits = official_divergence(x, y, yhat)
        assert intended.prediction == pytest.approx(bits * np.log(2), rel=1e-10)
        assert intended.compression == terms.compression
        wide = official(0.0, variant="official", sigma_y=2.0)[0]
        assert wide == pytest.approx(squares / 4 / np.log(2))


def test_terms_and_widths(batch):
    x, _, _, t = batch
    with jax.enable_x64(True):
        width_x, width_t = (information.median_distance(v) for v in (x, t))
        median = functools.partial(
            information.cs_ib_loss, *batch, sigma_x="median", sigma_t="median"
        )
        loss, terms = median(0.3)
        given = information.cs_ib_loss(*batch, 0.3, sigma_x=width_x, sigma_t=width_t)
        assert loss == given[0]
        expected = information.cs_mutual_information(x, t, width_x, width_t, normalized=True)
        assert terms.compression == pytest.approx(float(expected))
        assert loss == pytest.approx(float(terms.prediction + 0.3 * expected))
        alone, off = median(0.0)
        assert alone == terms.prediction and off.compression == 0
        plain = median(0.3, normalized=False)[1].compression
        assert plain == pytest.approx(
            float(information.cs_mutual_information(x, t, width_x, width_t))
        )


def network_and_batch(stochastic=False):
    network = information.CSIBRegressor(
        5, 1, hidden=6, latent=3, stochastic=stochastic, rngs=nnx.Rngs(0)
    )
    return nnx.split(network, nnx.Param, ...)


def penalties(x, y, out):
    """Each rival's penalty and error, and ours."""
    return {
        "cs-ib": information.cs_ib_loss(
            x, y, out.prediction, out.code, 0.1, sigma_x=2.0, sigma_t=1.0
        )[0],
        "huber": information.huber_error(y, out.prediction, 0.5),
        "mse": information.squared_error(y, out.prediction),
        "hsic": information.hsic_penalty(x, y, out.code, sigma_x=2.0, sigma_y=1.0, sigma_t=1.0),
        "vib": information.vib_rate(out.mean, out.deviation),
    }


def test_gradients_of_all_losses_by_finite_differences(batch):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(part) for part in batch[:2])
        graphdef, params, rest = network_and_batch(stochastic=True)
        flat, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda p: p.astype(jnp.float64), params)
        )

        def losses(flat):
            out = nnx.merge(graphdef, unravel(flat), rest)(x, key=jax.random.key(1))
            return sum(penalties(x, y, out).values())

        losses = jax.jit(jax.value_and_grad(losses))
        towards = np.random.default_rng(0).normal(size=flat.shape)
        sides = [losses(flat + h * towards)[0] for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(
            losses(flat)[1] @ towards, (sides[0] - sides[1]) / 2e-5, rtol=1e-5
        )


def test_the_gradient_redescends_where_the_squared_error_grows():
    """One label far off: its pull on the prediction fades."""
    x = y = jnp.linspace(-1, 1, 8)[:, None]

    def pull(far):
        moved = y.at[3].add(far)
        loss = lambda yhat: information.cs_ib_loss(x, moved, yhat, x, 0.0, sigma_x=0.5)[0]
        return abs(float(jax.grad(loss)(y)[3, 0]))

    assert pull(1.0) > 10 * pull(6.0)


def test_training_lowers_the_loss_and_the_compression():
    x = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    y = np.sin(x[:, :1]) + x[:, 1:2]
    graphdef, params, rest = network_and_batch()

    def run(beta):
        tx = optax.adam(1e-2)

        def loss(params):
            out = nnx.merge(graphdef, params, rest)(x)
            how = {"sigma_x": "median", "sigma_t": "median"}
            return information.cs_ib_loss(x, y, out.prediction, out.code, beta, **how)

        def step(carry, _):
            params, state = carry
            (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), (value, terms)

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[1]

    run = jax.jit(run)
    (values, terms), (penalised, squeezed) = run(0.0), run(1.0)
    assert values[0] == pytest.approx(float(terms.prediction[0]))  # beta 0, traced
    assert values[-1] < 0.5 * values[0]
    assert penalised[-1] < 0.5 * penalised[0]
    assert squeezed.compression[-1] < 0.8 * terms.compression[-1]


def test_eight_devices_equal_one():
    draw = np.random.default_rng(0)
    x, y, yhat, t = (jnp.asarray(draw.normal(size=(32, d)), jnp.float32) for d in (5, 1, 1, 3))

    def loss(*parts, axis_name=None):
        return information.cs_ib_loss(*parts, 0.5, sigma_x="median", axis_name=axis_name)[0]

    split = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=make_mesh({"data": 8}), in_specs=P("data"), out_specs=P(),
    )  # fmt: skip
    for f, g in zip(
        jax.jit(jax.value_and_grad(split, 2))(x, y, yhat, t),
        jax.jit(jax.value_and_grad(loss, 2))(x, y, yhat, t),
        strict=True,
    ):
        np.testing.assert_allclose(f, g, rtol=1e-4, atol=1e-6)


def test_degenerate_batches_have_finite_losses_and_gradients():
    constant = jnp.ones((6, 3))
    loss = lambda yhat, t: information.cs_ib_loss(
        constant, yhat * 0, yhat, t, 0.5, sigma_x="median", sigma_t="median"
    )[0]
    every = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for yhat, t in ((jnp.ones((6, 1)), constant), (1e5 * jnp.arange(6.0)[:, None], constant)):
        value, gradients = every(yhat, t)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradients)
    one = information.cs_ib_loss(*(jnp.ones((1, 2)),) * 4, 0.5)[0]
    assert one == 0


def test_traced_nan_is_never_hidden():
    """Also not in the codes of a penalty, whose kernels alone hold them."""
    x, t = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    loss = jax.jit(lambda t: information.cs_ib_loss(x, x[:, :1], x[:, :1], t, 0.5)[0])
    assert np.isfinite(loss(t))
    assert np.isnan(loss(np.where(t == t[2, 1], np.nan, t)))


# The network and the rivals


def test_the_encoder_samples_only_with_a_key():
    x = jnp.ones((4, 5))
    graphdef, params, rest = network_and_batch(stochastic=True)
    network = nnx.merge(graphdef, params, rest)
    plain, drawn = network(x), network(x, key=jax.random.key(0))
    np.testing.assert_array_equal(plain.code, plain.mean)
    assert not np.allclose(drawn.code, drawn.mean)
    assert float(drawn.deviation.min()) > 0
    np.testing.assert_allclose(
        (drawn.code - drawn.mean) / drawn.deviation, jax.random.normal(jax.random.key(0), (4, 3)),
        rtol=1e-4,
    )  # fmt: skip
    fixed = nnx.merge(*network_and_batch())(x, key=jax.random.key(0))
    np.testing.assert_array_equal(fixed.code, fixed.mean)
    assert not fixed.deviation.any()


def test_vib_rate_is_the_integral():
    m, s = 0.7, 0.4
    p, q = stats.norm(m, s), stats.norm(0, 1)
    exact = integrate.quad(lambda v: p.pdf(v) * (p.logpdf(v) - q.logpdf(v)), -4, 5)[0]
    found = information.vib_rate(jnp.full((3, 2), m), jnp.full((3, 2), s))
    assert found == pytest.approx(2 * exact, rel=1e-5)
    floored = information.vib_rate(jnp.zeros((3, 1)), jnp.zeros((3, 1)))
    assert floored == pytest.approx(-0.5 - np.log(1e-10), rel=1e-5)


def test_huber_is_quadratic_then_linear():
    y, yhat = jnp.zeros((3, 1)), jnp.array([[0.1], [-2.0], [5.0]])
    by_hand = (0.1**2 / 2 + 0.5 * (2 - 0.25) + 0.5 * (5 - 0.25)) / 3
    assert information.huber_error(y, yhat, 0.5) == pytest.approx(by_hand)
    wide = jax.jit(information.huber_error)(y, yhat, 100.0)
    assert wide == pytest.approx(float(information.squared_error(y, yhat)) / 2)


def test_hsic_penalty_is_the_difference(batch):
    x, y, _, t = batch
    with jax.enable_x64(True):
        width = information.median_distance
        parts = [information.hsic(v, t, width(v), width(t), normalized=True) for v in (x, y)]
        found = information.hsic_penalty(x, y, t, weight_y=0.5)
        assert found == pytest.approx(float(parts[0] - 0.5 * parts[1]), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: information.cs_ib_loss(x, y, y, x, 1.0, variant="sse"), "variant='sse'"),
        (lambda x, y: information.cs_ib_loss(x, y, y, x, -1.0), "beta=-1.0"),
        (lambda x, y: information.cs_ib_loss(x, y, y, x, float("nan")), "beta=nan"),
        (lambda x, y: information.cs_ib_loss(x, y, y, x, float("inf")), "beta=inf"),
        (
            lambda x, y: information.cs_ib_loss(x, y, y * np.nan, x, 0.0, variant="official"),
            "yhat holds NaN",
        ),
        (
            lambda x, y: information.cs_ib_loss(x, y, y, x, 0.0, variant="official", sigma_y=0.0),
            "sigma_y=0.0",
        ),
        (lambda x, y: information.huber_error(y, y, 0.0), "delta=0.0"),
        (lambda x, y: information.squared_error(y[:0], y[:0]), "not empty"),
        (lambda x, y: information.cs_ib_loss(x, y, y, x, 1.0, sigma_t="mean"), "sigma_t='mean'"),
        (lambda x, y: information.cs_ib_loss(x, y[:, 0], y[:, 0], x, 1.0), "y is .samples"),
        (lambda x, y: information.cs_ib_loss(x, x, x, x, 1.0, variant="official"), "one target"),
        (lambda x, y: information.squared_error(y, y[:, 0]), "all pairs"),
        (lambda x, y: information.vib_rate(x, x[:2]), "two matrices"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 2)), jnp.ones((4, 1)))
