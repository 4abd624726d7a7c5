"""Kernel estimators: hand cases, closed forms, float64 sums over pairs, blocks, eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlib.information import kernels
from rlib.parallel import make_mesh

CONDITIONAL = kernels.conditional_cs_divergence
INFORMATION = kernels.cs_mutual_information


def column(*values):
    return np.array(values, np.float64)[:, None]


@pytest.fixture(scope="module")
def draws():
    draw = np.random.default_rng(0)
    x, y, t = (draw.normal(size=(48, d)) for d in (6, 2, 5))
    return x, y, y + 0.5 * draw.normal(size=y.shape), t


def gram(a, b, sigma):
    """exp(-|a - b|^2 / 2 sigma^2) by differences, in float64."""
    return np.exp(-np.square(a[:, None] - b[None]).sum(axis=-1) / (2 * sigma**2))


# The equations, summed over all pairs in float64


def divergence_numpy(p, q, s):
    pp, qq, pq = gram(p, p, s), gram(q, q, s), gram(p, q, s)
    return np.log(pp.mean()) + np.log(qq.mean()) - 2 * np.log(pq.mean())


def mmd_numpy(p, q, s):
    return gram(p, p, s).mean() + gram(q, q, s).mean() - 2 * gram(p, q, s).mean()


def conditional_numpy(x, y, yhat, sx, sy, square_of_sum=False):
    k = gram(x, x, sx)
    below = k.sum(axis=1) ** 2 if square_of_sum else (k**2).sum(axis=1)
    total = lambda other: ((k * other).sum(axis=1) / below).sum()
    within = np.log(total(gram(y, y, sy))) + np.log(total(gram(yhat, yhat, sy)))
    return within - 2 * np.log(total(gram(yhat, y, sy)))


def information_numpy(x, t, sx, st):
    k, q, n = gram(x, x, sx), gram(t, t, st), len(x)
    one = np.ones(n)
    joint, apart = np.trace(k @ q) / n**2, (one @ k @ one) * (one @ q @ one) / n**4
    return np.log(joint) + np.log(apart) - 2 * np.log(one @ k @ q @ one / n**3)


def hsic_numpy(x, t, sx, st):
    h = np.eye(len(x)) - 1 / len(x)
    return np.trace(gram(x, x, sx) @ h @ gram(t, t, st) @ h) / len(x) ** 2


def entropy_numpy(matrix, alpha):
    w = np.linalg.eigvalsh(matrix / np.trace(matrix))
    w = w[w > 1e-12]
    return -np.sum(w * np.log(w)) if alpha == 1 else np.log(np.sum(w**alpha)) / (1 - alpha)


def renyi_numpy(x, t, sx, st, alpha):
    a, b = gram(x, x, sx), gram(t, t, st)
    return entropy_numpy(a, alpha) + entropy_numpy(b, alpha) - entropy_numpy(a * b, alpha)


def all_values(x, y, yhat, t, **how):
    """Every estimator once."""
    return {
        "cs": kernels.cs_divergence(x[:, :5], t, 1.5, **how),
        "mmd": kernels.mmd(x[:, :5], t, 1.5, **how),
        "conditional": CONDITIONAL(x, y, yhat, 2.0, 0.7, **how),
        "square": CONDITIONAL(x, y, yhat, 2.0, 0.7, denominator="square_of_sum", **how),
        "information": INFORMATION(x, t, 2.0, 1.7, **how),
        "normalized": INFORMATION(x, t, 2.0, 1.7, normalized=True, **how),
        "hsic": kernels.hsic(x, t, 2.0, 1.7, **how),
        "alignment": kernels.hsic(x, t, 2.0, 1.7, normalized=True, **how),
        "entropy": kernels.renyi_entropy(x, 2.0, **how),
        "renyi": kernels.renyi_mutual_information(x, t, 2.0, 1.7, **how),
    }


def all_numpy(x, y, yhat, t):
    own_i = information_numpy(x, x, 2.0, 2.0) * information_numpy(t, t, 1.7, 1.7)
    own_h = hsic_numpy(x, x, 2.0, 2.0) * hsic_numpy(t, t, 1.7, 1.7)
    return {
        "cs": divergence_numpy(x[:, :5], t, 1.5),
        "mmd": mmd_numpy(x[:, :5], t, 1.5),
        "conditional": conditional_numpy(x, y, yhat, 2.0, 0.7),
        "square": conditional_numpy(x, y, yhat, 2.0, 0.7, square_of_sum=True),
        "information": information_numpy(x, t, 2.0, 1.7),
        "normalized": information_numpy(x, t, 2.0, 1.7) / np.sqrt(own_i),
        "hsic": hsic_numpy(x, t, 2.0, 1.7),
        "alignment": hsic_numpy(x, t, 2.0, 1.7) / np.sqrt(own_h),
        "entropy": entropy_numpy(gram(x, x, 2.0), 2),
        "renyi": renyi_numpy(x, t, 2.0, 1.7, 2),
    }


def some(values):
    """One estimator of each kind of sums; the others are made of the same."""
    return values["cs"] + values["conditional"] + values["normalized"]


def with_all_values(*draws):
    values = all_values(*draws)
    return some(values), values


EVERY = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def single():
    """(sum of some, all values), gradients; for float32 samples of one shape."""
    return jax.jit(jax.value_and_grad(with_all_values, EVERY, has_aux=True))


def test_values_and_gradients_in_float64(draws):
    """Values are the equations', gradients those of finite differences; in blocks the same."""
    with jax.enable_x64(True):
        draws = [jnp.asarray(part) for part in draws]
        whole = jax.jit(jax.value_and_grad(with_all_values, EVERY, has_aux=True))
        (_, values), gradients = whole(*draws)
        for name, expected in all_numpy(*map(np.asarray, draws)).items():
            assert values[name].dtype == np.float64
            np.testing.assert_allclose(values[name], expected, rtol=1e-11, err_msg=name)
        for i, gradient in enumerate(gradients):
            towards = np.random.default_rng(i).normal(size=gradient.shape)
            moved = [[*draws[:i], draws[i] + h * towards, *draws[i + 1 :]] for h in (1e-5, -1e-5)]
            slope = (whole(*moved[0])[0][0] - whole(*moved[1])[0][0]) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * towards), slope, rtol=1e-7)
        # 48 rows: a shorter last block
        conditional = lambda yhat: CONDITIONAL(*draws[:2], yhat, 2.0, 0.7, block=20)
        value, gradient = jax.jit(jax.value_and_grad(conditional))(draws[2])
        assert value == pytest.approx(float(values["conditional"]), rel=1e-12)
        np.testing.assert_allclose(gradient, gradients[2], rtol=1e-9, atol=1e-13)


