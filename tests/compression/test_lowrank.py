from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.compression import Dense, LowRank, LowRankPayload


@partial(jax.jit, static_argnums=0)
def compress(codec, key, m):
    return codec.decode(codec.encode(key, m), m)


def apply(codec, m, key=None):
    return np.asarray(compress(codec, key, m), np.float64)


def matrix(*singular_values, rows=12, columns=9):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((rows, len(singular_values))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, len(singular_values))))
    return (u * singular_values @ v.T).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_matrix_of_its_rank_is_exact(rank):
    m = matrix(*np.arange(3.0, 3.0 - rank, -1.0))
    np.testing.assert_allclose(apply(LowRank(rank), m), m, atol=1e-5)


def test_many_iterations_reach_the_truncated_svd():
    m = matrix(4.0, 2.0, 0.5, 0.2)
    u, s, vt = np.linalg.svd(m.astype(np.float64))
    best = u[:, :2] * s[:2] @ vt[:2]
    np.testing.assert_allclose(apply(LowRank(2, power_iterations=20), m), best, atol=1e-5)
    error = [np.linalg.norm(m - apply(LowRank(2, power_iterations=t), m)) for t in (1, 2, 4, 20)]
    assert error == sorted(error, reverse=True)


def test_columns_of_p_are_orthonormal_and_the_error_is_orthogonal():
    m = np.random.default_rng(1).standard_normal((12, 9)).astype(np.float32)
    payload = LowRank(3).encode(jax.random.key(0), m)
    assert isinstance(payload, LowRankPayload)
    np.testing.assert_allclose(payload.p.T @ payload.p, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(payload.p.T @ (m - payload.p @ payload.q.T), 0, atol=1e-5)


def test_key_or_fixed_start():
    m = np.random.default_rng(1).standard_normal((12, 9)).astype(np.float32)
    np.testing.assert_array_equal(apply(LowRank(1), m), apply(LowRank(1), m))
    outs = [apply(LowRank(1), m, jax.random.key(seed)) for seed in (1, 2)]
    assert np.abs(outs[0] - outs[1]).max() > 0.01


def test_the_fixed_start_has_a_kernel():
    # Rows of M orthogonal to the fixed Q: M Q = 0, and what comes is not what was in M.
    q = np.asarray(jax.random.normal(jax.random.key(0), (9, 1)), np.float64)[:, 0]
    row = np.eye(9)[0] - q * q[0] / (q @ q)
    m = np.outer(np.arange(12.0) + 1, row).astype(np.float32)
    m[0] = 0
    fresh = np.linalg.norm(m - apply(LowRank(1), m, jax.random.key(7))) / np.linalg.norm(m)
    assert fresh < 1e-4
    # In exact arithmetic P is arbitrary; a perturbation towards Q decides it.
    m = m + 1e-3 * np.outer(np.eye(12)[0], q).astype(np.float32)
    fixed = np.linalg.norm(m - apply(LowRank(1), m)) / np.linalg.norm(m)
    assert fixed > 0.999


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0, 5), (9, 1)])
def test_what_would_not_shrink_travels_whole(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    payload = LowRank(2).encode(None, x)
    assert isinstance(payload, Dense) and payload.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(LowRank(2).decode(payload, x), x)
    assert LowRank(2).contraction(shape) == 1


def test_more_axes_are_a_matrix_of_the_first_and_the_rest():
    x = np.random.default_rng(0).standard_normal((8, 3, 4)).astype(np.float32)
    payload = LowRank(2).encode(None, x)
    assert payload.p.shape == (8, 2) and payload.q.shape == (12, 2)
    np.testing.assert_allclose(
        apply(LowRank(2), x).reshape(8, 12), apply(LowRank(2), x.reshape(8, 12)), atol=1e-6
    )
    assert LowRank(2).contraction((8, 3, 4)) == pytest.approx(2 / 12)


def test_zero_matrix():
    np.testing.assert_array_equal(apply(LowRank(2), jnp.zeros((12, 9))), 0)


def test_bad_arguments():
    for arguments in ({"rank": 0}, {"power_iterations": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            LowRank(**arguments)
