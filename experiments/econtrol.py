"""EControl (arXiv 2311.05645): compressed gradients with error control, any heterogeneity or noise.

Error compensation (EC) stalls where workers disagree, EF21 where gradients are noisy; EControl
feeds a fraction of its error back and should do neither. Tested on the paper's least squares over
step size, gain, number of workers, heterogeneity and noise; on digits split by label over ten
workers; and on a residual network on mnist_5k (preset full), at equal bytes and with step sizes
tuned on a draw of their own. EF21 with momentum (EF21-SGDM) and plain SGD stand beside.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from rlib import collectives, compression, data, nn, optim, parallel
from rlib.experiment import (
    COLOURS,
    Claim,
    Report,
    Row,
    Run,
    UsageError,
    judge,
    legend,
    named_key,
    panels,
    start,
    styled,
)

AXIS = "workers"
TUNING_SEED = 1_000_000  # no report uses it
QUIET = "Least squares, no noise: squared distance to the optimum by step size"
NOISY = "Least squares, noise: mean squared distance by number of workers"
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Run all problems with all methods, and judge the claims."""
    run = run or Run()
    seeds = len(run.seeds(config))
    methods = run.select(list(_transforms(compression.Identity(), config)))
    problems = _learning_problems(config)
    run.plan(_costs(config, methods, seeds, problems))
    quiet = {m: run.cached(f"quiet/{m}", lambda m=m: _quiet(config, m, seeds)) for m in methods}
    noisy = {m: run.cached(f"noisy/{m}", lambda m=m: _noisy(config, m, seeds)) for m in methods}
    gains = run.cached("gains", lambda: _gains(config, seeds)) if "econtrol" in methods else None
    learned = {name: _learn(run, config, name, p, methods, seeds) for name, p in problems.items()}
    _draw(run, config, quiet, noisy, gains, learned)
    rows = _rows(config, quiet, noisy, gains, learned)
    return Report(rows, _claims(config, quiet, noisy, gains, learned), _notes(config, learned))


def _transforms(codec: compression.Codec, config: ConfigDict) -> dict[str, Callable]:
    """Method -> (eta or None) -> transformation of local gradients into an agreed update."""
    mean = optax.stateless(lambda g, _: jax.lax.pmean(g, AXIS))
    naive = optax.stateless(
        lambda g, _: collectives.gathered_mean(codec, None, g, AXIS, scope="global")[0]
    )
    ef21 = functools.partial(optim.scale_by_ef21, codec, axis_name=AXIS)
    return {
        "sgd": lambda: mean,
        "naive": lambda: naive,
        "ec": lambda: optim.scale_by_error_compensation(codec, axis_name=AXIS),
        "ef21": ef21,
        "ef21-sgdm": lambda: ef21(config.momentum),
        "econtrol": lambda: optim.scale_by_econtrol(codec, axis_name=AXIS),
    }


# Least squares


def _problem(config: ConfigDict, seed: int, n: int, zeta: float) -> tuple[np.ndarray, ...]:
    """a_i, b_i and the optimum of f_i(x) = |a_i x - b_i|^2 / 2, a_i = i / sqrt(n)."""
    i = np.arange(1, n + 1)
    a = i / np.sqrt(n)
    draw = np.random.default_rng(seed).standard_normal((n, config.squares.dimension))
    b = draw * (zeta / i)[:, None]
    return a, b, (a[:, None] * b).sum(axis=0) / np.square(a).sum()


