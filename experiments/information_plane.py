"""Information plane (arXiv 1703.00810): do layers fit first, and then compress their input?

The paper: training first raises I(T;Y), then noise of the gradients lowers I(X;T), and that is why
networks generalise. Saxe et al. (ICLR 2018): what falls is the number of bins that saturating
units still occupy. Tested on all 12-bit patterns of a rule that is symmetric on the sphere, 50
initialisations: tanh and rectified units, bins over fixed, global and local ranges, 10 to 100 of
them, bounds with Gaussian noise, a tenth of the rate, plain SGD, 5 % of the data, one hidden
layer; gradients at frozen weights, and the information bottleneck's own bound.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from ml_collections import ConfigDict
from scipy.stats import binomtest

from rlib import information
from rlib.experiment import (
    COLOURS,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    legend,
    named_key,
    panels,
    start,
    styled,
)
from rlib.information import plane

LOSS = "I(X;T), final minus peak (bits)"
FINAL_X, FINAL_Y = "I(X;T), final (bits)", "I(T;Y), final (bits)"
ACCURACY = "Accuracy after training"
BETA, EXCESS = "Fitted beta of the bottleneck, final", "I(T;Y) below the bound, final (bits)"
NOISY = "I(X; T + noise), final minus peak (bits)"
SPEED = "Seconds for 1000 epochs of all seeds"
WHOLE = "Seconds in all: training, I(X;T) and I(T;Y)"
TITLES = {
    "tanh": "tanh",
    "relu": "rectified",
    "tanh_slow": "tanh, a tenth of the rate",
    "tanh_sgd": "tanh, plain SGD",
    "tanh_little_data": "tanh, 5 % of the data",
    "tanh_shallow": "tanh, one hidden layer",
}
Values = dict[str, Any]
Planes = dict[str, dict[str, np.ndarray]]  # arm -> view -> (seeds, snapshots, layers, 2)


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Train every arm, estimate by every view, and judge the claims."""
    run = run or Run()
    arms = run.select(sorted(config.arms, key=_place))
    trainings = {arm: _training(config, arm) for arm in arms}
    seeds = {arm: len(run.seeds(config.arms[arm])) for arm in arms}
    run.plan(_costs(run, config, arms))
    mesh, (_, labels) = run.mesh(config), plane.icosahedral_rule()
    trained = {
        arm: run.cached(
            f"train/{arm}/{seeds[arm]}", lambda a=arm: _train(config, run, a, seeds[a], mesh)
        )
        for arm in arms
    }

    def estimate(arm: str, ranges: Any, estimator: Any, params: Any = None) -> Values:
        params = trained[arm]["params"] if params is None else params
        begun = time.perf_counter()
        points = plane.information_trajectory(
            trainings[arm], labels, params, ranges, estimator, mesh=mesh
        )
        return {"points": points, "seconds": time.perf_counter() - begun}

    planes: Planes = {}
    whole = {}
    for arm in arms:
        planes[arm] = {}
        for policy, bins in config.arms[arm].views:
            ranges = plane.bin_ranges(trained[arm]["ranges"], policy)
            result = run.cached(
                f"plane/{arm}/{policy}-{bins}/{seeds[arm]}",
                lambda a=arm, r=ranges, b=bins: estimate(a, r, plane.binned(b)),
            )
            planes[arm][f"{policy} {bins}"] = result["points"]
            whole.setdefault(arm, float(trained[arm]["seconds"] + result["seconds"]))
    noisy = {}
    for arm in _noisy_arms(config, arms):
        chosen = _chosen(config.noise.snapshots, trained[arm]["params"].shape[1])
        few = len(run.seeds(config.noise))
        params = trained[arm]["params"][:few, chosen]
        ranges = trained[arm]["ranges"][:few, chosen]
        estimator = plane.noisy(config.noise.variance)
        noisy[arm] = run.cached(
            f"noise/{arm}/{few}",
            lambda a=arm, r=ranges, p=params, e=estimator: estimate(a, r, e, p),
        )["points"]
    bound = run.cached("bound", lambda: _bound(config))
    few = run.seeds(config.bound)
    fits = {
        arm: run.cached(
            f"beta/{arm}/{len(few)}",
            lambda a=arm: _fits(config, trainings[a], trained[a], a, len(few)),
        )
        for arm in _closest(arms)
    }
    speed: Values = {}
    if config.speed.repeats:
        count = len(run.seeds(config.speed))
        speed = run.cached(f"speed/{count}", lambda: _speed(config, count, mesh))
    _draw(run, config, trained, planes, noisy, bound, fits)
    return Report(
        _rows(config, trained, planes, noisy, bound, fits, speed, whole),
        _claims(config, trained, planes, noisy, bound, fits, speed, whole),
        _notes(config, arms),
    )


