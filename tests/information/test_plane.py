"""The rule's closed form, the network and its training against numpy, estimates by counting."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib import parallel
from rlib.information import plane

SMALL = plane.Training(hidden=(4, 3), bits=5, batch=8, learning_rate=0.01)
LABELS = (plane.patterns(5).sum(axis=1) > 2).astype(np.int32)
EPOCHS = [0, 1, 4]


@pytest.fixture(scope="module")
def trajectory():
    keys = jax.random.split(jax.random.key(0), 3)
    return plane.record_trajectory(SMALL, LABELS, EPOCHS, keys)


def outputs_of(params, widths, activation=np.tanh):
    """Hidden outputs and softmax of all patterns in float64, rows are patterns."""
    h, made, at = plane.patterns(widths[0]).astype(np.float64), [], 0
    for m, n in pairwise(widths):
        kernel = params[at : at + m * n].reshape(n, m).astype(np.float64)
        h = h @ kernel.T + params[at + m * n : at + m * n + n]
        at += m * n + n
        if at < len(params):
            h = activation(h)
            made.append(h)
    weights = np.exp(h - h.max(axis=1, keepdims=True))
    return [*made, weights / weights.sum(axis=1, keepdims=True)]


# The rule


def test_the_levels_have_the_closed_form():
    """All |C_ij| off the diagonal and the antipodes are 1 / sqrt 5, and P_l is even."""
    golden = (1 + np.sqrt(5)) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    vertices = np.array([np.roll(c, shift) for c in corners for shift in range(3)])
    opposite = np.argmin(vertices @ vertices.T, axis=1)
    x, _ = plane.icosahedral_rule()
    ones, pairs = x.sum(axis=1), (x * x[:, opposite]).sum(axis=1) / 2
    expected = 1.464 * ones**2 + 25.536 * (ones + 2 * pairs)
    np.testing.assert_allclose(plane.icosahedral_levels(), expected, atol=1e-6)


def test_the_classes_are_nearly_balanced_and_close_to_a_threshold():
    x, y = plane.icosahedral_rule()
    assert x.shape == (4096, 12)
    assert y.sum() == 1966
    assert np.mean((x.sum(axis=1) > 6) == y) == pytest.approx(0.907, abs=5e-4)


@pytest.mark.parametrize("bits", [0.5, 0.99])
def test_soft_labels_have_the_information_asked_for(bits):
    levels = plane.icosahedral_levels()
    p = plane.soft_labels(levels, bits)
    entropy = lambda q: -(q * np.log2(np.maximum(q, 1e-300))).sum(axis=-1)
    assert entropy(p.mean(axis=0)) - entropy(p).mean() == pytest.approx(bits, abs=1e-9)
    np.testing.assert_array_equal(p[:, 1] > 0.5, plane.icosahedral_rule()[1] == 1)


def test_more_information_than_the_classes_have_is_refused():
    with pytest.raises(ValueError, match="information"):
        plane.soft_labels(plane.icosahedral_levels(), 1.0)
    with pytest.raises(ValueError, match="one class"):
        plane.soft_labels(np.ones(8))


# The network


def test_first_weights_are_cut_normals():
    widths = (400, 300, 2)
    params = jax.jit(plane.init_network, static_argnums=1)(jax.random.key(0), widths)
    (kernel, bias), _ = plane.split_layers(params, widths)
    scaled = np.asarray(kernel) * 20
    assert np.abs(scaled).max() <= 2
    assert scaled.std() == pytest.approx(0.8796, abs=5e-3)  # of a normal cut at two deviations
    assert not np.asarray(bias).any()


@pytest.mark.parametrize("activation", ["tanh", "relu", "linear"])
def test_outputs_and_loss_are_those_of_numpy(activation):
    training = dataclasses.replace(SMALL, activation=activation)
    params = np.asarray(plane.init_network(jax.random.key(1), training.widths))
    functions = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0), "linear": lambda z: z}
    expected = outputs_of(params, training.widths, functions[activation])
    x = plane.patterns(5).T.astype(np.float32)
    words = np.arange(32, dtype=np.uint32) | (LABELS.astype(np.uint32) << 5)

    @jax.jit
    def both(p):
        outputs = plane.layer_outputs(p, x, training.widths, activation)
        return outputs, plane.cross_entropy(training, p, words)

    found, loss = both(params)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(a.T, b, atol=1e-6)
    assert float(loss) == pytest.approx(-np.log(expected[-1][np.arange(32), LABELS]).mean(), 1e-5)


def test_the_gradient_is_that_of_finite_differences():
    words = np.arange(32, dtype=np.uint32) | (LABELS.astype(np.uint32) << 5)
    params = np.asarray(plane.init_network(jax.random.key(1), SMALL.widths), np.float64)

    def loss(p):
        return -np.log(outputs_of(p, SMALL.widths)[-1][np.arange(32), LABELS]).mean()

    step = 1e-6 * np.eye(len(params))
    expected = [(loss(params + e) - loss(params - e)) / 2e-6 for e in step]
    gradient = jax.jit(jax.grad(lambda p: plane.cross_entropy(SMALL, p, words)))
    found = gradient(params.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=2e-6)


# Trajectories


def test_snapshots_include_both_ends():
    epochs = plane.snapshot_epochs(3000, 60)
    assert epochs[0] == 0 and epochs[1] == 1 and epochs[-1] == 3000
    assert (np.diff(epochs) > 0).all()


def test_each_seed_trains_on_its_own_patterns_with_their_labels(trajectory):
    index, label = trajectory.train & 31, trajectory.train >> 5
    assert trajectory.train.shape == (3, SMALL.train_size) == (3, 27)
    np.testing.assert_array_equal(label, LABELS[index])
    assert all(len(set(row)) == 27 for row in index.tolist())
    assert set(index[0].tolist()) != set(index[1].tolist())
    assert trajectory.params.shape == (3, 3, 5 * 4 + 4 + 4 * 3 + 3 + 3 * 2 + 2)


def test_gradient_descent_in_fixed_order_is_that_of_a_plain_loop():
    training = dataclasses.replace(SMALL, optimizer="sgd", learning_rate=0.5, shuffle=False)
    found = plane.record_trajectory(
        training, LABELS, [0, 3], jax.random.split(jax.random.key(0), 1)
    )
    np.testing.assert_array_equal(found.train[0] & 31, np.arange(27))
    params = jnp.asarray(found.params[0, 0])
    gradient = jax.jit(jax.grad(lambda p, w: plane.cross_entropy(training, p, w)))
    for batch in np.tile(found.train[0][:24].reshape(3, 8), (3, 1)):
        params = params - 0.5 * gradient(params, batch)
    np.testing.assert_allclose(found.params[0, 1], params, rtol=2e-5, atol=1e-6)


def test_a_shuffled_epoch_is_that_of_a_plain_loop(trajectory):
    """Each seed's own patterns, in places that are shuffled by the first key for all seeds."""
    init, step = plane.make_step(SMALL)
    step, first = jax.jit(step), jax.random.split(jax.random.key(0), 3)[0]
    moves = plane._moves(jax.random.fold_in(jax.random.fold_in(first, 1), 0), 27)
    for seed in (0, 2):
        state = init(jnp.asarray(trajectory.params[seed, 0]))
        for batch in trajectory.train[seed][moves][:24].reshape(3, 8):
            state = step(state, batch)
        np.testing.assert_allclose(trajectory.params[seed, 1], state[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 27])
