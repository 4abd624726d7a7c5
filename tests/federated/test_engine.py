"""The round: equal results however it is computed, who takes part, links, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib import compression, federated, parallel, training

WORK = federated.LocalWork(8, steps=3)
N, S = 10, 6


def loss(params, batch, key):
    logits = batch["x"] @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


PARAMS = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
ALGORITHMS = {
    "fedavg": federated.fedavg(optax.sgd(0.1, momentum=0.9), optax.adam(0.01)),
    "fedexp": federated.fedexp(optax.sgd(0.1)),
    "fedhyper": federated.fedhyper(0.1, client="cl"),
    "fedavg_m": federated.fedavg_m(0.1, 0.3, 0.2, variance_reduced=True),
    "scaffold_m": federated.scaffold_m(0.1, 0.3, 0.2),
    "fedspeed": federated.fedspeed(optax.sgd(0.1)),
}


def after(algorithm, held, rounds=2, work=WORK, clients=N, sampled=S, **options):
    made = federated.make_rounds(algorithm, loss, work, clients, sampled, **options)
    train = federated.make_train_step(made, PARAMS)
    state = train.init(PARAMS, (), jax.random.key(7))
    return training.fit([training.Phase(train, rounds)], state, held, chunk=rounds)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.fixture(scope="module")
def plain(digits):
    """Two rounds of each algorithm, one client after another."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = after(ALGORITHMS[name], digits, at_once=1)
        return found[name]

    return of


@pytest.mark.parametrize("name", ALGORITHMS)
def test_chunks_give_the_same(plain, digits, name):
    """Four side by side of six, so that the last chunk is padded."""
    state, history = after(ALGORITHMS[name], digits, at_once=4)
    assert_close((state.params, state.opt_state), (plain(name)[0].params, plain(name)[0].opt_state))
    assert_close(history, plain(name)[1])


@pytest.mark.parametrize("name", ["fedavg", "fedhyper", "scaffold_m"])
def test_a_mesh_gives_the_same(plain, digits, name, assert_replicas_equal):
    """Four devices for six clients of ten: slots and kept state are padded."""
    mesh = parallel.make_mesh({"data": 4}, jax.devices()[:4])
    state, history = after(ALGORITHMS[name], parallel.place(mesh, digits), mesh=mesh)
    expected, expected_history = plain(name)
    assert_replicas_equal((state.params, state.opt_state.server))
    assert_close(state.params, expected.params)
    assert_close(state.opt_state.server, expected.opt_state.server)
    clients = jax.tree.map(lambda x: x[:N], state.opt_state.clients)
    assert_close(clients, expected.opt_state.clients)
    assert_close(history, expected_history)
    for leaf in jax.tree.leaves(state.opt_state.clients):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {3}


def test_what_travels_between_devices(digits):
    """Without kept state: sums only. No examples, no models of clients."""
    mesh = parallel.make_mesh({"data": 2}, jax.devices()[:2])
    made = federated.make_rounds(ALGORITHMS["fedavg"], loss, WORK, N, S, mesh=mesh)
    train = federated.make_train_step(made, PARAMS)
    state = jax.eval_shape(train.init, PARAMS)
    report = parallel.wire_bytes(train.step.lower(state, digits).compile(), mesh)
    model = 4 * (64 * 10 + 10)
    assert report.total(kind="all-reduce") == report.total()
    assert model <= report.total() <= model + 64  # a ring of two sends as much as it reduces