def _place(arm: str) -> int:
    """In tables and figures; a configuration sorts its keys."""
    return list(TITLES).index(arm) if arm in TITLES else len(TITLES)


def _training(config: ConfigDict, arm: str) -> plane.Training:
    options = config.arms[arm]
    fields = ("activation", "optimizer", "learning_rate", "batch", "train_fraction")
    try:
        for policy, bins in options.views:
            plane.bin_ranges(np.zeros((1, 1, 1, 2)), policy)
            information.bin_codes(np.zeros(1), bins)
        plane.snapshot_epochs(options.epochs, config.snapshots)
        return plane.Training(tuple(options.hidden), **{field: options[field] for field in fields})
    except (TypeError, ValueError) as error:
        raise UsageError(f"--config.arms.{arm}: {error}") from error


def _costs(run: Run, config: ConfigDict, arms: list[str]) -> dict[str, float]:
    """Seconds on two CPU cores."""
    costs, seeds = {}, {arm: len(run.seeds(config.arms[arm])) for arm in arms}
    for arm in arms:
        options, training = config.arms[arm], _training(config, arm)
        samples = options.epochs * training.train_size * seeds[arm]
        costs[f"train/{arm}/{seeds[arm]}"] = 4 + 1e-9 * samples * sum(options.hidden)
    for arm in arms:
        for policy, bins in config.arms[arm].views:
            unit = f"plane/{arm}/{policy}-{bins}/{seeds[arm]}"
            costs[unit] = 1 + 6e-4 * config.snapshots * seeds[arm]
    for arm in _noisy_arms(config, arms):
        few = len(run.seeds(config.noise))
        costs[f"noise/{arm}/{few}"] = 0.15 * few * config.noise.snapshots
    costs["bound"] = 1.0
    for arm in _closest(arms):
        few = len(run.seeds(config.bound))
        costs[f"beta/{arm}/{few}"] = 0.4 * few
    if config.speed.repeats:
        costs[f"speed/{len(run.seeds(config.speed))}"] = 1.0 * config.speed.repeats
    return costs


def _closest(arms: list[str]) -> list[str]:
    """The arms that are looked at in more ways than one."""
    return [arm for arm in ("tanh", "relu") if arm in arms]


def _noisy_arms(config: ConfigDict, arms: list[str]) -> list[str]:
    return _closest(arms) if config.noise.seeds > 0 else []


def _chosen(count: int, of: int) -> np.ndarray:
    """Indices of some snapshots, the first and last among them."""
    return np.unique(np.linspace(0, of - 1, count).round().astype(int))


# Units of work


def _train(config: ConfigDict, run: Run, arm: str, seeds: int, mesh: Any) -> Values:
    begun = time.perf_counter()
    training, (_, labels) = _training(config, arm), plane.icosahedral_rule()
    # Seeds are the same in all arms: equal first weights, wherever the first widths agree.
    keys = jax.numpy.stack([named_key(seed, "plane") for seed in range(seeds)])
    trajectory = plane.record_trajectory(
        training,
        labels,
        plane.snapshot_epochs(config.arms[arm].epochs, config.snapshots),
        keys,
        mesh=mesh,
        on_chunk=lambda _: run.check(),
    )
    ranges = plane.output_ranges(training, trajectory.params, mesh=mesh)
    seconds = time.perf_counter() - begun
    return {
        **trajectory._asdict(),
        "accuracy": plane.accuracies(training, labels, trajectory, mesh=mesh),
        "ranges": ranges,
        "phases": plane.gradient_phases(training, trajectory, mesh=mesh),
        "seconds": seconds,  # compilation included
    }