def test_moves_are_uniform_permutations(size):
    keys = jax.random.split(jax.random.key(0), 4000)
    moves = np.asarray(jax.jit(jax.vmap(lambda key: plane._moves(key, size)))(keys))
    np.testing.assert_array_equal(np.sort(moves, axis=1), np.tile(np.arange(size), (4000, 1)))
    at = np.array([np.bincount(column, minlength=size) for column in moves.T])
    assert np.abs(at - 4000 / size).max() <= 5 * np.sqrt(4000 / size)  # of so many equal counts


def test_chunks_and_devices_change_nothing(trajectory):
    keys, seen = jax.random.split(jax.random.key(0), 3), []
    mesh = parallel.make_mesh({"data": -1})  # eight devices: five seeds are added and dropped
    split = plane.record_trajectory(
        SMALL, LABELS, EPOCHS, keys, mesh=mesh, chunk=2, on_chunk=seen.append
    )
    assert seen == [1, 3, 4]
    np.testing.assert_array_equal(split.train, trajectory.train)
    np.testing.assert_allclose(split.params, trajectory.params, atol=1e-6)
    ranges = plane.output_ranges(SMALL, trajectory.params)
    np.testing.assert_allclose(
        plane.output_ranges(SMALL, trajectory.params, mesh=mesh), ranges, atol=1e-6
    )


