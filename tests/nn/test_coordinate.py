"""Networks against their papers' formulas, in float64 numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlib.nn import Finer, FourierMLP, Gaussian, Siren, Wire

X = np.random.default_rng(0).uniform(-1, 1, (20, 2))
SIZES = (2, 16, 3, 3)


def layers(network):
    return [
        (np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64))
        for layer in network.layers
    ]


def mlp(network, activate, x):
    *hidden, (w_out, b_out) = layers(network)
    h = x
    for index, (w, b) in enumerate(hidden):
        h = activate(index, h @ w + b)
    return h @ w_out + b_out


def siren_formula(network, x):
    return mlp(network, lambda i, z: np.sin((300.0 if i == 0 else 30.0) * z), x)


def finer_formula(network, x):
    return mlp(network, lambda i, z: np.sin(30 * (np.abs(z) + 1) * z), x)


def gaussian_formula(network, x):
    a = 1 / (np.sqrt(2) * 8.0)
    return mlp(network, lambda i, z: np.exp(-(z**2) / (2 * a**2)), x)


def wire_formula(network, x):
    (w, b), *rest = layers(network)
    gabor = lambda z: np.exp(1j * 10 * z - 100 * np.abs(z) ** 2)
    h = gabor(x @ w + b)
    for index, (w, b) in enumerate(rest):
        z = h @ (w[0] + 1j * w[1]) + b[0] + 1j * b[1]
        h = z if index == len(rest) - 1 else gabor(z)
    return h.real


def fourier_formula(network, x):
    z = 2 * np.pi * x @ np.asarray(network.frequencies[...], np.float64)
    features = np.concatenate([np.sin(z), np.cos(z)], axis=-1)
    return mlp(network, lambda i, z: np.maximum(z, 0), features)


CASES = [
    (Siren, {"w_first": 300.0}, siren_formula),
    (Finer, {"k": 5.0}, finer_formula),
    (Gaussian, {"scale": 8.0}, gaussian_formula),
    (Wire, {"w": 10.0, "scale": 10.0}, wire_formula),
    (FourierMLP, {"sigma": 3.0, "features": 10}, fourier_formula),
]


@pytest.mark.parametrize(("network", "arguments", "formula"), CASES)
def test_forward_is_the_papers_formula(network, arguments, formula):
    made = network(*SIZES, rngs=nnx.Rngs(0), **arguments)
    chex.assert_trees_all_close(made(X.astype(np.float32)), formula(made, X), atol=3e-4)


@pytest.mark.parametrize(("network", "arguments"), [case[:2] for case in CASES])
def test_scales_are_no_part_of_the_program(network, arguments):
    """One compiled step serves all first-layer frequencies, sigmas and widths."""
    graphs = {nnx.split(network(*SIZES, rngs=nnx.Rngs(s), **arguments))[0] for s in (0, 1)}
    name = "w_first" if network is Siren else next(iter(arguments))
    changed = network(*SIZES, rngs=nnx.Rngs(0), **{**arguments, name: type(arguments[name])(10)})
    assert len(graphs | {nnx.split(changed)[0]}) == 1


def test_siren_draws_as_the_official_code():
    network = Siren(1, 256, 1, 4, rngs=nnx.Rngs(0))
    limits = [1.0, *[np.sqrt(6 / 256) / 30] * 4]
    bias_limits = [1.0, *[1 / np.sqrt(256)] * 4]
    for (w, b), limit, bias_limit in zip(layers(network), limits, bias_limits, strict=True):
        assert np.abs(w).max() <= limit
        assert w.std() == pytest.approx(limit / np.sqrt(3), rel=0.2)
        assert np.abs(b).max() <= bias_limit
    assert layers(network)[0][1].std() == pytest.approx(1 / np.sqrt(3), rel=0.1)


def test_finer_first_bias_is_wide_and_others_are_not():
    plain, wide = (Finer(1, 64, 1, 3, k=k, rngs=nnx.Rngs(0)) for k in (None, 20.0))
    assert np.abs(layers(wide)[0][1]).max() > 10
    chex.assert_trees_all_equal(layers(plain)[1:], layers(wide)[1:])


def test_finer_detach_matters_to_gradients_only():
    stopped, flowing = (Finer(*SIZES, detach=d, rngs=nnx.Rngs(0)) for d in (True, False))
    x = jnp.asarray(X, jnp.float32)
    chex.assert_trees_all_equal(stopped(x), flowing(x))
    slope = [jax.grad(lambda v, n=n: n(v).sum())(x) for n in (stopped, flowing)]
    assert np.abs(slope[0] - slope[1]).max() > 1e-2


def test_wire_counts_the_parameters_of_a_real_network():
    count = lambda n: sum(x.size for x in jax.tree.leaves(nnx.state(n, nnx.Param)))
    real, complex_ = Siren(1, 128, 1, 4, rngs=nnx.Rngs(0)), Wire(1, 128, 1, 4, rngs=nnx.Rngs(0))
    assert count(complex_) == pytest.approx(count(real), rel=0.05)


@pytest.mark.parametrize("network", [Siren, Wire])
def test_too_few_layers_are_refused(network):
    with pytest.raises(ValueError, match="n_hidden=0"):
        network(1, 8, 1, 0, rngs=nnx.Rngs(0))


def test_bfloat16_compute_keeps_float32_parameters():
    network = Gaussian(*SIZES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert network(jnp.asarray(X)).dtype == jnp.bfloat16
    assert network.layers[0].kernel.dtype == jnp.float32