def test_float32_far_from_the_origin(draws, single):
    """Distances are those between the samples, however far the samples are from 0."""
    (_, found), _ = single(*(np.float32(part + 100) for part in draws))
    for name, expected in all_numpy(*draws).items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-6, err_msg=name)


# The specification's hand cases and closed forms


def test_hand_cases_of_two_and_three_samples():
    with jax.enable_x64(True):
        x, y, flat = column(0, 1, 2), column(0, 1, 0), column(0.5, 0.5, 0.5)
        two = column(0, 1)
        a = np.exp(-0.5)
        exact = 2 * np.log((1 + a**2) / (2 * a))
        assert CONDITIONAL(two, two, two[::-1], 1, 1) == pytest.approx(exact, rel=1e-12)
        assert exact == pytest.approx(0.2402290, abs=5e-8)
        cases = {
            0.0582549: INFORMATION(two, two, 1, 1),
            0.0714882: CONDITIONAL(x, y, flat, 1, 1),
            0.3851942: CONDITIONAL(column(0, 1, 3), y, column(0, 0, 1), 1, 1),
            0.3827021: CONDITIONAL(column(0, 1, 3), column(0, 0, 1), y, 1, 1),
            0.0264232: INFORMATION(x, y, 1, 1),
            1.2128951: INFORMATION(column(0, 0, 10), column(0, 0, 0.1), 1, 1, normalized=True),
            # not always a cosine
            -0.0064702: CONDITIONAL(
                column(1.3, 0, 0.1), column(2.3, 0.2, 1.5), column(2.2, 1.4, 0.1), 1, 1
            ),
        }
        for expected, found in cases.items():
            assert found == pytest.approx(expected, abs=6e-8)
        unequal = (x, column(2, 5), 1.5)
        assert kernels.cs_divergence(*unequal) == pytest.approx(divergence_numpy(*unequal))
        assert kernels.mmd(*unequal) == pytest.approx(mmd_numpy(*unequal))
        assert CONDITIONAL(x, y, y, 1, 1) == pytest.approx(0, abs=1e-15)
        assert INFORMATION(x, flat, 1, 1) == pytest.approx(0, abs=1e-15)
        assert INFORMATION(x, x, 1, 1, normalized=True) == pytest.approx(1)


def test_invariances(draws):
    x, _, _, t = draws
    order = np.random.default_rng(1).permutation(len(x))
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    with jax.enable_x64(True):
        value = INFORMATION(x, t, 2.0, 1.7, normalized=True)
        for moved in ((x[order], t[order]), (x @ turn + 3, t - 5)):
            found = INFORMATION(*moved, 2.0, 1.7, normalized=True)
            assert found == pytest.approx(float(value), rel=1e-10)
        swapped = INFORMATION(t, x, 1.7, 2.0, normalized=True)
        assert swapped == pytest.approx(float(value), rel=1e-12)