def _bound(config: ConfigDict) -> Values:
    """The bottleneck's bound for the soft rule; inputs of one level are one input to it."""
    levels = plane.icosahedral_levels()
    soft = plane.soft_labels(levels, config.bound.information)
    _, first, count = np.unique(levels, return_index=True, return_counts=True)
    betas = np.geomspace(1.01, 1000, config.bound.betas)
    joint = soft[first] * count[:, None] / len(levels)
    points = information.information_bound(joint, betas)
    weight = count / len(levels)
    levels_told = (-np.sum(weight * np.log2(weight)), config.bound.information)
    inputs_told = (np.log2(sum(count)), config.bound.information)  # T = X
    return {"betas": betas, "points": np.vstack([[0, 0], points, levels_told, inputs_told])}


def _fits(config: ConfigDict, training: Any, trained: Values, arm: str, seeds: int) -> Values:
    """`layer_beta` of binned layers at first, halfway and last, (seeds, 3, layers, 4)."""
    policy, bins = config.arms[arm].views[0]
    soft = plane.soft_labels(plane.icosahedral_levels(), config.bound.information)
    few, chosen = slice(seeds), _chosen(3, trained["params"].shape[1])

    def cells(outputs: Any, _: Any, low: Any, high: Any) -> Any:
        return information.hash_rows(information.bin_codes(outputs, bins, low, high))

    found = plane.information_trajectory(
        training,
        np.zeros(len(soft)),
        trained["params"][few, chosen],
        plane.bin_ranges(trained["ranges"], policy)[few, chosen],
        cells,
    )
    fits = [information.layer_beta(t, soft) for t in found.reshape(-1, len(soft))]
    return {"fits": np.array(fits).reshape(*found.shape[:3], 4)}


