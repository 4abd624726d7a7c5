"""How does information bottleneck help deep learning (arXiv 2305.18887): does it predict the gap?

The paper bounds the gap between test and training loss by what the representation keeps of the
input beyond the label, I(X; Z | Y), plus what the encoder's parameters keep of the training set,
I(phi; S), and claims that this sum correlates with the gap better than either term, than norms and
than the number of parameters. Tested on a population of stochastic networks on blobs, over widths,
depths, weight decays, data draws and initialisations, trained plainly or with a constraint on
I(X; Z) by dual ascent. Correlations are ranks within a data draw, since every draw is another
problem; data draws are what intervals are over. The paper's networks are of one depth, and claims
are about these; networks of all depths together are judged beside them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict
from sklearn.datasets import make_blobs

from rlib import information, optim, parallel, training
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

SERIES = ("plain", "constrained")
REPRESENTATION = "I(X;Z|Y), mc"
PARAMETERS = "I(phi;S), jensen"
SUM = "sum"
SUMS = {  # of which two, and whether the second is scaled to the mean of the first
    SUM: (REPRESENTATION, PARAMETERS, True),
    "sum, clamp 1e-30": (REPRESENTATION, "I(phi;S), jensen, clamp 1e-30", True),
    "sum, not scaled": (REPRESENTATION, PARAMETERS, False),
    "sum of jensen": ("I(X;Z|Y), jensen", PARAMETERS, True),
}
ALL = "all depths"
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
    run.plan({unit: 10.0 + w * n / 6 for (_, (w, n)), unit in units.items()})
    pools: dict[str, Values] = {}
    for series in run.select(SERIES):
        parts = []
        for size in sizes:
            fit = functools.partial(_fit, config, run, series, *size, draws)
            parts.append(run.cached(units[series, size], fit))
        pools[series] = _pool(config, parts)
    found = {
        series: {name: _correlations(config, _part(pool, name)) for name in _populations(config)}
        for series, pool in pools.items()
    }
    _draw_correlations(run, found)
    _draw_models(run, config, pools)
    rows = [*_correlation_rows(config, found), *_mean_rows(config, pools)]
    return Report(rows, _claims(config, found), _notes(config, pools))


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
    """Initial parameters, two vectors (fewer arrays compile sooner), and the network of such."""
    network = information.StochasticClassifier(sizes, rngs=nnx.Rngs(key))
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    vectors, shaped = {}, {}
    for name in params:
        vectors[name], shaped[name] = ravel_pytree(params[name])

    def network_of(vectors):
        return nnx.merge(graphdef, nnx.State({k: shaped[k](v) for k, v in vectors.items()}), rest)

    return vectors, network_of


def _train(config: ConfigDict, constrained: bool, network_of, params, key, decay, examples):
    """Trained parameters, SWAG's state and the last multiplier."""
    x, labels = examples
    tx = optax.chain(
        optax.add_decayed_weights(decay),
        optax.sgd(config.learning_rate, config.momentum),
        optim.record_swag(config.swag.start, 1, config.swag.rank),
    )

    def loss(params, key, multiplier):
        network = network_of(params)
        mean, sd = network.encoder(x)
        z = mean + sd * jax.random.normal(key, mean.shape)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network.head(z), labels))
        if not constrained:
            return value, multiplier
        lacking = config.target - information.gaussian_information(z, mean, sd)
        ascended = multiplier + config.multiplier_rate * lacking
        return value + multiplier * lacking, ascended

    keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
    found = training.descend(loss, params, tx, keys, jnp.zeros(()))
    return found.params, found.state[-1], found.carry


def _measure(config: ConfigDict, network_of, params, key, examples) -> Values:
    """Losses, accuracy and information of one network; nats."""
    train, test, fresh = examples
    network = network_of(params)
    key_loss, key_information = jax.random.split(jax.random.fold_in(key, 2))
    x, labels = (jnp.concatenate(both) for both in zip(train, test, strict=True))
    keys = jax.random.split(key_loss, config.noise_draws)
    logits = jax.vmap(lambda k: network(x, k))(keys)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])
    is_right = jnp.argmax(jnp.mean(jax.nn.softmax(logits), axis=0), axis=-1) == labels
    loss, test_loss = jnp.mean(each[:, : len(train[0])]), jnp.mean(each[:, len(train[0]) :])
    mean, sd = network.encoder(fresh[0])
    z = mean + sd * jax.random.normal(key_information, mean.shape)
    kept = {
        f"{name}, {estimator}": information.gaussian_information(
            z, mean, sd, given, estimator=estimator
        )
        for name, given in (("I(X;Z|Y)", fresh[1]), ("I(X;Z)", None))
        for estimator in ("mc", "jensen")
    }
    return {
        **kept,
        "gap": test_loss - loss,
        "training loss": loss,
        "training accuracy": jnp.mean(is_right[: len(train[0])]),
        "weight norm": optax.tree.norm(params),
        "mean of Z": mean,
    }