def _distances(config, transform, n, zeta, gammas, noise, seeds) -> np.ndarray:
    """Squared distance to the optimum after each round, (gammas, seeds, rounds)."""
    d, rounds = config.squares.dimension, config.squares.rounds
    problems = [_problem(config, seed, n, zeta) for seed in range(seeds)]
    a, b, optimum = (
        jnp.asarray(np.stack(part), jnp.float32) for part in zip(*problems, strict=True)
    )
    keys = jnp.stack([named_key(seed, "noise") for seed in range(seeds)])
    tx = parallel.on_one_device(transform, n, AXIS)

    def descend(gamma, a, b, optimum, key):
        def step(carry, key):
            x, state = carry
            gradients = a[:, None] * (a[:, None] * x - b)
            gradients += noise / np.sqrt(d) * jax.random.normal(key, (n, d))
            update, state = tx.update(gradients, state, x)
            x = x - gamma * update
            return (x, state), jnp.sum(jnp.square(x - optimum))

        x = jnp.zeros(d)
        return jax.lax.scan(step, (x, tx.init(x)), jax.random.split(key, rounds))[1]

    over_seeds = jax.vmap(descend, in_axes=(None, 0, 0, 0, 0))
    over_gammas = jax.vmap(over_seeds, in_axes=(0, None, None, None, None))
    return np.asarray(jax.jit(over_gammas)(jnp.asarray(gammas), a, b, optimum, keys))


def _codec(config: ConfigDict) -> compression.TopK:
    return compression.TopK(k=config.squares.k)


def _quiet(config: ConfigDict, method: str, seeds: int) -> Values:
    made = {}
    for zeta in config.squares.heterogeneity:
        transform = _transforms(_codec(config), config)[method]()
        made[f"{zeta:g}"] = _distances(
            config, transform, config.squares.workers, zeta, config.squares.gammas, 0.0, seeds
        )
    return made


def _noisy(config: ConfigDict, method: str, seeds: int) -> Values:
    options = config.squares
    made = {}
    for n in options.many_workers:
        for noise in options.noise:
            transform = _transforms(_codec(config), config)[method]()
            distances = _distances(
                config,
                transform,
                n,
                max(options.heterogeneity),
                [options.noisy_gamma],
                noise,
                seeds,
            )
            made[f"{n} {noise:g}"] = distances[0]
    return made


def _gains(config: ConfigDict, seeds: int) -> Values:
    """EControl's last distance by its gain, in multiples of delta."""
    options = config.squares
    delta = options.k / options.dimension
    last = []
    for multiple in options.gains:
        transform = optim.scale_by_econtrol(_codec(config), multiple * delta, axis_name=AXIS)
        distances = _distances(
            config,
            transform,
            options.workers,
            max(options.heterogeneity),
            [options.gain_gamma],
            0.0,
            seeds,
        )
        last.append(distances[0, :, -1])
    return {"last": np.stack(last)}


# Learning


def _learning_problems(config: ConfigDict) -> dict[str, ConfigDict]:
    return {name: config[name] for name in ("digits", "resnet") if config[name].rounds > 0}


def _model(name: str, options: ConfigDict, key: jax.Array):
    """(parameters, (parameters, images) -> logits)."""
    if name == "digits":
        params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
        return params, lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"]
    network = nn.ResNet(
        10, in_channels=1, widths=tuple(options.widths), blocks=1, groups=4, rngs=nnx.Rngs(key)
    )
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    return params, lambda p, x: nnx.merge(graphdef, p, rest)(x)


def _by_label(labels: np.ndarray, workers: int) -> list[np.ndarray]:
    """Examples sorted by label and cut into equal parts: few labels a worker."""
    order = np.argsort(labels, kind="stable")
    size = len(order) // workers
    return [order[i * size : (i + 1) * size] for i in range(workers)]


