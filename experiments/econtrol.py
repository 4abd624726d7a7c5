"""EControl (arXiv 2311.05645): compressed gradients with error control, any heterogeneity or noise.

Error compensation (EC) stalls where workers disagree, EF21 where gradients are noisy; EControl
feeds a fraction of its error back and should do neither. Tested on the paper's least squares over
step size, gain, number of workers, heterogeneity and noise; on digits split by label over ten
workers; and on a residual network on mnist_5k (preset full), at equal bytes and with step sizes
tuned on a draw of their own. EF21 with momentum (EF21-SGDM) and plain SGD stand beside.
"""

import functools
from collections.abc import Callable
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
    TUNING_SEED,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    capped,
    legend,
    named_key,
    panels,
    slow_network,
    start,
    styled,
)

AXIS = "data"
QUIET = "Least squares, no noise: squared distance to the optimum by step size"
NOISY = "Least squares, noise: mean squared distance by number of workers"
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Run all problems with all methods, and judge the claims."""
    run = run or Run()
    seeds = len(run.seeds(config))
    methods = run.select(list(_transforms(compression.Identity(), config)))
    problems = _learning_problems(config)
    run.plan(_costs(run, config, methods, problems))
    posed = methods if config.squares.rounds > 0 else []
    quiet = {
        m: run.cached(f"quiet/{m}/{seeds}", lambda m=m: _quiet(config, m, seeds)) for m in posed
    }
    noisy = {
        m: run.cached(f"noisy/{m}/{seeds}", lambda m=m: _noisy(config, m, seeds)) for m in posed
    }
    gains = (
        run.cached(f"gains/{seeds}", lambda: _gains(config, seeds)) if "econtrol" in posed else None
    )
    learned = {name: _learn(run, config, name, p, methods) for name, p in problems.items()}
    links = slow_network.measured(run, "experiments.econtrol:network_trainings", config.network)
    _draw_squares(run, config, quiet, noisy, gains)
    _draw_learned(run, config, learned)
    slow_network.draw_network(run, links)
    rows = [*_rows(config, quiet, noisy, gains, learned), *slow_network.network_rows(links)]
    claims = [*_claims(config, quiet, noisy, gains, learned), *_network_claims(config, links)]
    return Report(rows, claims, _notes(quiet, learned))


def _transforms(codec: compression.Codec, config: ConfigDict) -> dict[str, Callable]:
    """Method -> maker of its transformation of local gradients into an agreed update."""
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

    def distances(gamma, a, b, optimum, key):
        def gradients(x, key):
            exact = a[:, None] * (a[:, None] * x - b)
            return exact + noise / np.sqrt(d) * jax.random.normal(key, (n, d))

        x, keys = jnp.zeros(d), jax.random.split(key, rounds)
        distance = lambda x: jnp.sum(jnp.square(x - optimum))
        return _rounds(tx, gradients, gamma, (x, tx.init(x)), keys, distance)[1]

    over_seeds = jax.vmap(distances, in_axes=(None, 0, 0, 0, 0))
    over_gammas = jax.vmap(over_seeds, in_axes=(0, None, None, None, None))
    return np.asarray(jax.jit(over_gammas)(jnp.asarray(gammas), a, b, optimum, keys))


def _rounds(tx, gradients, gamma, carry, keys, look=lambda params: None):
    """A loop like `training.descend`, by the gradients of many workers."""

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(gradients(params, key), state, params)
        params = jax.tree.map(lambda p, u: p - gamma * u, params, updates)
        return (params, state), look(params)

    return jax.lax.scan(step, carry, keys)


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
    channels = data.images(options.dataset, "train")[0].shape[-1]
    network = nn.ResNet(
        10,
        in_channels=channels,
        widths=tuple(options.widths),
        blocks=options.blocks,
        groups=options.groups,
        rngs=nnx.Rngs(key),
    )
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    return params, lambda p, x: nnx.merge(graphdef, p, rest)(x)


def _mean_of_parts(f: Callable, x: jax.Array, y: jax.Array, most: int = 1000) -> jax.Array:
    """Mean over examples of f, a mean over its examples, by equal parts that fit in memory."""
    size = next(n for n in range(most, 0, -1) if len(x) % n == 0)
    parts = [array.reshape(-1, size, *array.shape[1:]) for array in (x, y)]
    return jnp.mean(jax.lax.map(lambda rows: f(*rows), parts))


def _trainer(
    config: ConfigDict, name: str, method: str, check: Callable[[], None]
) -> Callable[[float, int], Values]:
    """(step size, seed) -> loss on all training examples and test accuracy, along the rounds."""
    options = config[name]
    train_set, test_set = (data.images(options.dataset, split) for split in ("train", "test"))
    parts = data.partition_by_label(train_set[1], options.workers)
    shards = tuple(jnp.asarray(np.stack([array[p] for p in parts])) for array in train_set)
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

    @functools.partial(jax.jit, donate_argnums=0)
    def stretch(carry, gamma, keys, shards):
        def gradients(params, key):
            keys = jax.random.split(key, options.workers)
            return jax.lax.map(lambda part: local(params, *part), (*shards, keys))

        return _rounds(tx, gradients, gamma, carry, keys)[0]

    @jax.jit
    def look(params, train_set, test_set):
        right = lambda x, y: jnp.mean(jnp.argmax(apply(params, x), axis=-1) == y)
        whole = functools.partial(loss, params)
        return _mean_of_parts(whole, *train_set), _mean_of_parts(right, *test_set)

    sets = jax.tree.map(jnp.asarray, (train_set, test_set))

    def train(gamma: float, seed: int) -> Values:
        params, _ = _model(name, options, named_key(seed, name, "weights"))
        keys = jax.random.split(named_key(seed, name, "batches"), options.rounds)
        carry, seen = (params, tx.init(params)), []
        for part in keys.reshape(options.looks, -1):
            check()
            carry = stretch(carry, gamma, part, shards)
            seen.append(look(carry[0], *sets))
        losses, accuracies = (np.asarray(values) for values in zip(*seen, strict=True))
        return {"loss": losses, "accuracy": accuracies}

    return train


def _learn(run: Run, config: ConfigDict, name: str, options: ConfigDict, methods):
    """Method -> {gamma, bytes a worker sends in a round, losses and accuracies (seeds, looks)}.

    A worker sends its payload to all others; SGD's gradients go round a ring.
    """
    try:
        data.images(options.dataset, "train")
    except data.DataUnavailable as error:
        raise UsageError(f"{error}; or leave the problem out: --config.{name}.rounds=0") from error
    params, _ = _model(name, options, jax.random.key(0))
    flat = jax.eval_shape(lambda p: ravel_pytree(p)[0], params)
    codec = compression.TopK(fraction=options.fraction)
    packed = compression.payload_bytes(jax.eval_shape(codec.encode, None, flat))
    ring = 2 * (options.workers - 1) / options.workers * 4 * flat.size
    learned = {}
    for method in methods:
        train = _trainer(config, name, method, run.check)
        last = lambda train=train: [train(g, TUNING_SEED)["loss"][-1] for g in options.gammas]
        gamma = run.choose(f"tune/{name}/{method}", options.gammas, last)
        results = [
            run.cached(f"fit/{name}/{method}/seed{seed}", functools.partial(train, gamma, seed))
            for seed in run.seeds(options)
        ]
        learned[method] = {
            "gamma": gamma,
            "bytes": ring if method == "sgd" else (options.workers - 1) * packed,
            "loss": np.stack([r["loss"] for r in results]),
            "accuracy": np.stack([r["accuracy"] for r in results]),
        }
    return learned


# Real processes over real TCP


def network_trainings(options: ConfigDict) -> dict[str, slow_network.Training]:
    """What `slow_network.measured` times: SGD by float32 and bfloat16 means, EC, EF21, EControl.

    A perceptron learns digits; every host has the examples of its own labels.
    """
    mesh = parallel.make_mesh({AXIS: options.hosts})
    network = nn.Perceptron((64, *options.hidden, 10), rngs=nnx.Rngs(0))
    graphdef, params, frozen = nnx.split(network, nnx.Param, ...)
    x, y = data.images("digits", "train")
    parts = data.partition_by_label(y, options.hosts)

    def loss(params: Any, frozen: Any, batch: Any, key: Any):
        logits = nnx.merge(graphdef, params, frozen)(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {}

    def batches():
        draw = np.random.default_rng(0)
        while True:
            rows = np.concatenate([draw.choice(part, options.batch) for part in parts])
            yield {"image": x[rows].reshape(len(rows), -1), "label": y[rows]}

    def step(transform: optax.GradientTransformation, stage: str | None = None):
        optimizer = optax.chain(transform, optax.sgd(options.learning_rate))
        return parallel.make_train_step(
            loss, optimizer, mesh, params, frozen, worker_axis=AXIS, stage=stage
        )

    rounded = optax.stateless(lambda g, _: collectives.rounded_mean(g, AXIS, jnp.bfloat16))
    exact = optax.stateless(lambda g, _: jax.lax.pmean(g, AXIS))
    phases = {
        "sgd": [("float32", step(exact), options.steps)],
        "sgd, bfloat16": [("bfloat16", step(rounded), options.steps)],
    }
    codec = compression.TopK(fraction=options.fraction)
    compensated = step(optim.scale_by_error_compensation(codec, axis_name=AXIS), "rest")
    phases["ec"] = [("Top-K", compensated, options.steps)]
    for name, transform in {
        "ef21": optim.scale_by_ef21(codec, axis_name=AXIS),
        "econtrol": optim.scale_by_econtrol(codec, axis_name=AXIS),
    }.items():
        whole, rest = step(transform, "first"), step(transform, "rest")
        phases[name] = [("first, whole", whole, 1), ("Top-K", rest, options.steps - 1)]
    return {n: slow_network.Training(p, params, frozen, batches) for n, p in phases.items()}


def _network_claims(config: ConfigDict, links: dict[float, slow_network.Measured]) -> list[Claim]:
    claims = []
    options = config.network  # a ring sends 8 d (n - 1) / n bytes, Top-K 8 k (n - 1)
    fewer = 1 / (options.hosts * options.fraction)
    for megabits, found in links.items():
        link = f"{megabits:g} Mbit/s"
        claims += [
            slow_network.step_claim(
                f"{link}: Top-K steps are faster than float32 (times)",
                found, "seconds", "float32", "Top-K", at_least=1,
            ),
            slow_network.step_claim(
                f"{link}: their bytes on the wire are fewer, index and value for each of K (times)",
                found, "bytes", "float32", "Top-K", at_least=0.9 * fewer,
            ),
            slow_network.training_claim(
                f"{link}: EControl's training is faster than SGD's in float32 (times)",
                found, "sgd", "econtrol", at_least=1,
            ),
        ]  # fmt: skip
    return claims


def _costs(run: Run, config: ConfigDict, methods, problems) -> dict[str, float]:
    seeds = len(run.seeds(config))
    costs = slow_network.costs(config.network)
    if config.squares.rounds > 0:
        costs |= {f"quiet/{m}/{seeds}": 1.5 * len(config.squares.heterogeneity) for m in methods}
        costs |= {f"noisy/{m}/{seeds}": 1.5 * len(config.squares.many_workers) for m in methods}
        if "econtrol" in methods:
            costs[f"gains/{seeds}"] = 1.2 * len(config.squares.gains)
    for name, options in problems.items():
        one = 0.3 if name == "digits" else 20.0
        for method in methods:
            costs[f"tune/{name}/{method}"] = one * len(options.gammas)
            fits = run.seeds(options)
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
                rows.append(Row(method, f"{gamma:g}", title, capped(last)))
    for method, found in noisy.items():
        for n in options.many_workers:
            values = capped(_floor(config, found, n, max(options.noise)))
            rows.append(Row(method, f"n={n}", f"{NOISY} (noise {max(options.noise):g})", values))
    if gains is not None:
        for multiple, last in zip(options.gains, gains["last"], strict=True):
            title = "EControl by gain: squared distance to the optimum"
            rows.append(Row("econtrol", f"{multiple:g} delta", title, capped(last)))
    for name, results in learned.items():
        for method, result in results.items():
            table = f"{name}, step sizes tuned"
            rows.append(Row(method, "training loss", table, capped(result["loss"][:, -1])))
            rows.append(Row(method, "test accuracy", table, capped(result["accuracy"][:, -1])))
            sent = [float(result["bytes"])]
            rows.append(Row(method, "bytes a worker sends in a round", table, sent))
    return rows


def _floor(config: ConfigDict, found: Values, n: int, noise: float) -> np.ndarray:
    """Mean over the last sixth of the rounds, one per seed."""
    distances = found[f"{n} {noise:g}"]
    return distances[:, -(config.squares.rounds // 6) :].mean(axis=1)


def _claims(config, quiet, noisy, gains, learned) -> list[Claim]:
    """Those claims of which everything was run; ratios are judged by their logarithms."""
    claims = Claims(quiet)
    options = config.squares
    zeta, noise = f"{max(options.heterogeneity):g}", max(options.noise)
    middle = len(options.gammas) // 2

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        tiny = np.finfo(np.float32).tiny
        return np.log10(np.maximum(a, tiny)) - np.log10(np.maximum(b, tiny))

    last = lambda m: quiet[m][zeta][middle, :, -1]
    claims.add(
        f"heterogeneity, step {options.gammas[middle]:g}: EC ends farther than EControl (log10)",
        ("ec", "econtrol"),
        lambda: ratio(last("ec"), last("econtrol")),
        at_least=3,
    )
    claims.add(
        "heterogeneity: naive compression ends farther than EControl (log10)",
        ("naive", "econtrol"),
        lambda: ratio(last("naive"), last("econtrol")),
        at_least=3,
    )
    floor = lambda m, n: _floor(config, noisy[m], n, noise)
    for n in options.many_workers:
        claims.add(
            f"noise, n={n}: EF21's floor is at least 3 times EControl's (log10)",
            ("ef21", "econtrol"),
            lambda n=n: ratio(floor("ef21", n), floor("econtrol", n)),
            at_least=float(np.round(np.log10(3), 3)),
        )
        claims.add(
            f"noise, n={n}: EControl's floor is at most twice SGD's (log10)",
            ("sgd", "econtrol"),
            lambda n=n: ratio(floor("econtrol", n), floor("sgd", n)),
            at_most=float(np.round(np.log10(2), 3)),
        )
        claims.add(
            f"noise, n={n}: EControl's floor is at most EF21-SGDM's (log10)",
            ("ef21-sgdm", "econtrol"),
            lambda n=n: ratio(floor("econtrol", n), floor("ef21-sgdm", n)),
            at_most=0,
        )
    few, many = options.many_workers[0], options.many_workers[-1]
    claims.add(
        f"speed-up, n={few} to {many}: EControl's floor falls at least as n grows (log10)",
        ("econtrol",),
        lambda: ratio(floor("econtrol", few), floor("econtrol", many)),
        at_least=float(np.round(np.log10(many / few), 3)),
    )
    if gains is not None:
        far = ~np.isfinite(gains["last"][-1])
        claims.add(
            f"gain: {options.gains[-1]:g} delta diverges (share of draws)",
            ("econtrol",),
            lambda: far,
            at_least=1,
        )
    for name, results in learned.items():
        of_problem = Claims(results)
        loss = lambda m, results=results: capped(results[m]["loss"][:, -1])
        for other in ("ec", "ef21", "ef21-sgdm"):
            of_problem.add(
                f"{name}: EControl's training loss is at most {other}'s, equal bytes",
                ("econtrol", other),
                lambda loss=loss, other=other: loss("econtrol") - loss(other),
                at_most=0,
            )
        claims += of_problem
    return claims


def _notes(quiet, learned) -> list[str]:
    notes = []
    if quiet or learned:
        notes.append(
            "Workers are simulated on one device; messages are really packed. Bytes are those of "
            "payloads sent to all others (SGD: of a ring all-reduce), without the first gradient, "
            "which EF21 and EControl send whole once."
        )
    if quiet:
        notes.append("float32 ends near 1e-9 where float64 would go on to 1e-27.")
    for name, results in learned.items():
        chosen = ", ".join(f"{m} {r['gamma']:g}" for m, r in results.items())
        notes.append(f"{name}: step sizes chosen on a draw of their own: {chosen}")
    return notes


# Figures


_COLOURS = {
    "sgd": "black",
    **dict(zip(("ec", "naive", "ef21", "ef21-sgdm", "econtrol"), COLOURS, strict=False)),
}


def _look(method: str) -> dict[str, Any]:
    reference = method == "sgd"
    return {
        "color": _COLOURS[method],
        "linestyle": "--" if reference else "-",
        "zorder": 3 if reference else 2,
    }


@styled
def _draw_squares(run: Run, config: ConfigDict, quiet, noisy, gains) -> None:
    if not quiet:
        return
    options = config.squares
    zeta, noise = f"{max(options.heterogeneity):g}", max(options.noise)
    middle = len(options.gammas) // 2
    figure, axes = panels(1, 3, size=(3.4, 3.0))
    for method, found in quiet.items():
        curve = np.exp(np.log(np.maximum(found[zeta][middle], 1e-30)).mean(axis=0))
        axes[0, 0].semilogy(curve, label=method, **_look(method))
    axes[0, 0].set(title="no noise", xlabel="round", ylabel="squared distance")
    for method, found in noisy.items():
        floors = [_floor(config, found, n, noise) for n in options.many_workers]
        axes[0, 1].errorbar(
            options.many_workers,
            [f.mean() for f in floors],
            [f.std() for f in floors],
            marker="o", markersize=3, capsize=2, **_look(method),
        )  # fmt: skip
    axes[0, 1].set(title="noise", xlabel="workers", ylabel="squared distance, last rounds")
    axes[0, 1].set(xscale="log", yscale="log")
    axes[0, 1].set_xticks(options.many_workers, [str(n) for n in options.many_workers])
    axes[0, 1].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if gains is not None:
        last = capped(gains["last"], 1e9).mean(axis=1)
        axes[0, 2].loglog(options.gains, last, color=_COLOURS["econtrol"], marker="o", markersize=3)
        axes[0, 2].axhline(1e9, color="#999999", linestyle=":")
        axes[0, 2].annotate("diverged", (options.gains[0], 1e9), va="bottom", fontsize=8)
    axes[0, 2].set(
        title="EControl by gain, no noise", xlabel="eta / delta", ylabel="squared distance"
    )
    legend(figure, axes[0, 0])
    arrays = {f"no noise {m}": f[zeta][middle] for m, f in quiet.items()}
    run.figure("least_squares", figure, **arrays)


@styled
def _draw_learned(run: Run, config: ConfigDict, learned) -> None:
    for name, results in learned.items():
        figure, axes = panels(1, 2, size=(3.6, 3.0))
        rounds = config[name].rounds // config[name].looks * np.arange(1, config[name].looks + 1)
        for method, result in results.items():
            sent = result["bytes"] * rounds / 1e3
            loss = result["loss"].mean(axis=0)
            axes[0, 0].plot(rounds, loss, label=method, **_look(method))
            axes[0, 1].loglog(sent, loss, **_look(method))
        axes[0, 0].set(xlabel="round", ylabel="training loss", title=name, yscale="log")
        axes[0, 1].set(xlabel="kilobytes sent by a worker", title="the same by bytes")
        axes[0, 1].tick_params(axis="x", which="minor", labelbottom=False)
        legend(figure, axes[0, 0])
        run.figure(name, figure, **{m: r["loss"] for m, r in results.items()})


if __name__ == "__main__":
    start(main, memory_keys=("squares.rounds", "resnet.batch"))
