"""The residual network: its normalisation, shapes, size, and independence of the examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlib.nn.resnet import GroupNorm, ResNet, group_norm
from rlib.parallel import make_mesh, make_train_step, shard_batch

X = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(8) % 4


def small(**arguments):
    arguments = {"in_channels": 3, "widths": (8, 16), "blocks": 1, "groups": 4, **arguments}
    return ResNet(4, rngs=nnx.Rngs(0), **arguments)


forward = nnx.jit(lambda network, x: network(x))


def parameters(network):
    return sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param)))


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm_is_the_formula(groups):
    draw = np.random.default_rng(1)
    x, scale, bias = draw.normal(3, 2, (2, 5, 4, 12)), draw.normal(size=12), draw.normal(size=12)
    expected = np.empty_like(x)
    for n in range(2):
        for g in range(groups):
            channels = slice(12 // groups * g, 12 // groups * (g + 1))
            part = x[n, :, :, channels]
            expected[n, :, :, channels] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    args = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    found = jax.jit(group_norm, static_argnums=3)(*args, groups)
    chex.assert_trees_all_close(found, expected * scale + bias, atol=5e-6)
    flax = nnx.GroupNorm(12, groups, epsilon=1e-5, rngs=nnx.Rngs(0), use_fast_variance=False)
    ours = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(GroupNorm(12, groups)(x)))))(args[0])
    theirs = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(flax(x)))))(args[0])
    chex.assert_trees_all_close(ours, theirs, atol=2e-6)


def test_statistics_of_bfloat16_are_float32():
    x = 100 + jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    x = x.astype(jnp.bfloat16)
    y = GroupNorm(8, 2)(x)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.mean(y, dtype=jnp.float32)) == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (7, 5, 2)])
def test_shapes(shape):
    network = ResNet(10, in_channels=shape[-1], blocks=1, rngs=nnx.Rngs(0))
    logits = nnx.eval_shape(lambda x: network(x), jax.ShapeDtypeStruct((3, *shape), jnp.float32))
    assert (logits.shape, logits.dtype) == ((3, 10), jnp.float32)


@pytest.mark.parametrize(("blocks", "widths"), [(1, (8, 16)), (2, (16, 32, 64)), (3, (16, 32, 64))])
def test_parameter_count(blocks, widths):
    network = ResNet(10, in_channels=3, widths=widths, blocks=blocks, rngs=nnx.Rngs(0))
    expected, inputs = 9 * 3 * widths[0], widths[0]
    for width in widths:
        for _ in range(blocks):
            expected += 2 * (inputs + width) + 9 * (inputs + width) * width
            expected += inputs * width if inputs != width else 0
            inputs = width
    assert parameters(network) == expected + 2 * inputs + 10 * (inputs + 1)


def test_examples_do_not_see_each_other():
    network = small()
    each = [forward(network, x[None])[0] for x in X[:3]]
    chex.assert_trees_all_close(forward(network, X[:3]), jnp.stack(each), atol=1e-5)
    mapped = jax.jit(jax.vmap(lambda x: network(x[None])[0]))
    chex.assert_trees_all_close(mapped(X[:3]), jnp.stack(each))


def test_loss_at_initialisation_is_near_that_of_chance():
    logits = forward(small(), X)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    assert float(loss) == pytest.approx(np.log(4), abs=0.5)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    network = small(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(network))} == {jnp.dtype(jnp.float32)}
    logits = forward(network, X)
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_close(logits, forward(small(), X), atol=0.1)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        small(groups=3)


def test_steps_on_a_mesh_equal_those_on_one_device():
    graphdef, params = nnx.split(small())

    def loss(params, frozen, batch, key):
        logits = nnx.merge(graphdef, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}

    results = []
    for sizes, devices in (({"data": 1}, jax.devices()[:1]), ({"data": 4, "model": 2}, None)):
        mesh = make_mesh(sizes, devices)
        train = make_train_step(loss, optax.sgd(0.1), mesh, params)
        state = train.init(params)
        for _ in range(2):
            state, _ = train.step(state, shard_batch(mesh, (X, LABELS)))
        results.append(jax.device_get(jax.tree.leaves(state.params)))
    chex.assert_trees_all_close(*results, atol=1e-5)
    head = nnx.to_flat_state(state.params)
    split = [path for path, p in head if "model" in p[...].sharding.spec]
    assert len(split) == 8  # of both blocks: conv1, norm2 (2), conv2
