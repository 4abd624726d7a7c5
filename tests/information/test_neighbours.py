"""Nearest neighbours and kernels: closed forms, float64 references, invariances, bad samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.spatial.distance import cdist
from scipy.special import digamma, gammaln

from rlib import information
from rlib.information import neighbours
from rlib.parallel import make_mesh

#: Most tests use pairs of this many samples of two coordinates: one program an estimator.
N, CLASSES = 1504, 6


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def measured(x, y, estimator):
    return float(information.mutual_information(x, y, estimator=estimator))


def measured_label(x, labels, estimator):
    found = information.mutual_information(x, labels, estimator=estimator, num_classes=CLASSES)
    return float(found)


def gaussian_pair(mi, d=2, n=N, seed=0):
    rho = np.sqrt(1 - np.exp(-2 * mi / d))
    x, z = normal((2, n, d), seed)
    return x, rho * x + np.exp(-mi / d) * z


def clusters():
    labels = np.arange(N) % 4
    centres = 100 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    return centres[labels] + normal((N, 2)), labels


# Distances


@pytest.mark.parametrize(("n", "d", "k"), [(2, 1, 1), (7, 3, 6), (700, 2, 1), (700, 70, 5)])
@pytest.mark.parametrize("metric", ["euclidean", "maximum"])
def test_distances_are_those_of_all_pairs(n, d, k, metric):
    x = normal((n, d))
    far = cdist(np.float64(x), np.float64(x), "chebyshev" if metric == "maximum" else metric)
    np.fill_diagonal(far, np.inf)
    found = information.knn_distances(x, k, metric=metric)
    np.testing.assert_allclose(found, np.sort(far, axis=1)[:, :k], rtol=1e-5)


def test_neighbours_of_the_own_label_alone():
    x, labels = np.array([0.0, 1, 2, 10, 11]), np.array([0, 1, 0, 1, 2])
    found = information.knn_distances(x, 2, labels=labels)
    np.testing.assert_array_equal(found[:, 0], [2, 9, 2, 9, np.inf])
    assert np.isinf(found[:, 1]).all()


def test_near_neighbours_far_from_the_origin_keep_their_precision():
    x = 1000 + np.arange(4.0) / 64
    np.testing.assert_array_equal(information.knn_distances(x, 1)[:, 0], 1 / 64)


def test_many_samples_need_no_matrix_of_all_pairs():
    x = jax.ShapeDtypeStruct((50_000, 4), jnp.float32)
    for estimator in ("wkl", "ksg"):
        f = jax.jit(lambda x, y, e=estimator: information.mutual_information(x, y, estimator=e))
        memory = f.lower(x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 64e6  # the matrix has 10e9


# Weights and entropy


def test_weights_of_the_specification():
    for d, expected in {
        5: (1.540590, 0.669625, 0.059949, -0.427792, -0.842371),
        8: (9.854, -7.669, -7.230, -1.205, 7.250),
    }.items():
        np.testing.assert_allclose(information.kl_weights(5, d), expected, atol=6e-4)
    sums = [np.abs(information.kl_weights(5, d)).sum() for d in (8, 12)]
    np.testing.assert_allclose(sums, [33.2, 755.3], atol=0.05)


@pytest.mark.parametrize(("k", "d"), [(5, 5), (5, 16), (8, 8), (24, 12), (19, 19)])
def test_weights_meet_their_equations(k, d):
    weights, j = information.kl_weights(k, d), np.arange(1, k + 1)
    assert weights.sum() == pytest.approx(1, abs=1e-8)
    for order in range(1, d // 4 + 1):
        terms = np.exp(gammaln(j + 2 * order / d) - gammaln(j))
        scale = np.linalg.norm(terms) * np.abs(weights).sum()
        assert (weights * terms).sum() / scale == pytest.approx(0, abs=1e-8)
    assert set(np.flatnonzero(weights) + 1) <= {i * k // d for i in range(1, d + 1)}


def test_without_a_solution_the_first_neighbour_serves():
    for k, d in ((5, 17), (5, 4), (1, 12), (5, 0)):
        np.testing.assert_array_equal(information.kl_weights(k, d), np.eye(k)[0])


def entropy_numpy(x, weights):
    n, d = x.shape
    far = cdist(x, x)
    np.fill_diagonal(far, np.inf)
    rho = np.sort(far, axis=1)[:, : len(weights)]
    j = np.arange(1, len(weights) + 1)
    ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    each = np.log(n - 1) - digamma(j) + ball + d * np.log(rho).mean(axis=0)
    return (weights * each).sum()


def test_the_entropy_of_three_points_by_hand():
    h = information.kl_entropy(jnp.array([[0.0], [1.0], [3.0]]), 1, whiten=False)
    assert float(h) == pytest.approx(2.1945591, abs=2e-6)


def test_entropy_against_the_equation():
    x = mixed()
    for weighted, weights in ((True, information.kl_weights(5, 6)), (False, np.eye(5)[4])):
        plain = information.kl_entropy(x, weighted=weighted, whiten=False)
        assert float(plain) == pytest.approx(entropy_numpy(x, weights), abs=5e-4)
    white = float(information.kl_entropy(x))
    assert white == pytest.approx(white_entropy_numpy(x, information.kl_weights(5, 6)), abs=5e-4)


def mixed():
    """All tests of entropy but one take samples of this shape."""
    return np.float64(normal((300, 6)) @ normal((6, 6), 1))


def white_entropy_numpy(x, weights=(1.0,)):
    covariance = np.atleast_2d(np.cov(x.T, bias=True))
    return entropy_numpy(whitened(x), weights) + 0.5 * np.linalg.slogdet(covariance)[1]


def whitened(x):
    """To unit variances, then by the symmetric root of the correlations."""
    x = np.float64(x) - np.float64(x).mean(axis=0)
    x /= x.std(axis=0)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def test_entropies_of_known_distributions():
    x = normal((5000, 2))
    uniform = np.random.default_rng(0).uniform(size=(5000, 1)).astype(np.float32)
    found = [float(information.kl_entropy(v)) for v in (x, uniform, -np.log(uniform))]
    # Three standard errors: of log rho pi / sqrt(6 N), of the surprise up to 1 / sqrt(N).
    error = 3 * np.sqrt((np.pi**2 / 6 + 1) / 5000)
    np.testing.assert_allclose(found, [np.log(2 * np.pi * np.e), 0, 1], atol=error)
    uniform[0] = uniform[1]  # two that agree by rounding do no harm
    assert float(information.kl_entropy(uniform)) == pytest.approx(found[1], abs=0.01)


def test_entropy_moves_by_the_log_determinant():
    x = normal((300, 6))
    base = float(information.kl_entropy(x))
    turn = np.eye(6, dtype=np.float32)
    turn[:3, :3] = [[1, 2, 0], [0, 3e-3, 1], [5, 0, 100]]
    shift = np.linalg.slogdet(turn)[1]
    assert float(information.kl_entropy(x @ turn)) - base == pytest.approx(shift, abs=2e-3)
    assert float(information.kl_entropy(x + 10)) == pytest.approx(base, abs=1e-4)
    scaled = information.kl_entropy(7 * x, whiten=False) - information.kl_entropy(x, whiten=False)
    assert float(scaled) == pytest.approx(6 * np.log(7), abs=1e-5)


def test_what_has_no_density_has_entropy_minus_infinity():
    x = normal((300, 6))
    for samples in (np.ones_like(x), np.c_[x[:, :5], x[:, :1]], np.r_[x[:150], x[:150]]):
        assert float(information.kl_entropy(samples)) == -np.inf


# Mutual information


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])  # wkl is kl in two dimensions
def test_gaussians_of_known_information(estimator):
    for mi in (0.0, 2.0):
        assert measured(*gaussian_pair(mi), estimator) == pytest.approx(mi, abs=0.12)


def test_wkl_against_the_equation():
    x, y = gaussian_pair(1.0, 3, 300)
    parts = [white_entropy_numpy(v, information.kl_weights(5, v.shape[1])) for v in (x, y)]
    joint = white_entropy_numpy(np.c_[x, y], information.kl_weights(5, 6))
    assert measured(x, y, "wkl") == pytest.approx(sum(parts) - joint, abs=1e-3)


def ksg_numpy(x, y, k):
    n = len(x)
    far = [cdist(v, v, "chebyshev") for v in (x, y)]
    joint = np.maximum(*far)
    np.fill_diagonal(joint, np.inf)
    reach = np.sort(joint, axis=1)[:, k - 1 : k]
    counts = [(f < reach).sum(axis=1) - 1 for f in far]  # without itself
    return digamma(k) + digamma(n) - sum(digamma(c + 1) for c in counts).mean()


def ross_numpy(x, labels, k):
    far = cdist(x, x, "chebyshev")
    np.fill_diagonal(far, np.inf)
    total = 0.0
    for row, label in zip(far, labels, strict=True):
        own = row[(labels == label) & np.isfinite(row)]
        reach = np.sort(own)[k - 1]
        total += digamma(len(own) + 1) + digamma((row <= reach).sum())
    return digamma(k) + digamma(len(x)) - total / len(x)


def test_ksg_against_the_equation():
    x, y = gaussian_pair(1.0)
    expected = ksg_numpy(whitened(x), whitened(y), 5)
    assert measured(x, y, "ksg") == pytest.approx(expected, abs=1e-5)
    labels = (x[:, 0] + y[:, 1] > 0).astype(int) + (x[:, 1] > 1)
    expected = ross_numpy(whitened(x), labels, 5)
    assert measured_label(x, labels, "ksg") == pytest.approx(expected, abs=1e-5)


def test_kernels_against_the_equation():
    x = np.float64(whitened(normal((200, 2))))
    far, grid = cdist(x, x), np.linspace(0.5, 1.06, 57) / 200**0.1
    np.fill_diagonal(far, np.inf)

    def entropy(b):
        kernels = np.exp(-np.square(far) / (2 * b * b)) / (2 * np.pi * b * b)
        return -np.log(kernels.sum(axis=1) / 199).mean()

    @jax.jit
    def found(x):
        samples = neighbours._whiten(x)
        entropies = neighbours._kernel_entropies(samples, jnp.float32(grid[::28]), None)
        return entropies[:, 0], neighbours._bandwidth(samples, jnp.ones(()), 200, None)

    expected = np.array([entropy(b) for b in grid])
    entropies, best = found(jnp.float32(x))
    np.testing.assert_allclose(entropies, expected[::28], atol=1e-4)
    assert float(best) == pytest.approx(grid[np.argmin(expected)], rel=0.02)


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])
def test_far_clusters_tell_their_label(estimator):
    x, labels = clusters()  # two of the six classes are empty
    assert measured_label(x, labels, estimator) == pytest.approx(np.log(4), abs=0.02)
    constant = np.ones_like(x)
    assert measured_label(constant, labels, estimator) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("estimator", ["kl", "kde"])
def test_linear_maps_of_each_side_change_nothing(estimator):
    x, y = gaussian_pair(1.0)
    labels = (x[:, 0] > 0).astype(int)
    maps = normal((2, 2, 2), 5) * np.array([1e-3, 10], np.float32)
    before, after = (measured(*p, estimator) for p in ((x, y), (x @ maps[0] + 3, y @ maps[1])))
    assert before == pytest.approx(after, abs=5e-3)
    before, after = (measured_label(v, labels, estimator) for v in (x, x @ maps[0]))
    assert before == pytest.approx(after, abs=5e-3)


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])
def test_directions_without_width_are_left_out(estimator):
    x, y = gaussian_pair(1.0)
    wide = [np.c_[x[:, 0], np.full(N, 5, np.float32)]]
    if estimator != "ksg":  # which depends on the axes' directions
        wide.append(np.c_[x[:, 0], -3 * x[:, 0]])
    one = x[:, :1]
    expected = {
        "kl": lambda: sum(map(white_entropy_numpy, (one, y))) - white_entropy_numpy(np.c_[one, y]),
        "ksg": lambda: ksg_numpy(whitened(one), whitened(y), 5),
        "kde": lambda: measured(one, y, "kde"),
    }[estimator]()
    for v in wide:
        assert measured(v, y, estimator) == pytest.approx(expected, abs=2e-3)
    constant = np.full((N, 2), 0.1, np.float32)
    assert measured(x, constant, estimator) == pytest.approx(0, abs=0.01)
    assert measured(constant, constant, estimator) == 0


@pytest.mark.parametrize("estimator", ["kl", "kde"])
def test_a_linear_function_holds_infinitely_much(estimator):
    x, y = gaussian_pair(1.0)
    assert measured(x, np.c_[x[:, 0] + 1, y[:, 1]], estimator) == np.inf


def test_ksg_saturates_where_neighbours_do_not():
    pair = gaussian_pair(8.0)
    assert measured(*pair, "kl") == pytest.approx(8, abs=0.15)
    assert measured(*pair, "ksg") < 6.5


def test_samples_that_coincide_are_told():
    x, y = gaussian_pair(1.0)
    labels = np.arange(N) % 4
    double = [np.repeat(v[: N // 2], 2, axis=0) for v in (x, y)]
    with pytest.raises(ValueError, match="coincide"):
        measured(*double, "kl")
    assert np.isnan(jax.jit(information.mutual_information)(*double))
    ranks = [information.gaussianise(v, key=jax.random.key(0)) for v in double]
    assert np.isfinite(measured(*ranks, "kl"))
    whole = [np.round(v) for v in (x, y)]  # more than k samples a place
    for estimator in ("kl", "ksg"):
        with pytest.raises(ValueError, match="coincide"):
            measured(*whole, estimator)
        with pytest.raises(ValueError, match="coincide"):
            measured_label(whole[0], labels, estimator)


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])
def test_samples_that_are_not_finite_are_told(estimator):
    x, y = gaussian_pair(1.0)
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[3, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            measured(broken, y, estimator)
        with pytest.raises(ValueError, match="not finite"):
            measured_label(broken, np.arange(N) % 4, estimator)


def test_ranks_distances_and_entropies_are_of_finite_samples():
    broken = normal((20, 1))
    broken[3] = np.nan
    for f in (information.gaussianise, information.kl_entropy):
        with pytest.raises(ValueError, match="not finite"):
            f(broken)
    with pytest.raises(ValueError, match="not finite"):
        information.knn_distances(broken, 1)
    inside = jax.jit(information.gaussianise)(broken)
    assert np.isnan(inside[3, 0]) and np.isfinite(np.delete(inside, 3)).all()


@pytest.mark.parametrize("estimator", ["kl", "ksg"])
def test_a_class_of_too_few_is_told(estimator):
    labels = np.arange(N) // (N - 2)  # two samples of class 1
    with pytest.raises(ValueError, match="too few"):
        measured_label(gaussian_pair(1.0)[0], labels, estimator)


def test_wrong_arguments_are_refused():
    x = normal((5, 2))
    information_of = information.mutual_information
    for f, match in (
        (lambda: information_of(x, x, k=5), "k=5 neighbours of 5"),
        (lambda: information.kl_entropy(x, 5), "k=5 neighbours of 5"),
        (lambda: information.knn_distances(x, 0), "k=0"),
        (lambda: information.knn_distances(x, 1, metric="manhattan"), "choose from"),
        (lambda: information.knn_distances(x, 1, labels=np.arange(4)), "one a row"),
        (lambda: information_of(x, x[:4]), "do not make pairs"),
        (lambda: information_of(x, x, estimator="kraskov"), "choose from kl"),
        (lambda: information_of(x, np.arange(5), num_classes=4), "outside 0"),
        (lambda: information_of(x, x, num_classes=4), "one integer a row"),
        (lambda: information_of(x[None], x), "is needed"),
    ):
        with pytest.raises(ValueError, match=match):
            f()


# Ranks and devices


def test_ranks_become_normal_quantiles():
    x = np.array([[3.0, 0], [1, 0], [2, 0]], np.float32)
    found = information.gaussianise(x)
    np.testing.assert_allclose(found[:, 0], [0.967422, -0.967422, 0], atol=1e-5)
    np.testing.assert_allclose(found[:, 1], [-0.967422, 0, 0.967422], atol=1e-5)  # by order
    drawn = [information.gaussianise(x, key=jax.random.key(s)) for s in range(6)]
    np.testing.assert_array_equal(np.sort(drawn[0][:, 1]), np.sort(found[:, 1]))
    assert len({tuple(d[:, 1].tolist()) for d in drawn}) > 1
    for d in drawn:
        np.testing.assert_array_equal(d[:, 0], found[:, 0])


def test_eight_devices_give_what_one_gives():
    x, y = gaussian_pair(1.0)
    labels = (x[:, 0] > 0).astype(np.int32)

    def measure(x, y, labels, axis_name=None):
        of = functools.partial(information.mutual_information, axis_name=axis_name)
        scalars = {e: of(x, y, estimator=e) for e in ("ksg", "kde")}
        scalars |= {
            f"{e} y": of(x, labels, estimator=e, num_classes=CLASSES) for e in ("kl", "ksg")
        }
        near = information.knn_distances(x, 3, labels=labels, axis_name=axis_name)
        return scalars, (near, information.gaussianise(x, axis_name=axis_name))

    sharded = jax.shard_map(
        functools.partial(measure, axis_name="data"),
        mesh=make_mesh({"data": 8}),
        in_specs=P("data"),
        out_specs=(P(), P("data")),
    )
    one, eight = measure(x, y, labels), jax.jit(sharded)(x, y, labels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), one, eight)
