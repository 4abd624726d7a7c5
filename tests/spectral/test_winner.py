"""The oracles of the method's specification."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlib import spectral
from rlib.nn import Siren, sine


def signal(values):
    return np.asarray(values, np.float64)[:, None]


def split(w_first=30.0, hidden=32, n_hidden=4):
    network = Siren(1, hidden, 1, n_hidden, w_first=w_first, rngs=nnx.Rngs(0))
    return nnx.split(network, nnx.Param, ...)


def test_centroid_of_a_tone_is_its_frequency():
    t = np.arange(1024)
    assert spectral.spectral_centroid(signal(np.cos(2 * np.pi * 100 * t / 1024))) == pytest.approx(
        0.1953125, abs=1e-9
    )


def test_centroid_of_impulses_and_constants():
    assert spectral.spectral_centroid(signal(np.eye(1, 16, 3)[0])) == pytest.approx(0.5, abs=1e-12)
    assert spectral.spectral_centroid(signal(np.eye(1, 5, 1)[0])) == pytest.approx(0.4, abs=1e-12)
    assert spectral.spectral_centroid(signal(np.full(64, 3.0))) == pytest.approx(0, abs=1e-12)
    assert spectral.spectral_centroid(signal(np.zeros(64))) == 0


def test_centroid_ignores_amplitude_reversal_and_shift():
    y = np.random.default_rng(0).normal(size=500)
    psi = spectral.spectral_centroid(signal(y))
    for changed in (-7 * y, y[::-1], np.roll(y, 123)):
        assert spectral.spectral_centroid(signal(changed)) == pytest.approx(psi, abs=1e-12)


def test_centroid_is_amplitude_weighted():
    t = np.arange(400)
    two_tones = np.cos(2 * np.pi * 40 * t / 400) + 3 * np.cos(2 * np.pi * 160 * t / 400)
    expected = (0.2 * 1 + 0.8 * 3) / 4
    assert spectral.spectral_centroid(signal(two_tones)) == pytest.approx(expected, abs=1e-9)


def test_modes_of_a_picture():
    image = np.random.default_rng(0).normal(size=(6, 8, 3))
    rows = np.mean(
        [spectral.spectral_centroid(image[i, :, [c]].T) for i in range(6) for c in range(3)]
    )
    raster = np.mean([spectral.spectral_centroid(image[..., c].reshape(-1, 1)) for c in range(3)])
    assert spectral.spectral_centroid(image, mode="rows") == pytest.approx(rows, abs=1e-12)
    assert spectral.spectral_centroid(image) == pytest.approx(raster, abs=1e-12)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(np.zeros((0, 1)), "not empty"), (np.full((4, 1), np.nan), "NaN"), (np.zeros(4), "shape")],
)
def test_centroid_refuses(bad, words):
    with pytest.raises(ValueError, match=words):
        spectral.spectral_centroid(bad)


def test_scales_of_one_channel():
    audio = spectral.noise_scales(0.5, 1, kind="audio")
    assert audio == (pytest.approx(3394.3092, abs=1e-4), pytest.approx(1.5))
    paper = spectral.WinnerSchedule(3500, 5, 3)
    assert spectral.noise_scales(0.5, 1, kind=paper)[0] == pytest.approx(3212.7025, abs=1e-4)
    image = spectral.noise_scales(0.5, 1, kind="image")
    assert image == (pytest.approx(45.895750, abs=1e-6), pytest.approx(0.2))


def test_scales_of_three_channels():
    code = spectral.noise_scales(0.5, 3, kind="image")
    assert code == (pytest.approx(12.126744, abs=1e-6), pytest.approx(0.0222222, abs=1e-7))
    paper = spectral.noise_scales(0.5, 3, kind="image", channel_rule="paper")
    assert paper[0] == pytest.approx(50 * (1 - np.exp(-5 * 0.5 / 3)))
    assert spectral.noise_scales(0.3, 1, kind="image") == spectral.noise_scales(
        0.3, 1, kind="image", channel_rule="paper"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"psi": 1.5, "kind": "audio"}, "between 0 and 1"),
        ({"psi": 0.5, "kind": "video"}, "audio"),
        ({"psi": 0.5, "kind": "audio", "channel_rule": "sqrt"}, "paper"),
    ],
)
def test_scales_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        spectral.noise_scales(arguments.pop("psi"), 1, **arguments)


def test_no_noise_is_siren_bit_for_bit():
    _, params, _ = split()
    chex.assert_trees_all_equal(
        spectral.winner_init(params, 0.0, 0.0, 30.0, jax.random.key(1)), params
    )


def test_only_the_first_two_kernels_change():
    _, params, _ = split()
    noisy = spectral.winner_init(params, 3000.0, 1.0, 30.0, jax.random.key(1))
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(noisy), strict=True
        )
        if (a != b).any()
    ]
    assert len(changed) == 2
    assert changed[0].startswith("['layers'][0]['kernel']")
    assert changed[1].startswith("['layers'][1]['kernel']")


def test_more_than_ten_layers_do_not_confuse_the_names():
    _, params, _ = split(hidden=4, n_hidden=13)
    noisy = spectral.winner_init(params, 1.0, 1.0, 30.0, jax.random.key(1))
    for layer in range(2, 14):
        chex.assert_trees_all_equal(noisy["layers"][layer], params["layers"][layer])


def test_noise_is_divided_by_the_hidden_frequency():
    draws = []
    for w_first in (30.0, 3000.0):
        _, params, _ = split(w_first, hidden=512)
        noisy = spectral.winner_init(params, 3000.0, 1.5, 30.0, jax.random.key(1))
        draws.append(noisy["layers"][0]["kernel"][...] - params["layers"][0]["kernel"][...])
        second = noisy["layers"][1]["kernel"][...] - params["layers"][1]["kernel"][...]
        assert np.std(second) == pytest.approx(1.5 / 30, rel=0.01)
    chex.assert_trees_all_close(draws[0], draws[1], rtol=1e-4)
    assert np.std(draws[0]) == pytest.approx(3000 / 30, rel=0.1)


@pytest.mark.parametrize(("s1", "expected"), [(0.0, 1.0), (0.5, 33.0), (1.0, 129.0)])
def test_variance_law(s1, expected):
    """Var[w0 (h W1)] = 1 + H s1^2 / 2 for uniform-phase h: slope H / 2, intercept 1."""
    hidden = 256
    h = sine(jax.random.uniform(jax.random.key(0), (4000, hidden), maxval=2 * jnp.pi))
    variances = []
    for seed in range(4):
        network = Siren(1, hidden, 1, 2, rngs=nnx.Rngs(seed))
        params = spectral.winner_init(
            nnx.state(network, nnx.Param), 0.0, s1, 30.0, jax.random.key(seed)
        )
        variances.append(float(jnp.var(30.0 * h @ params["layers"][1]["kernel"][...])))
    assert np.mean(variances) == pytest.approx(expected, rel=0.03)


def test_initial_output_has_energy_in_the_targets_band():
    """The bottleneck and its cure: only WINNER starts with energy in the high band."""
    y = spectral.band_limited_noise(4096, 0.5, 0.9)
    x = spectral.grid(4096).astype(np.float32)
    graphdef, params, rest = split(hidden=64)
    scales = spectral.noise_scales(spectral.spectral_centroid(y), 1, kind="audio")
    noisy = spectral.winner_init(params, *scales, 30.0, jax.random.key(0))
    energy = []
    for p in (params, noisy):
        frequency, amplitude = spectral.amplitude_spectrum(nnx.merge(graphdef, p, rest)(x)[:, 0])
        inside = (frequency >= 0.5) & (frequency <= 0.9)
        energy.append(np.square(amplitude[inside]).sum() / np.square(amplitude[1:]).sum())
    assert energy[0] < 1e-3
    assert energy[1] > 0.2
