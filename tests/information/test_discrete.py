"""Binning and counting against numpy in float64 and integers; bounds by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib import information
from rlib.information.plane import patterns

plane_point = jax.jit(information.information_plane_point, static_argnums=2)
bin_codes = jax.jit(information.bin_codes, static_argnames=("num_bins", "reference"))
hash_rows = jax.jit(information.hash_rows)
bounds = jax.jit(information.kde_entropy_bounds, static_argnums=1, static_argnames="block")
T = np.array([-0.9, -0.9, -0.3, -0.3, 0.3, 0.3, 0.9, 0.9], np.float32)[:, None]


def entropy(rows):
    """H of rows in bits, by unique tuples."""
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def point(codes, y):
    codes, y = np.asarray(codes), np.asarray(y)[:, None]
    joint = np.concatenate([codes, y], axis=1)
    return [entropy(codes), entropy(codes) + entropy(y) - entropy(joint)]


@pytest.mark.parametrize(
    ("y", "ity"),
    [((0, 0, 0, 0, 1, 1, 1, 1), 1.0), ((0, 1, 0, 1, 1, 0, 1, 1), 0.2044340)],
)
@pytest.mark.parametrize("reference", [None, "idnns"])
def test_the_hand_case(y, ity, reference):
    codes = bin_codes(T, 30, reference=reference)
    found = plane_point(codes, jnp.array(y))
    np.testing.assert_allclose(found, [2.0, ity], atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_counts_are_those_of_numpy(classes):
    draw = np.random.default_rng(classes)
    codes = draw.integers(0, 4, (600, 5)).astype(np.int32)
    y = draw.integers(0, classes, 600)
    found = plane_point(jnp.asarray(codes), jnp.asarray(y), classes)
    np.testing.assert_allclose(found, point(codes, y), atol=1e-5)
    assert float(information.entropy_of_rows(jnp.asarray(codes))) == pytest.approx(
        entropy(codes), abs=1e-5
    )


def test_hashes_tell_all_patterns_of_12_bits_apart():
    for spread in (1, 16, 2**20):  # hashes of codes that differ in few or high bits
        codes = jnp.asarray(patterns(12) * spread, jnp.int32)
        assert len(np.unique(hash_rows(codes))) == 4096


def test_injective_and_constant_layers():
    y = np.arange(4096) % 2
    every = plane_point(jnp.asarray(patterns(12)), y)
    np.testing.assert_allclose(every, [12.0, 1.0], atol=1e-5)
    none = plane_point(jnp.zeros((4096, 3), jnp.int32), y)
    np.testing.assert_allclose(none, [0.0, 0.0], atol=1e-6)


def test_one_row_knows_nothing():
    one = plane_point(jnp.zeros((1, 2), jnp.int32), jnp.ones(1, int))
    np.testing.assert_array_equal(one, [0.0, 0.0])


def test_merging_codes_raises_nothing_and_label_information_is_bounded():
    draw = np.random.default_rng(1)
    outputs, y = np.tanh(draw.normal(size=(512, 3))), draw.integers(0, 2, 512)
    points = np.array([plane_point(bin_codes(outputs, bins), y) for bins in (24, 12, 6, 3, 1)])
    assert (np.diff(points, axis=0) <= 1e-6).all()
    assert (points >= 0).all()
    assert (points[:, 1] <= np.minimum(points[:, 0], entropy(y[:, None])) + 1e-5).all()


def test_bins_are_those_of_numpy_and_of_the_official_code():
    t = np.random.default_rng(2).uniform(-1, 1, (300, 3)).astype(np.float32)
    t[0] = (-1.0, 1.0, 0.5)
    ours = np.clip(np.digitize(t, np.linspace(-1, 1, 31)) - 1, 0, 29)
    assert (np.asarray(bin_codes(t, 30)) == ours).mean() > 0.998  # edges in float32
    official = np.digitize(t, np.linspace(-1, 1, 30)) - 1
    found = np.asarray(bin_codes(t, 30, reference="idnns"))
    assert (found == official).mean() > 0.998
    assert found[0].tolist() == [0, 29, 21]


def test_outside_the_range_bins_clip_where_the_official_code_wraps():
    t = jnp.array([-1.5, 1.5])
    assert bin_codes(t, 30).tolist() == [0, 29]
    assert bin_codes(t, 30, reference="idnns").tolist() == [29, 29]


def test_values_that_are_not_finite_have_defined_bins():
    t = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])
    assert bin_codes(t, 4).tolist() == [-1, 3, 0, 2]
    codes = information.width_codes(t, 0.5)
    assert codes[0] == -(2**31) and codes[3] == 0 and codes[2] < 0 < codes[1]
    np.testing.assert_array_equal(information.output_range(t[:, None]), [0.0, 0.0])
    np.testing.assert_array_equal(information.output_range(t[:1, None]), [0.0, 0.0])


def test_a_range_without_width_is_one_bin():
    low, high = information.output_range(jnp.full((5, 2), 0.3))
    assert bin_codes(jnp.full((5, 2), 0.3), 30, low, high).tolist() == [[0, 0]] * 5


def test_bins_of_a_fixed_width():
    t = np.random.default_rng(3).normal(size=100).astype(np.float32)
    np.testing.assert_array_equal(information.width_codes(t, 0.25), np.floor(t / 0.25))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information.bin_codes(T, 0), "num_bins"),
        (lambda: information.bin_codes(T, 30, reference="code"), "reference"),
        (lambda: information.width_codes(T, 0.0), "width"),
        (lambda: information.hash_rows(jnp.zeros(3, jnp.int32)), "shape"),
        (lambda: information.entropy_of_rows(jnp.zeros((0, 2), jnp.int32)), "row"),
        (
            lambda: information.information_plane_point(jnp.zeros((3, 1), int), jnp.zeros(2, int)),
            "label",
        ),
        (lambda: information.kde_entropy_bounds(T, 0.0), "noise_var"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("block", [3, 8, 100])
def test_kernel_bounds_against_float64(block):
    t = np.random.default_rng(4).normal(size=(37, 3))
    squared = np.square(t[:, None] - t[None]).sum(axis=-1)
    var = 0.04
    expected = []
    for factor, extra in ((4.0, 1.5 * np.log(1 / 4)), (1.0, 0.0)):
        log_sum = np.log(np.exp(-squared / (2 * factor * var)).sum(axis=1))
        norm = 1.5 * np.log(2 * np.pi * factor * var)
        expected.append(1.5 - (log_sum - np.log(37) - norm).mean() + extra)
    found = bounds(jnp.asarray(t, jnp.float32), var, block=block)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0] <= found[1]


def test_kernel_bounds_of_far_and_equal_points():
    noise = information.gaussian_entropy(2, 0.1)
    far = jnp.array([[0.0, 0.0], [50.0, 0.0]])
    both = bounds(far, 0.1) - noise
    np.testing.assert_allclose(both, np.log(2), atol=1e-6)
    same = bounds(jnp.ones((7, 2)), 0.1) - noise
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    one = bounds(jnp.ones((1, 2)), 0.1) - noise
    np.testing.assert_allclose(one, 0.0, atol=1e-6)


def test_kernel_bounds_enclose_the_entropy_of_a_gaussian():
    t = jax.random.normal(jax.random.key(0), (2000, 1)) * 2
    low, high = bounds(t, 0.5)
    assert low < information.gaussian_entropy(1, 4.5) < high