def test_weights_that_are_not_finite_are_told():
    training = plane.Training(
        (1,), bits=2, batch=3, activation="linear", optimizer="sgd", learning_rate=1e30
    )
    with pytest.raises(ValueError, match="learning_rate"):
        plane.record_trajectory(
            training, np.arange(4) % 2, [5], jax.random.split(jax.random.key(0), 1)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"hidden": ()}, "hidden"),
        ({"bits": 40}, "bits"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"batch": 5000}, "batch"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plane.Training(**options)


@pytest.mark.parametrize(
    ("labels", "epochs", "message"),
    [(LABELS[:5], [0], "labels"), (LABELS + 1, [0], "labels"), (LABELS, [2, 1], "epochs")],
)
def test_bad_labels_and_epochs_are_refused(labels, epochs, message):
    with pytest.raises(ValueError, match=message):
        plane.record_trajectory(SMALL, labels, epochs, jax.random.split(jax.random.key(0), 1))


def test_no_keys_are_refused():
    with pytest.raises(ValueError, match="keys"):
        plane.record_trajectory(SMALL, LABELS, [0], jax.random.split(jax.random.key(0), 0))


# Estimates


def counted(codes, y):
    def entropy(rows):
        p = np.unique(rows, axis=0, return_counts=True)[1] / len(rows)
        return -(p * np.log2(p)).sum()

    joint = np.concatenate([codes, y[:, None]], axis=1)
    return entropy(codes), entropy(codes) + entropy(y[:, None]) - entropy(joint)


@pytest.mark.parametrize("policy", ["fixed", "local"])
def test_information_is_that_of_counting(trajectory, policy):
    ranges = plane.bin_ranges(plane.output_ranges(SMALL, trajectory.params), policy)
    found = plane.information_trajectory(SMALL, LABELS, trajectory.params, ranges, plane.binned(7))
    assert found.shape == (3, 3, 3, 2)
    for seed, snapshot in ((0, 0), (2, 2)):
        for layer, t in enumerate(outputs_of(trajectory.params[seed, snapshot], SMALL.widths)):
            low, high = ranges[seed, snapshot, layer].astype(np.float64)
            codes = np.clip(np.floor((t - low) / (high - low) * 7), 0, 6)
            # A value on an edge of its own range may fall to either side in float32.
            tolerance = 1e-5 if policy == "fixed" else 2 / 32
            np.testing.assert_allclose(
                found[seed, snapshot, layer], counted(codes, LABELS), atol=tolerance
            )


def test_ranges_follow_their_policy(trajectory):
    ranges = plane.output_ranges(SMALL, trajectory.params)
    t = outputs_of(trajectory.params[1, 2], SMALL.widths)[0]
    np.testing.assert_allclose(ranges[1, 2, 0], (t.min(), t.max()), atol=1e-6)
    whole = plane.bin_ranges(ranges, "global")
    np.testing.assert_allclose(whole[1, 0, 0, 1], ranges[1, :, 0, 1].max())
    np.testing.assert_array_equal(whole[:, 0], whole[:, 2])
    fixed = plane.bin_ranges(ranges, "fixed")
    assert np.unique(fixed[..., :-1, :]).tolist() == [-1, 1]
    for made in (whole, fixed, plane.bin_ranges(ranges, "local")):
        assert np.unique(made[..., -1, :]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="policy"):
        plane.bin_ranges(ranges, "mine")


