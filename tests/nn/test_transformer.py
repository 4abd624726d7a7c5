"""The Transformer against its equations in float64 numpy, and against its own limits."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from rlib.nn.transformer import (
    Transformer,
    causal_attention,
    next_token_loss,
    rotary,
    rotary_table,
)
from rlib.parallel import make_mesh, make_train_step, parameter_specs, shard_batch

VOCAB, TOKENS = 11, np.random.default_rng(0).integers(0, 11, (8, 6))
RULES = {"batch": "data", "mlp": "model", "heads": "model"}


def small(seed=0, **arguments):
    arguments = {"layers": 3, "embed": 16, "heads": 4, "kv_heads": 2, "mlp": 24, **arguments}
    return Transformer(VOCAB, rngs=nnx.Rngs(seed), **arguments)


def randomised(network):
    """Every parameter, norms' scales among them, away from its initial value."""
    graphdef, state = nnx.split(network)
    leaves, treedef = jax.tree.flatten(state)
    draw = np.random.default_rng(1)
    leaves = [x + 0.3 * draw.normal(size=x.shape).astype(np.float32) for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


forward = nnx.jit(lambda network, tokens: network(tokens))


def loss_of(graphdef, state, tokens=TOKENS):
    return next_token_loss(nnx.merge(graphdef, state)(tokens), tokens)


def formula(network, tokens):
    """The module's equations, position by position and head by head."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(network)))
    size = p["layers"]["query"].shape[-1]
    n, kv = p["layers"]["query"].shape[2], p["layers"]["key"].shape[2]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + 1e-6) * scale

    def turn(x, position):
        out = np.empty(size)
        for i in range(size // 2):
            angle = position * 10_000.0 ** (-2 * i / size)
            pair = x[i] + 1j * x[i + size // 2]
            out[i], out[i + size // 2] = (
                (pair * np.exp(1j * angle)).real,
                (pair * np.exp(1j * angle)).imag,
            )
        return out

    def sequence(row):
        x = [p["embedding"][token] for token in row]
        for index in range(len(p["layers"]["query"])):
            w = jax.tree.map(lambda a, i=index: a[i], p["layers"])
            h = [norm(v, w["attention_norm"]["scale"]) for v in x]
            for i in reversed(range(len(x))):
                for head in range(n):
                    shared = head * kv // n
                    q = turn(h[i] @ w["query"][:, head], i)
                    keys = [turn(h[j] @ w["key"][:, shared], j) for j in range(i + 1)]
                    scores = np.exp([q @ k / np.sqrt(size) for k in keys])
                    values = [h[j] @ w["value"][:, shared] for j in range(i + 1)]
                    mixed = sum(s * v for s, v in zip(scores, values, strict=True)) / scores.sum()
                    x[i] = x[i] + mixed @ w["out"][head]
            for i in range(len(x)):
                h = norm(x[i], w["mlp_norm"]["scale"])
                gate = h @ w["gate"]
                x[i] = x[i] + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
        matrix = p.get("unembedding")
        matrix = p["embedding"] if matrix is None else matrix
        return np.stack([matrix @ norm(v, p["norm"]["scale"]) for v in x])

    return np.stack([sequence(row) for row in tokens])


@pytest.mark.parametrize(
    "arguments", [{}, {"kv_heads": 4, "tied": False}, {"kv_heads": 1, "layers": 1}]
)
def test_forward_is_the_equations(arguments):
    network = randomised(small(**arguments))
    chex.assert_trees_all_close(
        forward(network, TOKENS[:2]), formula(network, TOKENS[:2]), rtol=1e-4, atol=1e-4
    )


def test_later_tokens_leave_earlier_logits_alone():
    network = randomised(small())
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % VOCAB
    before, after = forward(network, TOKENS), forward(network, changed)
    chex.assert_trees_all_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:].max(axis=(0, 2)) > 1e-3).all()


def test_rotary_scores_depend_on_the_difference_of_positions():
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    every = lambda x: rotary(jnp.broadcast_to(x, (20, 1, 8)), rotary_table(jnp.arange(20), 8))[:, 0]
    scores = np.asarray(every(q) @ every(k).T)
    for difference in range(-19, 20):
        assert np.ptp(np.diagonal(scores, difference)) < 2e-5
    assert np.ptp(scores[0]) > 0.1
    lengths = jnp.linalg.norm(every(q), axis=-1)
    chex.assert_trees_all_close(lengths, np.full(20, np.linalg.norm(q)), rtol=1e-5)


def test_grouped_queries_are_repeated_keys_and_values():
    grouped = randomised(small())
    graphdef, _ = nnx.split(small(kv_heads=4))
    state = nnx.state(grouped)
    for name in ("key", "value"):
        state["layers"][name] = jax.tree.map(lambda x: jnp.repeat(x, 2, 2), state["layers"][name])
    chex.assert_trees_all_close(
        forward(nnx.merge(graphdef, state), TOKENS), forward(grouped, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_scan_is_a_loop_over_layers():
    network = randomised(small())

    @nnx.jit
    def loop(network):
        x, table = network.embedding[...][TOKENS], rotary_table(jnp.arange(6), 4)
        for index in range(3):
            layer = jax.tree.map(lambda a, i=index: a[i], network.layers)
            x = layer(x, table, causal_attention)
        return network.norm(x) @ network.embedding[...].T

    chex.assert_trees_all_close(forward(network, TOKENS), loop(network), rtol=1e-5, atol=1e-5)


def test_layers_are_drawn_apart():
    query = small().layers.query[...]
    assert np.abs(query[0] - query[1]).max() > 0.1


def test_rematerialisation_gives_the_same_gradients():
    plain, again = (nnx.split(small(remat=remat)) for remat in (False, True))
    gradients = [jax.jit(jax.grad(loss_of, 1), static_argnums=0)(*pair) for pair in (plain, again)]
    chex.assert_trees_all_close(*map(jax.tree.leaves, gradients), rtol=1e-5, atol=1e-7)
    text = str(jax.make_jaxpr(lambda s: jax.grad(loss_of, 1)(again[0], s))(again[1]))
    assert "remat" in text or "checkpoint" in text


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    network = small(dtype=jnp.bfloat16)
    seen = []

    def attention(q, k, v):
        seen.append({q.dtype, k.dtype, v.dtype})
        return causal_attention(q, k, v)

    network.attention_fn = attention
    graphdef, state = nnx.split(network)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    logits = forward(network, TOKENS)
    assert logits.dtype == jnp.float32 and seen == [{jnp.dtype(jnp.bfloat16)}]
    chex.assert_trees_all_close(logits, forward(small(), TOKENS), atol=0.02)
    gradients = jax.tree.leaves(jax.eval_shape(jax.grad(partial(loss_of, graphdef)), state))
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.float32)}


def test_attention_is_injected():
    network = small(attention_fn=lambda q, k, v: jnp.zeros_like(q))
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    chex.assert_trees_all_equal(forward(network, TOKENS)[:, 1:], forward(network, changed)[:, 1:])


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count(tied):
    layers, d, n, k, f = 3, 16, 4, 2, 24
    size = d // n
    expected = (1 if tied else 2) * VOCAB * d + d
    expected += layers * (2 * d * n * size + 2 * d * k * size + 3 * d * f + 2 * d)
    found = jax.tree.leaves(nnx.state(small(tied=tied), nnx.Param))
    assert sum(x.size for x in found) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_loss_at_initialisation_is_that_of_chance(tied):
    network = Transformer(256, layers=2, embed=64, heads=4, tied=tied, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.uint8)
    loss = next_token_loss(forward(network, tokens), tokens)
    assert float(loss) == pytest.approx(np.log(256), abs=0.1)


def test_loss_is_the_next_tokens():
    logits = np.random.default_rng(0).normal(size=(2, 4, 5))
    tokens = np.array([[0, 1, 2, 3], [4, 3, 2, 1]], np.uint8)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = [-np.log(p[b, i, tokens[b, i + 1]]) for b in range(2) for i in range(3)]
    found = next_token_loss(jnp.asarray(logits, jnp.float32), tokens)
    chex.assert_trees_all_close(found, np.float32(np.mean(nats)), rtol=1e-6)
    with pytest.raises(ValueError, match="no next token"):
        next_token_loss(jnp.zeros((2, 1, 5)), jnp.zeros((2, 1), int))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "embed=16 does not divide into 3 heads"),
        ({"heads": 16, "kv_heads": 16}, "even size"),
        ({"kv_heads": 3}, "heads=4 do not divide into groups for kv_heads=3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_logical_names_map_to_the_mesh():
    specs = parameter_specs(make_mesh({"data": 4, "model": 2}), nnx.state(small(tied=False)), RULES)
    layers, value = specs["layers"], lambda leaf: tuple(leaf.get_value())
    assert value(layers["query"]) == (None, None, "model", None)
    assert value(layers["key"]) == value(layers["value"]) == (None, None, None, None)
    assert value(layers["out"]) == (None, "model", None, None)
    assert value(layers["gate"]) == value(layers["up"]) == (None, None, "model")
    assert value(layers["down"]) == (None, "model", None)
    assert value(specs["embedding"]) == value(specs["unembedding"]) == (None, None)
    every = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    shapes = jax.tree.leaves(nnx.state(small(tied=False)))
    assert [len(spec) for spec in every] == [x.ndim for x in shapes]  # each axis has a name


def test_steps_on_a_mesh_equal_those_on_one_device():
    graphdef, params = nnx.split(small())
    loss = lambda params, frozen, batch, key: (loss_of(graphdef, params, batch), {})
    results = []
    for sizes, devices in (({"data": 1}, jax.devices()[:1]), ({"data": 4, "model": 2}, None)):
        mesh = make_mesh(sizes, devices)
        train = make_train_step(loss, optax.sgd(0.5), mesh, params, rules=RULES)
        state = train.init(params)
        for _ in range(3):
            state, metrics = train.step(state, shard_batch(mesh, TOKENS))
        results.append(jax.device_get((jax.tree.leaves(state.params), metrics["loss"])))
    chex.assert_trees_all_close(*results, atol=1e-5)
    assert state.params["layers"]["gate"][...].sharding.spec == P(None, None, "model")
