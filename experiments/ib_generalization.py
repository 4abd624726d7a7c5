"""How does information bottleneck help deep learning (arXiv 2305.18887): does it predict the gap?

The paper bounds the gap between test and training loss by what the representation keeps of the
input beyond the label, I(X; Z | Y), plus what the encoder's parameters keep of the training set,
I(phi; S), and claims that this sum correlates with the gap better than either term, than norms and
than the number of parameters. Tested on a population of stochastic networks on blobs, over widths,
depths, weight decays, data draws and initialisations, trained plainly or with a constraint on
I(X; Z) by dual ascent. Correlations are ranks within a data draw, since every draw is another
problem; data draws are what intervals are over.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from sklearn.datasets import make_blobs

from rlib import information, optim, parallel
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

SERIES = ("plain", "constrained")
REPRESENTATION = "I(X;Z|Y), mc"
PARAMETERS = "I(phi;S), jensen"
SUM = "sum"
TERMS = {"I(X;Z|Y)": REPRESENTATION, "I(phi;S)": PARAMETERS}
OTHERS = {"the weight norm": "weight norm", "the parameter count": "parameter count"}
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Train and measure the population, correlate, and judge the claims."""
    run = run or Run()
    draws = len(run.seeds(config))
    if draws < 2:
        raise UsageError("--seeds: two data draws at least, between which I(phi; S) tells")
    sizes = [(width, layers) for layers in config.layers for width in config.widths]
    units = {
        (series, size): f"fit/{series}/draws{draws}/width{size[0]}-layers{size[1]}"
        for series in run.select(SERIES)
        for size in sizes
    }
    run.plan({unit: 8.0 + w * n / 16 for (_, (w, n)), unit in units.items()})
    pools: dict[str, Values] = {}
    for series in run.select(SERIES):
        parts = []
        for size in sizes:
            fit = functools.partial(_fit, config, run, series, *size, draws)
            parts.append(run.cached(units[series, size], fit))
        pools[series] = _pool(config, parts)
    found = {series: _correlations(config, pool) for series, pool in pools.items()}
    _draw_correlations(run, found)
    _draw_models(run, config, pools)
    rows = [*_correlation_rows(found), *_mean_rows(config, pools)]
    return Report(rows, _claims(found), _notes(config, pools))


# The population