def _fit(config: ConfigDict, run: Run, series: str, width: int, layers: int, draws: int) -> Values:
    """Every measure of the networks of one size, (draws, initialisations, decays)."""
    sizes = _network_sizes(config, width, layers)
    shape = (draws, config.initialisations, len(config.decays))
    draw, seed, decay = (index.ravel() for index in np.indices(shape))
    blobs = [_blobs(config.blobs, i) for i in range(draws)]
    examples = jax.tree.map(lambda *x: np.stack(x)[draw], *blobs)
    keys = [named_key(i, "network") for i in range(config.initialisations)]
    networks = [_network(sizes, key) for key in keys]
    network_of = networks[0][1]
    of_network = lambda *x: np.stack(x)[seed]
    params = jax.tree.map(of_network, *[params for params, _ in networks])
    key_data = of_network(*map(jax.random.key_data, keys))
    decays = np.asarray(config.decays, np.float32)[decay]

    def local(params, key_data, decays, examples):
        keys = jax.random.wrap_key_data(key_data)
        train = functools.partial(_train, config, series == "constrained", network_of)
        params, state, multiplier = jax.vmap(train)(params, keys, decays, examples[0])
        measure = lambda part: _measure(config, network_of, *part)
        measured = jax.lax.map(measure, (params, keys, examples))  # pairs of one network at a time
        posterior = optim.swag_restrict(state, lambda tree: tree["encoder"])
        return measured | {"multiplier": multiplier}, posterior

    together = parallel.map_over_mesh(local, run.mesh(config))
    measured, posteriors = together(params, key_data, decays, examples)
    means = measured.pop("mean of Z")
    values = {name: value.reshape(shape) for name, value in measured.items()}
    binned = functools.partial(information.binned_information, bins=config.bins)
    for name, given in (("I(X;Z|Y), binned", True), ("I(X;Z), binned", False)):
        each = [
            binned(z, blobs[i][2][1] if given else None) if np.isfinite(z).all() else np.nan
            for z, i in zip(means, draw, strict=True)
        ]
        values[name] = np.reshape(each, shape)
    values |= _parameter_informations(config, posteriors, shape)
    weights = sum(x.size for x in networks[0][0].values())
    values["parameter count"] = np.full(shape, weights, float)
    indices = {"draw": draw, "initialisation": seed, "decay": decay}
    values |= {name: index.reshape(shape) for name, index in indices.items()}
    values |= {"width": np.full(shape, width), "layers": np.full(shape, layers)}
    return values


def _parameter_informations(config: ConfigDict, posteriors: Any, shape: tuple[int, ...]) -> Values:
    """I(phi; S) of the draws' posteriors together: one value for all draws of a setting.

    NaN if one of the draws' networks diverged: the setting is then left out.
    """
    draws, *settings = shape
    stack = lambda x: np.swapaxes(x.reshape(draws, -1, *x.shape[1:]), 0, 1)
    stacked = jax.tree.map(stack, posteriors)
    floor = 2 * config.swag.floor  # the diagonal part is half of the variance
    kinds = {
        PARAMETERS: ("jensen", floor),
        "I(phi;S), jensen, clamp 1e-30": ("jensen", 1e-30),
        "I(phi;S), mc": ("mc", floor),
    }
    values = {}
    for name, (estimator, floor) in kinds.items():
        found = _of_settings(stacked, floor, estimator, config.swag.draws)
        values[name] = np.broadcast_to(np.asarray(found).reshape(1, *settings), shape)
    return values


@functools.partial(jax.jit, static_argnames=("estimator", "draws"))
def _of_settings(stacked: Any, floor: float, estimator: Any, draws: int) -> jax.Array:
    one = lambda posterior: information.parameter_information(
        posterior, named_key(0, "posterior"), estimator=estimator, draws=draws, floor=floor
    )
    return jax.lax.map(one, stacked)