def test_saturated_units_leave_the_entropy_of_their_signs(trajectory):
    """Weights to infinity: tanh goes to its corners, and bins see signs alone."""
    params = trajectory.params * 1e6
    ranges = np.broadcast_to(np.float32([-1, 1]), (3, 3, 3, 2))
    found = plane.information_trajectory(SMALL, LABELS, params, ranges, plane.binned(7))
    signs = np.sign(outputs_of(params[0, 0], SMALL.widths)[0])
    # Biases start at 0: pattern 0 has all sums 0, a corner of its own in the middle of the range.
    assert found[0, 0, 0, 0] == pytest.approx(counted(signs, LABELS)[0], abs=1e-5)


def test_noise_bounds_enclose_each_other(trajectory):
    ranges = plane.output_ranges(SMALL, trajectory.params)
    found = plane.information_trajectory(
        SMALL, LABELS, trajectory.params, ranges, plane.noisy(1e-2)
    )
    assert (found[..., 0] <= found[..., 1] + 1e-5).all()
    assert (found >= -1e-5).all() and (found <= 5 + 1e-5).all()


def test_labels_of_estimates_are_checked(trajectory):
    ranges = plane.output_ranges(SMALL, trajectory.params)
    for wrong in (LABELS[:5], LABELS + 1):  # the binned estimator would count other cells
        with pytest.raises(ValueError, match="labels"):
            plane.information_trajectory(SMALL, wrong, trajectory.params, ranges)
        with pytest.raises(ValueError, match="labels"):
            plane.accuracies(SMALL, wrong, trajectory)


def test_accuracies_of_both_parts(trajectory):
    found = plane.accuracies(SMALL, LABELS, trajectory)
    output = outputs_of(trajectory.params[1, 2], SMALL.widths)[-1]
    right = output.argmax(axis=1) == LABELS
    seen = np.isin(np.arange(32), trajectory.train[1] & 31)
    np.testing.assert_allclose(found[1, 2], (right[seen].mean(), right[~seen].mean()), atol=1e-6)


# Gradients


def linear(w, x):
    return jnp.sum(w["a"] * x)


def test_equal_mini_batches_have_no_fluctuation():
    batches = jnp.tile(jnp.array([[3.0, 4.0]]), (4, 1))
    phase = plane.gradient_snr(linear, {"a": jnp.array([0.0, 2.0])}, batches)["a"]
    assert (float(phase.mean), float(phase.std)) == (2.5, 0.0)
    assert np.isinf(phase.snr)


def test_opposite_mini_batches_have_no_mean():
    phase = plane.gradient_snr(linear, {"a": jnp.ones(1)}, jnp.array([[5.0], [-5.0]]))["a"]
    assert (float(phase.mean), float(phase.std), float(phase.snr)) == (0.0, 5.0, 0.0)


def test_no_gradient_and_no_weights_are_zero_not_nan():
    phase = plane.gradient_snr(linear, {"a": jnp.zeros(2)}, jnp.zeros((3, 2)))["a"]
    assert [float(v) for v in phase] == [0.0, 0.0, 0.0]


def test_phases_are_those_of_gradients_at_frozen_weights(trajectory):
    found = plane.gradient_phases(SMALL, trajectory)
    params = jnp.asarray(trajectory.params[1, 2])
    batches = trajectory.train[1][:24].reshape(3, 8)
    gradient = jax.jit(jax.grad(lambda p, w: plane.cross_entropy(SMALL, p, w)))
    g = np.array([gradient(params, b) for b in batches], np.float64)[:, :20]  # the first kernel
    norm = np.linalg.norm(params[:20])
    mean, std = np.linalg.norm(g.mean(axis=0)), np.linalg.norm(g.std(axis=0))
    np.testing.assert_allclose(found[1, 2, 0], (mean / norm, std / norm, mean / std), rtol=1e-4)
