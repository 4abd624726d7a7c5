"""Classification of digits: loss and accuracy against the network's own logits."""

import chex
import jax
import numpy as np
from flax import nnx

from rlib import data, federated, nn


def perceptron(rngs):
    return nn.Perceptron((64, 8, 10), rngs=rngs)


def test_loss_and_accuracy_are_those_of_the_networks_logits():
    digits = federated.classification("digits", perceptron, flat=True, shift=0.3)
    pixels, labels = data.images("digits", "test")
    key = jax.random.key(3)
    logits = np.asarray(perceptron(nnx.Rngs(key))(pixels.reshape(-1, 64) - np.float32(0.3)))
    params = jax.jit(digits.init)(key)
    right = np.mean(logits.argmax(axis=1) == labels)
    np.testing.assert_allclose(jax.jit(digits.accuracy)(params, digits.test), right, rtol=1e-6)
    normalised = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -normalised[np.arange(len(labels)), labels]
    np.testing.assert_allclose(digits.loss(params, digits.test, None), expected, atol=1e-5)


def test_a_network_is_named_by_its_sizes():
    key, sizes = jax.random.key(0), {"widths": (4, 8), "blocks": 1, "groups": 4}
    for given, network in (
        ({"hidden": (8,)}, perceptron),
        ({**sizes, "hidden": (8,)}, lambda rngs: nn.ResNet(10, in_channels=1, **sizes, rngs=rngs)),
    ):
        digits = federated.image_classification("digits", **given, shift=0.3)
        same = federated.classification("digits", network, flat="widths" not in given, shift=0.3)
        chex.assert_trees_all_equal(*(jax.jit(each.init)(key) for each in (digits, same)))
        chex.assert_trees_all_equal(digits.test, same.test)


def test_images_keep_their_shape_for_a_network_of_pictures():
    make = lambda rngs: nn.ResNet(10, in_channels=1, widths=(8,), blocks=1, rngs=rngs)
    digits = federated.classification("digits", make)
    some = jax.tree.map(lambda x: x[:7], digits.test)
    assert some["x"].shape == (7, 8, 8, 1)
    params = jax.jit(digits.init)(jax.random.key(0))
    assert jax.jit(lambda p: digits.loss(p, some, None))(params).shape == (7,)
    assert 0 <= jax.jit(digits.accuracy)(params, some) <= 1