def _speed(config: ConfigDict, seeds: int, mesh: Any) -> Values:
    """Seconds for 1000 epochs of all seeds: all in one program, and a loop of jitted steps."""
    options = config.speed
    training, (_, labels) = _training(config, "tanh"), plane.icosahedral_rule()
    init, step = plane.make_step(training)  # the loop has the same fast step
    step = jax.jit(step)
    keys = jax.numpy.stack([named_key(seed, "speed") for seed in range(seeds)])
    words = np.arange(4096, dtype=np.uint32) | (labels.astype(np.uint32) << 12)
    size = training.steps_per_epoch * training.batch
    draw, loop = np.random.default_rng(0), []
    times: list[float] = []
    stops = options.epochs * np.arange(1, options.repeats + 2)

    def looped() -> float:
        """One seed; the others would take as long."""
        state = init(plane.init_network(keys[0], training.widths))
        state = jax.block_until_ready(step(state, words[: training.batch]))
        begun = time.perf_counter()
        for _ in range(options.epochs):
            order = draw.permutation(words)[:size].reshape(-1, training.batch)
            for batch in order:
                state = step(state, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - begun

    def note(_: int) -> None:
        times.append(time.perf_counter())
        loop.append(looped())
        times.append(time.perf_counter())

    plane.record_trajectory(
        training, labels, stops, keys, mesh=mesh, chunk=options.epochs, on_chunk=note
    )
    together = [b - a for a, b in zip(times[1::2], times[2::2], strict=False)]
    scale = 1000 / options.epochs
    return {
        "loop": scale * seeds * np.array(loop[1:]),
        "together": scale * np.array(together),
    }


# The report


def _main_view(planes: Planes, arm: str) -> np.ndarray:
    """I(X;T) and I(T;Y) by the arm's own bins."""
    return next(iter(planes[arm].values()))


def _from_peak(points: np.ndarray) -> np.ndarray:
    """I(X;T) at the end minus its largest value, (seeds, layers)."""
    ixt = points[..., 0]
    return ixt[:, -1] - ixt.max(axis=1)


def _layer_names(config: ConfigDict, arm: str) -> list[str]:
    return [*(f"{width} units" for width in config.arms[arm].hidden), "output"]


def _rows(config, trained, planes, noisy, bound, fits, speed, whole) -> list[Row]:
    rows = []

    def add(method: str, metric: str, arm: str, values: np.ndarray) -> None:
        """A row a layer of values (seeds, layers)."""
        for name, column in zip(_layer_names(config, arm), values.T, strict=False):
            if np.isfinite(column).all():
                rows.append(Row(method, name, metric, column))

    for arm, views in planes.items():
        for view, points in views.items():
            add(f"{arm}, {view} bins", LOSS, arm, _from_peak(points))
    for arm in planes:
        points = _main_view(planes, arm)
        add(arm, FINAL_X, arm, points[:, -1, :, 0])
        add(arm, FINAL_Y, arm, points[:, -1, :, 1])
    for arm, points in noisy.items():
        for k, side in enumerate(("lower", "upper")):
            add(f"{arm}, {side} bound", NOISY, arm, _from_peak(points[..., k : k + 1]))
    for arm, result in trained.items():
        for k, part in enumerate(("training patterns", "other patterns")):
            values = result["accuracy"][:, -1, k]
            if np.isfinite(values).all():
                rows.append(Row(arm, part, ACCURACY, values))
    for arm, found in fits.items():
        add(arm, BETA, arm, found["fits"][:, -1, :, 0])
        add(arm, EXCESS, arm, _below_bound(found["fits"][:, -1], bound))
    for name, values in speed.items():
        title = {"loop": "loop over seeds of jitted steps", "together": "one program"}[name]
        rows.append(Row(title, "tanh", SPEED, values))
    rows += [Row(arm, "all seeds", WHOLE, [seconds]) for arm, seconds in whole.items()]
    return rows


def _below_bound(fits: np.ndarray, bound: Values) -> np.ndarray:
    """The bound's I(T;Y) at a layer's I(X;T), minus the layer's, (seeds, layers)."""
    ixt, ity = bound["points"][np.argsort(bound["points"][:, 0])].T
    return np.interp(fits[..., 2], ixt, np.maximum.accumulate(ity)) - fits[..., 3]


def _fitted_at(points: np.ndarray) -> np.ndarray:
    """First snapshot at which the last hidden layer has 95 % of its largest I(T;Y), (seeds,)."""
    ity = points[:, :, -2, 1]
    return np.argmax(ity >= 0.95 * ity.max(axis=1, keepdims=True), axis=1)


def _snr(result: Values) -> np.ndarray:
    """Geometric mean over hidden kernels of the gradient's SNR, (seeds, snapshots)."""
    snr = np.clip(result["phases"][:, :, :-1, 2], 1e-6, 1e6)
    return np.exp(np.log(snr).mean(axis=2))


def _turns_at(snr: np.ndarray) -> np.ndarray:
    """First snapshot with an SNR below 1; the last one if there is none, (seeds,)."""
    below = snr < 1
    return np.where(below.any(axis=1), np.argmax(below, axis=1), snr.shape[1] - 1)


def _claims(config, trained, planes, noisy, bound, fits, speed, whole) -> list[Claim]:
    """Those claims of which everything was run."""
    claims = Claims(trained)
    bits = config.compressed

    def lost(arm: str, layer: int, view: str | None = None) -> Callable[[], np.ndarray]:
        points = lambda: _main_view(planes, arm) if view is None else planes[arm][view]
        return lambda: _from_peak(points())[:, layer]

    # Layers of 10 and 7 units have nearly one cell a pattern, and cannot show a change.
    narrow = {width: i for i, width in enumerate(config.arms.tanh.hidden) if width <= 5}
    for width, i in narrow.items():
        claims.add(
            f"tanh: the layer of {width} units compresses (final minus peak of I(X;T), bits)",
            ("tanh",), lost("tanh", i), at_most=-bits,
        )  # fmt: skip
    for width, i in narrow.items():
        claims.add(
            f"rectified units: the layer of {width} units does not (bits)",
            ("relu",), lost("relu", i), at_least=-bits,
        )  # fmt: skip
    claims.add(
        "tanh: the last hidden layer compresses in most seeds (p of a sign test)",
        ("tanh",), lambda: [_sign_test(lost("tanh", -2)() < -bits)], at_most=0.05, exact=True,
    )  # fmt: skip
    claims.add(
        "rectified units: it does not in most seeds (p of a sign test)",
        ("relu",), lambda: [_sign_test(lost("relu", -2)() >= -bits)], at_most=0.05, exact=True,
    )  # fmt: skip
    other = lambda arm: trained[arm]["accuracy"][:, -1, 1]
    claims.add(
        "rectified units generalise as well as tanh (difference of accuracy on other patterns)",
        ("tanh", "relu"),
        lambda: _paired(other("relu"), other("tanh")),
        at_least=-0.01,
    )
    last = len(config.arms.tanh.hidden) - 1
    for view in planes.get("tanh", {}):
        if view != next(iter(planes["tanh"])):
            claims.add(
                f"tanh, {view} bins: the last hidden layer compresses (bits)",
                ("tanh",), lost("tanh", last, view), at_most=-bits,
            )  # fmt: skip
    for view in planes.get("relu", {}):
        if view != next(iter(planes["relu"])):
            claims.add(
                f"rectified units, {view} bins: the last hidden layer does not compress (bits)",
                ("relu",), lost("relu", last, view), at_least=-bits,
            )  # fmt: skip
    for arm, sign, limits in (
        ("tanh", "compresses", {"at_most": -bits}),
        ("relu", "does not compress", {"at_least": -bits}),
    ):
        if arm in noisy:
            claims.add(
                f"{arm}, Gaussian noise, upper bound: the last hidden layer {sign} (bits)",
                (arm,), lambda a=arm: _from_peak(noisy[a][..., 1:])[:, last], **limits,
            )  # fmt: skip
    claims.add(
        "tanh, a tenth of the rate: the last hidden layer compresses (bits)",
        ("tanh_slow",), lost("tanh_slow", -2), at_most=-bits,
    )  # fmt: skip
    for arm, name in (("tanh", "Adam"), ("tanh_sgd", "SGD")):
        claims += _phase_claims(config, trained, planes, arm, name)
    fall = lambda arm: (
        _main_view(planes, arm)[:, -1, -2, 1] - _main_view(planes, arm)[:, :, -2, 1].max(axis=1)
    )
    claims.add(
        "5 % of the data: the last hidden layer loses I(T;Y) (final minus peak, bits)",
        ("tanh_little_data",), lambda: fall("tanh_little_data"), at_most=-0.05,
    )  # fmt: skip
    claims.add(
        "85 % of the data: it does not",
        ("tanh",), lambda: fall("tanh"), at_least=-0.05,
    )  # fmt: skip
    claims.add(
        "one hidden layer needs twice the epochs of five to 0.9 bit at the output (log2)",
        ("tanh", "tanh_shallow"),
        lambda: _paired(
            *(np.log2(_reached(trained[a], planes, a)) for a in ("tanh_shallow", "tanh"))
        ),
        at_least=1,
    )
    hidden = lambda arm: fits[arm]["fits"][:, -1, :-1]
    claims.add(
        "tanh: the fitted beta falls from the first hidden layer to the last (log10)",
        ("tanh",),
        lambda: np.log10(hidden("tanh")[:, 0, 0] / hidden("tanh")[:, -1, 0]),
        at_least=0.1,
    )
    claims.add(
        "tanh: hidden layers end near the bottleneck's bound (largest distance of I(T;Y), bits)",
        ("tanh",), lambda: _below_bound(hidden("tanh"), bound).max(axis=1), at_most=0.05,
    )  # fmt: skip
    claims.add(
        "tanh: and near its encoders (largest divergence, bits)",
        ("tanh",), lambda: hidden("tanh")[..., 1].max(axis=1), at_most=0.5,
    )  # fmt: skip
    if "tanh" in whole:
        # As long as it took, once: no sample.
        shape = f"{len(trained['tanh']['params'])} seeds, {config.arms.tanh.epochs} epochs"
        claims.add(
            f"tanh, {shape}: the whole plane under one minute (seconds)",
            ("tanh",), lambda: [whole["tanh"]], at_most=60, exact=True,
        )  # fmt: skip
    if speed:
        ratio = speed["loop"] / speed["together"]
        claims.add(
            "one program over a loop of jitted steps (times faster)",
            (), lambda: ratio, at_least=3,
        )  # fmt: skip
    return claims


def _phase_claims(config, trained, planes, arm: str, name: str) -> list[Claim]:
    if arm not in trained:
        return []
    points, result = _main_view(planes, arm), trained[arm]
    snr, epochs = _snr(result), np.maximum(result["epochs"], 1)
    fit, turn, rows = _fitted_at(points), _turns_at(snr), np.arange(len(points))
    ixt = points[:, :, :-1, 0].sum(axis=2)
    lost = ixt.max(axis=1) - ixt[:, -1]
    after = (ixt[rows, fit] - ixt[:, -1]) / np.maximum(lost, 1e-6)
    distance = np.abs(np.log2(epochs[turn] / epochs[fit]))
    claims = Claims([arm])
    claims.add(
        f"tanh, {name}: most of I(X;T) is lost after I(T;Y) has risen (share)",
        (arm,), lambda: after, at_least=0.5,
    )  # fmt: skip
    claims.add(
        f"tanh, {name}: the gradient's mean falls below its fluctuation (log10 of SNR, final)",
        (arm,), lambda: np.log10(snr[:, -1]), at_most=0,
    )  # fmt: skip
    claims.add(
        f"tanh, {name}: and does so when I(T;Y) has risen, within a factor 2 (log2 of epochs)",
        (arm,), lambda: distance, at_most=1,
    )  # fmt: skip
    return claims


def _sign_test(seeds: np.ndarray) -> float:
    """Probability of so many true seeds or more, were either as likely."""
    return float(binomtest(int(seeds.sum()), len(seeds), alternative="greater").pvalue)


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differences of the seeds that both have."""
    n = min(len(a), len(b))
    return a[:n] - b[:n]


def _reached(result: Values, planes_of: Planes, arm: str, bits: float = 0.9) -> np.ndarray:
    """Epoch at which the output first has so much I(T;Y); the last epoch if it never has."""
    ity = _main_view(planes_of, arm)[:, :, -1, 1]
    there = ity >= bits
    epochs = np.maximum(result["epochs"], 1)
    return np.where(there.any(axis=1), epochs[np.argmax(there, axis=1)], epochs[-1])


def _notes(config: ConfigDict, arms: list[str]) -> list[str]:
    notes = [
        "All 4096 patterns are inputs: informations of binned layers are exact, and I(X;T) = H(T), "
        "the entropy of the occupied cells. It cannot exceed 12 bits, where wide layers stay.",
        "The peak is the largest of the snapshots, so final minus peak is never above 0; less than "
        f"{config.compressed:g} bit is taken as none.",
        "The rectified units' own range is global: of each layer over its whole training. Units "
        "that grow start in few of its bins, so that part of their rise is the range's; local "
        "ranges and noise of a fixed size stand beside it.",
        "The bound and the fitted betas are those of the soft rule, I(X;Y) = "
        f"{config.bound.information:g} bit; networks are trained on its classes. beta is chosen to "
        "bring a layer near the bound; 10000 is the largest tried, where cells tell all levels.",
    ]
    if "tanh_little_data" in arms:
        notes.append(
            "With 5 % of the data an epoch has few steps; epochs are more, steps about the same."
        )
    return notes


# Figures


def _title(arm: str) -> str:
    return TITLES.get(arm, arm.replace("_", " "))


def _draw(run, config, trained, planes, noisy, bound, fits) -> None:
    if not planes:
        return
    _draw_planes(run, config, trained, planes)
    _draw_views(run, config, trained, planes, noisy)
    _draw_phases(run, config, trained, planes)
    _draw_layers(run, config, planes)
    _draw_bound(run, config, bound, fits)


@styled
def _draw_planes(run: Run, config: ConfigDict, trained, planes) -> None:
    """Mean paths over seeds; colour is the epoch, dots what no layer can exceed."""
    arms = list(planes)
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = panels(rows, columns, size=(3.1, 2.7), sharex=True, sharey=True)
    share = plane.icosahedral_rule()[1].mean()
    most = -share * np.log2(share) - (1 - share) * np.log2(1 - share)  # H(Y)
    arrays = {}
    for axis, arm in zip(axes.flat, arms, strict=False):
        mean = _main_view(planes, arm).mean(axis=0)
        arrays[arm] = mean
        epochs = np.maximum(trained[arm]["epochs"], 0.5)
        colours = np.log(epochs / epochs[0]) / np.log(epochs[-1] / epochs[0])
        axis.plot([0, most, 12], [0, most, most], color="black", linewidth=1, linestyle=":")
        for snapshot in mean[:: max(1, len(mean) // 12)]:
            axis.plot(*snapshot.T, color="#dddddd", linewidth=0.6, zorder=1)
        for layer in range(mean.shape[1]):
            shown = axis.scatter(*mean[:, layer].T, c=colours, cmap="viridis", s=9, zorder=3)
            axis.plot(*mean[:, layer].T, color="#999999", linewidth=0.5, zorder=2)
        policy, bins = config.arms[arm].views[0]
        axis.set_title(_title(arm))
        axis.text(12.3, -0.02, f"{policy} {bins} bins", ha="right", fontsize=8, color="#666666")
    for axis in axes[-1]:
        axis.set_xlabel("I(X;T) (bits)")
    for axis in axes[:, 0]:
        axis.set_ylabel("I(T;Y) (bits)")
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=list(axes.flat), ticks=[0, 1], fraction=0.03, aspect=30)
    bar.ax.set_yticklabels(["first", "last"])
    bar.set_label("epoch (logarithm)")
    run.figure("planes", figure, **arrays)


def _layer_look(index: int, count: int) -> dict[str, Any]:
    output = index == count - 1
    return {
        "color": "black" if output else COLOURS[index % 6],
        "linestyle": "--" if output else "-",
    }


def _by_layer(axis: Axes, epochs: np.ndarray, values: np.ndarray, names: list[str]) -> None:
    """Mean of (seeds, snapshots, layers) in a line, and three seeds faintly."""
    at = np.maximum(epochs, 0.5)
    for layer, name in enumerate(names):
        look = _layer_look(layer, len(names))
        axis.semilogx(at, values[:3, :, layer].T, linewidth=0.5, alpha=0.5, **look)
        axis.semilogx(at, values[:, :, layer].mean(axis=0), label=name, **look)


@styled
def _draw_views(run: Run, config: ConfigDict, trained, planes, noisy) -> None:
    """I(X;T) by epoch for every view of tanh and rectified units."""
    arms = [arm for arm in ("tanh", "relu") if arm in planes] or list(planes)[:1]
    columns = max(len(planes[arm]) + (arm in noisy) for arm in arms)
    figure, axes = panels(len(arms), columns, size=(2.3, 2.3), sharex=True, sharey=True)
    arrays = {}
    for row, arm in zip(axes, arms, strict=True):
        names, epochs = _layer_names(config, arm), trained[arm]["epochs"]
        for axis, (view, points) in zip(row, planes[arm].items(), strict=False):
            _by_layer(axis, epochs, points[..., 0], names)
            axis.set_title(f"{_title(arm)}, {view} bins")
            arrays[f"{arm} {view}"] = points[..., 0]
        if arm in noisy:
            axis = row[len(planes[arm])]
            chosen = _chosen(config.noise.snapshots, len(epochs))
            _by_layer(axis, epochs[chosen], noisy[arm].mean(axis=-1), names)
            axis.set_title(f"{_title(arm)}, Gaussian noise")
            arrays[f"{arm} noise"] = noisy[arm]
        row[0].set_ylabel("I(X;T) (bits)")
        for axis in row[len(planes[arm]) + (arm in noisy) :]:
            axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    legend(figure, axes[0, 0])
    run.figure("views", figure, **arrays)


@styled
def _draw_phases(run: Run, config: ConfigDict, trained, planes) -> None:
    """Mean and fluctuation of the gradients of each layer."""
    arms = [arm for arm in ("tanh", "tanh_sgd", "relu") if arm in planes] or list(planes)[:1]
    figure, axes = panels(1, len(arms), size=(3.3, 2.9), sharey=True)
    arrays = {}
    for axis, arm in zip(axes[0], arms, strict=True):
        names = _layer_names(config, arm)
        phases = np.exp(np.log(np.maximum(trained[arm]["phases"], 1e-12)).mean(axis=0))
        at = np.maximum(trained[arm]["epochs"], 0.5)
        for layer, name in enumerate(names):
            colour = _layer_look(layer, len(names))["color"]
            axis.loglog(at, phases[:, layer, 0], color=colour, label=name)
            axis.loglog(at, phases[:, layer, 1], color=colour, linestyle=":")
        fit = trained[arm]["epochs"][_fitted_at(_main_view(planes, arm))]
        axis.axvline(max(0.5, float(np.median(fit))), color="#999999", linewidth=1, zorder=0)
        axis.set(title=_title(arm), xlabel="epoch", ylim=(1e-6, None))
        arrays[arm] = phases
    axes[0, 0].set_ylabel("gradient / weights\nmean (line), fluctuation (dots)")
    legend(figure, axes[0, 0])
    run.figure("gradients", figure, **arrays)


@styled
def _draw_layers(run: Run, config: ConfigDict, planes) -> None:
    """Final minus peak of I(X;T) by layer and arm, every seed a point."""
    figure, axes = panels(1, 1, size=(7.5, 3.0))
    axis, arms = axes[0, 0], list(planes)
    names = max((_layer_names(config, arm) for arm in arms), key=len)
    arrays, draw = {}, np.random.default_rng(0)
    for k, arm in enumerate(arms):
        lost = _from_peak(_main_view(planes, arm))
        arrays[arm] = lost
        place = [names.index(n) for n in _layer_names(config, arm)]
        at = np.array(place) + (k - (len(arms) - 1) / 2) * 0.8 / len(arms)
        spread = draw.uniform(-0.25, 0.25, len(lost))[:, None] * 0.8 / len(arms)
        look = {"color": COLOURS[k % len(COLOURS)], "linestyle": "none"}
        axis.plot(at + spread, lost, marker=".", markersize=2.5, alpha=0.5, **look)
        axis.plot(at, lost.mean(axis=0), marker="_", markersize=9, label=_title(arm),
                  markeredgewidth=2, **look)  # fmt: skip
    axis.axhline(-config.compressed, color="#999999", linewidth=1, linestyle=":")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("I(X;T), final minus peak (bits)")
    legend(figure, axis, columns=3)
    run.figure("compression", figure, **arrays)


@styled
def _draw_bound(run: Run, config: ConfigDict, bound, fits) -> None:
    """Layers on their way to the bottleneck's bound, and their fitted beta at the end."""
    if not fits:
        return
    figure, axes = panels(1, len(fits) + 1, size=(3.3, 2.9))
    arrays = {"bound": bound["points"]}
    for axis, (arm, result) in zip(axes[0], fits.items(), strict=False):
        found, names = result["fits"], _layer_names(config, arm)
        arrays[arm] = found
        axis.plot(*bound["points"].T, color="black", linewidth=1, linestyle=":")
        for layer, name in enumerate(names):
            colour = _layer_look(layer, len(names))["color"]
            for k, (marker, size) in enumerate((("o", 2), ("o", 4), ("*", 7))):
                axis.plot(
                    *found[:, k, layer, 2:].T, marker, markersize=size, color=colour,
                    alpha=(0.4, 0.6, 1.0)[k], linestyle="none", label=name if k == 1 else None,
                )  # fmt: skip
        axis.set(title=f"{_title(arm)}: first small, last a star", xlabel="I(X;T) (bits)")
        draw = np.random.default_rng(0).uniform(-0.1, 0.1, found.shape[0])[:, None]
        places = np.arange(len(names)) + draw + 0.3 * (list(fits).index(arm) - 0.5)
        look = {"color": COLOURS[list(fits).index(arm)], "linestyle": "none", "markersize": 3}
        axes[0, -1].semilogy(places, found[:, -1, :, 0], marker="o", alpha=0.6, **look)
        axes[0, -1].plot([], [], marker="o", label=_title(arm), **look)
        axes[0, -1].set_xticks(range(len(names)), [n.removesuffix(" units") for n in names])
    axes[0, 0].set_ylabel("I(T;Y) of the soft rule (bits)")
    axes[0, -1].set(title="at the end", xlabel="units of the layer", ylabel="fitted beta")
    axes[0, -1].legend()
    legend(figure, axes[0, 0])
    run.figure("bound", figure, **arrays)


if __name__ == "__main__":
    # Steps of such small networks use one core: seeds are split over a few.
    start(main, cpu_devices=min(8, os.cpu_count() or 1))
