"""Pairs, pictures, codes and noisy networks: closed forms, hand cases, degenerate layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlib import information


def test_correlations_of_the_specification():
    assert float(information.component_correlation(2.0, 2)) == pytest.approx(0.9298735, abs=1e-6)
    assert float(information.component_correlation(10.0, 4)) == pytest.approx(0.9966253, abs=1e-6)
    assert float(information.component_correlation(0.0, 3)) == 0
    with pytest.raises(ValueError, match="at least 0"):
        information.component_correlation(-0.1, 3)


@pytest.mark.parametrize(("dx", "dy", "rotate"), [(3, 3, True), (4, 2, True), (2, 3, False)])
def test_pairs_hold_what_was_asked(dx, dy, rotate):
    x, y = information.gaussian_pair(jax.random.key(0), 2.0, dx, dy, 20_000, rotate=rotate)
    joint = np.corrcoef(np.c_[x, y].T)
    parts = [np.linalg.slogdet(c)[1] for c in (joint[:dx, :dx], joint[dx:, dx:], joint)]
    assert 0.5 * (parts[0] + parts[1] - parts[2]) == pytest.approx(2, abs=0.03)
    np.testing.assert_allclose(joint[:dx, :dx], np.eye(dx), atol=0.03)
    aligned = np.abs(joint[0, dx + 1 :]).max()
    assert (aligned < 0.03) != rotate


def test_the_gaussian_channel_and_what_dropping_loses():
    variances, noise = np.array([4, 1, 0.25], np.float32), 0.1
    full = float(information.channel_information(variances, noise))
    top = float(information.channel_information(variances[::-1], noise, 2))
    np.testing.assert_allclose(
        [full, top, full - top], [3.6821152, 3.0557337, 0.6263815], rtol=1e-6
    )
    draw = np.random.default_rng(0)
    x = (np.sqrt(variances) * draw.standard_normal((3000, 3))).astype(np.float32)
    y = x + np.float32(np.sqrt(noise)) * draw.standard_normal((3000, 3)).astype(np.float32)
    assert float(information.mutual_information(x, y)) == pytest.approx(full, abs=0.12)
    short = [information.principal_axes(v, 2)(v) for v in (x, y)]
    assert float(information.mutual_information(*short)) == pytest.approx(top, abs=0.12)
    with pytest.raises(ValueError, match="above 0"):
        information.channel_information(variances, 0.0)


def test_the_widest_direction_may_know_nothing():
    draw = np.random.default_rng(0)
    noise, a, z = draw.standard_normal((3, 3000, 2)).astype(np.float32)
    rho = float(information.component_correlation(2.0, 1))
    b = rho * a[:, 0] + np.sqrt(1 - rho**2) * z[:, 0]
    x, y = np.c_[10 * noise[:, 0], a[:, 0]], np.c_[10 * noise[:, 1], b]
    assert float(information.mutual_information(x, y)) == pytest.approx(2, abs=0.1)
    kept = [information.principal_axes(v, 1)(v) for v in (x, y)]
    assert float(information.mutual_information(*kept)) == pytest.approx(0, abs=0.1)


def test_a_bump_is_the_formula():
    image = np.asarray(information.render_bumps(jnp.array([[0.25, 0.5]]), 5)[0])
    grid = np.linspace(0, 1, 5)
    expected = np.exp(-10 * ((grid[:, None] - 0.25) ** 2 + (grid[None] - 0.5) ** 2))
    np.testing.assert_allclose(image, expected, rtol=1e-5)


def test_rectangles_cover_their_area():
    u = np.random.default_rng(0).uniform(size=(50, 4)).astype(np.float32)
    images = np.asarray(information.render_rectangles(jnp.asarray(u), 16))
    m = 2 / 32
    left = [(1 - m) * (1 - np.sqrt(1 - u[:, i])) for i in (0, 2)]
    lengths = [m + u[:, i + 1] * (1 - low - m) for i, low in zip((0, 2), left, strict=True)]
    np.testing.assert_allclose(images.mean(axis=(1, 2)), lengths[0] * lengths[1], rtol=1e-4)
    assert images.min() >= 0 and images.max() <= 1 + 1e-5
    centre = (images.sum(axis=2) * (np.arange(16) + 0.5)).sum(axis=1) / images.sum(axis=(1, 2)) / 16
    np.testing.assert_allclose(centre, left[0] + lengths[0] / 2, atol=0.02)


def test_principal_axes_are_the_singular_vectors():
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32) * [5, 4, 3, 2, 1] + 7
    projection = information.principal_axes(jnp.asarray(x, jnp.float32), 2)
    _, _, vectors = np.linalg.svd(x - x.mean(axis=0))
    overlap = np.abs(vectors[:2] @ np.asarray(projection.axes))
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-3)
    np.testing.assert_allclose(projection(jnp.float32(x)).mean(axis=0), 0, atol=1e-5)
    with pytest.raises(ValueError, match="as many axes"):
        information.principal_axes(jnp.ones((9, 3)), 4)


def test_noise_is_relative_or_absolute():
    x = jnp.array([0.0, 1.0, -100.0])
    many = jnp.broadcast_to(x, (4000, 3))
    relative = information.add_noise(jax.random.key(0), many, 0.1)
    absolute = information.add_noise(jax.random.key(0), many, 0.1, relative=False)
    np.testing.assert_allclose(jnp.std(relative, axis=0), [0, 0.1, 10], rtol=0.05)
    np.testing.assert_allclose(jnp.std(absolute, axis=0), 0.1, rtol=0.05)
    np.testing.assert_allclose(jnp.mean(relative, axis=0), x, atol=0.5)


def test_an_autoencoder_learns_to_copy():
    centres = jax.random.uniform(jax.random.key(0), (64, 2))
    images = information.render_bumps(centres, 7)[..., None]  # 7 -> 3 and back

    @jax.jit
    def fit(images):
        encode, error = information.fit_autoencoder(
            jax.random.key(1),
            images,
            2,
            channels=(4,),
            widths=(16,),
            steps=200,
            learning_rate=1e-2,
        )
        return encode(images), error

    codes, error = fit(images)
    alike = jnp.mean(jnp.abs(images - images.mean(axis=0)))  # all decoded to their mean
    assert float(error) < 0.6 * float(alike)
    assert codes.shape == (64, 2) and float(codes.min()) > 0 and float(codes.max()) < 1


def test_a_network_too_deep_for_its_images_is_refused():
    for network in (information.Autoencoder, information.NoisyClassifier):
        with pytest.raises(ValueError, match="images of 8x8"):
            network((8, 8, 1), 2, channels=(1, 1, 1, 1), rngs=nnx.Rngs(0))


def test_every_layer_hears_its_own_noise():
    make = lambda **options: information.NoisyClassifier(
        (6, 6, 1), 3, channels=(4,), widths=(5,), rngs=nnx.Rngs(0), **options
    )
    images = jax.random.uniform(jax.random.key(1), (7, 6, 6, 1))
    one, other = jax.random.split(jax.random.key(2))
    quiet, loud = make(sigma=0.0, dropout=0.5), make(sigma=0.1)

    @jax.jit
    def outputs(one, other):
        training = quiet(images, one, training=True)
        return [quiet(images, one), quiet(images, other), loud(images, one), training], [
            jax.nn.log_softmax(quiet.affine[1](quiet(images, one)[1]))
        ]

    (calm, same, noisy, dropped), (last,) = outputs(one, other)
    assert [layer.shape for layer in calm] == [(7, 2, 2, 4), (7, 5), (7, 3)]
    np.testing.assert_allclose(jnp.exp(calm[-1]).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(calm[2], last, rtol=1e-5)  # of the layer before
    for layers in zip(calm, same, noisy, strict=True):
        np.testing.assert_array_equal(layers[0], layers[1])
        assert float(jnp.abs(layers[0] - layers[2]).max()) > 1e-3
    assert float(jnp.abs(dropped[0] - calm[0]).max()) > 0.01


def test_a_path_sees_labels_narrow_layers_and_dead_ones():
    draw = np.random.default_rng(0)
    labels = np.arange(400) % 4
    code = draw.standard_normal((400, 2)).astype(np.float32)
    knows = np.eye(4, dtype=np.float32)[labels] + 0.01 * draw.standard_normal((400, 4))
    copy = code + 0.05 * draw.standard_normal((400, 2))
    layers = [jnp.asarray(v, jnp.float32) for v in (knows, copy, np.zeros((400, 3)))]
    for ranks in (True, False):
        path = jax.jit(
            lambda key, ranks=ranks: information.information_path(
                key, code, layers, labels, 4, dim=3, ranks=ranks
            )
        )
        i_xl, i_ly = path(jax.random.key(0))
        np.testing.assert_allclose(i_ly, [np.log(4), 0, 0], atol=0.2)
        assert float(i_xl[1]) == pytest.approx(np.log1p(0.05**-2), abs=0.4)
        assert float(i_xl[2]) == pytest.approx(0, abs=0.2)
        if ranks:  # tight clusters alone are beyond these neighbours: below -3 nats
            assert float(i_xl[0]) == pytest.approx(0, abs=0.3)


def test_ranks_of_one_coordinate_mislead_neighbours():
    """They lie on a grid, where neighbours are farther than in a random sample."""
    x = np.random.default_rng(0).standard_normal((400, 1)).astype(np.float32)
    labels = np.arange(400) % 4
    of = lambda x: float(information.mutual_information(x, labels, num_classes=4))
    assert of(x) == pytest.approx(0, abs=0.12)
    assert of(information.gaussianise(x)) > 0.5
