"""Cooldown (arXiv 2410.04579): rare domains first over-sampled, then left at their share.

Byte-level Transformers are trained on languages whose texts differ by a factor of 60. Temperature
sampling over-samples the rare ones, which learn fast and then are learnt by heart; scalarisation
weights their losses instead, whose gradients are noisier; Cooldown over-samples until half of the
steps and then samples by size. All methods share the model, the rate and the number of steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rlib import data, nn, parallel
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
from rlib.training import Phase

Values = dict[str, Any]
LOSS = "Held-out loss (nats a byte)"
NOISE = "Norm of the gradient, variance about its moving average of 25 early steps"
MOMENTS = "Squared gradient of one sequence, scalarisation over over-sampling"


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Train every method on every seed, and judge the claims."""
    run = run or Run()
    methods = run.select(config.methods)
    units = {(m, s): f"fit/{m}/seed{s}" for m in methods for s in run.seeds(config)}
    run.plan(dict.fromkeys(units.values(), 1.0))
    study = Study(config, run)
    found: dict[str, list[Values]] = {method: [] for method in methods}
    for (method, seed), unit in units.items():
        fit = lambda unit=unit, method=method, seed=seed: study.fit(unit, method, seed)
        found[method].append(run.cached(unit, fit))
    _draw(run, config, found)
    return Report(_rows(config, study, found), _claims(config, study, found), _notes(config, study))


class Sampling(NamedTuple):
    """How a method draws and weights sequences."""

    temperature: float | Callable[[int], float]
    weights: np.ndarray
    sizes: np.ndarray | None
    sgd: bool


class NormsState(NamedTuple):
    """Norm of the gradient at each step, and how many there were."""

    count: Int[Array, ""]  # type: ignore[assignment]
    norms: Float[Array, " steps"]


def record_norms(steps: int) -> optax.GradientTransformation:
    """Passes gradients on and keeps their global norms."""

    def update(updates: Any, state: NormsState, params: Any = None):
        norms = state.norms.at[state.count].set(optax.tree.norm(updates))
        return updates, NormsState(state.count + 1, norms)

    init = lambda params: NormsState(jnp.zeros((), jnp.int32), jnp.zeros(steps))
    return optax.GradientTransformation(init, update)


def _inverse_root(peak: float, warmup: int) -> optax.Schedule:
    """Linear up to `peak`, then with the inverse root of the step, as published."""
    return lambda step: peak * jnp.minimum((step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))


