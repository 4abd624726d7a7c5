"""Temperature sampling, scalarisation and Cooldown against their specification's oracles."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlib import data
from rlib.data import streams

SIZES = (900, 100)
TAIL = (2733, 162, 39, 1)


@pytest.mark.parametrize(
    ("sizes", "tau", "probs", "ratio"),
    [
        (SIZES, 1, (0.9, 0.1), 1.0),
        (SIZES, 2, (0.75, 0.25), 1.25),
        (SIZES, 3, (0.6753335, 0.3246665), 1.5608337),
        (SIZES, 5, (0.6081268, 0.3918732), 1.9465554),
        (SIZES, 100, None, 2.7292878),
        (TAIL, 5, (0.4543018, 0.2581782, 0.1941911, 0.0933290), 29.831925),
        (TAIL, 100, None, 174.513304),
    ],
)
def test_probabilities_and_variance_ratio(sizes, tau, probs, ratio):
    p = data.temperature_probs(sizes, tau)
    if probs is not None:
        np.testing.assert_allclose(p, probs, atol=5e-8)
    np.testing.assert_allclose(data.variance_ratio(sizes, tau), ratio, rtol=1e-7)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)


def test_weights():
    np.testing.assert_allclose(data.scalarization_weights(SIZES, 2), [0.8333333, 2.5], rtol=1e-6)
    expected = [0.6756964, 3.9187324]
    np.testing.assert_allclose(data.scalarization_weights(SIZES, 5), expected, rtol=1e-6)


def test_probabilities_are_free_of_scale_keep_ranks_and_tend_to_uniform():
    for tau in (1, 1.5, 4, 1e3):
        p = data.temperature_probs(TAIL, tau)
        np.testing.assert_allclose(p, data.temperature_probs(np.multiply(TAIL, 1e9), tau))
        assert (np.diff(p) < 0).all()
    np.testing.assert_allclose(data.temperature_probs(TAIL, np.inf), 0.25)
    ratios = [data.variance_ratio(TAIL, tau) for tau in np.linspace(1, 20, 50)]
    assert (np.diff(ratios) > 0).all()


@pytest.mark.parametrize(("gradients", "mean"), [((1.0, -1.0), 0.5), ((1.0, 0.0), 0.75)])
def test_second_moments_by_enumeration(gradients, mean):
    """Both estimators have one mean; which is noisier depends on the gradients."""
    g, w, p1, p = (
        np.array(gradients),
        *(
            f(SIZES, tau)
            for f, tau in (
                (data.scalarization_weights, 2),
                (data.temperature_probs, 1),
                (data.temperature_probs, 2),
            )
        ),
    )
    np.testing.assert_allclose(p1 @ (w * g), mean)
    np.testing.assert_allclose(p @ g, mean)
    second = p1 @ (w * g) ** 2, p @ g**2
    ratio = data.variance_ratio(SIZES, 2, g**2)
    np.testing.assert_allclose(second[0] / second[1], ratio)
    if gradients == (1.0, -1.0):
        np.testing.assert_allclose([s - mean**2 for s in second], [1.0, 0.75])
    else:  # theorem 2 does not hold without its assumption
        np.testing.assert_allclose(second, [0.625, 0.75])
        assert ratio < 1


def test_the_weighted_gradient_of_all_data_is_that_of_the_mixture():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(1000, 3)), draw.normal(size=1000)
    domain = np.repeat([0, 1], SIZES)
    grads = (x @ np.array([1.0, -2.0, 0.5]) - y)[:, None] * x  # of squared errors
    weighted = (data.scalarization_weights(SIZES, 3)[domain, None] * grads).mean(axis=0)
    by_domain = np.stack([grads[domain == k].mean(axis=0) for k in (0, 1)])
    np.testing.assert_allclose(weighted, data.temperature_probs(SIZES, 3) @ by_domain, rtol=1e-12)


@pytest.fixture
def counted(monkeypatch):
    """Three sets whose examples tell where they come from."""
    sizes = {"a": 700, "b": 60, "c": 9}
    monkeypatch.setattr(streams, "names", lambda: list(sizes))
    column = lambda name: np.arange(sizes[name]) + 1000 * list(sizes).index(name)
    monkeypatch.setattr(streams, "arrays", lambda name, split: {"i": column(name)})
    return list(sizes), list(sizes.values())


def take(count, names, first=0, **arguments):
    batches = iter(data.mixture(names, **{"batch_size": 256, "seed": 0} | arguments))
    batches.set_state({"next_index": first})
    return list(itertools.islice(batches, count))


def test_frequencies_follow_the_schedule(counted):
    names, sizes = counted
    schedule = data.cooldown(20)
    for first, tau in ((0, 5.0), (20, 1.0)):
        batches = take(20, names, first, temperature=schedule)
        rows = np.concatenate([batch["domain"] for batch in batches])
        expected = len(rows) * data.temperature_probs(sizes, tau)
        found = np.bincount(rows, minlength=3)
        assert stats.chisquare(found, expected).pvalue > 1e-3
        values = np.concatenate([batch["i"] for batch in batches])
        np.testing.assert_array_equal(values // 1000, rows)
        within = np.bincount(values[rows == 0], minlength=sizes[0])
        assert stats.chisquare(within).pvalue > 1e-3


def test_cooldown_between_equal_temperatures_is_static_and_shares_its_halves(counted):
    names, _ = counted
    same = lambda a, b: all((x["i"] == y["i"]).all() for x, y in zip(a, b, strict=True))
    cold, warm = (take(8, names, temperature=tau) for tau in (1.0, 5.0))
    assert same(warm, take(8, names, temperature=data.cooldown(4, 5.0, 5.0)))
    assert same(cold, take(8, names, temperature=data.cooldown(0)))
    assert same(warm[:4] + cold[4:], take(8, names, temperature=data.cooldown(4)))
    assert not same(cold, warm)


def test_processes_slice_one_batch_and_a_state_resumes(counted):
    names, _ = counted
    options = {"temperature": data.cooldown(2)}
    whole = take(4, names, **options)
    parts = [take(4, names, process_index=i, process_count=2, **options) for i in (0, 1)]
    for i, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([part[i][key] for part in parts]))
    np.testing.assert_array_equal(take(1, names, 3, **options)[0]["i"], whole[3]["i"])


def test_text_of_any_length():
    names = ["python_docs", "messages/sw"]
    batch = next(iter(data.mixture(names, batch_size=64, seed=1, temperature=5.0, length=32)))
    assert batch["tokens"].shape == (64, 32) and set(batch["domain"]) == {0, 1}
    for k, name in enumerate(names):
        text = data.arrays(name)["tokens"].tobytes()
        assert all(row.tobytes() in text for row in batch["tokens"][batch["domain"] == k])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": []}, "no data sets"),
        ({"temperature": 0.5}, "0.5 is below 1"),
        ({"temperature": lambda step: np.nan}, "below 1"),
        ({"sizes": [1.0]}, "1 sizes for 2"),
        ({"sizes": [1.0, 0.0]}, "positive"),
        ({"batch_size": 0}, "batch_size"),
        ({"names": ["python_docs", "digits"]}, "features"),
    ],
)
def test_mistakes(change, words):
    arguments = {"names": ["python_docs", "python_source"], "batch_size": 4, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        data.mixture(arguments.pop("names"), **arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: data.variance_ratio(SIZES, 2, [1.0]), "second_moments"),
        (lambda: data.variance_ratio(SIZES, 2, [1.0, -1.0]), "second_moments"),
        (lambda: data.variance_ratio(SIZES, 2, [0.0, 0.0]), "second_moments"),
        (lambda: data.cooldown(2, 5.0, 0.5), "lo=0.5"),
        (lambda: data.cooldown(-1), "switch=-1"),
        (lambda: data.unimax_sizes(SIZES, 0, 1.0), "budget 0"),
        (lambda: data.unimax_sizes(SIZES, 10, np.nan), "epochs nan"),
    ],
)
def test_wrong_numbers_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_array_may_be_the_temperature(counted):
    names, _ = counted
    schedule = lambda step: np.where(step < 2, 5.0, 1.0)
    for a, b in zip(
        take(4, names, temperature=schedule),
        take(4, names, temperature=data.cooldown(2)),
        strict=True,
    ):
        np.testing.assert_array_equal(a["i"], b["i"])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(30, [10, 10, 10]), (600, [280, 280, 40]), (5000, [3600, 400, 40])],
)
def test_unimax_is_even_until_a_domain_was_seen_so_often(budget, expected):
    order = [2, 0, 1]
    np.testing.assert_allclose(data.unimax_sizes([900, 100, 10], budget, 4.0), expected)
    turned = data.unimax_sizes(np.array([900, 100, 10])[order], budget, 4.0)
    np.testing.assert_allclose(turned, np.array(expected)[order])
