"""Nearest neighbours and kernels: closed forms, float64 references, invariances, bad samples."""

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

pytestmark = pytest.mark.slow


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gaussian_pair(mi, d, n, seed=0):
    rho = np.sqrt(1 - np.exp(-2 * mi / d))
    x, z = normal((2, n, d), seed)
    return x, rho * x + np.exp(-mi / d) * z


def clusters(n=1000):
    labels = np.arange(n) % 4
    centres = 100 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    return centres[labels] + normal((n, 2)), labels


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
    d = 6
    x = np.float64(normal((300, d)) @ normal((d, d), 1))
    root = np.linalg.cholesky(np.linalg.inv(np.cov(x.T, bias=True)))
    shift = np.linalg.slogdet(root)[1]
    for weighted, weights in ((True, information.kl_weights(5, d)), (False, np.eye(5)[4])):
        plain = information.kl_entropy(x, 5, weighted=weighted, whiten=False)
        assert float(plain) == pytest.approx(entropy_numpy(x, weights), abs=5e-4)
    white = information.kl_entropy(x)
    expected = entropy_numpy(x @ root, information.kl_weights(5, d)) - shift
    assert float(white) == pytest.approx(expected, abs=5e-4)


def test_entropies_of_known_distributions():
    x = normal((5000, 2))
    uniform = np.random.default_rng(0).uniform(size=(5000, 1)).astype(np.float32)
    found = [float(information.kl_entropy(v)) for v in (x, uniform, -np.log(uniform))]
    # Three standard errors: of log rho pi / sqrt(6 N), of the surprise up to 1 / sqrt(N).
    error = 3 * np.sqrt((np.pi**2 / 6 + 1) / 5000)
    np.testing.assert_allclose(found, [np.log(2 * np.pi * np.e), 0, 1], atol=error)


def test_entropy_moves_by_the_log_determinant():
    x = normal((300, 3))
    base = float(information.kl_entropy(x))
    turn = np.array([[1, 2, 0], [0, 3e-3, 1], [5, 0, 100]], np.float32)
    shift = np.linalg.slogdet(turn)[1]
    assert float(information.kl_entropy(x @ turn)) - base == pytest.approx(shift, abs=2e-3)
    assert float(information.kl_entropy(x + 10)) == pytest.approx(base, abs=1e-4)
    scaled = information.kl_entropy(7 * x, whiten=False) - information.kl_entropy(x, whiten=False)
    assert float(scaled) == pytest.approx(3 * np.log(7), abs=1e-5)


def test_what_has_no_density_has_entropy_minus_infinity():
    x = normal((50, 2))
    for samples in (np.ones((50, 2)), np.c_[x, x[:, :1]], np.r_[x, x]):
        assert float(information.kl_entropy(samples, 1)) == -np.inf


def test_two_samples_that_agree_by_rounding_do_no_harm():
    x = normal((2000, 1))
    expected = float(information.kl_entropy(x, 1))
    x[0] = x[1]
    assert float(information.kl_entropy(x, 1)) == pytest.approx(expected, abs=0.03)


# Mutual information


@pytest.mark.parametrize("estimator", information.ESTIMATORS)
def test_gaussians_of_known_information(estimator):
    for mi in (0.0, 2.0):
        found = information.mutual_information(*gaussian_pair(mi, 2, 2000), estimator=estimator)
        assert float(found) == pytest.approx(mi, abs=0.12)


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


def whitened(x):
    """By the symmetric root."""
    x = np.float64(x) - np.float64(x).mean(axis=0)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def test_ksg_against_the_equation():
    x, y = gaussian_pair(1.0, 2, 300)
    found = information.mutual_information(x, y[:, :1], estimator="ksg", k=3)
    assert float(found) == pytest.approx(ksg_numpy(whitened(x), whitened(y[:, :1]), 3), abs=1e-5)
    labels = (x[:, 0] + y[:, 1] > 0).astype(int) + (x[:, 1] > 1)
    found = information.mutual_information(x, labels, estimator="ksg", k=3, num_classes=3)
    assert float(found) == pytest.approx(ross_numpy(whitened(x), labels, 3), abs=1e-5)


def test_kernels_against_the_equation():
    x = np.float64(whitened(normal((200, 3))))
    far, b = cdist(x, x), 0.4
    kernels = np.exp(-np.square(far) / (2 * b * b)) / (2 * np.pi * b * b) ** 1.5
    np.fill_diagonal(kernels, 0)
    expected = -np.log(kernels.sum(axis=1) / 199).mean()
    samples = neighbours._whiten(jnp.float32(x))
    found = neighbours._kernel_entropies(samples, jnp.array([0.1, b]), None)
    assert float(found[1, 0]) == pytest.approx(expected, abs=1e-4)