def test_one_round_is_the_numpy_round(digits):
    """Full gradients, unequal sizes, weights by examples; float64."""
    work = federated.LocalWork(None, steps=2)
    state, history = after(federated.fedavg(optax.sgd(0.5)), digits, 1, work=work, sampled=None)
    x, y = np.asarray(digits.examples["x"], np.float64), np.asarray(digits.examples["y"])
    total, mean_loss = np.zeros((65, 10)), 0.0
    sizes = np.asarray(digits.sizes)
    for rows, size in zip(np.asarray(digits.rows), sizes, strict=True):
        inputs = np.concatenate([x[rows[:size]], np.ones((size, 1))], axis=1)
        targets, w, losses = np.eye(10)[y[rows[:size]]], np.zeros((65, 10)), []
        for _ in range(2):
            scores = np.exp(inputs @ w)
            chances = scores / scores.sum(axis=1, keepdims=True)
            losses.append(-np.mean(np.log(np.sum(chances * targets, axis=1))))
            w -= 0.5 * inputs.T @ (chances - targets) / size
        total += size / sizes.sum() * w
        mean_loss += size / sizes.sum() * np.mean(losses)
    np.testing.assert_allclose(state.params["w"], total[:64], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["b"], total[64], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history["loss"], [mean_loss], rtol=1e-5)