def test_gaussians_tend_to_the_closed_forms():
    """Divergence d^2 / (2 v + s^2) = 0.4444; information of correlation 0.8: 0.2171 at s = 0.5."""
    draw, s, rho = np.random.default_rng(0), 0.5, 0.8
    a, b, z = draw.normal(size=(3, 4000, 1))
    divergence = jax.jit(lambda a, b: kernels.cs_divergence(a, b, s))(a, b + 1)
    assert divergence == pytest.approx(1 / (2 + s**2), rel=0.1)
    r2 = (rho / (1 + s**2 / 2)) ** 2
    exact = -np.log(1 - r2) / 2 + np.log(1 - r2 / 4)
    assert exact == pytest.approx(0.2171298, abs=1e-7)
    dependent = rho * a + np.sqrt(1 - rho**2) * z
    found = jax.jit(lambda x, t: INFORMATION(x, t, s, s))(a, dependent)
    assert found == pytest.approx(exact, rel=0.05)


def test_limits_of_the_widths(draws):
    x, y, yhat, t = draws
    n = len(x)
    with jax.enable_x64(True):
        assert CONDITIONAL(x, y, yhat, 1e6, 1e6) == pytest.approx(0, abs=1e-10)
        assert INFORMATION(x, t, 1e6, 1e6) == pytest.approx(0, abs=1e-10)
        # all x alike: the marginal divergence
        marginal = divergence_numpy(y, yhat, 0.7)
        assert CONDITIONAL(x, y, yhat, 1e6, 0.7) == pytest.approx(marginal, rel=1e-8)
        # no two x alike: a pointwise (correntropy) loss
        pointwise = np.exp(-np.square(y - yhat).sum(axis=1) / (2 * 0.7**2)).sum()
        expected = 2 * np.log(n) - 2 * np.log(pointwise)
        assert CONDITIONAL(x, y, yhat, 1e-3, 0.7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 3.0])
def test_renyi_of_any_order_from_eigenvalues(draws, alpha):
    x, _, _, t = draws
    with jax.enable_x64(True):
        found = kernels.renyi_mutual_information(x, t, 2.0, 1.7, alpha=alpha)
        assert found == pytest.approx(renyi_numpy(x, t, 2.0, 1.7, alpha), rel=1e-9)
        gradient = jax.grad(lambda x: kernels.renyi_entropy(x, 2.0, alpha=alpha))(jnp.asarray(x))
    assert np.isfinite(gradient).all()


def test_the_median_distance_ignores_equal_samples():
    assert kernels.median_distance(column(0, 1, 3, 7)) == pytest.approx(3.5)  # 1 2 3 4 6 7
    many = np.concatenate([np.zeros((60, 1)), np.ones((40, 1))])
    assert kernels.median_distance(many) == 1
    assert kernels.median_distance(np.ones((60, 50))) == 1
    assert kernels.median_distance(np.ones((1, 3))) == 1
    # equal rows of many features: what cancellation leaves of their distance is no distance
    draw = np.random.default_rng(0).normal(size=(3, 50)) + 10
    apart = np.sort(np.sqrt(np.square(draw[:, None] - draw).sum(axis=-1))[np.triu_indices(3, 1)])
    assert kernels.median_distance(np.repeat(draw, 20, axis=0)) == pytest.approx(apart[1], rel=1e-4)
    normal = np.random.default_rng(1).normal(size=(298, 50))
    thinned = normal[::5]  # 60 of them
    distances = np.sqrt(np.square(thinned[:, None] - thinned).sum(axis=-1))
    expected = np.median(distances[np.triu_indices(60, 1)])
    assert kernels.median_distance(normal, most=60) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(kernels.median_distance)(jnp.float32(column(0, 1, 3, 7)))
    assert not gradient.any()


# Degenerate samples


def test_finite_samples_give_finite_values_and_gradients(draws, single):
    x, y, _, t = (np.float32(part) for part in draws)
    flat = [np.ones_like(part) for part in (x, y, t)]
    cases = (flat, (x, *flat[1:]), (flat[0], y, t), (x, 1e6 * y, 1e6 * t))
    for i, (a, b, c) in enumerate(cases):
        (_, values), gradients = single(a, b, -b, c)
        for name, value in values.items():
            assert np.isfinite(value), (i, name)
        assert all(np.isfinite(g).all() for g in gradients)
        if i < 3:  # x or t is constant
            assert values["normalized"] == values["alignment"] == 0


