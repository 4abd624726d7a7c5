"""FedSpeed (arXiv 2302.10429): longer local phases, fewer rounds, a higher accuracy.

Twenty clients with a few labels each learn digits, four of them a round. FedSpeed keeps a client
near the server's model, takes the bias of that away by a dual variable, and takes its gradients
uphill of its model. It stands beside FedAvg, FedProx, FedSAM, SCAFFOLD and FedAvg-M, beside itself
without the ascent (near to FedDyn), and beside the version whose duals are averaged over a round's
clients only. Every method has its settings tuned with as many trials; as FedSpeed takes two
gradients a step, methods of one gradient are also run with twice as many local steps.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rlib import compression, data, federated
from rlib.experiment import (
    COLOURS,
    TUNING_SEED,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    draw_split,
    legend,
    named_key,
    panels,
    start,
    styled,
)

Values = dict[str, Any]
Setting = dict[str, float]
Place = tuple[str, int]
Found = dict[Place, list[Values]]
#: Method -> what it is called in print, gradients of a local step.
METHODS = {
    "fedavg": ("FedAvg", 1),
    "fedprox": ("FedProx", 1),
    "fedsam": ("FedSAM", 2),
    "scaffold": ("SCAFFOLD", 1),
    "fedavg-m": ("FedAvg-M", 1),
    "correction": ("FedSpeed without ascent", 1),
    "fedspeed": ("FedSpeed", 2),
    "fedspeed-sampled": ("FedSpeed, duals over the sampled", 2),
}
PUBLISHED = 82.26 - 77.31  # points over FedAvg, CIFAR-10, Dirichlet(0.1)
ACCURACY = "Test accuracy, mean of the last rounds (%)"


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Tune every method at every K, train it on every seed, vary FedSpeed, judge the claims."""
    run = run or Run()
    study = Study(config, run.seeds(config), run.select(METHODS))
    run.plan(study.costs())
    chosen = {at: study.tuned(run, *at) for at in study.places}
    found = {
        at: [
            run.cached(study.unit(*at, seed), functools.partial(study.fit, *at, chosen[at], seed))
            for seed in study.seeds
        ]
        for at in study.places
    }
    varied = {
        name: [
            run.cached(f"vary/{name}/seed{seed}", functools.partial(study.fit, *case, seed))
            for seed in study.seeds
        ]
        for name, case in study.variations(chosen).items()
    }
    _draw_rounds(run, study, found)
    _draw_clients(run, study, found)
    _draw_variations(run, study, varied)
    claims = _claims(study, found, varied)
    return Report(_rows(study, found, varied), claims, _notes(study, found, chosen))


