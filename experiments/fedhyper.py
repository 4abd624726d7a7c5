"""FedHyper (arXiv 2310.03156): learning rates of server and clients that repair a bad choice.

Clients with skewed labels train a perceptron on digits. The server's rate (G), the rate that it
decides for its clients (SL) and the rate of each client within a round (CL) follow inner products
of successive updates; FedAvg, with a decaying rate too, FedAdam, FedAdagrad and FedExP stand
beside. Every method starts from rates a thousandfold apart; then from its own best one. A rate that
is large to begin with leaves the schedules room to diverge: that is shown, and a closer bound.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.ticker import NullLocator
from ml_collections import ConfigDict

from kernels_pallas.timing import in_turns
from rlib import data, federated
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
TITLES = {"g": "G", "sl": "SL", "cl": "CL", "g+cl": "G + CL", "gm": "G with momentum"}
BASELINES = {
    "fedavg": "FedAvg",
    "decay": "FedAvg with a decaying rate",
    "fedadam": "FedAdam",
    "fedadagrad": "FedAdagrad",
    "fedexp": "FedExP",
}


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Choose every method's rates, run all parts, and judge the claims."""
    run = run or Run()
    study = Study(config, run)
    study.plan()
    tuned = study.tune()
    found = study.run_all(tuned)
    study.draw(found, tuned)
    return Report(study.rows(found, tuned), study.claims(found), study.notes(tuned))


class Setting(NamedTuple):
    """The numbers of a method: one compiled program serves them all.

    Fields:
        rate: of the clients, beta_0.
        alpha: global rate, with FedHyper the first one; FedAdam's and FedAdagrad's own.
        decay: factor of the clients' rate a round.
        alpha_bounds, beta_bounds: multiples of the first rates.
        weight: of the last global update, in CL.
        momentum: of the server, in G.
        spread: factor of the first weights.
    """

    rate: float
    alpha: float = 1.0
    decay: float = 1.0
    alpha_bounds: tuple[float, float] = (1 / 3, 3.0)
    beta_bounds: tuple[float, float] = (1 / 10, 10.0)
    weight: float = 0.0
    momentum: float = 0.0
    spread: float = 1.0


class Job(NamedTuple):
    """A unit of work: a program at some settings, on one seed."""

    unit: str
    program: str
    settings: tuple[Setting, ...]
    seed: int


def make_algorithm(program: str, s: Setting) -> federated.Algorithm:
    """The algorithm of a program, whose numbers may be traced."""
    local = optax.sgd(s.rate)
    # Adagrad starts from the square of Adam's epsilon, 1e-3, both as published.
    adaptive = {
        "fedadam": lambda: optax.adam(s.alpha, b1=0.9, b2=0.99, eps=1e-3),
        "fedadagrad": lambda: optax.adagrad(s.alpha, initial_accumulator_value=1e-6, eps=1e-6),
    }
    if program == "fedavg":
        return federated.fedavg(local, optax.sgd(s.alpha), scale=lambda t: s.decay**t)
    if program in adaptive:
        return federated.fedavg(local, adaptive[program]())
    if program == "fedexp":
        return federated.fedexp(local)
    name, _, variant = program.partition(" ")
    client = {"g": "constant", "sl": "sl", "cl": "cl", "g+cl": "cl"}
    if name not in client or variant not in ("", "official"):
        raise UsageError(f"no method {program!r}")
    chosen: Any = {"client": client[name], "variant": variant or "paper"}
    return federated.fedhyper(
        s.rate,
        server=name.startswith("g"),
        alpha=s.alpha,
        gamma_alpha=s.alpha_bounds,
        gamma_beta=s.beta_bounds,
        global_coef=s.weight,
        momentum=s.momentum,
        **chosen,
    )