def test_the_bandwidth_is_the_likeliest():
    samples = neighbours._whiten(jnp.asarray(normal((300, 2))))
    best = neighbours._bandwidth(samples, jnp.ones(()), 300, None)
    grid = jnp.linspace(0.5, 1.06, 57) / 300**0.1
    entropies = neighbours._kernel_entropies(samples, grid, None)[:, 0]
    assert float(best) == pytest.approx(float(grid[jnp.argmin(entropies)]), rel=0.02)


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])  # wkl is kl in two dimensions
def test_far_clusters_tell_their_label(estimator):
    x, labels = clusters()
    for classes in (4, 6):  # empty classes change nothing
        found = information.mutual_information(x, labels, estimator=estimator, num_classes=classes)
        assert float(found) == pytest.approx(np.log(4), abs=0.02)


@pytest.mark.parametrize("estimator", ["wkl", "kde"])
def test_linear_maps_of_each_side_change_nothing(estimator):
    x, y = gaussian_pair(1.0, 3, 300)
    labels = (x[:, 0] > 0).astype(int)
    maps = normal((2, 3, 3), 5) * np.array([1, 1e-3, 10], np.float32)
    for pair, mapped, classes in (
        ((x, y), (x @ maps[0] + 3, y @ maps[1]), None),
        ((x, labels), (x @ maps[0], labels), 2),
    ):
        before, after = (
            float(information.mutual_information(*p, estimator=estimator, num_classes=classes))
            for p in (pair, mapped)
        )
        assert before == pytest.approx(after, abs=5e-3)


@pytest.mark.parametrize("estimator", ["kl", "ksg", "kde"])
def test_directions_without_width_are_left_out(estimator):
    x, y = gaussian_pair(1.0, 2, 300)
    information_of = lambda x, y: float(information.mutual_information(x, y, estimator=estimator))
    expected = information_of(x, y)
    assert information_of(np.c_[x, np.full(300, 5.0, np.float32)], y) == pytest.approx(
        expected, abs=2e-3
    )
    if estimator != "ksg":  # which depends on the axes' directions
        assert information_of(np.c_[x, x[:, 0]], y) == pytest.approx(expected, abs=2e-3)
    assert information_of(x, np.full(300, 0.1, np.float32)) == pytest.approx(0, abs=0.01)


def test_a_linear_function_holds_infinitely_much():
    x = normal((100, 2))
    for estimator in ("kl", "kde"):
        found = information.mutual_information(x, x[:, :1] + 1, estimator=estimator)
        assert float(found) == np.inf


def test_ksg_saturates_where_neighbours_do_not():
    x, y = gaussian_pair(8.0, 2, 2000)
    kl, ksg = (float(information.mutual_information(x, y, estimator=e)) for e in ("kl", "ksg"))
    assert kl == pytest.approx(8, abs=0.15)
    assert ksg < 6.5


def test_undefined_results_are_told():
    x, y = gaussian_pair(1.0, 1, 20)
    double = (np.r_[x, x], np.r_[y, y])
    with pytest.raises(ValueError, match="coincide"):
        information.mutual_information(*double)
    assert np.isnan(jax.jit(information.mutual_information)(*double))
    ranks = [information.gaussianise(v, key=jax.random.key(0)) for v in double]
    assert np.isfinite(information.mutual_information(*ranks))
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[3] = bad
        for estimator in information.ESTIMATORS:
            with pytest.raises(ValueError, match="not finite"):
                information.mutual_information(broken, y, estimator=estimator)
        with pytest.raises(ValueError, match="not finite"):
            information.kl_entropy(broken)
    labels = np.arange(20) // 18  # two samples of class 1
    for estimator in ("wkl", "ksg"):
        with pytest.raises(ValueError, match="too few"):
            information.mutual_information(x, labels, estimator=estimator, k=3, num_classes=2)


def test_wrong_arguments_are_refused():
    x = normal((5, 2))
    information_of = information.mutual_information
    for f, match in (
        (lambda: information_of(x, x, k=5), "k=5 neighbours of 5"),
        (lambda: information.kl_entropy(x, 5), "k=5 neighbours of 5"),
        (lambda: information.knn_distances(x, 0), "k=0"),
        (lambda: information.knn_distances(x, 1, metric="manhattan"), "choose from"),
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
    x, y = gaussian_pair(1.0, 3, 256)
    labels = (x[:, 0] > 0).astype(np.int32)
    mesh = make_mesh({"data": 8})

    def measure(x, y, labels, axis_name=None):
        of = lambda *pair, **more: information.mutual_information(
            *pair, axis_name=axis_name, **more
        )
        scalars = {
            **{e: of(x, y, estimator=e) for e in ("kl", "ksg", "kde")},
            **{f"{e} y": of(x, labels, estimator=e, num_classes=2) for e in ("kl", "ksg")},
        }
        rows = {
            "near": information.knn_distances(x, 3, labels=labels, axis_name=axis_name),
            "ranks": information.gaussianise(x, axis_name=axis_name),
        }
        return scalars, rows

    sharded = jax.jit(
        jax.shard_map(
            lambda *a: measure(*a, axis_name="data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=(P(), P("data")),
        )
    )
    for one, eight in zip(
        jax.tree.leaves(jax.jit(measure)(x, y, labels)),
        jax.tree.leaves(sharded(x, y, labels)),
        strict=True,
    ):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-4)