class Study:
    """The clients, and compiled trainings of every method and number of local steps."""

    def __init__(self, config: ConfigDict, seeds: Iterable[int], methods: Iterable[str]):
        self.config, self.seeds = config, tuple(seeds)
        try:
            self.problem = federated.image_classification(
                config.dataset,
                hidden=config.hidden,
                widths=config.widths,
                blocks=config.blocks,
                groups=config.groups,
            )
        except data.DataUnavailable as error:
            raise UsageError(str(error)) from error
        twice = sorted({*config.intervals, *(2 * k for k in config.intervals)})
        single = lambda method: METHODS[method][1] == 1
        self.places: list[Place] = [
            (m, k) for m in methods for k in (twice if single(m) else config.intervals)
        ]
        self.program = functools.cache(self._program)
        self.initial, self.look = jax.jit(self.problem.init), jax.jit(self._look)

    def split(self, seed: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Who holds which training examples, and the examples to be judged by.

        Settings are not chosen by the test set: as many training examples are kept from the
        clients, who hold fewer in proportion.
        """
        config, train, test = self.config, self.problem.train, self.problem.test
        rows, size = np.arange(len(train["y"])), config.size
        if seed >= TUNING_SEED:
            kept = np.random.default_rng(seed).permutation(rows)
            out, rows = np.split(kept, [len(test["y"])])
            size = size * len(rows) // len(kept)
            test = jax.tree.map(lambda x: x[out], train)
        labels = train["y"][rows]
        parts = data.partition_dirichlet(
            labels, config.clients, config.concentration, seed, size=size
        )
        return [rows[part] for part in parts], test

    @functools.cache  # noqa: B019 - as long as the study
    def draw(self, seed: int) -> tuple[federated.ClientData, dict[str, Any]]:
        """`split` as arrays whose shapes are those of all seeds, so that nothing is compiled again.

        Padding is not drawn for batches of `steps`; where whole epochs are taken nothing is tuned.
        """
        parts, test = self.split(seed)
        held = federated.client_data(self.problem.train, parts)
        padding = self.config.size - held.rows.shape[1]
        held = held._replace(rows=np.pad(held.rows, ((0, 0), (0, padding)), mode="edge"))
        return jax.tree.map(jnp.asarray, (held, test))

    def algorithm(self, method: str, s: Any, rate: Any, steps: int) -> federated.Algorithm:
        """The method with its settings, which tells how far clients move apart."""
        config = self.config
        clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
        local = optax.chain(*clip, optax.sgd(rate))
        per_step = lambda moved, client, batches: jax.tree.map(
            lambda m: rate * batches.steps * m, moved
        )
        whole = lambda moved, client, batches: moved
        match method:
            case "fedavg":
                return _watched(federated.fedavg(local), whole)
            case "fedprox":
                return _watched(federated.fedavg(local, proximal=s["proximal"]), whole)
            case "fedsam":
                return _watched(federated.fedavg(local, ascent=s["ascent"]), whole)
            case "scaffold":
                algorithm = federated.scaffold(rate, gamma=rate * steps)
                return _watched(algorithm, lambda sent, *rest: per_step(sent[0], *rest))
            case "fedavg-m":
                return _watched(federated.fedavg_m(rate, rate * steps, s["beta"]), per_step)
            case "correction":
                return _watched(federated.fedspeed(local, s["prox"], 0), whole)
        make = functools.partial(federated.fedspeed, local, s["prox"], s["ascent"], s["mixing"])
        if method == "fedspeed":
            return _watched(make(), whole)
        undo = lambda sent, dual, batches: jax.tree.map(lambda m, d: m - s["prox"] * d, sent, dual)
        return _watched(make(dual_average="sampled"), undo)

    def rounds(self, method: str, k: int, setting: Any) -> federated.Rounds:
        """The rate falls by round, so that each round is one of another algorithm."""
        config = self.config
        work = federated.LocalWork(config.batch, **{config.unit: k})

        def at(round: Any) -> federated.Rounds:
            rate = setting["rate"] * config.rate_decay**round
            return federated.make_rounds(
                self.algorithm(method, setting, rate, work.count(config.size)),
                self._loss,
                work,
                config.clients,
                config.sampled,
            )

        step = lambda state, held: at(state.step).step(state, held)
        return federated.Rounds(at(0).init, step, None)

    def _loss(self, params: Any, batch: Any, key: Any) -> jax.Array:
        losses = self.problem.loss(params, batch, key)
        if self.config.weight_decay:
            losses += self.config.weight_decay / 2 * optax.tree.norm(params, squared=True)
        return losses

    def _program(self, method: str, k: int) -> Callable[..., tuple[Any, Values]]:
        """(setting, parameters, clients, key) -> parameters along the rounds, metrics.

        Everything else is compiled once for all methods: `initial` and `look`.
        """
        config = self.config

        @jax.jit
        def train(setting, params, held, key):
            done = federated.simulate(
                self.rounds(method, k, setting),
                params,
                held,
                config.rounds,
                key=key,
                looks=config.looks,
                look=lambda params: params,
            )
            metrics = done.metrics
            watched = metrics["clients"] * compression.payload_bytes(params)
            return done.seen, {
                # Rounding may leave less than nothing of a difference of squares.
                "spread": jnp.maximum(metrics["square"] - metrics["square of the mean"], 0.0),
                "bytes": (metrics["bytes_up"] - watched)[-1] / metrics["clients"][-1],
                "dropped": jnp.sum(metrics["nonfinite"]),
            }

        return train

    def _look(self, seen: Any, held: federated.ClientData, test: Any) -> Values:
        """Losses and accuracies on the clients' examples and others, along the rounds."""
        own = jax.tree.map(lambda x: x[held.rows.ravel()], held.examples)

        def mean_loss(params: Any, given: Any) -> jax.Array:
            batch = lambda one: jax.tree.map(lambda x: x[None], one)
            one = lambda given: self.problem.loss(params, batch(given), None)
            return jnp.mean(jax.lax.map(one, given, batch_size=min(1000, len(given["y"]))))

        def look(params: Any) -> Values:
            sets = {"train": own, "test": test}
            losses = {f"{name} loss": mean_loss(params, x) for name, x in sets.items()}
            return losses | {name: self.problem.accuracy(params, x) for name, x in sets.items()}

        return jax.lax.map(look, seen)

    def fit(self, method: str, k: int, setting: Setting, seed: int) -> Values:
        """One training."""
        held, test = self.draw(seed)
        every = {**dict.fromkeys(("proximal", "ascent", "prox", "beta", "mixing"), 1.0), **setting}
        given = {name: jnp.float32(value) for name, value in every.items()}
        params = self.initial(named_key(seed, "weights"))
        seen, metrics = self.program(method, k)(given, params, held, named_key(seed, "rounds"))
        return jax.tree.map(np.asarray, {**self.look(seen, held, test), **metrics})

    def trials(self, method: str) -> list[Setting]:
        grid = self.config.trials[method]
        names = sorted(grid)
        return [dict(zip(names, v, strict=True)) for v in itertools.product(*map(grid.get, names))]

    def tuned(self, run: Run, method: str, k: int) -> Setting:
        """The setting of the highest accuracy on the kept examples; a mean over draws."""
        trials = self.trials(method)
        draws = range(TUNING_SEED, TUNING_SEED + self.config.draws)

        def errors() -> np.ndarray:
            tried = [
                _accuracy(self.config, [self.fit(method, k, s, seed) for seed in draws])
                for s in trials
            ]
            return 100 - np.array(tried)

        return run.choose(f"tune/{method}/K{k}", trials, errors)

    def unit(self, method: str, k: int, seed: int) -> str:
        return f"fit/{method}/K{k}/seed{seed}"

    def variations(self, chosen: dict[Place, Setting]) -> dict[str, tuple[str, int, Setting]]:
        """Name -> (method, K, setting): one thing at a time from FedSpeed's, at the first K."""
        k = self.config.intervals[0]
        if ("fedspeed", k) not in chosen:
            return {}
        base = {**chosen["fedspeed", k], "mixing": 1.0}
        cases: dict[str, tuple[str, int, Setting]] = {
            f"{name}={value:g}": ("fedspeed", k, {**base, name: value})
            for name, values in self.config.vary.items()
            for value in values
            if name != "ascent" or value
        }
        cases["neither"] = ("fedavg", k, base)
        cases["proximal term alone"] = ("fedprox", k, {**base, "proximal": 1 / base["prox"]})
        cases["ascent alone"] = ("fedsam", k, base)
        cases["correction alone"] = cases["ascent=0"] = ("correction", k, base)
        cases["both"] = ("fedspeed", k, base)
        cases["both, duals over the sampled"] = ("fedspeed-sampled", k, base)
        return cases

    def costs(self) -> dict[str, float]:
        """Seconds of a small network's 1000 local steps, and of compiling."""
        config = self.config
        one = lambda m, k: METHODS[m][1] * k * config.rounds * config.sampled / 2e4 + 0.1
        costs = {}
        for method, k in self.places:
            trials = len(self.trials(method))
            costs[f"tune/{method}/K{k}"] = 3 + trials * config.draws * one(method, k)
            costs |= {self.unit(method, k, seed): one(method, k) for seed in self.seeds}
        like = {at: {"rate": 1.0, "prox": 1.0, "ascent": 1.0} for at in self.places}
        for name, (method, k, _) in self.variations(like).items():
            costs |= {f"vary/{name}/seed{seed}": one(method, k) for seed in self.seeds}
        return costs


def _watched(algorithm: federated.Algorithm, moved: Callable[..., Any]) -> federated.Algorithm:
    """The algorithm, whose clients also tell how far they moved.

    Args:
        moved: (message, client, batches) -> the client's x_K - x, up to the sign.
    """
    square = lambda tree: optax.tree.norm(tree, squared=True)

    def local(client: Any, down: Any, batches: Any, grad: Any):
        message, client, scalars = algorithm.local(client, down, batches, grad)
        d = moved(message, client, batches)
        return (message, d), client, {**scalars, "square": square(d)}

    def apply(params: Any, server: Any, mixed: Any, cohort: Any):
        params, server, found = algorithm.apply(params, server, mixed[0], cohort)
        return params, server, {**found, "square of the mean": square(mixed[1])}

    return algorithm._replace(local=local, apply=apply)


# What a training is judged by, one value a seed


def _last(config: ConfigDict, runs: list[Values], name: str) -> np.ndarray:
    return np.array([np.mean(run[name][-config.last :]) for run in runs])


def _accuracy(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    """Per cent."""
    return 100 * _last(config, runs, "test")


def _reached(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    every = config.rounds // config.looks
    return federated.rounds_to([run["test"] for run in runs], config.target, every)


def _spread(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    """Mean squared distance of the clients' models from their mean, over the last rounds."""
    rounds = config.last * config.rounds // config.looks
    return np.array([np.mean(run["spread"][-rounds:]) for run in runs])


def _loss(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    return _last(config, runs, "train loss")


def _loss_gap(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    return _last(config, runs, "test loss") - _loss(config, runs)


def _accuracy_gap(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    return 100 * (_last(config, runs, "train") - _last(config, runs, "test"))


# The report


def _target(config: ConfigDict) -> str:
    return f"Rounds to {100 * config.target:g} % ({config.rounds + 1}: not reached)"


def _rows(study: Study, found: Found, varied: dict[str, list[Values]]) -> list[Row]:
    config, rows = study.config, []
    tables = {
        ACCURACY: _accuracy,
        _target(config): _reached,
        "Spread of the clients' models, last rounds": _spread,
        "Training loss, mean of the last rounds (nats)": _loss,
        "Test minus training loss (nats)": _loss_gap,
        "Training minus test accuracy (points)": _accuracy_gap,
    }
    for title, measure in tables.items():
        for (method, k), runs in found.items():
            rows.append(Row(METHODS[method][0], f"K={k}", title, measure(config, runs)))
    for (method, k), runs in found.items():
        sent = [run["bytes"] for run in runs]
        if k == config.intervals[0]:
            rows.append(Row(METHODS[method][0], "bytes", "Bytes a client sends in a round", sent))
    title = f"FedSpeed's setting at K={config.intervals[0]}, one thing changed"
    columns = {
        "accuracy (%)": _accuracy,
        "rounds": _reached,
        "spread": _spread,
        "training loss (nats)": _loss,
        "loss gap (nats)": _loss_gap,
    }
    for case, runs in varied.items():
        rows += [Row(_print(case), name, title, f(config, runs)) for name, f in columns.items()]
    return rows


_SYMBOLS = {"rate": "eta", "mixing": "alpha", "prox": "lambda", "ascent": "rho", "proximal": "mu"}


def _print(case: str) -> str:
    for name, symbol in _SYMBOLS.items():
        case = case.replace(f"{name}=", f"{symbol}=")
    return case


def _claims(study: Study, found: Found, varied: dict[str, list[Values]]) -> list[Claim]:
    config = study.config
    claims = Claims(dict.fromkeys(method for method, _ in found))
    first, last = config.intervals[0], config.intervals[-1]
    accuracy = lambda method, k: _accuracy(config, found[method, k])
    lead = lambda other, k, j: accuracy("fedspeed", k) - accuracy(other, j)
    reached = lambda method, k: _reached(config, found[method, k])
    for k in config.intervals:
        for other, (title, _) in METHODS.items():
            if other != "fedspeed":
                claims.add(
                    f"K={k}: FedSpeed ends above {title} (points)",
                    ("fedspeed", other),
                    lambda other=other, k=k: lead(other, k, k),
                    at_least=0,
                )
        claims.add(
            f"K={k}: and above FedAvg by the published {PUBLISHED:.1f} points",
            ("fedspeed", "fedavg"),
            lambda k=k: lead("fedavg", k, k),
            at_least=round(PUBLISHED, 2),
        )
        for other in ("fedavg", "scaffold", "fedavg-m", "correction"):
            claims.add(
                f"K={k}, equal gradients: FedSpeed ends above {METHODS[other][0]} of {2 * k} steps",
                ("fedspeed", other),
                lambda other=other, k=k: lead(other, k, 2 * k),
                at_least=0,
            )
        claims.add(
            f"K={k}: FedSpeed reaches {100 * config.target:g} % before FedAvg (rounds)",
            ("fedspeed", "fedavg"),
            lambda k=k: reached("fedspeed", k) - reached("fedavg", k),
            at_most=0,
        )
    if first != last:
        for method in ("fedspeed", "fedavg"):
            claims.add(
                f"{METHODS[method][0]} reaches {100 * config.target:g} % earlier at K={last} "
                f"than at K={first} (rounds)",
                (method,),
                lambda m=method: reached(m, last) - reached(m, first),
                at_most=0,
            )
            claims.add(
                f"{METHODS[method][0]} ends higher at K={last} than at K={first} (points)",
                (method,),
                lambda m=method: accuracy(m, last) - accuracy(m, first),
                at_least=0,
            )
        claims.add(
            f"FedSpeed's lead over FedAvg is larger at K={last} than at K={first} (points)",
            ("fedspeed", "fedavg"),
            lambda: lead("fedavg", last, last) - lead("fedavg", first, first),
            at_least=0,
        )
    spread = lambda runs: np.log10(np.maximum(_spread(config, runs), 1e-12))
    claims.add(
        f"K={first}: FedSpeed's clients stay nearer to each other than FedAvg's (log10)",
        ("fedspeed", "fedavg"),
        lambda: spread(found["fedspeed", first]) - spread(found["fedavg", first]),
        at_most=0,
    )
    claims.add(
        f"K={first}: FedSpeed's loss generalises better than FedAvg's: its gap is smaller (nats)",
        ("fedspeed", "fedavg"),
        lambda: (
            _loss_gap(config, found["fedspeed", first]) - _loss_gap(config, found["fedavg", first])
        ),
        at_most=0,
    )
    sent = lambda method: [run["bytes"] for run in found[method, first]]
    claims.add(
        "FedSpeed sends as many bytes as FedAvg (ratio)",
        ("fedspeed", "fedavg"),
        lambda: np.divide(sent("fedspeed"), sent("fedavg")),
        at_most=1,
        exact=True,
    )
    return [*claims, *_claims_of_stages(config, varied)]


def _claims_of_stages(config: ConfigDict, varied: dict[str, list[Values]]) -> list[Claim]:
    """All at FedSpeed's setting, none tuned of its own."""
    claims, at = Claims(varied), f"same setting, K={config.intervals[0]}"
    for high, low in (
        ("both", "neither"),
        ("correction alone", "neither"),
        ("correction alone", "proximal term alone"),
        ("ascent alone", "neither"),
        ("correction alone", "ascent alone"),
        ("both", "correction alone"),
        ("both", "ascent alone"),
        ("both", "both, duals over the sampled"),
        ("mixing=1", "mixing=0.5"),
    ):
        claims.add(
            f"{at}: {_print(high)} ends above {_print(low)} (points)",
            (high, low),
            lambda a=high, b=low: _accuracy(config, varied[a]) - _accuracy(config, varied[b]),
            at_least=0,
        )
    spread = lambda case: np.log10(np.maximum(_spread(config, varied[case]), 1e-12))
    gap = lambda case: _loss_gap(config, varied[case])
    for low, high in (("both", "neither"), ("both", "correction alone")):
        claims.add(
            f"{at}: clients stay nearer to each other with {low} than with {high} (log10)",
            (low, high),
            lambda a=low, b=high: spread(a) - spread(b),
            at_most=0,
        )
        claims.add(
            f"{at}: the loss gap is smaller with {low} than with {high} (nats)",
            (low, high),
            lambda a=low, b=high: gap(a) - gap(b),
            at_most=0,
        )
    return claims


def _notes(study: Study, found: Found, chosen: dict[Place, Setting]) -> list[str]:
    config, notes = study.config, []
    shown = {**_SYMBOLS, "beta": "beta"}
    for method in dict.fromkeys(method for method, _ in found):
        trials = study.trials(method)
        own = {k: setting for (m, k), setting in chosen.items() if m == method}
        text = "; ".join(
            f"K={k}: " + ", ".join(f"{name} {s[key]:g}" for key, name in shown.items() if key in s)
            for k, s in own.items()
        )
        rates = {trial["rate"] for trial in trials}
        ends = [k for k, s in own.items() if s["rate"] in (min(rates), max(rates))]
        edge = ""
        if ends and len(rates) > 1:
            edge = f" (for K={', '.join(map(str, ends))} the rate is at the end of its grid)"
        how = f"chosen of {len(trials)}" if len(trials) > 1 else "as published"
        notes.append(f"{METHODS[method][0]}, {how}: {text}{edge}.")
    if config.draws:
        notes.append(
            f"Settings were chosen by {config.draws} draws of their own, on training examples kept "
            "from the clients; the test set chose nothing. What is varied is not tuned again."
        )
    dropped = sum(float(np.sum(run["dropped"])) for runs in found.values() for run in runs)
    notes.append(
        f"A local step takes two gradients for FedSpeed and FedSAM, one for the others; K counts "
        f"steps, or epochs where the configuration says so. Messages that were not finite: "
        f"{dropped:g}."
    )
    if config.clip or config.weight_decay:
        notes.append(
            "Weight decay is part of every loss. SCAFFOLD and FedAvg-M do not clip. Images are not "
            "augmented. The settings are published ones, and nobody has run this preset."
        )
    return notes


# Figures

_COLOURS = dict(
    zip(
        ("fedprox", "fedspeed", "scaffold", "fedavg-m", "fedsam", "correction", "fedavg",
         "fedspeed-sampled"),
        COLOURS,
        strict=True,
    )
)  # fmt: skip


def _look(method: str) -> dict[str, Any]:
    return {
        "color": _COLOURS[method],
        "label": METHODS[method][0],
        "linewidth": 2.4 if method == "fedspeed" else 1.2,
        "linestyle": "--" if method == "fedavg" else "-",
        "zorder": 3 if method == "fedspeed" else 2,
    }


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _curves(runs: list[Values], name: str) -> np.ndarray:
    return np.stack([run[name] for run in runs])


@styled
def _draw_rounds(run: Run, study: Study, found: Found) -> None:
    """Accuracy by round, by gradients, by K."""
    config, k = study.config, study.config.intervals[0]
    rounds = config.rounds // config.looks * np.arange(1, config.looks + 1)
    figure, axes = panels(1, 3, size=(3.8, 3.2))
    by_round, by_gradients, by_k = axes[0]
    for method in dict.fromkeys(method for method, _ in found):
        curves = _curves(found[method, k], "test")
        mean, steps = 100 * curves.mean(axis=0), METHODS[method][1] * k * rounds
        by_round.plot(rounds, mean, **_look(method))
        by_gradients.plot(steps, mean, **_look(method))
        own = [j for m, j in found if m == method]
        ends = [_accuracy(config, found[method, j]) for j in own]
        means = [e.mean() for e in ends]
        if method == "fedspeed-sampled":  # far below all others: told in place of shown
            by_k.annotate(
                f"duals over the sampled: {min(means):.1f} to {max(means):.1f} %",
                (0.5, 0.02), xycoords="axes fraction", fontsize=8, color="#666666", ha="center",
            )  # fmt: skip
            continue
        by_k.errorbar(
            [METHODS[method][1] * j for j in own], means, [_error(e) for e in ends],
            marker="o", markersize=3, capsize=2, **_look(method),
        )  # fmt: skip
    top = 100 * max(_curves(runs, "test").mean(axis=0).max() for runs in found.values())
    for panel in (by_round, by_gradients):
        panel.set_ylim(max(0, top - 50), top + 2)
    by_round.axhline(100 * config.target, color="#999999", linestyle=":", linewidth=1)
    by_round.set(xlabel="round", ylabel="test accuracy (%)", title=f"K = {k}")
    by_gradients.set(xlabel="gradients a client", title=f"K = {k}, by gradients")
    ticks = sorted({METHODS[m][1] * j for m, j in found})
    by_k.margins(y=0.12)
    by_k.set(xscale="log", xlabel="gradients a client and round", title="last rounds")
    by_k.set_xticks(ticks, [str(tick) for tick in ticks])
    by_k.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    legend(figure, by_round, columns=4)
    arrays = {f"{method} K={k}": _curves(runs, "test") for (method, k), runs in found.items()}
    run.figure("rounds", figure, rounds=rounds, **arrays)


@styled
def _draw_clients(run: Run, study: Study, found: Found) -> None:
    """Who holds what, how far clients move apart, how much better they know their own examples."""
    config, k = study.config, study.config.intervals[0]
    figure, axes = panels(1, 3, size=(3.8, 3.2))
    split, spread, gap = axes[0]
    parts, _ = study.split(study.seeds[0])
    draw_split(split, parts[:20], study.problem.train["y"], "labels of clients, first seed")
    arrays = {}
    for i, method in enumerate(dict.fromkeys(method for method, _ in found)):
        runs = found[method, k]
        arrays[f"spread {method}"] = curves = _curves(runs, "spread")
        rounds = np.arange(1, config.rounds + 1)
        spread.semilogy(rounds, np.maximum(curves, 1e-9).mean(axis=0), **_look(method))
        arrays[f"gap {method}"] = gaps = _loss_gap(config, runs)
        gap.errorbar(
            gaps.mean(), -i, xerr=_error(gaps), marker="o", capsize=2, color=_COLOURS[method]
        )
    names = [METHODS[m][0].replace(", ", ",\n") for m in dict.fromkeys(m for m, _ in found)]
    gap.set_yticks(range(0, -len(names), -1), names)
    gap.set(xlabel="test minus training loss (nats)", title=f"generalisation, K = {k}")
    spread.set(xlabel="round", ylabel="mean squared distance")
    spread.set_title(f"clients' models from their mean, K = {k}")
    legend(figure, spread, columns=4)
    run.figure("clients", figure, **arrays)


@styled
def _draw_variations(run: Run, study: Study, varied: dict[str, list[Values]]) -> None:
    """What the two stages and each setting of FedSpeed do."""
    if not varied:
        return
    config = study.config
    figure, axes = panels(1, 4, size=(3.0, 2.8))
    ends = {case: _accuracy(config, runs) for case, runs in varied.items()}
    stages = [case for case in ends if "=" not in case]
    for i, case in enumerate(stages):
        axes[0, 0].errorbar(
            ends[case].mean(), -i, xerr=_error(ends[case]), marker="o", capsize=2, color=COLOURS[1]
        )
    axes[0, 0].set_yticks(
        range(0, -len(stages), -1), [case.replace(", ", ",\n") for case in stages]
    )
    axes[0, 0].set(xlabel="test accuracy (%)", title=f"stages, K = {config.intervals[0]}")
    panels_of = dict(zip(("mixing", "ascent", "prox"), axes[0, 1:], strict=True))
    for name, panel in panels_of.items():
        values, symbol = config.vary[name], _SYMBOLS[name]
        own = [ends[f"{name}={value:g}"] for value in values]
        panel.errorbar(
            values, [e.mean() for e in own], [_error(e) for e in own],
            marker="o", markersize=3, capsize=2, color=COLOURS[1],
        )  # fmt: skip
        panel.set(xlabel=symbol, title=f"by {symbol}")
    bottom, top = np.transpose([panel.get_ylim() for panel in panels_of.values()])
    for panel in panels_of.values():
        panel.set_ylim(bottom.min(), top.max())
    panels_of["prox"].set(xscale="log")
    axes[0, 1].set(ylabel="test accuracy (%)")
    run.figure("variations", figure, **ends)


if __name__ == "__main__":
    start(main, memory_keys=("batch", "clients", "rounds"))