def test_traced_nan_comes_out_as_nan(draws, single):
    """In few features and in many: no estimate may look like one of clean samples."""
    uses = {"x": "cs mmd conditional square information normalized hsic alignment entropy renyi",
            "y": "conditional square", "yhat": "conditional square",
            "t": "information normalized hsic alignment renyi"}  # fmt: skip
    for i, (name, uses_it) in enumerate(uses.items()):
        parts = [np.float32(part) for part in draws]
        parts[i] = np.where(np.arange(parts[i].size).reshape(parts[i].shape) == 7, np.nan, parts[i])
        (_, values), _ = single(*parts)
        assert all(np.isnan(values[use]) for use in uses_it.split()), name
    several = jax.jit(lambda x: (kernels.median_distance(x),
                                 kernels.renyi_entropy(x, 1.0, alpha=0.5)))  # fmt: skip
    for d in (2, 6):
        assert np.isnan(several(np.full((4, d), np.nan))).all()


def test_far_samples_keep_their_divergence():
    """Every kernel between them is 0 in floating point; -2 log of the largest is not."""
    x = column(0)
    assert kernels.cs_divergence(x, x + 1e3, 1.0) == pytest.approx(1e6)
    gradient = jax.grad(lambda y: CONDITIONAL(x, x, y, 1.0, 1.0))(jnp.float32(x + 1e3))
    assert gradient == pytest.approx(2e3)


def test_a_batch_of_one():
    x, t = column(1), column(3)
    assert CONDITIONAL(x, x, t, 1.0, 2.0) == pytest.approx(4 / 4)
    assert INFORMATION(x, t, 1.0, 1.0) == 0
    assert INFORMATION(x, t, 1.0, 1.0, normalized=True) == 0
    assert kernels.hsic(x, t, 1.0, 1.0) == 0
    assert kernels.renyi_entropy(x, 1.0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: CONDITIONAL(x, x[:, 0], x[:, 0], 1, 1), r"y is \(samples, features\).*y\[:, N"),
        (lambda x: kernels.cs_divergence(x[:, 0], x, 1), "one sample or 4 of them"),
        (lambda x: kernels.cs_divergence(x, x[:, :1], 1), "of 2 and of 1 features"),
        (lambda x: INFORMATION(x, x[:3], 1, 1), "4 and 3 rows"),
        (lambda x: kernels.hsic(x * np.nan, x, 1, 1), "x holds NaN"),
        (lambda x: kernels.mmd(x, x / 0.0, 1), "xq holds NaN or inf"),
        (lambda x: kernels.renyi_entropy(x[:0], 1), "x is empty"),
        (lambda x: kernels.median_distance(x, most=1), "most=1"),
        (lambda x: kernels.renyi_entropy(x, 0), "sigma=0: a positive"),
        (lambda x: kernels.renyi_entropy(x, 1e-20), "sigma=1e-20: a positive"),
        (lambda x: kernels.renyi_entropy(x + 1e200, 1), "as float32"),
        (lambda x: kernels.renyi_entropy(x, 1, alpha=-1), "alpha=-1"),
        (lambda x: kernels.renyi_entropy(x, 1, alpha=3, axis_name="data"), "use alpha=2"),
        (lambda x: kernels.cs_divergence(x, x, 1, block=0), "block=0"),
        (lambda x: CONDITIONAL(x, x, x, 1, 1, denominator="sum"), "sum_of_squares"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(8.0).reshape(4, 2))


# Size and sharding


def test_memory_of_twenty_thousand_samples():
    """Compiled, not run: temporary memory is under 200 MB, where one Gram matrix has 1600."""
    f = jax.value_and_grad(lambda a, b: kernels.cs_divergence(a, b, 2.0))
    part = jax.ShapeDtypeStruct((20_000, 10), jnp.float32)
    usual = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    compiled = jax.jit(f).lower(part, part).compile(compiler_options=usual)
    assert compiled.memory_analysis().temp_size_in_bytes < 200e6


def test_eight_devices_equal_one(draws, single):
    """Gradients inside shard_map, in blocks; tests/information/test_cs_ib.py takes one outside."""
    draws = [np.float32(part) for part in draws]
    parts = lambda *draws: some(all_values(*draws, axis_name="data", block=3))
    shard = functools.partial(jax.shard_map, mesh=make_mesh({"data": 8}), in_specs=P("data"))
    inside = shard(jax.value_and_grad(parts, EVERY), out_specs=(P(), P("data")))
    found, split = jax.jit(inside)(*draws)
    (value, _), gradients = single(*draws)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(split, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_vmapped_axis_equals_one(draws):
    """Estimators that the test above leaves out."""

    def others(*draws, **how):
        values = all_values(*draws, **how)
        return [values[name] for name in ("mmd", "alignment", "renyi")]

    draws = [np.float32(part) for part in draws]
    parts = functools.partial(others, axis_name="data", block=4)
    split = [part.reshape(8, 6, -1) for part in draws]
    found = jax.jit(jax.vmap(parts, axis_name="data"))(*split)
    np.testing.assert_allclose(
        found, np.stack([np.full(8, one) for one in jax.jit(others)(*draws)]), rtol=1e-4
    )