class Study:
    """The problem, the programs and what is to be run."""

    def __init__(self, config: ConfigDict, run: Run):
        self.config, self.run = config, run
        self.methods = run.select(config.methods)
        self.problem = _problem(config)
        steps = {"steps": config.steps} if config.steps else {"epochs": config.epochs}
        self.work = federated.LocalWork(config.batch_size, **steps)
        self.local_steps = self.work.count(config.size)
        labels = self.problem.train["y"]
        rows = np.linspace(0, len(labels) - 1, min(config.check, len(labels))).astype(int)
        check = jax.tree.map(lambda x: x[rows], self.problem.train)
        on_device = lambda tree: jax.tree.map(jnp.asarray, tree)
        self.train = on_device(self.problem.train)
        self.looked_at = on_device({"accuracy": self.problem.test, "check": check})
        self.programs: dict[tuple[str, int], Callable[..., Values]] = {}
        self.trials = {method: self._trials(method) for method in self.methods}
        if len({len(trials) for trials in self.trials.values()}) > 1:
            counts = ", ".join(f"{m} {len(t)}" for m, t in self.trials.items())
            raise UsageError(f"settings to choose from differ in number: {counts}")

    # Settings

    def setting(self, method: str, rate: float, second: float | None = None) -> Setting:
        """A method at a rate, with FedAdam's, FedAdagrad's and the decay's second number."""
        s = Setting(rate, weight=1 / self.local_steps)
        if method == "gm":
            s = s._replace(momentum=self.config.momentum)
        if second is not None:
            s = s._replace(**{"decay" if method == "decay" else "alpha": second})
        return s

    def _trials(self, method: str) -> tuple[Setting, ...]:
        tuning = self.config.tuning
        if method not in tuning:
            first, last, count = tuning.one
            return tuple(self.setting(method, r) for r in np.geomspace(first, last, count))
        first, last, count = tuning.two
        pairs = itertools.product(np.geomspace(first, last, count), tuning[method])
        return tuple(self.setting(method, rate, second) for rate, second in pairs)

    def ablation(self, name: str, rate: float) -> tuple[str, Setting]:
        """The program of a variant, and its setting."""
        method, _, change = name.partition(" ")
        s = self.setting(method, rate)
        # The official code's bounds are absolute at its default rates, 1 and 0.01.
        alpha = (0.2, 5.0) if method == "g" else (0.8, 5.0)
        match change:
            case "no global term":
                return _program(method), s._replace(weight=0.0)
            case "fixed alpha":
                return _program(method), s._replace(alpha_bounds=(1.0, 1.0))
            case "He weights":  # their variance, 2 / n in place of 1 / (3 n)
                return _program(method), s._replace(spread=6**0.5)
            case "official bounds":
                return _program(method), s._replace(alpha_bounds=alpha)
            case "official":
                s = s._replace(alpha_bounds=alpha, weight=0.1 / self.config.sampled)
                return f"{_program(method)} official", s
        raise UsageError(f"no ablation {name!r}")

    def bounded(self, method: str, gamma: float, rate: float) -> Setting:
        bounds = (1 / gamma, gamma)
        field = "alpha_bounds" if method == "g" else "beta_bounds"
        return self.setting(method, rate)._replace(**{field: bounds})

    # Work

    def jobs(self, tuned: Mapping[str, Setting]) -> dict[tuple[Any, ...], Job]:
        """All but the tuning: (part, method, ..., seed) -> job."""
        config = self.config
        jobs: dict[tuple[Any, ...], Job] = {}

        def add(part: str, name: str, program: str, settings: Sequence[Setting], about: str = ""):
            for seed in self.run.seeds(config):
                unit = f"{part}/{name.replace(' ', '_')}{about}/seed{seed}"
                jobs[part, name, seed] = Job(unit, program, tuple(settings), seed)

        for method in self.methods:
            best = tuned[method]
            two = method in config.tuning
            about = f"/{best.alpha:g},{best.decay:g}" if two else ""
            grid = [best._replace(rate=rate) for rate in config.rates]
            add("grid", method, _program(method), grid, about)
            add("tuned", method, _program(method), [best], f"/{best.rate:g}{about}")
            if method in TITLES and "fedavg" in tuned:
                rate = tuned["fedavg"].rate
                borrowed = [self.setting(method, rate)]
                add("borrowed", method, _program(method), borrowed, f"/{rate:g}")
        for method in self._of(config.alpha_methods if config.alphas else ()):
            pairs = itertools.product(config.alphas, config.rates)
            add("alpha", method, _program(method), [self.setting(method, b, a) for a, b in pairs])
        for method in self._of(config.gamma_methods):
            pairs = itertools.product(config.gammas, config.rates)
            add("gamma", method, _program(method), [self.bounded(method, g, b) for g, b in pairs])
        for name in config.ablations:
            if name.partition(" ")[0] in self.methods:
                made = [self.ablation(name, rate) for rate in config.rates]
                add("ablation", name, made[0][0], [setting for _, setting in made])
        return jobs

    def _of(self, methods: Sequence[str]) -> list[str]:
        return [method for method in methods if method in self.methods]

    def plan(self, tuned: Mapping[str, Setting] | None = None) -> None:
        """Costs in runs; before the tuning with any of the trials for the best one."""
        jobs = self.jobs(tuned or {m: trials[0] for m, trials in self.trials.items()})
        draws = self.config.tuning.draws
        costs = {f"tune/{m}": float(draws * len(trials)) for m, trials in self.trials.items()}
        costs |= {job.unit: float(len(job.settings)) for job in jobs.values()}
        if timed := self._timed():
            calls = len(timed) * self.config.repeats * self.config.turns
            costs[self._time_unit()] = float(calls)
        self.run.plan(costs)

    def tune(self) -> dict[str, Setting]:
        """Each method's setting of the fewest rounds to the target, on training examples."""

        def counts(method: str) -> np.ndarray:
            """(settings, draws)"""
            program, trials = _program(method), self.trials[method]
            draws = [TUNING_SEED + i for i in range(self.config.tuning.draws)]
            curves = [self._curves(Job("", program, trials, draw))["check"] for draw in draws]
            return federated.rounds_to(np.stack(curves, axis=1), self.config.target)

        tuned = {
            m: self.run.choose(f"tune/{m}", trials, functools.partial(counts, m))
            for m, trials in self.trials.items()
        }
        self.plan(tuned)
        return tuned

    def run_all(self, tuned: Mapping[str, Setting]) -> dict[str, Any]:
        """part -> method -> curves (seeds, settings, rounds); "time" -> seconds by method."""
        found: dict[str, Any] = {}
        for (part, name, _), job in self.jobs(tuned).items():
            found.setdefault(part, {}).setdefault(name, []).append(self._do(job))
        stack = lambda *curves: np.stack(curves)
        for part in found.values():
            for name, runs in part.items():
                part[name] = jax.tree.map(stack, *runs)
        if self._timed():
            found["time"] = self.run.cached(self._time_unit(), self._time)
        return found

    def _do(self, job: Job) -> Values:
        return self.run.cached(job.unit, lambda: self._curves(job))

    def _curves(self, job: Job) -> Values:
        program, inputs = self.program(job.program, self.config.rounds), self.inputs(job.seed)
        runs = []
        for setting in job.settings:
            self.run.check()
            runs.append(jax.device_get(program(_traced(setting), *inputs)))
        return jax.tree.map(lambda *curves: np.stack(curves).astype(np.float32), *runs)

    @functools.lru_cache(maxsize=4)  # noqa: B019 a study lives as long as its run
    def inputs(self, seed: int) -> tuple[Any, ...]:
        """Keys of weights and of rounds, and the split."""
        held = federated.client_data(self.train, self.parts(seed))
        held = held._replace(rows=jnp.asarray(held.rows), sizes=jnp.asarray(held.sizes))
        return named_key(seed, "weights"), named_key(seed, "rounds"), held, self.looked_at

    def parts(self, seed: int) -> list[np.ndarray]:
        config, labels = self.config, self.problem.train["y"]
        return data.partition_dirichlet(
            labels, config.clients, config.concentration, seed, size=config.size
        )

    def program(self, name: str, looks: int) -> Callable[..., Values]:
        """(setting, keys, clients' data, examples to look at) -> curves, compiled once.

        Args:
            looks: at accuracies; 1 for timing.
        """
        if (name, looks) in self.programs:
            return self.programs[name, looks]
        config, problem = self.config, self.problem

        def train(setting, weights_key, key, held, looked_at):
            rounds = federated.make_rounds(
                make_algorithm(name, setting),
                problem.loss,
                self.work,
                config.clients,
                config.sampled,
                weights="equal",
            )
            look = lambda p: {k: problem.accuracy(p, given) for k, given in looked_at.items()}
            spread = lambda x: setting.spread * x if x.ndim > 1 else x
            params = jax.tree.map(spread, problem.init(weights_key))
            done = federated.simulate(
                rounds,
                params,
                held,
                config.rounds,
                key=key,
                looks=looks,
                look=look,
            )
            kept = ("alpha", "alpha clipped", "beta", "beta clipped", "inner", "nonfinite")
            return done.seen | {k: v for k, v in done.metrics.items() if k in kept}

        self.programs[name, looks] = jax.jit(train)
        return self.programs[name, looks]

    def _timed(self) -> list[str]:
        timed = self._of(self.config.timed)
        return timed if len(timed) > 1 and timed[0] == self.config.timed[0] else []

    def _time_unit(self) -> str:
        """One for all methods, since they take turns."""
        return f"time/{','.join(self._timed())}"

    def _time(self) -> Values:
        """Seconds of all rounds, one look at their end included; (repeats,) a method.

        Methods take turns; of a few turns the quickest counts, since other work only adds.
        """
        weights, _, *rest = self.inputs(0)
        setting = _traced(self.setting("g+cl", self.config.small[-1]))
        key = jax.block_until_ready(named_key(0, "time"))
        programs = [self.program(_program(method), 1) for method in self._timed()]
        calls = [functools.partial(program, setting, weights, key, *rest) for program in programs]
        repeats, turns = self.config.repeats, self.config.turns
        seconds = in_turns(calls, repeats * turns, between=self.run.check)
        quickest = seconds.reshape(-1, repeats, turns).min(axis=2)
        return dict(zip(self._timed(), quickest, strict=True))

    # The report

    def final(self, curves: Values) -> np.ndarray:
        """Mean accuracy of the last rounds, (seeds, settings)."""
        return curves["accuracy"][..., -self.config.last :].mean(axis=-1)

    def at(self, rate: float) -> int:
        return list(self.config.rates).index(rate)

    def inner_rates(self) -> list[int]:
        """Where the rates are of the range whose worst one is reported."""
        low, high = self.config.worst
        return [i for i, rate in enumerate(self.config.rates) if low <= rate <= high]

    def multiples(self) -> list[tuple[int, int]]:
        """Pairs of rates of which the second is the first one's upper bound."""
        pairs = itertools.product(enumerate(self.config.rates), repeat=2)
        return [(i, j) for (i, a), (j, b) in pairs if np.isclose(self.config.gamma * a, b)]

    def rows(self, found: Mapping[str, Any], tuned: Mapping[str, Setting]) -> list[Row]:
        config = self.config
        rows = []
        low, high = config.worst

        def by_rate(name: str, metric: str, final: np.ndarray) -> None:
            for i, rate in enumerate(config.rates):
                rows.append(Row(name, f"{rate:g}", metric, final[:, i]))
            worst = final[:, self.inner_rates()].min(axis=1)
            rows.append(Row(name, f"worst of {low:g} to {high:g}", metric, worst))

        accuracy = f"Accuracy by beta_0, mean of the last {config.last} rounds"
        for method, curves in found["grid"].items():
            by_rate(method, accuracy, self.final(curves))
        for method, curves in found["grid"].items():
            for i, rate in enumerate(config.rates):
                counts = federated.rounds_to(curves["accuracy"][:, i], 0.8)
                rows.append(Row(method, f"{rate:g}", "Rounds to 80 % by beta_0", counts))
        for method in self._of(("sl", "cl", "g+cl") if "fedavg" in self.methods else ()):
            metric = f"Accuracy minus FedAvg's at {config.gamma:g} times the rate, by beta_0"
            for i, j in self.multiples():
                gap = (
                    self.final(found["grid"][method])[:, i]
                    - self.final(found["grid"]["fedavg"])[:, j]
                )
                rows.append(Row(method, f"{config.rates[i]:g}", metric, gap))
        metric = "Every method at its own best setting"
        for method, curves in found["tuned"].items():
            counts = federated.rounds_to(curves["accuracy"][:, 0], config.target)
            rows.append(Row(method, f"rounds to {100 * config.target:g} %", metric, counts))
            rows.append(Row(method, "accuracy", metric, self.final(curves)[:, 0]))
            rows.append(Row(method, "beta_0", metric, [tuned[method].rate]))
        for method, curves in found.get("borrowed", {}).items():
            metric = "Accuracy at the best rate of FedAvg"
            rows.append(Row(method, "accuracy", metric, self.final(curves)[:, 0]))
        for method, curves in found.get("alpha", {}).items():
            final = self._by_alpha(curves)
            metric = f"Accuracy by first global rate, beta_0 = {config.good:g}"
            for alpha, each in zip(config.alphas, final[..., self.at(config.good)].T, strict=True):
                rows.append(Row(method, f"{alpha:g}", metric, each))
            rows.append(Row(method, "mean of all beta_0", metric, final.mean(axis=(1, 2))))
            rows.append(Row(method, "worst of all beta_0", metric, final.min(axis=(1, 2))))
        for method, curves in found.get("gamma", {}).items():
            for gamma, final in zip(config.gammas, self._by_gamma(curves), strict=True):
                by_rate(f"{method}, {gamma:g}", "Accuracy by beta_0 and bound", final)
        for name, curves in found.get("ablation", {}).items():
            by_rate(name, "Accuracy by beta_0, variants", self.final(curves))
        for method, curves in found["grid"].items():
            for name, values in _moves(curves).items():
                for i, rate in enumerate(config.rates):
                    rows.append(
                        Row(f"{method}: {name}", f"{rate:g}", "What moves, by beta_0", values[:, i])
                    )
        timed = found.get("time", {})
        for method, seconds in timed.items():
            ratio = seconds / timed[config.timed[0]]
            rows.append(Row(method, "ratio", f"Time of a round over {config.timed[0]}'s", ratio))
        return rows

    def _by_alpha(self, curves: Values) -> np.ndarray:
        """(seeds, alphas, rates)"""
        final = self.final(curves)
        return final.reshape(len(final), len(self.config.alphas), -1)

    def _by_gamma(self, curves: Values) -> np.ndarray:
        """(gammas, seeds, rates)"""
        final = self.final(curves)
        return final.reshape(len(final), len(self.config.gammas), -1).swapaxes(0, 1)

    def claims(self, found: Mapping[str, Any]) -> list[Claim]:
        config = self.config
        claims = Claims([*found["grid"], *found.get("ablation", {})])
        final = lambda method, part="grid": self.final(found[part][method])
        at = lambda method, rate: final(method)[:, self.at(rate)]
        worst = lambda method: final(method)[:, self.inner_rates()].min(axis=1)
        gain = lambda method, rate: at(method, rate) - at("fedavg", rate)
        low, high = config.worst

        for rate, method in itertools.product(config.small, ("sl", "cl", "g+cl")):
            claims.add(
                f"beta_0 = {rate:g}: {TITLES[method]} ends 0.3 above FedAvg (accuracy)",
                ("fedavg", method),
                lambda rate=rate, method=method: gain(method, rate),
                at_least=0.3,
            )
        claims.add(
            f"beta_0 = {config.small[0]:g}: G alone changes nothing (accuracy)",
            ("fedavg", "g"),
            lambda: gain("g", config.small[0]),
            within=0.02,
        )
        for where, choice in (
            (f"of {low:g} to {high:g}", self.inner_rates()),
            (f"of {min(config.rates):g} to {max(config.rates):g}", slice(None)),
        ):
            claims.add(
                f"worst beta_0 {where}: G + CL ends 0.15 above FedAvg (accuracy)",
                ("fedavg", "g+cl"),
                lambda c=choice: final("g+cl")[:, c].min(1) - final("fedavg")[:, c].min(1),
                at_least=0.15,
            )
        for method in ("decay", "fedadam", "fedadagrad", "fedexp"):
            claims.add(
                f"worst beta_0 of {low:g} to {high:g}: G + CL ends above {BASELINES[method]}",
                (method, "g+cl"),
                lambda method=method: worst("g+cl") - worst(method),
                at_least=0,
            )
        if config.alphas:
            by_alpha = lambda m: self._by_alpha(found["alpha"][m])[..., self.at(config.good)]
            for i, method in itertools.product((0, len(config.alphas) - 1), ("g", "g+cl")):
                claims.add(
                    f"alpha_0 = {config.alphas[i]:g}: {TITLES[method]} ends 0.15 above FedAvg "
                    "(accuracy)",
                    ("fedavg", method),
                    lambda i=i, m=method: (by_alpha(m) - by_alpha("fedavg"))[:, i],
                    at_least=0.15,
                )
        large = f"beta_0 = {config.large:g}, bound"
        bounded = lambda method, gamma: (
            self._by_gamma(found["gamma"][method])[
                list(config.gammas).index(gamma), :, self.at(config.large)
            ]
            - at("fedavg", config.large)
        )
        for method in ("sl", "cl"):
            claims.add(
                f"{large} {config.gamma:g}: {TITLES[method]} fails, 0.1 below FedAvg (accuracy)",
                ("fedavg", method),
                lambda method=method: bounded(method, config.gamma),
                at_most=-0.1,
            )
        claims.add(
            f"{large} {config.gamma:g}: G + CL ends at most 0.05 below FedAvg (accuracy)",
            ("fedavg", "g+cl"),
            lambda: bounded("g+cl", config.gamma),
            at_least=-0.05,
        )
        for method in ("sl", "cl", "g+cl"):
            claims.add(
                f"{large} {config.repair:g}: {TITLES[method]} ends at most 0.01 below FedAvg",
                ("fedavg", method),
                lambda method=method: bounded(method, config.repair),
                at_least=-0.01,
            )
        count = lambda method: federated.rounds_to(
            found["tuned"][method]["accuracy"][:, 0], config.target
        ).astype(float)
        ratio = lambda other, method: count(other) / count(method)
        for method in ("g", "sl", "cl", "g+cl"):
            claims.add(
                f"tuned: FedAvg needs 1.1 times the rounds of {TITLES[method]} to "
                f"{100 * config.target:g} % (ratio)",
                ("fedavg", method),
                lambda method=method: ratio("fedavg", method),
                at_least=1.1,
            )
        for other in ("decay", "fedadam", "fedadagrad", "fedexp"):
            claims.add(
                f"tuned: {BASELINES[other]} needs 1.1 times the rounds of G + CL (ratio)",
                (other, "g+cl"),
                lambda other=other: ratio(other, "g+cl"),
                at_least=1.1,
            )
        for method in ("g", "sl", "cl", "g+cl"):
            claims.add(
                f"at FedAvg's best rate {TITLES[method]} ends at most 0.01 below it (accuracy)",
                ("fedavg", method),
                lambda m=method: (final(m, "borrowed") - final("fedavg", "tuned"))[:, 0],
                at_least=-0.01,
            )
        mean = lambda method, part: final(method, part)[:, self.inner_rates()].mean(axis=1)
        for method in ("cl", "g+cl"):
            without = f"{method} no global term"
            claims.add(
                f"the last global update's term helps {TITLES[method]} (accuracy, mean of "
                f"{low:g} to {high:g})",
                (method, without),
                lambda m=method, w=without: mean(m, "grid") - mean(w, "ablation"),
                at_least=0,
            )
        claims.add(
            f"beta_0 = {config.small[0]:g}: the official code's CL ends 0.3 above FedAvg",
            ("fedavg", "cl official"),
            lambda: (
                final("cl official", "ablation")[:, self.at(config.small[0])]
                - at("fedavg", config.small[0])
            ),
            at_least=0.3,
        )
        if "g+cl" in found.get("time", {}):
            claims.add(
                "a round of G + CL takes at most 1.2 times FedAvg's",
                ("fedavg", "g+cl"),
                lambda: found["time"]["g+cl"] / found["time"]["fedavg"],
                at_most=1.2,
            )
        return claims

    def notes(self, tuned: Mapping[str, Setting]) -> list[str]:
        config = self.config
        number = len(next(iter(self.trials.values())))
        chosen = []
        for method, s in tuned.items():
            second = {"decay": f" x {s.decay:g}^round"}.get(method, f", server {s.alpha:.3g}")
            chosen.append(f"{method} {s.rate:.3g}{second if method in config.tuning else ''}")
        return [
            f"Settings by the fewest rounds to {100 * config.target:g} % of the training examples, "
            f"{number} a method, on {config.tuning.draws} draws of their own: "
            f"{'; '.join(chosen)}. The second number also holds for all of beta_0.",
            f"A run that does not get there counts {config.rounds + 1} rounds.",
            f"Bounds are relative to the first rates: 3 for alpha and {config.gamma:g} for beta, "
            "but where bounds vary: there G's is that of alpha, the others' that of beta.",
            "Official: the released code's rule, bounds, weight and momentum; its SL resets the "
            "rate in every round. He weights: the first matrices times the root of 6. Adam's step "
            "is bias-corrected, which the published FedAdam's is not.",
            f"Times: all rounds as one compiled call, the quickest of {config.turns} turns; values "
            "are repeats.",
        ]

    # Figures

    def draw(self, found: Mapping[str, Any], tuned: Mapping[str, Setting]) -> None:
        self._draw_accuracy(found)
        self._draw_rates(found)
        self._draw_tuned(found)
        self._draw_alpha(found)

    @styled
    def _draw_accuracy(self, found: Mapping[str, Any]) -> None:
        config = self.config
        shown = {m: self.final(curves) for m, curves in found["grid"].items()}
        figure, axes = panels(1, 3, size=(3.6, 3.2), sharey=True)
        for method, final in shown.items():
            axes[0, 0].plot(config.rates, final.mean(axis=0), label=method, **_look(method))
        axes[0, 0].set(title="all methods", ylabel="accuracy, last rounds")
        chosen = [m for m in ("sl", "g+cl") if m in found.get("gamma", {})]
        for column, method in enumerate(chosen, start=1):
            finals = self._by_gamma(found["gamma"][method])
            for gamma, final, colour in zip(config.gammas, finals, COLOURS, strict=False):
                mean, spread = final.mean(axis=0), final.std(axis=0)
                axes[0, column].plot(
                    config.rates, mean, color=colour, marker="o", markersize=3, label=f"{gamma:g}"
                )
                axes[0, column].fill_between(
                    config.rates, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0
                )
            axes[0, column].set(title=f"{TITLES[method]} by its bound of beta")
            axes[0, column].legend(loc="lower center", title="bound", title_fontsize=8)
        for ax in axes[0]:
            ax.set(xscale="log", xlabel="first rate of the clients", ylim=(0, 1))
        legend(figure, axes[0, 0], columns=10)
        self.run.figure("accuracy", figure, rates=np.array(config.rates), **shown)

    @styled
    def _draw_rates(self, found: Mapping[str, Any]) -> None:
        """Alpha, beta and inner products along the rounds, means over seeds."""
        config, grid = self.config, found["grid"]
        wanted = [(m, what) for m in ("g", "g+cl") for what in ("alpha", "inner")]
        wanted = [*wanted[:2], ("sl", "beta"), *wanted[2:], ("g+cl", "beta")]
        shown = [(m, what) for m, what in wanted if m in grid]
        if not shown:
            return
        rates = [r for r in (*config.small, config.good, config.large) if r in config.rates]
        figure, axes = panels(-(-len(shown) // 3), min(3, len(shown)), size=(3.4, 2.5))
        arrays: Values = {}
        x = np.arange(1, config.rounds + 1)
        for ax in axes.flat[len(shown) :]:
            ax.set_axis_off()
        for ax, (method, what) in zip(axes.flat, shown, strict=False):
            curves = grid[method][what]
            arrays.setdefault(method, {})[what] = curves
            for rate, colour in zip(rates, COLOURS, strict=False):
                values = curves[:, self.at(rate)]
                scale = 1 / rate if what == "beta" else 1.0
                middle = np.median(values, axis=0) * scale
                low, high = np.quantile(values, [0.25, 0.75], axis=0) * scale
                ax.plot(x, middle, color=colour, label=f"beta_0 = {rate:g}")
                ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            title = {"alpha": "alpha", "beta": "beta / beta_0", "inner": "inner product"}[what]
            ax.set_title(f"{TITLES[method]}: {title}")
            if what == "inner":
                ax.set_yscale("symlog", linthresh=1e-3)
                ax.set_yticks([-1, -1e-1, -1e-2, 0, 1e-2, 1e-1, 1])
                continue
            bound = 3 if what == "alpha" else config.gamma
            ends = (1 / bound, 1, bound)
            ax.set(yscale="log", ylim=(0.9 / bound, 1.1 * bound))
            ax.set_yticks(ends, ["1/" + f"{bound:g}", "1", f"{bound:g}"])
            ax.yaxis.set_minor_locator(NullLocator())
            for end in ends:
                ax.axhline(end, color="#999999", linestyle=":", linewidth=0.8, zorder=0)
        for ax in axes[-1]:
            ax.set_xlabel("round")
        legend(figure, axes[0, 0])
        self.run.figure("rates", figure, rates=np.array(rates), **arrays)

    @styled
    def _draw_tuned(self, found: Mapping[str, Any]) -> None:
        figure, axes = panels(1, 2, size=(4.4, 3.2))
        labels = self.problem.train["y"]
        draw_split(axes[0, 0], self.parts(0), labels, "who holds what, seed 0")
        x = np.arange(1, self.config.rounds + 1)
        shown = {m: curves["accuracy"][:, 0] for m, curves in found["tuned"].items()}
        for method, curves in shown.items():
            axes[0, 1].plot(x, curves.mean(axis=0), label=method, **_look(method, marker=False))
        axes[0, 1].axhline(self.config.target, color="#999999", linestyle=":", linewidth=1)
        axes[0, 1].set(title="every method at its best setting", xlabel="round", ylabel="accuracy")
        axes[0, 1].set(xlim=(0.5, self.config.rounds / 2))
        legend(figure, axes[0, 1], columns=10)
        self.run.figure("tuned", figure, **shown)

    @styled
    def _draw_alpha(self, found: Mapping[str, Any]) -> None:
        config, grids = self.config, found.get("alpha", {})
        if not grids:
            return
        figure, axes = panels(1, len(grids), size=(3.8, 2.6), sharey=True)
        finals = {method: self._by_alpha(curves).mean(axis=0) for method, curves in grids.items()}
        for ax, (method, final) in zip(axes[0], finals.items(), strict=True):
            image = ax.imshow(final, origin="lower", vmin=0, vmax=1, cmap="viridis", aspect="auto")
            ax.set_xticks(range(len(config.rates)), [f"{r:g}" for r in config.rates])
            ax.set_yticks(range(len(config.alphas)), [f"{a:g}" for a in config.alphas])
            for (i, j), value in np.ndenumerate(final):
                ink = "white" if value < 0.6 else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
            ax.set(title=TITLES.get(method, BASELINES.get(method)), xlabel="first rate of clients")
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
        axes[0, 0].set_ylabel("first global rate")
        figure.colorbar(image, ax=axes[0, -1], label="accuracy")
        self.run.figure("alpha", figure, **finals)


def _moves(curves: Values) -> dict[str, np.ndarray]:
    """What the logs of a method hold, each (seeds, rates)."""
    made = {}
    if "alpha" in curves:
        made["alpha at the end"] = curves["alpha"][..., -1]
    if "alpha clipped" in curves:
        made["rounds at alpha's bounds"] = curves["alpha clipped"][..., -1]
    if "beta clipped" in curves:
        made["rounds at beta's bounds"] = curves["beta clipped"][..., -1]
    if "inner" in curves:
        # A mean would be that of the few rounds that diverge.
        made["inner product, median of rounds"] = np.median(curves["inner"], axis=-1)
    if ("beta" in curves and np.ptp(curves["beta"], axis=-1).any()) or "beta clipped" in curves:
        made["beta at the end"] = curves["beta"][..., -1]
    return made


def _program(method: str) -> str:
    return {"decay": "fedavg", "gm": "g"}.get(method, method)


def _traced(setting: Setting) -> Setting:
    return jax.tree.map(jnp.float32, setting)


def _problem(config: ConfigDict) -> federated.Classification:
    return federated.image_classification(
        config.dataset,
        hidden=config.hidden,
        widths=config.widths,
        blocks=config.blocks,
        groups=config.groups,
        shift=config.shift,
    )


def _look(method: str, marker: bool = True) -> dict[str, Any]:
    names = [*TITLES, *BASELINES]
    own = method in TITLES
    colours = ("#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
    greys = ("#000000", "#666666", "#56B4E9", "#882255", "#999999")
    look = {
        "color": dict(zip(names, (*colours, *greys), strict=True))[method],
        "linestyle": "-" if own or method == "fedavg" else "--",
        "linewidth": 1.8 if own or method == "fedavg" else 1.1,
    }
    return look | ({"marker": "o", "markersize": 3} if marker else {})


if __name__ == "__main__":
    start(main, memory_keys=("batch_size", "check"))