def _pool(config: ConfigDict, parts: list[Values]) -> Values:
    """All networks of a series, one after another; `kept` says which are compared."""
    pool = {name: np.concatenate([np.ravel(part[name]) for part in parts]) for name in parts[0]}
    sound = np.all([np.isfinite(value) for value in pool.values()], axis=0)
    pool["kept"] = sound & (pool["training accuracy"] >= config.least_accuracy)
    return pool


def _published(config: ConfigDict) -> str:
    """The population that claims are about: the last number of layers."""
    return f"{config.layers[-1]} layers"


def _populations(config: ConfigDict) -> list[str]:
    """Networks of each depth, and all of them."""
    depths = [f"{layers} layers" for layers in config.layers]
    return [*depths, ALL] if len(depths) > 1 else depths


def _part(pool: Values, population: str) -> Values:
    """The networks of a population that are compared, with the sums of their two terms."""
    chosen = pool["kept"]
    if population != ALL:
        chosen = chosen & (pool["layers"] == int(population.split()[0]))
    part = {name: value[chosen] for name, value in pool.items()}
    score = information.combined_score
    sums = {
        name: score(part[a], part[b], scaled=scaled) if chosen.any() else part[a]
        for name, (a, b, scaled) in SUMS.items()
    }
    return part | sums


# Correlations

MEASURES = (
    REPRESENTATION,
    "I(X;Z|Y), jensen",
    "I(X;Z|Y), binned",
    "I(X;Z), mc",
    "I(X;Z), jensen",
    "I(X;Z), binned",
    PARAMETERS,
    "I(phi;S), jensen, clamp 1e-30",
    "I(phi;S), mc",
    *SUMS,
    "weight norm",
    "parameter count",
)


def _correlations(config: ConfigDict, part: Values) -> Values:
    """Measure -> correlations with the gap: one a draw, pooled, within decays, and an interval."""
    draws = [d for d in np.unique(part["draw"]) if np.sum(part["draw"] == d) >= 3]
    if not draws:
        return {}
    kept = np.isin(part["draw"], draws)
    gap, draw = part["gap"][kept], part["draw"][kept]
    arm = draw * len(config.decays) + part["decay"][kept]
    first = draw < config.published_draws
    correlate = information.generalization_correlation
    found = {}
    for measure in MEASURES:
        score = part[measure][kept]
        of_draw = lambda groups, score=score: [
            correlate(gap[draw == d], score[draw == d], groups[draw == d]).spearman for d in draws
        ]
        found[measure] = {
            "single": of_draw(draw),
            "within decays": of_draw(arm),
            "pooled": correlate(gap, score, draw)._asdict(),
            "interval": information.correlation_interval(
                gap, score, draw, resamples=config.resamples
            ),
            "draws ignored": correlate(gap, score).spearman,
        }
        if first.any():
            few = correlate(gap[first], score[first], draw[first])
            found[measure]["first"] = few.spearman
    return found


# The report


def _correlation_rows(config: ConfigDict, found: dict[str, Values]) -> list[Row]:
    rows = []
    first = f"first {config.published_draws} draws"
    for series, populations in found.items():
        title = f"Correlation with the gap within data draws, {series}"
        for population, measures in populations.items():
            for measure, c in measures.items():
                columns = {f"{population}: Spearman, by draw": c["single"]}
                if population == _published(config):
                    columns |= {
                        "pooled": [c["pooled"]["spearman"]],
                        "Pearson, pooled": [c["pooled"]["pearson"]],
                        "Kendall, pooled": [c["pooled"]["kendall"]],
                        "within decays, by draw": c["within decays"],
                        "draws ignored": [c["draws ignored"]],
                    }
                    columns |= {f"{first}, pooled": [c["first"]]} if "first" in c else {}
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
             "I(phi;S), jensen, clamp 1e-30", "weight norm")  # fmt: skip
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