@functools.cache
def _images(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = data.arrays("digits" if name == "digits" else "mnist_5k", split)
    images = arrays["image"].astype(np.float32)
    return images / images.max(), arrays["label"]


def _trainer(config: ConfigDict, name: str, method: str) -> Callable[[float, int], Values]:
    """(step size, seed) -> loss on all training examples and test accuracy, along the rounds."""
    options = config[name]
    x, y = _images(name, "train")
    parts = _by_label(y, options.workers)
    shards = tuple(jnp.asarray(np.stack([array[p] for p in parts])) for array in (x, y))
    everything = tuple(jnp.asarray(v) for split in ("train", "test") for v in _images(name, split))
    _, apply = _model(name, options, jax.random.key(0))
    codec = compression.TopK(fraction=options.fraction)
    tx = parallel.on_one_device(_transforms(codec, config)[method](), options.workers, AXIS)
    size = shards[1].shape[1]

    def loss(params, images, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)
        decay = options.decay * sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
        return jnp.mean(losses) + decay / 2

    def local(params, images, labels, key):
        rows = jax.random.randint(key, (options.batch,), 0, size)
        return jax.grad(loss)(params, images[rows], labels[rows])

    def step(gamma, carry, key):
        params, state = carry
        keys = jax.random.split(key, options.workers)
        grads = jax.lax.map(lambda part: local(params, *part), (*shards, keys))
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - gamma * u, params, updates)
        return (params, state), None

    def stretch(gamma, carry, keys):
        carry, _ = jax.lax.scan(functools.partial(step, gamma), carry, keys)
        params = carry[0]
        x, y, x_test, y_test = everything
        right = jnp.mean(jnp.argmax(apply(params, x_test), axis=-1) == y_test)
        return carry, (loss(params, x, y), right)

    @jax.jit
    def descend(params, gamma, keys):
        return jax.lax.scan(functools.partial(stretch, gamma), (params, tx.init(params)), keys)[1]

    def train(gamma: float, seed: int) -> Values:
        params, _ = _model(name, options, named_key(seed, name, "weights"))
        keys = jax.random.split(named_key(seed, name, "batches"), options.rounds)
        losses, accuracies = descend(params, gamma, keys.reshape(options.looks, -1))
        return {"loss": np.asarray(losses), "accuracy": np.asarray(accuracies)}

    return train


def _learn(run: Run, config: ConfigDict, name: str, options: ConfigDict, methods, seeds: int):
    """Method -> {gamma, bytes per round and worker, losses and accuracies (seeds, looks)}."""
    try:
        _images(name, "train")
    except data.DataUnavailable as error:
        raise UsageError(f"{error}; or leave the problem out: --config.{name}.rounds=0") from error
    params, _ = _model(name, options, jax.random.key(0))
    flat = jax.eval_shape(lambda p: ravel_pytree(p)[0], params)
    codec = compression.TopK(fraction=options.fraction)
    packed = compression.payload_bytes(jax.eval_shape(codec.encode, None, flat))
    learned = {}
    for method in methods:
        train = _trainer(config, name, method)
        tuned = [
            run.cached(f"tune/{name}/{method}/{g:g}", functools.partial(train, g, TUNING_SEED))
            for g in options.gammas
        ]
        gamma = options.gammas[int(np.nanargmin([result["loss"][-1] for result in tuned]))]
        results = [
            run.cached(f"fit/{name}/{method}/seed{seed}", functools.partial(train, gamma, seed))
            for seed in range(min(seeds, options.seeds))
        ]
        learned[method] = {
            "gamma": gamma,
            "bytes": 4 * flat.size if method == "sgd" else packed,
            "loss": np.stack([r["loss"] for r in results]),
            "accuracy": np.stack([r["accuracy"] for r in results]),
        }
    return learned


def _costs(config, methods, seeds, problems) -> dict[str, float]:
    costs = {f"quiet/{m}": 1.5 * len(config.squares.heterogeneity) for m in methods}
    costs |= {f"noisy/{m}": 1.5 * len(config.squares.many_workers) for m in methods}
    costs["gains"] = 1.2 * len(config.squares.gains)
    for name, options in problems.items():
        one = 0.3 if name == "digits" else 20.0
        for method in methods:
            costs |= {f"tune/{name}/{method}/{gamma:g}": one for gamma in options.gammas}
            fits = range(min(seeds, options.seeds))
            costs |= {f"fit/{name}/{method}/seed{seed}": one for seed in fits}
    return costs


# The report


