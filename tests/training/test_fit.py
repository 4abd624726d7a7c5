import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib.parallel import make_mesh, make_train_step, shard_batch
from rlib.training import Phase, fit

fit_module = importlib.import_module("rlib.training.fit")
TARGET = np.linspace(0, 1, 16, dtype=np.float32)[:, None]


def loss(w, frozen, batch, key):
    return jnp.mean((batch - w) ** 2), {"w": w.sum()}


@pytest.fixture(scope="module")
def built():
    mesh = make_mesh({"data": 8})
    train = make_train_step(loss, optax.sgd(0.1), mesh, jnp.zeros(1))
    return train, shard_batch(mesh, TARGET)


def start(train):
    return train.init(jnp.zeros(1))


def closed_form(steps):
    """w <- w - 0.1 * 2 (w - mean): an error that shrinks by 0.8 a step."""
    return TARGET.mean() * (1 - 0.8**steps)


def test_gradient_descent_on_a_quadratic(built):
    train, data = built
    state, history = fit([Phase(train, 25)], start(train), data, chunk=10)
    assert int(state.step) == 25
    assert state.params[0] == pytest.approx(closed_form(25), rel=1e-5)
    np.testing.assert_allclose(history["w"], closed_form(np.arange(25)), rtol=1e-5)
    assert history["loss"].shape == (25,)


def test_chunks_do_not_matter(built):
    train, data = built
    runs = [fit([Phase(train, 23)], start(train), data, chunk=c) for c in (1, 7, 100)]
    chex.assert_trees_all_equal(*[history for _, history in runs])
    chex.assert_trees_all_equal(*[state.params for state, _ in runs])


def test_it_continues_where_the_state_stands(built):
    train, data = built
    whole, _ = fit([Phase(train, 20)], start(train), data, chunk=6)
    part, first = fit([Phase(train, 11)], start(train), data, chunk=6)
    rest, second = fit([Phase(train, 20)], part, data, chunk=6)
    chex.assert_trees_all_equal(rest.params, whole.params)
    assert (len(first["loss"]), len(second["loss"])) == (11, 9)
    done, nothing = fit([Phase(train, 20)], rest, data, chunk=6)
    assert int(done.step) == 20
    assert nothing == {}


def test_phases_follow_each_other_and_are_skipped_when_done(built):
    train, data = built
    slow = make_train_step(loss, optax.sgd(0.0), train.mesh, jnp.zeros(1))
    phases = [Phase(train, 10), Phase(slow, 5), Phase(train, 3)]
    state, history = fit(phases, start(train), data, chunk=4)
    assert state.params[0] == pytest.approx(closed_form(13), rel=1e-5)
    assert len(set(history["w"][10:16].tolist())) == 1
    part, _ = fit(phases[:1], start(train), data, chunk=4)
    again, _ = fit(phases, part, data, chunk=4)
    chex.assert_trees_all_equal(again.params, state.params)


def test_a_phase_ends_when_it_is_told_to_and_a_restart_remembers(built):
    train, data = built
    slow = make_train_step(loss, optax.sgd(0.0), train.mesh, jnp.zeros(1))
    phases = [Phase(train, 50, until=lambda s: float(s.params[0]) > 0.4), Phase(slow, 6)]
    state, _ = fit(phases, start(train), data, chunk=4)
    assert int(state.step) == 8 + 6  # 0.8^8 = 0.17: the first look at which w exceeds 0.4
    assert int(state.phase_start) == 8
    stops = []

    def stop(state, history):
        stops.append(jax.tree.map(np.asarray, state._replace(key=None)))
        if len(stops) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(phases, start(train), data, chunk=4, on_chunk=stop)
    assert (int(stops[-1].step), int(stops[-1].phase)) == (12, 1)
    for stopped in stops:
        again = train.init(jnp.zeros(1))._replace(
            **{k: v for k, v in stopped._asdict().items() if k != "key"}
        )
        ended, _ = fit(phases, jax.device_put(again, train.shardings), data, chunk=4)
        chex.assert_trees_all_equal(ended.params, state.params)
        assert int(ended.step) == 14


def test_a_stream_gives_what_resident_data_give(built):
    train, data = built
    resident, expected = fit([Phase(train, 13)], start(train), data, chunk=5)
    streamed, history = fit([Phase(train, 13)], start(train), iter([TARGET] * 13), chunk=5)
    chex.assert_trees_all_equal(streamed.params, resident.params)
    chex.assert_trees_all_equal(history, expected)


def test_a_stream_that_ends_early_is_an_error(built):
    train, _ = built
    with pytest.raises(ValueError, match="ended after 2"):
        fit([Phase(train, 9)], start(train), iter([TARGET] * 2), chunk=5)


def test_one_program_serves_all_lengths_and_draws(built):
    train, data = built
    fit([Phase(train, 3)], start(train), data, chunk=5)
    compiled = fit_module._run_resident._cache_size()
    fit([Phase(train, 12)], train.init(jnp.ones(1)), data, chunk=5)
    assert fit_module._run_resident._cache_size() == compiled
    fit([Phase(train, 12)], train.init(jnp.ones(1)), data, chunk=17)
    assert fit_module._run_resident._cache_size() == compiled + 1


def test_on_chunk_sees_every_chunk(built):
    train, data = built
    seen = []
    fit(
        [Phase(train, 7)],
        start(train),
        data,
        chunk=3,
        on_chunk=lambda s, h: seen.append((int(s.step), len(h["loss"]))),
    )
    assert seen == [(3, 3), (6, 3), (7, 1)]


def test_looks_join_the_history_once_a_chunk(built):
    train, data = built
    seen, look = [], lambda state: {"at": state.step, "error": 1 - state.params[0]}
    state, history = fit(
        [Phase(train, 4), Phase(train, 3)],
        start(train),
        data,
        chunk=3,
        look=look,
        on_chunk=lambda s, h: seen.append(h["at"].tolist()),
    )
    assert history["at"].tolist() == [3, 4, 7]
    assert seen == [[3], [4], [7]]
    assert history["error"][-1] == 1 - state.params[0]
    assert history["loss"].shape == (7,)
    with pytest.raises(ValueError, match="look gives 'loss'"):
        fit([Phase(train, 1)], start(train), data, look=lambda state: {"loss": 0.0})


def test_empty_chunks_are_refused(built):
    train, data = built
    with pytest.raises(ValueError, match="chunk=0"):
        fit([Phase(train, 3)], start(train), data, chunk=0)