class Study:
    """The model and the texts, to be trained by any method on the run's mesh."""

    def __init__(self, config: ConfigDict, run: Run):
        self.config, self.run, self.mesh = config, run, run.mesh(config)
        self.sizes = np.array([len(self._sequences(name, "train")) for name in config.domains])
        self.held_out = [self._some(name, "test", config.rows) for name in config.domains]
        self.graphdef, self.params, self.frozen = self._model(0)
        make = lambda optimizer: parallel.make_train_step(
            self.loss,
            optax.chain(record_norms(config.steps), optimizer),
            self.mesh,
            self.params,
            self.frozen,
        )
        self.adam = make(
            optax.adam(_inverse_root(config.learning_rate, config.warmup), b2=config.b2)
        )
        self.sgd = make(optax.sgd(_inverse_root(config.sgd_learning_rate, config.warmup)))
        self.evaluate = jax.jit(self._evaluate)
        self.moments = jax.jit(self._moments)

    def _model(self, seed: int):
        network = nn.Transformer(
            256,
            layers=self.config.layers,
            embed=self.config.embed,
            heads=self.config.heads,
            rngs=nnx.Rngs(named_key(seed, "weights")),
        )
        return nnx.split(network, nnx.Param, ...)

    def loss(self, params: Any, frozen: Any, batch: Any, key: Any):
        logits = nnx.merge(self.graphdef, params, frozen)(batch["tokens"])
        return nn.next_token_loss(logits, batch["tokens"], batch["weight"]), {}

    def _sequences(self, name: str, split: str) -> np.ndarray:
        tokens = data.arrays(name, split)["tokens"].reshape(-1)
        count = len(tokens) // self.config.length
        return tokens[: count * self.config.length].reshape(count, -1)

    def _some(self, name: str, split: str, most: int) -> np.ndarray:
        """Evenly spaced over the text."""
        rows = self._sequences(name, split)
        return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]

    def method(self, name: str) -> Sampling:
        config, ones = self.config, np.ones(len(self.sizes))
        name, _, optimizer = name.partition("-")
        sgd = optimizer == "sgd"
        budget = config.steps * config.batch
        match name:
            case "scalarised":
                weights = data.scalarization_weights(self.sizes, config.hi)
                return Sampling(1.0, weights, None, sgd)
            case "cooldown":
                return Sampling(data.cooldown(config.switch, config.hi, config.lo), ones, None, sgd)
            case "gradual":
                slope = (config.lo - config.hi) / max(config.steps - 1, 1)
                return Sampling(lambda step: config.hi + slope * step, ones, None, sgd)
            case "increasing":
                return Sampling(data.cooldown(config.switch, config.lo, config.hi), ones, None, sgd)
            case "unimax":
                sizes = data.unimax_sizes(self.sizes, budget, config.epochs)
                return Sampling(1.0, ones, sizes, sgd)
        if not name.startswith("tau=") or optimizer not in ("", "sgd"):
            raise UsageError(f"no method {name!r} with {optimizer or 'Adam'}")
        return Sampling(float(name.removeprefix("tau=")), ones, None, sgd)

    def stream(self, method: Sampling, seed: int) -> Any:
        config, weights = self.config, method.weights.astype(np.float32)
        batches = data.mixture(
            config.domains,
            batch_size=config.batch,
            seed=seed,
            temperature=method.temperature,
            sizes=method.sizes,
            length=config.length,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        weigh = lambda b: {"tokens": b["tokens"], "weight": weights[b["domain"]]}
        return iter(batches.map(weigh))

    def fit(self, unit: str, name: str, seed: int) -> Values:
        """Held-out losses along the training, norms of its gradients, E|g|^2 at its end."""
        config, method = self.config, self.method(name)
        _, params, frozen = self._model(seed)
        train = self.sgd if method.sgd else self.adam
        state, stream = train.init(params, frozen), self.stream(method, seed)
        look = lambda state: self.evaluate(state.params, state.frozen)
        first, phases = look(state), [Phase(train, config.steps)]
        state, history = self.run.fit(unit, phases, state, stream, chunk=config.chunk, look=look)
        return {
            "steps": np.array([0, *range(config.chunk, config.steps, config.chunk), config.steps]),
            "losses": np.stack([np.append(first[n], history[n]) for n in config.domains], axis=1),
            "norms": np.asarray(state.opt_state[0].norms),
            "moments": np.asarray(self.moments(state.params, state.frozen)),
        }

    def _evaluate(self, params: Any, frozen: Any) -> dict[str, Float[Array, ""]]:
        """Held-out loss by domain."""
        network = nnx.merge(self.graphdef, params, frozen)
        loss = lambda rows: nn.next_token_loss(network(jnp.asarray(rows)), rows)
        return {n: loss(rows) for n, rows in zip(self.config.domains, self.held_out, strict=True)}

    def _moments(self, params: Any, frozen: Any) -> Float[Array, " domains"]:
        """E|g|^2 of one sequence, by domain."""

        def one(row: Array) -> Array:
            batch = {"tokens": row[None], "weight": jnp.ones(1)}
            grads = jax.grad(lambda p: self.loss(p, frozen, batch, None)[0])(params)
            return optax.tree.norm(grads, squared=True)

        domains = self.config.domains
        texts = [self._some(name, "train", self.config.moments) for name in domains]
        return jnp.stack([jnp.mean(jax.lax.map(one, jnp.asarray(rows))) for rows in texts])


# The report


def _final(runs: list[Values]) -> np.ndarray:
    """(seeds, domains)"""
    return np.stack([run["losses"][-1] for run in runs])


def _noise(config: ConfigDict, runs: list[Values]) -> np.ndarray:
    """Variance of the gradient's norm about its moving average, (seeds,)."""
    first, last = config.noise
    width = min(25, last - first)
    average = lambda norms: np.convolve(norms, np.ones(width) / width, mode="same")
    noise = [run["norms"] - average(run["norms"]) for run in runs]
    return np.array([np.var(each[first:last]) for each in noise])


def _ratios(config: ConfigDict, study: Study, found) -> list[float]:
    """E|g|^2 of scalarisation over that of over-sampling, with over-sampling's final gradients."""
    runs = found.get(f"tau={config.hi:g}", [])
    return [data.variance_ratio(study.sizes, config.hi, run["moments"]) for run in runs]


def _rows(config: ConfigDict, study: Study, found: dict[str, list[Values]]) -> list[Row]:
    rows = []
    for method, runs in found.items():
        final = _final(runs)
        best = np.stack([run["losses"].min(axis=0) for run in runs])[:, -1]
        columns = {_short(name): final[:, i] for i, name in enumerate(config.domains)}
        columns["mean of the others"] = final[:, 1:].mean(axis=1)
        columns["rarest, best"] = best
        for column, values in columns.items():
            rows.append(Row(method, column, LOSS, values.tolist()))
        rows.append(Row(method, "variance", NOISE, _noise(config, runs).tolist()))
    equal = data.variance_ratio(study.sizes, config.hi)
    rows.append(Row("theorem 2: equal gradients in all domains", "ratio", MOMENTS, [equal]))
    if ratios := _ratios(config, study, found):
        rows.append(Row("gradients as measured", "ratio", MOMENTS, ratios))
    return rows


def _short(name: str) -> str:
    return name.rpartition("/")[2].removeprefix("python_")


def _claims(config: ConfigDict, study: Study, found: dict[str, list[Values]]) -> list[Claim]:
    claims = Claims(method for method, runs in found.items() if runs)
    rich = lambda method: _final(found[method])[:, 0]
    rare = lambda method: _final(found[method])[:, 1:].mean(axis=1)
    noise = lambda method: np.log10(_noise(config, found[method]))

    over, by_size = (f"tau={tau:g}" for tau in (config.hi, config.lo))
    claims.add(
        f"Cooldown ends within {config.margin:g} nats of sampling by size on the largest language",
        ("cooldown", by_size),
        lambda: rich("cooldown") - rich(by_size),
        at_most=config.margin,
    )
    claims.add(
        "and below it on the others",
        ("cooldown", by_size),
        lambda: rare("cooldown") - rare(by_size),
        at_most=0,
    )
    others = {
        over: "static over-sampling",
        "tau=100": "even sampling",
        "unimax": "UniMax",
        "scalarised": "scalarisation",
        "increasing": "the increasing schedule",
        "gradual": "a gradual schedule",
    }
    for method, title in others.items():
        claims.add(
            f"Cooldown ends below {title} on the largest language (nats)",
            ("cooldown", method),
            lambda m=method: rich("cooldown") - rich(m),
            at_most=0,
        )
        claims.add(
            "and on the others",
            ("cooldown", method),
            lambda m=method: rare("cooldown") - rare(m),
            at_most=0,
        )
    for title, end in (("Adam", ""), ("SGD", "-sgd")):
        weighted, drawn = pair = (f"scalarised{end}", f"{over}{end}")
        claims.add(
            f"{title}: the gradient's norm varies 10 times more under scalarisation (log10)",
            pair,
            lambda w=weighted, d=drawn: noise(w) - noise(d),
            at_least=1,
        )
        claims.add(
            f"{title}: scalarisation ends above over-sampling on the largest language (nats)",
            pair,
            lambda w=weighted, d=drawn: rich(w) - rich(d),
            at_least=0,
        )
        claims.add(
            f"{title}: and on the others",
            pair,
            lambda w=weighted, d=drawn: rare(w) - rare(d),
            at_least=0,
        )
    claims.add(
        "with the gradients as they are, scalarisation's are the larger (ratio of squares)",
        (over,),
        lambda: _ratios(config, study, found),
        at_least=1,
    )
    return claims


def _notes(config: ConfigDict, study: Study) -> list[str]:
    p = {tau: data.temperature_probs(study.sizes, tau) for tau in (config.lo, config.hi)}
    seen = {f"tau {tau:g}": config.steps * config.batch * q / study.sizes for tau, q in p.items()}
    halves = config.switch / config.steps
    seen["Cooldown"] = (
        halves * seen[f"tau {config.hi:g}"] + (1 - halves) * seen[f"tau {config.lo:g}"]
    )
    numbers = lambda values: ", ".join(f"{value:.3g}" for value in values)
    return [
        f"Sequences of {config.length} bytes, by language: {', '.join(map(str, study.sizes))}.",
        *(f"Shares at tau {tau:g}: {numbers(q)}." for tau, q in p.items()),
        *(
            f"A sequence is seen on average, {k}: {numbers(times)} times."
            for k, times in seen.items()
        ),
    ]


# Figures


@styled
def _draw(run: Run, config: ConfigDict, found: dict[str, list[Values]]) -> None:
    shown = [method for method in found if not method.endswith("sgd")]
    if not shown:
        return
    colours = dict(zip([m for m in config.methods if not m.endswith("sgd")], COLOURS, strict=False))
    count = len(config.domains)
    figure, axes = panels(1, count, size=(2.6, 2.8))
    arrays: dict[str, Any] = {}
    for method in shown:
        runs = found[method]
        losses = np.stack([r["losses"] for r in runs])
        arrays[method] = {"losses": losses, "norms": np.stack([r["norms"] for r in runs])}
        for i in range(count):
            axes[0, i].plot(
                runs[0]["steps"],
                losses[:, :, i].mean(axis=0),
                label=method,
                color=colours[method],
                linestyle="--" if method == "increasing" else "-",
                linewidth=2.5 if method == "cooldown" else 1.2,
            )
    for i, name in enumerate(config.domains):
        ends = arrays[shown[0]]["losses"][:, 1:, i]
        axes[0, i].set(xlabel="step", title=_short(name))
        axes[0, i].axvline(config.switch, linestyle=":", color="#999999")
        axes[0, i].set_ylim(top=float(np.max(ends)) + 0.2)
    axes[0, 0].set_ylabel("held-out loss (nats a byte)")
    legend(figure, axes[0, 0], columns=len(shown))
    run.figure("losses", figure, steps=found[shown[0]][0]["steps"], **arrays)


if __name__ == "__main__":
    start(main, memory_keys=("batch", "length", "embed"))