def test_an_epoch_sees_every_example_once(digits):
    """A loss linear in x: what a client moves is the sum of its batches' means."""
    seen = lambda x, batch, key: batch["index"] @ x
    rows = 7 * np.arange(len(digits.examples["y"]))
    held = digits._replace(examples={"index": np.eye(len(rows), dtype=np.float32)})
    work = federated.LocalWork(8, epochs=2)
    made = federated.make_rounds(
        federated.fedavg(optax.sgd(1.0)), seen, work, N, None, weights=[0] * 3 + [1] + [0] * 6
    )
    state, _ = jax.jit(made.step)(made.init(jnp.zeros(len(rows))), held)
    size = int(held.sizes[3])
    moved = -np.asarray(state.params)
    own = np.asarray(held.rows[3][:size])
    assert moved[np.setdiff1d(np.arange(len(rows)), own)].max() == 0
    last = size % 8 or 8
    once_each = np.array([2 / 8, 2 / last, 1 / 8 + 1 / last])  # by the batches that it was in
    assert np.abs(moved[own][:, None] - once_each).min(axis=1).max() < 1e-6
    np.testing.assert_allclose(moved.sum(), 2 * -(-size // 8), rtol=1e-5)


def test_clients_of_fewer_examples_make_fewer_steps(digits):
    """Momentum within a round tells steps that were left out from steps of zeros."""
    algorithm = federated.fedavg(optax.sgd(0.1, momentum=0.9))
    work = federated.LocalWork(16, epochs=1)
    small = int(np.argmin(digits.sizes))
    weights = np.eye(N)[small]
    state, _ = after(algorithm, digits, 1, work=work, sampled=None, weights=weights)
    alone = federated.client_data(
        digits.examples, [np.asarray(digits.rows[small][: digits.sizes[small]])]
    )
    steps = work.count(int(alone.sizes[0]))
    assert steps < work.count(digits.rows.shape[1])
    moved = {"b": jnp.zeros(10)}
    # A gradient that is constant: sum over steps of (1 - 0.9^k) / 0.1.
    constant = lambda params, batch, key: jnp.full(len(batch["y"]), params["b"].sum())
    for held, clients, given in ((digits, N, weights), (alone, 1, "equal")):
        made = federated.make_rounds(algorithm, constant, work, clients, weights=given)
        found, _ = jax.jit(made.step)(made.init(moved), held)
        expected = -0.1 * sum((1 - 0.9**k) / 0.1 for k in range(1, steps + 1))
        np.testing.assert_allclose(found.params["b"], expected, rtol=1e-5)
    assert np.isfinite(state.params["w"]).all()


def test_every_subset_is_as_likely():
    draw = jax.vmap(lambda key: federated.engine._draw(key, 6, 3, False, None, 0)[0])
    chosen = np.sort(np.asarray(draw(jax.random.split(jax.random.key(0), 20_000))), axis=1)
    subsets, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(subsets) == 20 and all(len(set(row)) == 3 for row in subsets.tolist())
    np.testing.assert_allclose(counts / 1000, 1, atol=0.13)  # four standard deviations


def test_with_replacement_a_client_can_train_twice_on_other_batches(digits):
    draw = jax.vmap(lambda key: federated.engine._draw(key, 4, 4, True, None, 0)[0])
    chosen = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(np.bincount(chosen.ravel()) / 4000, 1, atol=0.06)
    difference = lambda messages, weights: jax.tree.map(lambda x: x[0] - x[1], messages)
    algorithm = federated.fedavg(optax.sgd(0.1))._replace(mix=difference)
    alone = federated.client_data(digits.examples, [np.arange(50)])
    state, _ = after(algorithm, alone, 1, clients=1, sampled=2, replace=True)
    assert np.abs(state.params["w"]).max() > 0
    with pytest.raises(ValueError, match="keep state"):
        after(ALGORITHMS["scaffold_m"], digits, replace=True)


def test_who_is_not_available_is_not_drawn(digits):
    night = lambda key, round: jnp.arange(N) < 4
    state, history = after(ALGORITHMS["scaffold_m"], digits, 3, available=night)
    assert history["clients"].tolist() == [4, 4, 4]
    touched = np.abs(state.opt_state.clients["b"]).max(axis=1) > 0
    np.testing.assert_array_equal(touched, np.arange(N) < 4)
    assert history["bytes_down"][0] == 4 * (3 * 4 * 650 + 4)  # x, g, c, a weight
    nobody = lambda key, round: jnp.zeros(N, bool)
    state, history = after(ALGORITHMS["scaffold_m"], digits, 2, available=nobody)
    assert history["clients"].tolist() == [0, 0]
    assert_close(state.params, PARAMS)
    assert np.isnan(history["loss"]).all()  # not 0, which would look like the best one


def test_drop_outs_keep_their_state_and_weigh_nothing(digits):
    state, history = after(ALGORITHMS["scaffold_m"], digits, 1, sampled=None, dropout=0.5)
    touched = np.abs(state.opt_state.clients["b"]).max(axis=1) > 0
    assert 0 < touched.sum() == history["clients"][0] < N
    p = np.asarray(digits.sizes) / np.sum(digits.sizes)
    mean = np.tensordot(p, np.asarray(state.opt_state.clients["b"]), axes=1)
    np.testing.assert_allclose(state.opt_state.server.c["b"], mean, rtol=1e-4, atol=1e-6)
    _, history = after(ALGORITHMS["scaffold_m"], digits, 40, sampled=None, dropout=0.5, work=WORK)
    assert 4 < history["clients"].mean() < 6
    assert history["clients"].min() < history["clients"].max()
    np.testing.assert_array_equal(history["bytes_up"], history["clients"] * np.float32(2 * 4 * 650))


def poisoned(digits, client=2):
    """One client's pictures are not numbers."""
    x = np.array(digits.examples["x"])
    x[np.asarray(digits.rows[client])] = np.nan
    return digits._replace(examples={**digits.examples, "x": x})


def test_a_client_that_returns_nan_is_left_out_and_counted(digits):
    full = {"rounds": 2, "sampled": None}
    bad, history = after(ALGORITHMS["fedavg"], poisoned(digits), weights="equal", **full)
    assert history["nonfinite"].tolist() == [1, 1] and history["clients"].tolist() == [9, 9]
    others = 1.0 - np.eye(N)[2]
    without, expected = after(ALGORITHMS["fedavg"], digits, weights=others, **full)
    assert_close(bad.params, without.params)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    bad, _ = after(ALGORITHMS["scaffold_m"], poisoned(digits), weights="equal", **full)
    assert not np.any(bad.opt_state.clients["b"][2])
    mean = bad.opt_state.clients["b"].mean(axis=0)
    np.testing.assert_allclose(bad.opt_state.server.c["b"], mean, rtol=1e-5, atol=1e-6)


def test_a_client_that_returns_nan_is_an_error_on_demand(digits):
    mesh = parallel.make_mesh({"data": 4}, jax.devices()[:4])
    with pytest.raises(FloatingPointError, match="round 0: something of 1 clients is not finite"):
        after(ALGORITHMS["fedavg"], poisoned(digits), sampled=None, nonfinite="error", mesh=mesh)
    after(ALGORITHMS["fedavg"], digits, sampled=None, nonfinite="error", mesh=mesh)


def test_a_step_of_the_server_that_is_not_finite_is_not_taken(quadratics):
    """Adam's second moment overflows: model and moments stay, and the round is counted."""
    two = quadratics([1, 1], [1e25, 1e25])
    algorithm = federated.fedavg(optax.sgd(1.0), optax.adam(0.1))
    xs, seen, state = two.run(algorithm, 1, rounds=2, start=0.0)
    assert xs.tolist() == [0, 0] and [m["nonfinite"] for m in seen] == [2, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state.server))
    # Weights as large as they get are shares like others.
    xs, *_ = quadratics([1, 1], [1, 3]).run(
        federated.fedavg(optax.sgd(1.0)), 1, rounds=1, start=0.0, weights=[3e38, 3e38]
    )
    assert xs.tolist() == [2]


def test_links_carry_codecs_and_count_their_bytes(digits):
    plain = federated.fedavg(optax.sgd(0.1))
    codec = compression.TopK(fraction=0.1)
    quantized = compression.StochasticQuantization(bits=8)
    bytes_of = lambda codec, tree: compression.payload_bytes(
        jax.eval_shape(lambda x: compression.encode_tree(codec, jax.random.key(0), x), tree)
    )
    _, history = after(plain, digits, up=codec, down=quantized)
    assert history["bytes_up"].tolist() == [S * bytes_of(codec, PARAMS)] * 2
    # Down goes the factor of the clients' rate as well, as it is.
    assert history["bytes_down"].tolist() == [S * (bytes_of(quantized, PARAMS) + 4)] * 2
    assert history["loss"][1] < history["loss"][0]
    _, history = after(plain, digits)
    assert history["bytes_up"].tolist() == [S * 4 * 650] * 2
    assert history["bytes_down"].tolist() == [S * 4 * 651] * 2


def test_a_lossy_codec_needs_error_feedback_where_clients_keep_state(two):
    """Else SCAFFOLD ends far from the minimum, as what clients keep is not what arrived."""
    codec = compression.NaturalCompression()
    for algorithm in (federated.scaffold(0.1, 0.5), federated.fedspeed(optax.sgd(0.1))):
        with pytest.raises(ValueError, match="error_feedback=True"):
            two.run(algorithm, 5, rounds=1, up=codec)
    two.run(federated.fedavg(optax.sgd(0.1)), 5, rounds=1, up=codec)


def test_single_numbers_are_not_coded(digits):
    """The clients' rate arrives as it was sent."""
    algorithm = federated.fedhyper(0.05, server=False, client="sl")
    _, history = after(algorithm, digits, 1, down=compression.NaturalCompression())
    assert history["beta"][0] == pytest.approx(0.05, rel=1e-6)


def test_kept_state_of_any_type_crosses_a_mesh(digits):
    def counting(more):
        def local(client, down, batches, grad):
            kept = {"times": client["times"] + more, "seen": True}
            return jax.tree.map(jnp.zeros_like, down), kept, {"loss": jnp.zeros(())}

        apply = lambda params, server, mixed, cohort: (params, server, {})
        client = lambda params: {"times": jnp.int32(0), "seen": False}
        return federated.Algorithm(local, apply, client=client)

    mesh = parallel.make_mesh({"data": 4}, jax.devices()[:4])
    state, _ = after(counting(1), digits, 3, mesh=mesh)
    kept = state.opt_state.clients
    assert kept["times"].sum() == 3 * S and kept["times"].dtype == jnp.int32
    np.testing.assert_array_equal(kept["seen"], kept["times"] > 0)
    with pytest.raises(TypeError, match="local turned state of int32 into float32"):
        after(counting(0.5), digits)


def test_half_precision_sums_many_steps_in_float32():
    held = federated.client_data(np.zeros(1, np.float32), [np.array([0])])
    linear = lambda x, batch, key: jnp.full(1, x)
    made = federated.make_rounds(
        federated.scaffold(1e-4, 1e-4), linear, federated.LocalWork(None, steps=600), 1
    )
    state, _ = jax.jit(made.step)(made.init(jnp.bfloat16(0)), held)
    assert float(state.opt_state.clients[0]) == 1.0


def test_epochs_are_shuffled_anew_and_under_64_bits_too(digits):
    work = federated.LocalWork(4, epochs=2)
    rows, size = jnp.asarray(digits.rows[0]), jnp.asarray(digits.sizes[0])

    def order(seed):
        batches = federated.clients.batches_of(work, jax.random.key(seed), rows, size)
        halves = zip(batches.rows.reshape(2, -1), batches.weights.reshape(2, -1), strict=True)
        return [np.asarray(half)[np.asarray(live) > 0].tolist() for half, live in halves]

    own = sorted(np.asarray(rows)[: int(size)].tolist())
    for epochs in (order(0), order(1)):
        assert all(sorted(epoch) == own for epoch in epochs) and epochs[0] != epochs[1]
    assert order(0) != order(1)
    with jax.enable_x64(True):
        assert all(sorted(epoch) == own for epoch in order(0))


def test_error_feedback_sends_later_what_was_left_out(digits):
    """Of a constant message every coordinate arrives in time; without feedback only the largest."""
    constant = federated.Algorithm(
        local=lambda client, down, batches, grad: (
            jnp.array([4.0, 3.0, 2.0, 1.0]), client, {"loss": jnp.zeros(())},
        ),
        apply=lambda params, server, mixed, cohort: (params + mixed, server, {}),
    )  # fmt: skip
    flat = lambda params, batch, key: jnp.zeros(len(batch["y"]))
    ends = {}
    for feedback in (False, True):
        made = federated.make_rounds(
            constant, flat, WORK, N, up=compression.TopK(k=1), error_feedback=feedback
        )
        state = made.init(jnp.zeros(4))
        step = jax.jit(made.step)
        for _ in range(20):
            state, _ = step(state, digits)
        ends[feedback] = np.asarray(state.params)
        left = state.opt_state.errors
    assert ends[False].tolist() == [80, 0, 0, 0]
    np.testing.assert_allclose(ends[True] + np.asarray(left)[0], [80, 60, 40, 20], rtol=1e-5)
    assert (ends[True] > 10).all()


def test_a_mix_of_ones_own_gets_all_messages(digits):
    """The mean of one's own is the built-in one, also over a mesh; a median resists an outlier."""
    mean = lambda messages, weights: jax.tree.map(
        lambda x: jnp.tensordot(weights, x, axes=1), messages
    )
    algorithm = ALGORITHMS["fedavg"]
    expected = after(algorithm, digits)[0].params
    assert_close(after(algorithm._replace(mix=mean), digits)[0].params, expected)
    mesh = parallel.make_mesh({"data": 4}, jax.devices()[:4])
    assert_close(after(algorithm._replace(mix=mean), digits, mesh=mesh)[0].params, expected)


def test_a_stopped_training_goes_on_to_the_same(digits):
    made = federated.make_rounds(ALGORITHMS["scaffold_m"], loss, WORK, N, S)
    train = federated.make_train_step(made, PARAMS)
    whole, _ = training.fit([training.Phase(train, 5)], train.init(PARAMS), digits, chunk=5)
    first, _ = training.fit([training.Phase(train, 2)], train.init(PARAMS), digits, chunk=5)
    stored = jax.tree.map(np.asarray, first._replace(key=jax.random.key_data(first.key)))
    again = stored._replace(key=jax.random.wrap_key_data(stored.key), phase=np.int32(0))
    rest, _ = training.fit([training.Phase(train, 5)], again, digits, chunk=5)
    jax.tree.map(np.testing.assert_array_equal, whole.params, rest.params)
    jax.tree.map(np.testing.assert_array_equal, whole.opt_state, rest.opt_state)


def test_simulate_is_fit(digits):
    made = federated.make_rounds(ALGORITHMS["fedavg"], loss, WORK, N, S)
    found = jax.jit(
        lambda key: federated.simulate(
            made, PARAMS, digits, 4, key=key, looks=2, look=lambda p: p["b"]
        )
    )(jax.random.key(7))
    state, history = after(ALGORITHMS["fedavg"], digits, 4)
    assert_close(found.state.params, state.params)
    assert_close(found.metrics, history)
    np.testing.assert_allclose(found.seen[-1], state.params["b"], rtol=1e-5)
    with pytest.raises(ValueError, match="not divisible into 3 looks"):
        federated.simulate(made, PARAMS, digits, 4, looks=3)


def test_kept_state_is_changed_in_place(digits, usual_optimizations):
    """A thousand clients' state: a round needs no second copy of it."""
    many = federated.client_data(digits.examples, [np.arange(i, i + 8) for i in range(1000)])
    made = federated.make_rounds(ALGORITHMS["fedspeed"], loss, WORK, 1000, 5)
    train = federated.make_train_step(made, PARAMS)
    state = jax.eval_shape(train.init, PARAMS)
    memory = train.step.lower(state, many).compile().memory_analysis()
    kept = 4 * 650 * 1000
    assert memory.alias_size_in_bytes >= kept
    assert memory.temp_size_in_bytes < kept / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampled": 11}, "1 to 10 clients"),
        ({"sampled": 0}, "1 to 10 clients"),
        ({"at_once": 0}, "at least one client"),
        ({"available": lambda key, round: jnp.full(N, 0.5)}, "a boolean for each of 10"),
        ({"available": lambda key, round: jnp.ones(3, bool)}, "a boolean for each of 10"),
        ({"weights": [0.0] * N}, "sum to 0"),
        ({"weights": [-1.0] + [1.0] * 9}, ">= 0"),
        ({"weights": [1.0]}, "10 finite numbers"),
        ({"weights": "size"}, '"examples", "equal"'),
        ({"dropout": 1.0}, "no probability"),
        ({"nonfinite": "ignore"}, '"drop" or "error"'),
        ({"error_feedback": True}, "needs a codec"),
        ({"clients": 9, "sampled": 3}, "data of 10 clients for rounds of 9"),
    ],
)
def test_mistakes_are_told(digits, options, message):
    with pytest.raises(ValueError, match=message):
        after(ALGORITHMS["fedavg"], digits, **options)