def _claims(config: ConfigDict, found: dict[str, Values]) -> list[Claim]:
    claims: list[Claim] = []
    published, terms = _published(config), {**TERMS, "the sum": SUM}
    for series, populations in found.items():
        for population in dict.fromkeys((published, *_populations(config)[-1:])):
            measures = populations[population]
            where, of_networks = f"{series}, {population}", Claims(measures)
            single = {name: np.asarray(c["single"]) for name, c in measures.items()}
            for name, measure in terms.items():
                sentence = f"{where}: {name} orders networks as the gap does (Spearman in a draw)"
                one = lambda m=measure, single=single: single[m]
                of_networks.add(sentence, (measure,), one, at_least=0)
            for name, measure in {**TERMS, **OTHERS}.items():
                sentence = f"{where}: the sum does so better than {name} (difference)"
                gain = lambda m=measure, single=single: single[SUM] - single[m]
                of_networks.add(sentence, (SUM, measure), gain, at_least=0)
            for name, measure in terms.items() if population == published else ():
                sentence = f"{where}: {name} orders networks of one weight decay, too"
                within = lambda m=measure, found=measures: found[m]["within decays"]
                of_networks.add(sentence, (measure,), within, at_least=0)
            claims += of_networks
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
        if series == "constrained":
            negative = np.mean(pool["multiplier"][kept] < 0)
            notes.append(
                f"{series}: I(X;Z) on training examples is pulled to {config.target:g} nats from "
                "either side, as in the official code: a multiplier below 0, as that of "
                f"{negative:.0%} is in the end, punishes information."
            )
    notes.append(
        "I(phi;S), and with it the sum, is one value for all data draws of a setting: data draws "
        "are not quite independent replicates of it."
    )
    notes.append(
        "SWAG clamps variances at 1e-30, and weights of dead units that nothing decays never move: "
        "by the clamp alone they decide I(phi;S). The official code's densities add 1e-6 to every "
        f"variance; here it is at least {config.swag.floor:g}, but for the rows called clamp 1e-30."
    )
    notes.append(
        f"Claims are about networks of {config.layers[-1]} layers, as published. Depth moves the "
        "information and the gap by itself: with all depths together ranks compare depths, too."
    )
    return notes


# Figures


@styled
def _draw_correlations(run: Run, found: dict[str, Values]) -> None:
    shown = {
        population: {series: of[population] for series, of in found.items() if of[population]}
        for population in next(iter(found.values()))
    }
    shown = {population: series for population, series in shown.items() if series}
    if not shown:
        return
    figure, axes = panels(1, len(shown), size=(3.2, 4.6))
    place = np.arange(len(MEASURES))[::-1]
    arrays = {}
    for ax, (population, of) in zip(axes[0], shown.items(), strict=True):
        for i, (series, measures) in enumerate(of.items()):
            middle = np.array([measures[m]["pooled"]["spearman"] for m in MEASURES])
            low, high = np.array([measures[m]["interval"] for m in MEASURES]).T
            shift = 0.16 - 0.32 * i if len(of) > 1 else 0.0
            ax.hlines(place + shift, low, high, color=COLOURS[i])
            ax.plot(middle, place + shift, "o", color=COLOURS[i], markersize=4, label=series)
            name = f"{series}, {population}"
            arrays |= {f"{name} middle": middle, f"{name} low": low, f"{name} high": high}
        ax.axvline(0, color="#999999", linewidth=0.8, zorder=0)
        ax.set_yticks(place, MEASURES if ax is axes[0, 0] else [""] * len(place))
        ax.set(title=population, xlabel="Spearman with the gap")
    legend(figure, axes[0, 0])
    run.figure("correlations", figure, measures=np.array(MEASURES), **arrays)


@styled
def _draw_models(run: Run, config: ConfigDict, pools: dict[str, Values]) -> None:
    shown = (REPRESENTATION, PARAMETERS, SUM)
    figure, axes = panels(len(pools), len(shown), size=(3.2, 2.7))
    arrays = {}
    for line, (series, pool) in zip(axes, pools.items(), strict=True):
        part = _part(pool, _published(config))
        gap = part["gap"].copy()
        for d in np.unique(part["draw"]):
            gap[part["draw"] == d] -= np.mean(gap[part["draw"] == d])
        for ax, measure in zip(line, shown, strict=True):
            for i, decay in enumerate(config.decays):
                chosen = part["decay"] == i
                ax.plot(
                    part[measure][chosen], gap[chosen], ".",
                    color=COLOURS[i], markersize=3, alpha=0.5, label=f"weight decay {decay:g}",
                )  # fmt: skip
            ax.set(xlabel=f"{measure} (nats)", title=f"{series}, {_published(config)}")
            if measure.startswith("I(phi;S)"):
                ax.set_xscale("log")
                ax.tick_params(axis="x", which="minor", labelbottom=False)
        line[0].set(ylabel="gap less its draw's mean (nats)")
        arrays |= {f"{series} {m}": part[m] for m in (*shown, "gap", "decay", "draw")}
    legend(figure, axes[0, 0])
    run.figure("networks", figure, **arrays)


if __name__ == "__main__":
    start(main, memory_keys=("widths", "blobs.fresh"))