def _blobs(options: ConfigDict, draw: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Training, test and fresh examples (x, label) of one draw of the centres."""
    counts = (options.train, options.test, options.fresh)
    x, y = make_blobs(
        sum(counts), centers=options.centers, cluster_std=options.sd, random_state=draw
    )
    cuts = np.cumsum(counts)[:-1]
    parts = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    return tuple((x.astype(np.float32), y.astype(np.int32)) for x, y in parts)


def _network_sizes(config: ConfigDict, width: int, layers: int) -> tuple[int, ...]:
    wide = (layers + 1) // 2
    return (2, *[width] * wide, *[width // 2] * (layers - wide), config.blobs.centers)


def _network(sizes, key):
    """Initial parameters, and what makes a network of parameters."""
    network = information.StochasticClassifier(sizes, rngs=nnx.Rngs(key))
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    return params, lambda params: nnx.merge(graphdef, params, rest)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _train(config: ConfigDict, constrained: bool, sizes, key, decay, examples):
    """Trained parameters, SWAG's state and the last multiplier."""
    x, labels = examples
    params, network_of = _network(sizes, key)
    tx = optax.chain(
        optax.add_decayed_weights(decay),
        optax.sgd(config.learning_rate, config.momentum),
        optim.record_swag(config.swag.start, 1, config.swag.rank),
    )

    def loss(params, multiplier, key):
        network = network_of(params)
        mean, sd = network.encoder(x)
        z = mean + sd * jax.random.normal(key, mean.shape)
        value = _cross_entropy(network.head(z), labels)
        if not constrained:
            return value, jnp.zeros(())
        lacking = config.target - information.gaussian_information(z, mean, sd)
        return value + multiplier * lacking, lacking

    def step(carry, key):
        params, state, multiplier = carry
        grads, lacking = jax.grad(loss, has_aux=True)(params, multiplier, key)
        updates, state = tx.update(grads, state, params)
        multiplier = multiplier + config.multiplier_rate * lacking  # ascent
        return (optax.apply_updates(params, updates), state, multiplier), None

    keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
    carry = (params, tx.init(params), jnp.zeros(()))
    params, state, multiplier = jax.lax.scan(step, carry, keys)[0]
    return params, state[-1], multiplier


def _measure(config: ConfigDict, sizes, params, key, examples) -> Values:
    """Losses, accuracy and information of one network; nats."""
    train, test, fresh = examples
    network = _network(sizes, key)[1](params)
    key_loss, key_information = jax.random.split(jax.random.fold_in(key, 2))

    def losses(examples):
        keys = jax.random.split(key_loss, config.noise_draws)
        logits = jax.vmap(lambda k: network(examples[0], k))(keys)
        each = jax.vmap(lambda one: _cross_entropy(one, examples[1]))(logits)
        guess = jnp.argmax(jnp.mean(jax.nn.softmax(logits), axis=0), axis=-1)
        return jnp.mean(each), jnp.mean(guess == examples[1])

    mean, sd = network.encoder(fresh[0])

    def informations(key):
        z = mean + sd * jax.random.normal(key, mean.shape)
        return {
            f"{name}, {estimator}": information.gaussian_information(
                z, mean, sd, labels, estimator=estimator
            )
            for name, labels in (("I(X;Z|Y)", fresh[1]), ("I(X;Z)", None))
            for estimator in ("mc", "jensen")
        }

    keys = jax.random.split(key_information, config.information_draws)
    kept = jax.tree.map(jnp.mean, jax.lax.map(informations, keys))
    (loss, accuracy), (test_loss, _) = losses(train), losses(test)
    return {
        **kept,
        "gap": test_loss - loss,
        "training loss": loss,
        "training accuracy": accuracy,
        "weight norm": optax.tree.norm(params),
        "mean of Z": mean,
    }


def _fit(config: ConfigDict, run: Run, series: str, width: int, layers: int, draws: int) -> Values:
    """Every measure of the networks of one size, (draws, initialisations, decays)."""
    sizes = _network_sizes(config, width, layers)
    shape = (draws, config.initialisations, len(config.decays))
    draw, seed, decay = (index.ravel() for index in np.indices(shape))
    mesh = run.mesh(config)
    count, parts = len(draw), parallel.data_axis_size(mesh)
    rows = np.arange(-(-count // parts) * parts) % count  # as many networks as the mesh divides
    blobs = [_blobs(config.blobs, i) for i in range(draws)]
    examples = jax.tree.map(lambda *x: np.stack(x)[draw[rows]], *blobs)
    keys = [jax.random.key_data(named_key(i, "network")) for i in range(config.initialisations)]
    decays = np.asarray(config.decays, np.float32)[decay[rows]]
    batch = (np.stack(keys)[seed[rows]], decays, examples)

    def local(keys, decays, examples):
        keys = jax.random.wrap_key_data(keys)
        train = functools.partial(_train, config, series == "constrained", sizes)
        params, state, multiplier = jax.vmap(train)(keys, decays, examples[0])
        measure = lambda part: _measure(config, sizes, *part)
        measured = jax.lax.map(measure, (params, keys, examples))  # pairs of one network at a time
        return measured | {"multiplier": multiplier}, _encoder_only(state)

    split = parallel.batch_spec(mesh)
    together = jax.jit(  # networks know nothing of each other: no collectives, nothing to check
        jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False),
        out_shardings=parallel.named(mesh, PartitionSpec()),
    )
    measured, posteriors = together(*parallel.shard_batch(mesh, batch))
    measured, posteriors = jax.tree.map(lambda x: x[:count], (measured, posteriors))
    means = np.asarray(measured.pop("mean of Z"))
    values = {name: np.asarray(value).reshape(shape) for name, value in measured.items()}
    binned = functools.partial(information.binned_information, bins=config.bins)
    for name, given in (("I(X;Z|Y), binned", True), ("I(X;Z), binned", False)):
        each = [
            binned(z, blobs[i][2][1] if given else None) if np.isfinite(z).all() else np.nan
            for z, i in zip(means, draw, strict=True)
        ]
        values[name] = np.reshape(each, shape)
    values |= _parameter_informations(config, posteriors, shape)
    weights = jax.eval_shape(lambda: _network(sizes, jax.random.key(0))[0])
    values["parameter count"] = np.full(shape, sum(x.size for x in jax.tree.leaves(weights)), float)
    indices = {"draw": draw, "initialisation": seed, "decay": decay}
    values |= {name: index.reshape(shape) for name, index in indices.items()}
    values |= {"width": np.full(shape, width), "layers": np.full(shape, layers)}
    return values


def _encoder_only(state: optim.SwagState) -> optim.SwagState:
    return optim.swag_restrict(state, lambda tree: tree["encoder"])


def _parameter_informations(config: ConfigDict, posteriors: Any, shape: tuple[int, ...]) -> Values:
    """I(phi; S) of the draws' posteriors together: one value for all draws of a setting."""
    draws, *settings = shape
    stack = lambda x: jnp.swapaxes(x.reshape(draws, -1, *x.shape[1:]), 0, 1)
    stacked = jax.tree.map(stack, posteriors)
    kinds = {
        PARAMETERS: {"estimator": "jensen"},
        "I(phi;S), jensen, no frozen": {
            "estimator": "jensen",
            "floor": 2 * config.swag.least_sd**2,  # the diagonal part is half of it
        },
        "I(phi;S), mc": {"estimator": "mc"},
    }

    @jax.jit
    def all_kinds(stacked):
        def one(posterior):
            key = named_key(0, "posterior")
            return {
                name: information.parameter_information(
                    posterior, key, draws=config.swag.draws, **kind
                )
                for name, kind in kinds.items()
            }

        return jax.lax.map(one, stacked)

    found = all_kinds(stacked)
    return {
        name: np.broadcast_to(np.asarray(value).reshape(1, *settings), shape)
        for name, value in found.items()
    }


def _pool(config: ConfigDict, parts: list[Values]) -> Values:
    """All networks of a series, one after another, sums added; `kept` says which are compared."""
    pool = {name: np.concatenate([np.ravel(part[name]) for part in parts]) for name in parts[0]}
    sound = np.all([np.isfinite(value) for value in pool.values()], axis=0)
    pool["kept"] = sound & (pool["training accuracy"] >= config.least_accuracy)
    add = lambda a, b, scaled: _sum_over(pool["kept"], pool[a], pool[b], scaled)
    pool[SUM] = add(REPRESENTATION, PARAMETERS, True)
    pool["sum, no frozen"] = add(REPRESENTATION, "I(phi;S), jensen, no frozen", True)
    pool["sum, not scaled"] = add(REPRESENTATION, PARAMETERS, False)
    pool["sum of jensen"] = add("I(X;Z|Y), jensen", PARAMETERS, True)
    return pool


def _sum_over(kept: np.ndarray, a: np.ndarray, b: np.ndarray, scaled: bool) -> np.ndarray:
    """The combined score of those that are compared; NaN for the others."""
    made = np.full(a.shape, np.nan)
    if kept.any():
        made[kept] = information.combined_score(a[kept], b[kept], scaled=scaled)
    return made


# Correlations

MEASURES = (
    REPRESENTATION,
    "I(X;Z|Y), jensen",
    "I(X;Z|Y), binned",
    "I(X;Z), mc",
    "I(X;Z), jensen",
    "I(X;Z), binned",
    PARAMETERS,
    "I(phi;S), jensen, no frozen",
    "I(phi;S), mc",
    SUM,
    "sum, no frozen",
    "sum, not scaled",
    "sum of jensen",
    "weight norm",
    "parameter count",
)


def _correlations(config: ConfigDict, pool: Values) -> Values:
    """Measure -> correlations with the gap: one a draw, pooled, within decays, and an interval."""
    kept = pool["kept"]
    draws = [d for d in np.unique(pool["draw"]) if np.sum(kept & (pool["draw"] == d)) >= 3]
    kept = kept & np.isin(pool["draw"], draws)
    if not draws:
        return {}
    gap, draw = pool["gap"][kept], pool["draw"][kept]
    arm = draw * len(config.decays) + pool["decay"][kept]
    found = {}
    for measure in MEASURES:
        score = pool[measure][kept]
        pooled = information.generalization_correlation(gap, score, draw)
        of_draw = lambda groups, score=score: [
            information.generalization_correlation(
                gap[draw == d], score[draw == d], groups[draw == d]
            ).spearman
            for d in draws
        ]
        interval = information.correlation_interval(gap, score, draw, resamples=config.resamples)
        found[measure] = {
            "single": of_draw(draw),
            "within decays": of_draw(arm),
            "pooled": pooled._asdict(),
            "interval": interval,
            "draws ignored": information.generalization_correlation(gap, score).spearman,
        }
    return found


# The report


def _correlation_rows(found: dict[str, Values]) -> list[Row]:
    rows = []
    for series, measures in found.items():
        title = f"Correlation with the gap within data draws, {series}"
        for measure, c in measures.items():
            columns = {
                "Spearman, by draw": c["single"],
                "Spearman, pooled": [c["pooled"]["spearman"]],
                "Pearson, pooled": [c["pooled"]["pearson"]],
                "Kendall, pooled": [c["pooled"]["kendall"]],
                "Spearman within decays, by draw": c["within decays"],
                "Spearman, draws ignored": [c["draws ignored"]],
            }
            rows += [Row(measure, column, title, values) for column, values in columns.items()]
    return rows


def _mean_rows(config: ConfigDict, pools: dict[str, Values]) -> list[Row]:
    """Means of the networks that are compared, by arm, one value a data draw."""
    arms = {
        "decay": [(f"decay {decay:g}", i) for i, decay in enumerate(config.decays)],
        "width": [(f"width {width}", width) for width in config.widths],
        "layers": [(f"{layers} layers", layers) for layers in config.layers],
    }
    shown = ("gap", "training loss", REPRESENTATION, "I(X;Z), mc", PARAMETERS,
             "I(phi;S), jensen, no frozen", "weight norm")  # fmt: skip
    rows = []
    for series, pool in pools.items():
        for arm, settings in arms.items():
            for name, value in settings:
                chosen = pool["kept"] & (pool[arm] == value)
                for measure in shown:
                    by_draw = [
                        float(pool[measure][chosen & (pool["draw"] == d)].mean())
                        for d in np.unique(pool["draw"][chosen])
                    ]
                    title = f"Means by arm, {series} (nats)"
                    rows += [Row(name, measure, title, by_draw)] if by_draw else []
    return rows


def _claims(found: dict[str, Values]) -> list[Claim]:
    claims = []
    for series, measures in found.items():
        if not measures:
            continue
        single = {name: np.asarray(c["single"]) for name, c in measures.items()}
        for name, measure in {**TERMS, "the sum": SUM}.items():
            sentence = f"{series}: {name} orders networks as the gap does (Spearman in a draw)"
            claims.append(judge(sentence, list(single[measure]), at_least=0))
        for name, measure in {**TERMS, **OTHERS}.items():
            sentence = f"{series}: the sum does so better than {name} (difference)"
            claims.append(judge(sentence, list(single[SUM] - single[measure]), at_least=0))
        for name, measure in {"I(X;Z|Y)": REPRESENTATION, "the sum": SUM}.items():
            sentence = f"{series}: {name} orders networks of one weight decay, too"
            claims.append(judge(sentence, measures[measure]["within decays"], at_least=0))
    return claims


def _notes(config: ConfigDict, pools: dict[str, Values]) -> list[str]:
    notes = []
    for series, pool in pools.items():
        kept, draws = pool["kept"], np.unique(pool["draw"])
        fresh, most = config.blobs.fresh, lambda name, pool=pool: np.nanmax(pool[name])
        notes += [
            f"{series}: {kept.sum()} of {kept.size} networks did not diverge and have a training "
            f"accuracy of at least {config.least_accuracy:g}; they are compared.",
            f"{series}: mc reaches {most('I(X;Z), mc'):.2f} nats of at most log {fresh} = "
            f"{np.log(fresh):.2f} for I(X;Z), {most(REPRESENTATION):.2f} of about "
            f"{np.log(fresh / config.blobs.centers):.2f} for I(X;Z|Y), and "
            f"{np.nanmin(pool['I(phi;S), mc']):.4f} to {most('I(phi;S), mc'):.4f} of at most "
            f"log {len(draws)} = {np.log(len(draws)):.4f} for I(phi;S): at a limit it tells no "
            "networks apart.",
        ]
    notes.append(
        "I(phi;S), and with it the sum, is one value for all data draws of a setting: data draws "
        "are not quite independent replicates of it."
    )
    notes.append(
        "Weights of dead units that nothing decays never move: their SWAG variance is the floor, "
        "1e-30 as published, and they decide I(phi;S) by jensen. 'No frozen' raises the floor to "
        f"a standard deviation of {config.swag.least_sd:g}."
    )
    return notes


# Figures


@styled
def _draw_correlations(run: Run, found: dict[str, Values]) -> None:
    found = {series: measures for series, measures in found.items() if measures}
    if not found:
        return
    figure, axes = panels(1, 1, size=(6.2, 4.6))
    ax = axes[0, 0]
    place = np.arange(len(MEASURES))[::-1]
    arrays = {}
    for i, (series, measures) in enumerate(found.items()):
        middle = np.array([measures[m]["pooled"]["spearman"] for m in MEASURES])
        low, high = np.array([measures[m]["interval"] for m in MEASURES]).T
        shift = 0.16 - 0.32 * i if len(found) > 1 else 0.0
        ax.hlines(place + shift, low, high, color=COLOURS[i])
        ax.plot(middle, place + shift, "o", color=COLOURS[i], markersize=4, label=series)
        arrays |= {f"{series} middle": middle, f"{series} low": low, f"{series} high": high}
    ax.axvline(0, color="#999999", linewidth=0.8, zorder=0)
    ax.set_yticks(place, MEASURES)
    ax.set(xlabel="Spearman with the gap within data draws, 95 % bootstrap interval")
    legend(figure, ax)
    run.figure("correlations", figure, measures=np.array(MEASURES), **arrays)


@styled
def _draw_models(run: Run, config: ConfigDict, pools: dict[str, Values]) -> None:
    shown = (REPRESENTATION, "I(phi;S), jensen, no frozen", "sum, no frozen")
    figure, axes = panels(len(pools), len(shown), size=(3.2, 2.7))
    arrays = {}
    for line, (series, pool) in zip(axes, pools.items(), strict=True):
        kept = pool["kept"]
        gap = np.full(kept.shape, np.nan)
        for d in np.unique(pool["draw"]):
            own = kept & (pool["draw"] == d)
            gap[own] = pool["gap"][own] - np.mean(pool["gap"][own]) if own.any() else np.nan
        for ax, measure in zip(line, shown, strict=True):
            for i, decay in enumerate(config.decays):
                chosen = kept & (pool["decay"] == i)
                ax.plot(
                    pool[measure][chosen], gap[chosen], ".",
                    color=COLOURS[i], markersize=3, alpha=0.5, label=f"weight decay {decay:g}",
                )  # fmt: skip
            ax.set(xlabel=f"{measure} (nats)", title=series)
            if measure.startswith("I(phi;S)"):
                ax.set_xscale("log")
                ax.tick_params(axis="x", which="minor", labelbottom=False)
        line[0].set(ylabel="gap less its draw's mean (nats)")
        arrays |= {f"{series} {m}": pool[m] for m in (*shown, "gap", "decay", "draw", "kept")}
    legend(figure, axes[0, 0])
    run.figure("networks", figure, **arrays)


if __name__ == "__main__":
    start(main, memory_keys=("widths", "blobs.fresh"))
