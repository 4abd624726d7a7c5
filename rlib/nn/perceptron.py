"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
from flax import nnx
from jaxtyping import Array, Float

from rlib.nn.coordinate import Affine


class Perceptron(nnx.Module):
    """Affine layers with an activation between them.

    Args:
        sizes: inputs, width of each hidden layer, outputs.
        activation: elementwise.

    >>> Perceptron((3, 8, 2), rngs=nnx.Rngs(0))(jax.numpy.ones((5, 3))).shape
    (5, 2)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(Affine(m, n, rngs=rngs) for m, n in pairwise(sizes))
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