def _rows(config, quiet, noisy, gains, learned) -> list[Row]:
    options = config.squares
    rows = []
    for method, by_zeta in quiet.items():
        for zeta, distances in by_zeta.items():
            for gamma, last in zip(options.gammas, distances[:, :, -1], strict=True):
                title = f"{QUIET} (heterogeneity {zeta})"
                rows.append(Row(method, f"{gamma:g}", title, _finite(last)))
    for method, found in noisy.items():
        for n in options.many_workers:
            values = _finite(_floor(config, found, n, max(options.noise)))
            rows.append(Row(method, f"n={n}", f"{NOISY} (noise {max(options.noise):g})", values))
    if gains is not None:
        for multiple, last in zip(options.gains, gains["last"], strict=True):
            title = "EControl by gain: squared distance to the optimum"
            rows.append(Row("econtrol", f"{multiple:g} delta", title, _finite(last)))
    for name, results in learned.items():
        for method, result in results.items():
            table = f"{name}, step sizes tuned"
            rows.append(Row(method, "training loss", table, _finite(result["loss"][:, -1])))
            rows.append(Row(method, "test accuracy", table, _finite(result["accuracy"][:, -1])))
            rows.append(Row(method, "bytes a round and worker", table, [float(result["bytes"])]))
    return rows


def _finite(values: Iterable[float]) -> list[float]:
    """A run that left the range of float32 counts as its largest number."""
    largest = float(np.finfo(np.float32).max)
    return [float(v) if np.isfinite(v) else largest for v in np.asarray(values)]