def test_mistakes_in_data_and_losses_are_told(digits):
    x = {"x": np.zeros(5)}
    for parts, message in (
        ([np.array([0]), np.array([], int)], r"clients \[1\] of 2 have no examples"),
        ([], "of 0 have no"),
        ([np.array([5])], "positions 5 to 5 of 5"),
    ):
        with pytest.raises(ValueError, match=message):
            federated.client_data(x, parts)
    for part in (np.array([True, False]), np.array([0.5]), np.array([[0]])):
        with pytest.raises(ValueError, match="positions are"):
            federated.client_data(x, [part])
    with pytest.raises(ValueError, match="of batches of at least 1"):
        federated.LocalWork(0, steps=1)
    with pytest.raises(ValueError, match="all need as many"):
        federated.client_data({"x": np.zeros(5), "y": np.zeros(4)}, [np.array([0])])
    for options in ({}, {"steps": 1, "epochs": 1}, {"steps": 0}, {"epochs": -1}):
        with pytest.raises(ValueError, match="steps or epochs"):
            federated.LocalWork(4, **options)
    made = federated.make_rounds(
        ALGORITHMS["fedavg"], lambda p, b, k: jnp.mean(loss(p, b, k)), WORK, N
    )
    with pytest.raises(ValueError, match="one value for each of the 8 examples"):
        made.step(made.init(PARAMS), digits)


def test_how_many_clients_train_side_by_side_on_a_cpu():
    dense = lambda size: {"w": jnp.zeros((size, 1)), "b": jnp.zeros(1)}
    at_once = lambda params: federated.engine._at_once(params, 20, None)
    assert at_once(dense(1000)) == 20  # all
    assert at_once(dense(2**17)) == 7
    assert at_once(dense(2**21)) == 1
    assert at_once({"kernel": jnp.zeros((3, 3, 1, 1))}) == 1
