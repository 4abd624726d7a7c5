"""Compressed means: hand cases, conservation, and one program under vmap and shard_map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlib.collectives import (
    chunk_length,
    compressed_mean,
    gathered_mean,
    require_local,
    rounded_mean,
    vary,
)
from rlib.compression import Identity, ScaledSign, TopK
from rlib.parallel import make_mesh, wire_bytes


def sign_numpy(u, mask, scale):
    kept, count = u[mask], max(mask.sum(), 1)
    s = np.sqrt((kept**2).sum() / count) if scale == "l2" else np.abs(kept).sum() / count
    return np.where(mask, np.where(u >= 0, s, -s), 0)


def mean_numpy(u, worker_error, server_error, mask, scale="l2"):
    """The two phases, worker by worker, in float64. u: (n, d)."""
    n, d = u.shape
    length = -(-d // n)
    total = np.where(mask, u + worker_error, 0)
    sent = np.stack([sign_numpy(row, mask, scale) for row in total])
    mean, server = np.zeros(d), np.zeros((n, length))
    for j in range(n):
        part = slice(j * length, min((j + 1) * length, d))
        size = max(part.stop - part.start, 0)
        c = np.where(mask[part], sent[:, part].mean(axis=0) + server_error[j, :size], 0)
        mean[part] = sign_numpy(c, mask[part], scale)
        server[j, :size] = c - mean[part]
    return mean, total - sent, server


def random_case(n, d, seed=0, masked=False):
    draw = np.random.default_rng(seed)
    mask = draw.uniform(size=d) > 0.3 if masked else np.ones(d, bool)
    server = draw.normal(size=(n, -(-d // n)))
    return draw.normal(size=(n, d)), np.where(mask, draw.normal(size=(n, d)), 0), server, mask


def by_vmap(u, worker_error, server_error, mask, scale="l2"):
    args = [jnp.asarray(a, jnp.float32) for a in (u, worker_error, server_error)]
    return mean_by_vmap(*args, jnp.asarray(mask), scale=scale)


@partial(jax.jit, static_argnames="scale")
def mean_by_vmap(u, worker_error, server_error, mask, scale):
    one = lambda *a: compressed_mean(*a, "data", mask=mask, scale=scale)
    return jax.vmap(one, axis_name="data")(u, worker_error, server_error)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["l2", "l1"])
@pytest.mark.parametrize(("n", "d"), [(1, 5), (2, 4), (3, 7), (8, 3), (8, 100), (4, 10_001)])
def test_against_the_equations(n, d, scale, masked):
    u, worker, server, mask = random_case(n, d, masked=masked)
    if n == 1:
        server = np.zeros_like(server)  # the server of one worker keeps no error
    expected = mean_numpy(u, worker, server, mask, scale)
    got = by_vmap(np.where(mask, u, np.nan), worker, server, mask, scale)  # nan: not read
    for row in np.asarray(got.mean):
        np.testing.assert_allclose(row[mask], expected[0][mask], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.worker_error[:, mask], expected[1][:, mask], atol=2e-5)
    length = chunk_length(d, n)
    inside = np.pad(mask, (0, n * length - d)).reshape(n, length)
    np.testing.assert_allclose(np.where(inside, got.server_error, 0), expected[2], atol=2e-5)


def test_the_specifications_hand_case():
    m = 0.1 * np.array([[1.0, -2, 3, 0], [-1, 4, 1, 2]])
    got = by_vmap(m, np.zeros((2, 4)), np.zeros((2, 2)), np.ones(4, bool))
    np.testing.assert_allclose(got.mean[0], [-0.023719, 0.023719, 0.210802, 0.210802], atol=1e-6)
    np.testing.assert_allclose(
        got.worker_error[0], [-0.087083, -0.012917, 0.112917, -0.187083], atol=1e-6
    )
    np.testing.assert_allclose(
        got.worker_error[1], [0.134521, 0.165479, -0.134521, -0.034521], atol=1e-6
    )
    np.testing.assert_allclose(got.server_error, 0, atol=1e-7)


def test_nothing_is_lost():
    """mean + server error + mean worker error stays what came in, coordinate by coordinate."""
    u, worker, server, mask = random_case(4, 50)
    got = by_vmap(u, worker, server, mask)
    flat = np.asarray(got.server_error).reshape(-1)[:50]
    left = np.asarray(got.mean[0]) + flat + np.asarray(got.worker_error).mean(axis=0)
    right = u.mean(axis=0) + server.reshape(-1)[:50] + worker.mean(axis=0)
    np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_masked_tensor_is_left_alone():
    u, worker, server, _ = random_case(4, 20)
    got = by_vmap(u, 0 * worker, 0 * server, np.zeros(20, bool))
    assert not np.asarray(got.mean).any()
    assert not np.asarray(got.worker_error).any()
    assert not np.asarray(got.server_error).any()


def test_shard_map_gives_the_bits_of_vmap():
    n, shapes = 8, {"a": (13,), "b": (3, 500), "c": ()}
    draw = np.random.default_rng(1)
    tree = {k: draw.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()}
    worker = {k: 0.1 * v for k, v in tree.items()}
    server = {
        k: np.zeros((n, chunk_length(int(np.prod(s)), n)), np.float32) for k, s in shapes.items()
    }
    one = lambda *a: compressed_mean(*a, "data")
    expected = jax.jit(jax.vmap(one, axis_name="data"))(tree, worker, server)

    def worker_side(*args):
        mean, *errors = one(*jax.tree.map(lambda x: x[0], args))
        return mean, jax.tree.map(lambda x: x[None], errors)

    split = jax.shard_map(
        worker_side, mesh=make_mesh({"data": n}), in_specs=P("data"), out_specs=(P(), P("data"))
    )
    mean, (worker_error, server_error) = jax.jit(split)(tree, worker, server)
    for key in shapes:
        np.testing.assert_allclose(mean[key], expected.mean[key][0], rtol=1e-6)
        np.testing.assert_array_equal(np.sign(mean[key]), np.sign(expected.mean[key][0]))
        np.testing.assert_allclose(worker_error[key], expected.worker_error[key], atol=1e-6)
        np.testing.assert_allclose(server_error[key], expected.server_error[key], atol=1e-6)


@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("codec", [Identity(), TopK(k=3), ScaledSign("l1")])
def test_gathered_mean_is_the_mean_of_the_messages(codec, scope):
    draw = np.random.default_rng(0)
    tree = {
        "a": draw.normal(size=(4, 6)).astype(np.float32),
        "b": draw.normal(size=(4, 3, 2)).astype(np.float32),
    }
    run = jax.vmap(lambda t: gathered_mean(codec, None, t, "data", scope=scope), axis_name="data")
    mean, own = jax.jit(run)(tree)
    for key in tree:
        np.testing.assert_allclose(mean[key][1], np.mean(own[key], axis=0), atol=1e-6)
    if isinstance(codec, TopK):
        kept = sum((np.asarray(own[k]) != 0).reshape(4, -1).sum(axis=1) for k in tree)
        assert set(kept.tolist()) == {3 if scope == "global" else 6}


def test_one_worker_sends_nothing():
    mean, own = gathered_mean(TopK(k=1), None, {"a": jnp.array([1.0, -2.0])}, None)
    np.testing.assert_array_equal(mean["a"], [0, -2])
    np.testing.assert_array_equal(mean["a"], own["a"])


def test_what_is_already_averaged_is_refused():
    mesh = make_mesh({"data": 8})
    check = lambda x: (require_local({"w": x}, "data", "me"), x)[1]
    spec = {"mesh": mesh, "in_specs": P(), "out_specs": P()}
    with pytest.raises(ValueError, match=r"\['w'\] is the same on all workers"):
        jax.jit(jax.shard_map(check, **spec))(jnp.ones(3))
    jax.jit(jax.shard_map(lambda x: jax.lax.pmean(check(vary(x, "data")), "data"), **spec))(
        jnp.ones(3)
    )
    with pytest.raises(ValueError, match="no axis 'data'"):
        require_local({"w": jnp.ones(3)}, "data", "me")


@pytest.mark.parametrize("n", [2, 8])
def test_rounded_mean_is_the_mean_to_half_precision_and_sends_two_bytes(n):
    draw = np.random.default_rng(0)
    tree = {
        "a": draw.normal(size=(n, 5)).astype(np.float32),
        "b": draw.normal(size=(n, 3, 40)).astype(np.float32),
    }
    run = lambda t: rounded_mean(t, "data", jnp.bfloat16)
    got = jax.jit(jax.vmap(run, axis_name="data"))(tree)
    for key in tree:
        np.testing.assert_allclose(got[key][0], tree[key].mean(axis=0), rtol=0.02, atol=0.02)
        np.testing.assert_array_equal(got[key][0], got[key][-1])
    mesh = make_mesh({"data": n}, jax.devices()[:n])
    split = jax.shard_map(
        lambda t: run(jax.tree.map(lambda x: x[0], t)), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    sent = wire_bytes(jax.jit(split).lower(tree).compile(), mesh)
    padded = sum(-(-x[0].size // n) * n for x in tree.values())
    assert sent.total() == 2 * 2 * padded * (n - 1) / n