def _floor(config: ConfigDict, found: Values, n: int, noise: float) -> np.ndarray:
    """Mean over the last sixth of the rounds, one per seed."""
    distances = found[f"{n} {noise:g}"]
    return distances[:, -(config.squares.rounds // 6) :].mean(axis=1)


def _claims(config, quiet, noisy, gains, learned) -> list[Claim]:
    """Those claims of which everything was run; ratios are judged by their logarithms."""
    claims: list[Claim] = []
    options = config.squares
    zeta, noise = f"{max(options.heterogeneity):g}", max(options.noise)
    middle = len(options.gammas) // 2

    def ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
        tiny = np.finfo(np.float32).tiny
        return [float(v) for v in np.log10(np.maximum(a, tiny)) - np.log10(np.maximum(b, tiny))]

    def add(sentence: str, needs: Iterable[str], values: Callable[[], Iterable[float]], **bound):
        if set(needs) <= set(quiet):
            claims.append(judge(sentence, list(values()), **bound))

    last = lambda m: quiet[m][zeta][middle, :, -1]
    add(
        f"heterogeneity, step {options.gammas[middle]:g}: EC ends farther than EControl (log10)",
        ("ec", "econtrol"),
        lambda: ratio(last("ec"), last("econtrol")),
        at_least=3,
    )
    add(
        "heterogeneity: naive compression ends farther than EControl (log10)",
        ("naive", "econtrol"),
        lambda: ratio(last("naive"), last("econtrol")),
        at_least=3,
    )
    floor = lambda m, n: _floor(config, noisy[m], n, noise)
    for n in options.many_workers:
        add(
            f"noise, n={n}: EF21's floor is at least 3 times EControl's (log10)",
            ("ef21", "econtrol"),
            lambda n=n: ratio(floor("ef21", n), floor("econtrol", n)),
            at_least=float(np.round(np.log10(3), 3)),
        )
        add(
            f"noise, n={n}: EControl's floor is at most twice SGD's (log10)",
            ("sgd", "econtrol"),
            lambda n=n: ratio(floor("econtrol", n), floor("sgd", n)),
            at_most=float(np.round(np.log10(2), 3)),
        )
        add(
            f"noise, n={n}: EControl's floor is at most EF21-SGDM's (log10)",
            ("ef21-sgdm", "econtrol"),
            lambda n=n: ratio(floor("econtrol", n), floor("ef21-sgdm", n)),
            at_most=0,
        )
    few, many = options.many_workers[0], options.many_workers[-1]
    add(
        f"speed-up, n={few} to {many}: EControl's floor falls at least as n grows (log10)",
        ("econtrol",),
        lambda: ratio(floor("econtrol", few), floor("econtrol", many)),
        at_least=float(np.round(np.log10(many / few), 3)),
    )
    if gains is not None:
        far = [float(not np.isfinite(v)) for v in gains["last"][-1]]
        add(
            f"gain: {options.gains[-1]:g} delta diverges (share of draws)",
            ("econtrol",),
            lambda: far,
            at_least=1,
        )
    for name, results in learned.items():
        for other in ("ec", "ef21", "ef21-sgdm"):
            if {other, "econtrol"} <= set(results):
                a, b = (results[m]["loss"][:, -1] for m in ("econtrol", other))
                sentence = f"{name}: EControl's training loss is at most {other}'s, equal bytes"
                claims.append(judge(sentence, [float(v) for v in a - b], at_most=0))
    return claims


def _notes(config: ConfigDict, learned) -> list[str]:
    notes = [
        "Workers are simulated on one device; messages are really packed. Bytes are those of a "
        "payload, without the first gradient, which EF21 and EControl send whole once.",
        "float32 ends near 1e-9 where float64 would go on to 1e-27.",
    ]
    for name, results in learned.items():
        chosen = ", ".join(f"{m} {r['gamma']:g}" for m, r in results.items())
        notes.append(f"{name}: step sizes chosen on a draw of their own: {chosen}")
    return notes


# Figures


@styled
def _draw(run: Run, config: ConfigDict, quiet, noisy, gains, learned) -> None:
    options = config.squares
    colours = {
        "sgd": "black",
        **dict(zip(("ec", "naive", "ef21", "ef21-sgdm", "econtrol"), COLOURS, strict=False)),
    }
    look = lambda m: {"linestyle": "--" if m == "sgd" else "-", "zorder": 3 if m == "sgd" else 2}
    zeta, noise = f"{max(options.heterogeneity):g}", max(options.noise)
    middle = len(options.gammas) // 2
    figure, axes = panels(1, 3, size=(3.4, 3.0))
    for method, found in quiet.items():
        curve = np.exp(np.log(np.maximum(found[zeta][middle], 1e-30)).mean(axis=0))
        axes[0, 0].semilogy(curve, color=colours[method], label=method, **look(method))
    axes[0, 0].set(title="no noise", xlabel="round", ylabel="squared distance")
    for method, found in noisy.items():
        floors = [_floor(config, found, n, noise) for n in options.many_workers]
        axes[0, 1].errorbar(
            options.many_workers,
            [f.mean() for f in floors],
            [f.std() for f in floors],
            color=colours[method], marker="o", markersize=3, capsize=2, **look(method),
        )  # fmt: skip
    axes[0, 1].set(title="noise", xlabel="workers", ylabel="squared distance, last rounds")
    axes[0, 1].set(xscale="log", yscale="log")
    axes[0, 1].set_xticks(options.many_workers, [str(n) for n in options.many_workers])
    axes[0, 1].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if gains is not None:
        last = np.minimum(np.nan_to_num(gains["last"], nan=1e9, posinf=1e9), 1e9).mean(axis=1)
        axes[0, 2].loglog(options.gains, last, color=colours["econtrol"], marker="o", markersize=3)
        axes[0, 2].axhline(1e9, color="#999999", linestyle=":")
        axes[0, 2].annotate("diverged", (options.gains[0], 1e9), va="bottom", fontsize=8)
    axes[0, 2].set(
        title="EControl by gain, no noise", xlabel="eta / delta", ylabel="squared distance"
    )
    legend(figure, axes[0, 0])
    arrays = {f"no noise {m}": f[zeta][middle] for m, f in quiet.items()}
    run.figure("least_squares", figure, **arrays)
    for name, results in learned.items():
        figure, axes = panels(1, 2, size=(3.6, 3.0))
        rounds = config[name].rounds // config[name].looks * np.arange(1, config[name].looks + 1)
        for method, result in results.items():
            sent = result["bytes"] * rounds / 1e3
            loss = result["loss"].mean(axis=0)
            axes[0, 0].plot(rounds, loss, color=colours[method], label=method, **look(method))
            axes[0, 1].loglog(sent, loss, color=colours[method], **look(method))
        axes[0, 0].set(xlabel="round", ylabel="training loss", title=name, yscale="log")
        axes[0, 1].set(xlabel="kilobytes sent by a worker", title="the same by bytes")
        legend(figure, axes[0, 0])
        run.figure(name, figure, **{m: r["loss"] for m, r in results.items()})


if __name__ == "__main__":
    start(main, memory_keys=("squares.rounds", "resnet.batch"))
