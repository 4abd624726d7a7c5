"""Momentum FedAvg and SCAFFOLD (arXiv 2306.16504): one more vector downwards against client drift.

A perceptron learns digits that are split by label over clients: all take part with one label each;
two of 20 with two labels each; five of 100 on single examples, where theory has momentum gain. All
methods choose their rates from as many settings on draws of their own, and run at published ones.
Noisy quadratics, whose minimum is known, show where the methods end by local steps, the error by
clients, and, with settings chosen, what SCAFFOLD-M and the variance-reduced (VR) forms bring.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from rlib import data, federated
from rlib.experiment import (
    COLOURS,
    TUNING_SEED,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    capped,
    choose,
    draw_split,
    legend,
    named_key,
    panels,
    start,
    styled,
)

Values = dict[str, Any]
#: eta, gamma (on digits as a multiple of eta K), and beta, or what stands in its place.
Setting = tuple[float, float, float]
TITLES = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "server-momentum": "FedAvg with server momentum",
    "fedavg-m": "FedAvg-M",
    "fedavg-m-vr": "FedAvg-M-VR",
    "scaffold": "SCAFFOLD",
    "scaffold-m": "SCAFFOLD-M",
    "scaffold-m-vr": "SCAFFOLD-M-VR",
}
#: What the third number of a setting is; methods without one try more local rates.
THIRD = {
    "fedprox": "mu",
    "server-momentum": "momentum",
    **dict.fromkeys(("fedavg-m", "fedavg-m-vr", "scaffold-m", "scaffold-m-vr"), "beta"),
}
#: Methods that another one's program serves.
SERVED = {"fedprox": "fedavg", "server-momentum": "fedavg"}
#: On quadratics, where no bytes are counted, those with beta = 1.
SERVED_ON_QUADRATICS = {"fedavg": "fedavg-m", "scaffold": "scaffold-m"}
QUADRATIC = ("fedavg", "fedavg-m", "fedavg-m-vr", "scaffold", "scaffold-m", "scaffold-m-vr")
#: With half of the local steps, for as many gradients as the plain form.
HALF = "-half"
SWEPT = ("fedavg-m", "scaffold-m")
PLACES = {
    "full": "10 clients of one label, all",
    "partial": "20 of two labels, 2 a round",
    "noisy": "100 of two labels, 5 a round, batch 1",
    "network": "residual network",
    "network_100": "residual network, 100 clients",
}
#: What diverged counts as it.
LARGEST = 1e12


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Train every method on every problem, and judge the claims."""
    run = run or Run()
    methods = run.select(config.methods)
    places = [place for place in PLACES if config[place].rounds > 0]
    run.plan(_costs(run, config, methods, places))
    learned = {place: Learning(run, config, place).results(methods) for place in places}
    squares = Quadratics(run, config, [m for m in methods if m in QUADRATIC]).results()
    _draw_learned(run, config, learned)
    _draw_splits(run, config, places)
    _draw_betas(run, config, learned)
    _draw_quadratics(run, config, squares)
    claims = Claims(methods)
    for place in places:
        _learned_claims(claims, config, place, learned[place])
    _quadratic_claims(claims, config, squares)
    rows = _learned_rows(config, learned) + _quadratic_rows(config, squares)
    return Report(rows, claims, _notes(config, learned, squares))


def algorithm(
    name: str,
    steps: Any,
    eta: Any,
    gamma: Any,
    *,
    beta: Any = 1.0,
    mu: Any = 0.0,
    momentum: Any = 0.0,
) -> federated.Algorithm:
    """A method of K local steps; its numbers may be traced."""
    reduced = name.endswith("-vr")
    match name:
        case "fedavg" | "fedprox" | "server-momentum":
            server = optax.sgd(gamma / (eta * steps), momentum=momentum)
            return federated.fedavg(optax.sgd(eta), server, proximal=mu)
        case "fedavg-m" | "fedavg-m-vr":
            return federated.fedavg_m(eta, gamma, beta, variance_reduced=reduced)
        case "scaffold":
            return federated.scaffold(eta, gamma)
        case "scaffold-m" | "scaffold-m-vr":
            return federated.scaffold_m(eta, gamma, beta, variance_reduced=reduced)
    raise UsageError(f"no method {name!r}; it must be one of {', '.join(TITLES)}")


def settings(
    method: str, options: ConfigDict, servers: Sequence[float], thirds: dict[str, Sequence[float]]
) -> list[Setting]:
    """What a method tries."""
    if method not in THIRD:
        return list(itertools.product(options.more_etas, servers, (0.0,)))
    return list(itertools.product(options.etas, servers, thirds[THIRD[method]]))


def _costs(run: Run, config: ConfigDict, methods, places) -> dict[str, float]:
    costs: dict[str, float] = {}
    for place, method in itertools.product(places, methods):
        options = config[place]
        trials = len(options.etas) * len(options.servers) * len(options.betas) * options.draws
        costs[f"tune/{place}/{method}/chosen"] = 4 + 0.1 * trials
        names = ["chosen", "published"]
        if method in SWEPT:
            swept = [f"beta={beta:g}" for beta in options.betas]
            names += swept
            costs |= {f"tune/{place}/{method}/{name}": 0.0 for name in swept}
        for name, seed in itertools.product(names, run.seeds(options)):
            costs[f"fit/{place}/{method}/{name}/seed{seed}"] = 0.1
    options = config.quadratics
    seeds = len(run.seeds(options))
    for method in (m for m in methods if m in QUADRATIC):
        costs[f"bias/{method}/{seeds}"] = 8.0
        costs[f"floors/{method}/{seeds}"] = 8.0
        for name in (method, method + HALF) if method.endswith("-vr") else (method,):
            for n, s in options.gain.pairs:
                costs[f"gain/N{n}-S{s}/{name}/{seeds}"] = 4.0
    return costs


# Digits and other labelled images


class Learning:
    """A data set dealt to clients, and every method's training on it."""

    def __init__(self, run: Run, config: ConfigDict, place: str):
        self.run, self.config, self.place = run, config, place
        self.options = config[place]
        self.program = functools.cache(self._program)
        try:
            self.problem = _problem(self.options)
        except data.DataUnavailable as error:
            where = f"--config.{place}.rounds=0"
            raise UsageError(f"{error}; or leave the problem out: {where}") from error

    def results(self, methods: Sequence[str]) -> dict[str, Values]:
        """By method: the settings, and what was measured at each, along a leading axis of seeds."""
        return {method: self._measured(method) for method in methods}

    def _measured(self, method: str) -> Values:
        options, published = self.options, self.config.published
        train = self._trainer(method)
        thirds = {"beta": options.betas, "mu": options.mus, "momentum": options.momenta}
        tried = settings(method, options, options.servers, thirds)
        loss = functools.cache(functools.partial(self._loss, train))

        def best(name: str, among: list[Setting]) -> Setting:
            unit = f"tune/{self.place}/{method}/{name}"
            return self.run.choose(unit, among, lambda: [loss(setting) for setting in among])

        third = published[THIRD[method]] if method in THIRD else 0.0
        taken = {
            "chosen": best("chosen", tried),
            "published": (published.eta, published.server, third),
        }
        for beta in options.betas if method in SWEPT else ():
            name = f"beta={beta:g}"
            taken[name] = best(name, [setting for setting in tried if setting[2] == beta])
        found: Values = {"settings": taken, "trials": len(tried)}
        for name, setting in taken.items():
            results = [
                self.run.cached(
                    f"fit/{self.place}/{method}/{name}/seed{seed}",
                    functools.partial(train, setting, seed),
                )
                for seed in self.run.seeds(options)
            ]
            found[name] = {key: np.stack([r[key] for r in results]) for key in results[0]}
        return found

    def _loss(self, train: Callable[[Setting, int], Values], setting: Setting) -> np.floating:
        """The final training loss, mean over the draws."""
        self.run.check()
        draws = [train(setting, TUNING_SEED + i) for i in range(self.options.draws)]
        return np.mean([r["loss"][-self.options.tail :] for r in draws])

    def _trainer(self, method: str) -> Callable[[Setting, int], Values]:
        """(setting, seed) -> accuracy and loss along the rounds, clients' accuracies at the end."""
        options, train = self.options, self.problem.train
        program = self.program(SERVED.get(method, method))
        # All numbers are given, for methods that share a program.
        given = {"beta": 1.0, "mu": 0.0, "momentum": 0.0}

        def fit(setting: Setting, seed: int) -> Values:
            eta, server, third = setting
            numbers = {"eta": eta, "gamma": server * eta * options.steps, **given}
            if method in THIRD:
                numbers[THIRD[method]] = third
            held = federated.client_data(train, _parts(options, train["y"], seed))
            found = program(held, named_key(seed, self.place), numbers)
            names = ("accuracy", "loss", "clients", "bytes")
            return dict(zip(names, map(np.asarray, found), strict=True))

        return fit

    def _program(self, method: str) -> Callable[..., tuple[Array, ...]]:
        options, problem = self.options, self.problem
        work = federated.LocalWork(options.batch, steps=options.steps)

        @jax.jit
        def program(held: federated.ClientData, key: Key[Array, ""], numbers: dict[str, Array]):
            rounds = federated.make_rounds(
                algorithm(method, options.steps, **numbers),
                problem.loss, work, options.clients, options.sampled,
            )  # fmt: skip
            own = lambda rows: jax.tree.map(lambda x: jnp.asarray(x)[rows], problem.train)
            loss = lambda params, rows: jnp.mean(problem.loss(params, own(rows), key))

            def look(params: Any) -> tuple[Array, Array]:
                losses = jax.lax.map(lambda rows: loss(params, rows), held.rows)
                return problem.accuracy(params, problem.test), jnp.mean(losses)

            weights, batches = jax.random.split(key)
            done = federated.simulate(
                rounds, problem.init(weights), held, options.rounds,
                key=batches, looks=options.looks, look=look,
            )  # fmt: skip
            right = lambda rows: problem.accuracy(done.state.params, own(rows))
            sent = [done.metrics[f"bytes_{way}"][0] / options.sampled for way in ("up", "down")]
            return *done.seen, jax.lax.map(right, held.rows), jnp.stack(sent)

        return program


#: Places share a data set and its network.
_shared = functools.cache(federated.image_classification)


def _problem(options: ConfigDict) -> federated.Classification:
    sizes = {name: options[name] for name in ("hidden", "widths", "blocks")}
    return _shared(options.dataset, **sizes, groups=4)


def _parts(options: ConfigDict, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Clients of equal sizes, so that no draw needs another program."""
    clients = options.clients
    match options.split:
        case "label":
            parts = data.partition_by_key(labels)
            if len(parts) != clients:
                raise UsageError(f"{clients} clients for {len(parts)} labels; one each is wanted")
            size = min(map(len, parts))
            return [part[:size] for part in parts]
        case "shards":
            return data.partition_shards(labels, clients, seed=seed)
        case "dirichlet":
            size = len(labels) // clients
            return data.partition_dirichlet(labels, clients, options.concentration, seed, size=size)
    raise UsageError(f"split={options.split!r}; it must be label, shards or dirichlet")


# Quadratics


class Quadratics:
    """Clients' losses (x - b_i)' A_i (x - b_i) / 2, and errors of every method on them.

    Curvatures of the clients are 0.5 to 1.5 times those of the mean. Their minima b_i go along with
    them, so that the drift does not average out over many clients, and have a part of their own.
    """

    def __init__(self, run: Run, config: ConfigDict, methods: Sequence[str]):
        self.run, self.options, self.methods = run, config.quadratics, methods
        self.program = functools.cache(self._program)

    def results(self) -> dict[str, dict[str, Values]]:
        """ "bias", "floors" and "gain": of each method the errors, seeds along the last axis."""
        seeds, parts = len(self.run.seeds(self.options)), {}
        for part, measure in (("bias", self._bias), ("floors", self._floors)):
            parts[part] = {
                method: self.run.cached(
                    f"{part}/{method}/{seeds}", functools.partial(measure, method, seeds)
                )
                for method in self.methods
            }
        parts["gain"] = {}
        for method in self.methods:
            for name in (method, method + HALF) if method.endswith("-vr") else (method,):
                parts["gain"][name] = {
                    f"N={n}, S={s}": self.run.cached(
                        f"gain/N{n}-S{s}/{name}/{seeds}",
                        functools.partial(self._gain, name, n, s, seeds),
                    )
                    for n, s in self.options.gain.pairs
                }
        return parts

    def problem(self, key: Key[Array, ""], places: int, clients: Any, noise: Any):
        """What each place holds, the first `clients` of them in use; curvature, minimum of all."""
        options = self.options
        d = options.dimension
        there = (jnp.arange(places) < clients)[:, None]
        stretch = (0.5 + jnp.arange(places) / (clients - 1))[:, None]
        a = stretch * jnp.geomspace(1 / options.condition, 1.0, d)
        own, common = jax.random.split(key)
        common, own = jax.random.normal(common, (d,)), jax.random.normal(own, (places, d))
        b = options.heterogeneity * (2 * (stretch - 1) * common + own)
        curvature = jnp.sum(there * a, axis=0)
        minimum = jnp.sum(there * a * b, axis=0) / curvature
        return {"a": a, "b": b, "noise": jnp.full(places, noise)}, curvature / clients, minimum

    def _program(self, method: str, places: int, sampled: int, most: int, rounds: int):
        """(eta, gamma, beta, noise, clients N, steps K, key), along a leading axis ->
        squared gradients after each round, distance of the end from FedAvg's for step beta eta.

        N and K are traced: a client makes an epoch over K copies of its loss, or none.
        """

        def loss(x: Array, batch: Any, key: Array) -> Float[Array, " 1"]:
            square = jnp.sum(batch["a"] * (x - batch["b"]) ** 2, axis=-1) / 2
            noise = jax.random.normal(key, x.shape) / jnp.sqrt(len(x))
            return square + batch["noise"] * jnp.dot(noise, x)

        def one(eta, gamma, beta, noise, clients, steps, key):
            drawn, batches = jax.random.split(key)
            examples, curvature, minimum = self.problem(drawn, places, clients, noise)
            there = jnp.arange(places) < clients
            rows = jnp.broadcast_to(jnp.arange(places)[:, None], (places, most))
            held = federated.ClientData(examples, rows, jnp.where(there, steps, 0).astype(int))
            made = algorithm(method, steps, eta, gamma, beta=beta)
            done = federated.simulate(
                federated.make_rounds(
                    made, loss, federated.LocalWork(1, epochs=1), places, sampled
                ),
                jnp.zeros(self.options.dimension), held, rounds,
                key=batches, looks=rounds, look=lambda x: jnp.sum((curvature * (x - minimum)) ** 2),
            )  # fmt: skip
            moved = there[:, None] * (1 - (1 - beta * eta * examples["a"]) ** steps)
            end = jnp.sum(moved * examples["b"], axis=0) / jnp.sum(moved, axis=0)
            norm = jnp.linalg.norm
            return {
                "curve": done.seen,
                "first": jnp.sum((curvature * minimum) ** 2),
                "apart": norm(done.state.params - end) / norm(end - minimum),
            }

        return jax.jit(jax.vmap(one))

    def _run(self, method: str, shape: tuple[int, ...], lanes: Sequence[Sequence[Any]], keys):
        """The program of these shapes on (eta, gamma, beta, noise, N, K), one a lane."""
        self.run.check()
        program = self.program(SERVED_ON_QUADRATICS.get(method, method), *shape)
        numbers = np.asarray(lanes, np.float32).T
        if method in SERVED_ON_QUADRATICS:
            numbers[2] = 1.0
        return jax.tree.map(np.asarray, program(*numbers, keys))

    def _keys(self, seeds: Sequence[int]) -> Array:
        return jnp.stack([named_key(seed, "quadratics") for seed in seeds])

    def _tail(self, errors: np.ndarray) -> np.ndarray:
        count = max(1, round(self.options.tail * errors.shape[-1]))
        return capped(errors[..., -count:], LARGEST).mean(axis=-1)

    def _bias(self, method: str, seeds: int) -> Values:
        """The last squared gradient (K, seeds), over that at the start, and distances of the end.

        "apart" is the distance from where FedAvg of step beta eta ends, over that point's distance
        from the minimum; without meaning for one local step, where the two are the same.
        """
        o = self.options.bias
        sizes = [(o.clients, k) for k in o.steps]
        found = self._sizes(method, o, sizes, 0.0, seeds)
        last = found["curve"][..., -1] / found["first"]
        return {"error": capped(last, LARGEST), "apart": found["apart"]}

    def _floors(self, method: str, seeds: int) -> Values:
        """Mean squared gradients of the last rounds: by clients at one K, by K at one N."""
        o = self.options.floors
        clients, steps = o.middle
        sizes = [(n, steps) for n in o.clients] + [(clients, k) for k in o.steps]
        found = self._tail(self._sizes(method, o, sizes, o.noise, seeds)["curve"])
        return {"clients": found[: len(o.clients)], "steps": found[len(o.clients) :]}

    def _sizes(self, method: str, o: ConfigDict, sizes, noise: float, seeds: int) -> Values:
        """Arrays (sizes, seeds, ...), all clients in every round."""
        places, most = (max(size[i] for size in sizes) for i in (0, 1))
        lanes = [(o.eta, o.gamma, o.beta, noise, *size) for size in sizes for _ in range(seeds)]
        keys = jnp.tile(self._keys(range(seeds)), len(sizes))
        found = self._run(method, (places, places, most, o.rounds), lanes, keys)
        return {key: x.reshape(len(sizes), seeds, *x.shape[1:]) for key, x in found.items()}

    def _gain(self, name: str, clients: int, sampled: int, seeds: int) -> Values:
        """Errors (noises, seeds) with settings (noises, 3) that were chosen on other draws."""
        o = self.options.gain
        method = name.removesuffix(HALF)
        steps = o.steps // 2 if name.endswith(HALF) else o.steps
        tried = settings(method, o, o.gammas, {"beta": o.betas})
        width = max(len(tried), seeds)  # of one program for both

        def curves(taken: Sequence[Setting], noise: float, keys: Array) -> np.ndarray:
            """One a setting and key."""
            taken = [*taken, *[taken[0]] * (width - len(taken))]
            lanes = [(*setting, noise, clients, steps) for setting in taken]
            keys = keys[np.minimum(np.arange(width), len(keys) - 1)]
            shape = (clients, sampled, o.steps, o.rounds)
            return self._run(method, shape, lanes, keys)["curve"]

        chosen, errors, means = [], [], []
        for noise in o.noises:
            draws = self._keys([TUNING_SEED + i for i in range(o.draws)])
            losses = [self._tail(curves(tried, noise, key[None]))[: len(tried)] for key in draws]
            # Of logarithms, as errors are reported, so that no draw decides alone.
            chosen.append(choose(tried, np.mean(_log10(np.stack(losses)), axis=0)))
            seen = curves([chosen[-1]] * seeds, noise, self._keys(range(seeds)))[:seeds]
            errors.append(self._tail(seen))
            means.append(_log10(seen).mean(axis=0))
        return {"settings": np.array(chosen), "error": np.stack(errors), "curve": np.stack(means)}


def _log10(errors: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(capped(errors, LARGEST), 1 / LARGEST**2))


# The report


def _final(options: ConfigDict, found: Values, name: str, key: str) -> np.ndarray:
    """(seeds,): the mean of the last looks."""
    return capped(found[name][key], LARGEST)[:, -options.tail :].mean(axis=1)


def _rounds_to(config: ConfigDict, options: ConfigDict, found: Values) -> np.ndarray:
    """(seeds,): the first round at the target accuracy; one more than all if there is none."""
    every = options.rounds // options.looks
    return federated.rounds_to(found["chosen"]["accuracy"], config.target, every)


def _spread(found: Values) -> np.ndarray:
    return found["chosen"]["clients"].std(axis=1)


def _at_bytes(options: ConfigDict, found: dict[str, Values], method: str) -> np.ndarray:
    """(seeds,): accuracy when a client has sent and got what it does in all of FedAvg's rounds."""
    total = lambda m: float(found[m]["chosen"]["bytes"][0].sum())
    last = round(options.looks * min(1.0, total("fedavg") / total(method)))
    first = max(0, last - options.tail)
    return found[method]["chosen"]["accuracy"][:, first : max(last, 1)].mean(axis=1)


def _learned_rows(config: ConfigDict, learned: dict[str, dict[str, Values]]) -> list[Row]:
    rows = []
    for place, found in learned.items():
        options, group = config[place], PLACES[place]
        for method, results in found.items():
            final = functools.partial(_final, options, results)
            measured = {
                "Test accuracy, settings chosen": final("chosen", "accuracy"),
                "Test accuracy, published settings": final("published", "accuracy"),
                "Training loss, settings chosen (nats)": final("chosen", "loss"),
                f"Rounds to {config.target:.0%} (one more than all, if never)": _rounds_to(
                    config, options, results
                ),
                "Standard deviation of the clients' accuracies at the end": _spread(results),
                "Kilobytes a client gets and sends in a round": [
                    results["chosen"]["bytes"][0].sum() / 1e3
                ],
            }
            if "fedavg" in found:
                at = _at_bytes(options, found, method)
                measured["Test accuracy at the bytes of FedAvg's rounds"] = at
            rows += [Row(method, group, metric, values) for metric, values in measured.items()]
            by_beta = "Test accuracy by beta, rates chosen for each"
            rows += [
                Row(f"{method}, {name}", group, by_beta, final(name, "accuracy"))
                for name in results["settings"]
                if name.startswith("beta=")
            ]
    return rows


def _quadratic_rows(config: ConfigDict, squares: dict[str, dict[str, Values]]) -> list[Row]:
    options, rows = config.quadratics, []
    for method, found in squares["bias"].items():
        for k, errors in zip(options.bias.steps, found["error"], strict=True):
            title = "Quadratics, exact gradients: last squared gradient over the first (log10)"
            rows.append(Row(method, f"K={k}", title, _log10(errors)))
    title = "Quadratics, noise, all clients, equal settings: squared gradient (log10)"
    n, k = options.floors.middle
    for method, found in squares["floors"].items():
        for clients, errors in zip(options.floors.clients, found["clients"], strict=True):
            rows.append(Row(method, f"N={clients}, K={k}", title, _log10(errors)))
        for steps, errors in zip(options.floors.steps, found["steps"], strict=True):
            if (n, steps) not in [(c, k) for c in options.floors.clients]:
                rows.append(Row(method, f"N={n}, K={steps}", title, _log10(errors)))
    for i, noise in enumerate(options.gain.noises):
        title = f"Quadratics, settings chosen, noise {noise:g}: squared gradient (log10)"
        for method, pairs in squares["gain"].items():
            for pair, found in pairs.items():
                rows.append(Row(method, pair, title, _log10(found["error"][i])))
    return rows


def _learned_claims(
    claims: Claims, config: ConfigDict, place: str, found: dict[str, Values]
) -> None:
    options, where = config[place], f"{place} participation" if place != "noisy" else place
    accuracy = lambda method, name="chosen": _final(options, found[method], name, "accuracy")

    def above(method: str, other: str, name: str = "chosen", end: str = "") -> None:
        claims.add(
            f"{where}: {TITLES[method]}'s accuracy is above {TITLES[other]}'s{end}",
            (method, other),
            lambda: accuracy(method, name) - accuracy(other, name),
            at_least=0,
        )

    above("fedavg-m", "fedavg")
    above("fedavg-m", "fedavg", "published", ", published settings")
    claims.add(
        f"{where}: also where FedAvg-M stops at FedAvg's bytes",
        ("fedavg-m", "fedavg"),
        lambda: _at_bytes(options, found, "fedavg-m") - _at_bytes(options, found, "fedavg"),
        at_least=0,
    )
    above("fedavg-m", "fedprox")
    above("fedavg-m", "server-momentum")
    above("fedavg-m-vr", "fedavg-m")
    above("scaffold-m", "scaffold")
    above("scaffold-m", "scaffold", "published", ", published settings")
    above("scaffold-m-vr", "scaffold-m")
    above("scaffold", "fedavg-m")
    if place != "full":
        return
    pair = ("fedavg-m", "fedavg")
    to = lambda method: _rounds_to(config, options, found[method])
    claims.add(
        f"{where}: FedAvg-M reaches {config.target:.0%} before FedAvg (rounds)",
        pair,
        lambda: to("fedavg-m") - to("fedavg"),
        at_most=0,
    )
    claims.add(
        f"{where}: its clients' accuracies are spread less",
        pair,
        lambda: _spread(found["fedavg-m"]) - _spread(found["fedavg"]),
        at_most=0,
    )


def _slope(errors: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(seeds,): the power of the size by which errors (sizes, seeds) go."""
    return np.polyfit(np.log10(sizes), _log10(errors), 1)[0]


def _quadratic_claims(
    claims: Claims, config: ConfigDict, squares: dict[str, dict[str, Values]]
) -> None:
    options = config.quadratics
    k = max(options.bias.steps)
    last = lambda method: _log10(squares["bias"][method]["error"][-1])
    for method in ("fedavg", "fedavg-m"):
        claims.add(
            f"exact gradients, K={k}: {TITLES[method]} ends off the minimum, 1000 times "
            "SCAFFOLD-M's squared gradient (log10)",
            (method, "scaffold-m"),
            lambda m=method: last(m) - last("scaffold-m"),
            at_least=3,
        )
    claims.add(
        "FedAvg-M ends nearer to it than FedAvg (log10)",
        ("fedavg", "fedavg-m"),
        lambda: last("fedavg-m") - last("fedavg"),
        at_most=0,
    )
    claims.add(
        "FedAvg-M ends where FedAvg of step beta eta would (distance over that point's bias)",
        ("fedavg-m",),
        lambda: squares["bias"]["fedavg-m"]["apart"][-1],
        at_most=0.01,
    )
    for method in ("scaffold", "scaffold-m"):
        claims.add(
            f"{TITLES[method]} ends at the minimum (squared gradient over the first, log10)",
            (method,),
            lambda m=method: last(m),
            at_most=-8,
        )
    floors = squares["floors"]
    for method in ("fedavg-m", "scaffold-m"):
        for size, title in (("clients", "N"), ("steps", "K")):
            claims.add(
                f"noise: {TITLES[method]}'s error falls as 1/{title} (its power, plus 1)",
                (method,),
                lambda m=method, size=size: _slope(floors[m][size], options.floors[size]) + 1,
                within=0.15,
            )
    n = max(options.floors.clients)
    claims.add(
        f"noise, N={n}: FedAvg's error is at least 3 times FedAvg-M's, equal settings (log10)",
        ("fedavg", "fedavg-m"),
        lambda: _log10(floors["fedavg"]["clients"][-1]) - _log10(floors["fedavg-m"]["clients"][-1]),
        at_least=float(np.round(np.log10(3), 3)),
    )
    noises = list(enumerate(options.gain.noises))
    for n, s in options.gain.pairs:
        error = lambda m, i, n=n, s=s: _log10(squares["gain"][m][f"N={n}, S={s}"]["error"][i])

        def below(method: str, other: str, i: int, noise: float, end="", n=n, s=s, error=error):
            claims.add(
                f"settings chosen, S={s} of N={n}, noise {noise:g}: {TITLES[method]}'s error is "
                f"below {TITLES[other]}'s{end} (log10)",
                (method, other),
                lambda: error(method + (HALF if end else ""), i) - error(other, i),
                at_most=0,
            )

        momentum, plain = ("fedavg-m", "fedavg") if s == n else ("scaffold-m", "scaffold")
        for i, noise in noises:
            # FedAvg's exact end is as near as the least rate that was tried: no claim.
            if s < n or noise > 0:
                below(momentum, plain, i, noise)
        i, noise = noises[-1]
        below(f"{momentum}-vr", momentum, i, noise)
        below(f"{momentum}-vr", momentum, i, noise, " at as many gradients")


def _notes(config: ConfigDict, learned, squares) -> list[str]:
    notes = [
        "Spread over seeds is that of weights and batches, and with shards of the split too.",
        "Published settings: eta 0.1, the server's step to the mean of the clients' models, beta "
        "0.1 (FL-Simulator's FedCM, without its decay, clip and weight decay).",
        "VR forms take two gradients a step, so twice as many in as many rounds; those with -half "
        "make half of the local steps.",
    ]
    text = lambda setting: " ".join(f"{x:g}" for x in setting)
    for place, found in learned.items():
        named = {m: r["settings"]["chosen"][: 3 if m in THIRD else 2] for m, r in found.items()}
        chosen = "; ".join(f"{m} {text(setting)}" for m, setting in named.items())
        counts = {r["trials"] for r in found.values()}
        notes.append(
            f"{PLACES[place]}: of {', '.join(map(str, sorted(counts)))} settings each, chosen by "
            f"training loss (eta, gamma / (eta K), beta or mu or momentum): {chosen}."
        )
    for i, noise in enumerate(config.quadratics.gain.noises):
        for pair in [f"N={n}, S={s}" for n, s in config.quadratics.gain.pairs]:
            chosen = "; ".join(
                f"{m} {text(r[pair]['settings'][i][: 3 if m.removesuffix(HALF) in THIRD else 2])}"
                for m, r in squares["gain"].items()
            )
            notes.append(f"Quadratics, {pair}, noise {noise:g} (eta, gamma, beta): {chosen}.")
    notes.append(
        "Without noise, all clients: FedAvg and FedAvg-M end off the minimum by the least eta that "
        "was tried, and by beta eta; smaller ones would end nearer."
    )
    bounds = "; ".join(
        f"S={s} of N={n}: {(n / s) ** (2 / 3):.2f} against {1 + n ** (2 / 3) / s:.2f}"
        for n, s in config.quadratics.gain.pairs
        if s < n
    )
    notes.append(
        "The bounds' factors of L Delta / R, SCAFFOLD's (N/S)^(2/3) against SCAFFOLD-M's "
        f"1 + N^(2/3)/S: {bounds}. Constants are left out of both."
    )
    return notes


# Figures


_LOOK: dict[str, dict[str, Any]] = {
    "fedavg": {"color": COLOURS[6]},
    "fedprox": {"color": COLOURS[7], "linestyle": "--"},
    "server-momentum": {"color": COLOURS[7]},
    "fedavg-m": {"color": COLOURS[1], "linewidth": 2.2},
    "fedavg-m-vr": {"color": COLOURS[4], "linestyle": "--"},
    "scaffold": {"color": COLOURS[2]},
    "scaffold-m": {"color": COLOURS[0], "linewidth": 2.2},
    "scaffold-m-vr": {"color": COLOURS[5], "linestyle": "--"},
}


@styled
def _draw_learned(run: Run, config: ConfigDict, learned) -> None:
    if not learned:
        return
    figure, axes = panels(2, len(learned), size=(3.6, 2.7), sharey="row")
    arrays: dict[str, Any] = {}
    for column, (place, found) in enumerate(learned.items()):
        options = config[place]
        rounds = options.rounds // options.looks * np.arange(1, options.looks + 1)
        for method, results in found.items():
            accuracy = results["chosen"]["accuracy"].mean(axis=0)
            sent = rounds * results["chosen"]["bytes"][0].sum() / 1e6
            arrays[f"{place} {method}"] = results["chosen"]["accuracy"]
            axes[0, column].plot(rounds, accuracy, label=TITLES[method], **_LOOK[method])
            axes[1, column].plot(sent, accuracy, **_LOOK[method])
        least = min(r["chosen"]["bytes"][0].sum() for r in found.values())
        axes[0, column].set(title=PLACES[place], xlabel="round")
        axes[1, column].set(
            xlabel="megabytes up and down, a sampled client", xlim=(0, least * options.rounds / 1e6)
        )
        for row in (0, 1):
            axes[row, column].axhline(config.target, linestyle=":", color="#999999", linewidth=1)
    for row in (0, 1):
        axes[row, 0].set_ylabel("test accuracy")
    legend(figure, axes[0, 0], columns=4)
    run.figure("accuracy", figure, **arrays)


@styled
def _draw_splits(run: Run, config: ConfigDict, places: Sequence[str]) -> None:
    if not places:
        return
    figure, axes = panels(1, len(places), size=(3.6, 2.6))
    arrays = {}
    for column, place in enumerate(places):
        labels = _problem(config[place]).train["y"]
        parts = _parts(config[place], labels, 0)
        draw_split(axes[0, column], parts, labels, PLACES[place])
        arrays[place] = np.stack(parts)
    run.figure("splits", figure, **arrays)


@styled
def _draw_betas(run: Run, config: ConfigDict, learned) -> None:
    shown = {p: f for p, f in learned.items() if any(m in f for m in SWEPT)}
    if not shown:
        return
    figure, axes = panels(1, len(shown), size=(3.4, 2.7))
    arrays: dict[str, Any] = {}
    for column, (place, found) in enumerate(shown.items()):
        options = config[place]
        for method, plain in zip(SWEPT, ("fedavg", "scaffold"), strict=True):
            if method not in found:
                continue
            points = {b: _final(options, found[method], f"beta={b:g}", "accuracy")
                      for b in options.betas}  # fmt: skip
            if plain in found:  # beta = 1
                points[1.0] = _final(options, found[plain], "chosen", "accuracy")
            values = np.stack(list(points.values()))
            arrays[f"{place} {method}"] = values
            axes[0, column].errorbar(
                list(points), values.mean(axis=1), values.std(axis=1),
                marker="o", markersize=4, capsize=2, label=TITLES[method], **_LOOK[method],
            )  # fmt: skip
        axes[0, column].set(title=PLACES[place], xlabel="beta, rates chosen for each", xscale="log")
        ticks = [*options.betas, 1.0]
        axes[0, column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0, column].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[0, 0].set_ylabel("test accuracy")
    legend(figure, axes[0, 0])
    run.figure("beta", figure, **arrays)


@styled
def _draw_quadratics(run: Run, config: ConfigDict, squares) -> None:
    if not squares["bias"]:
        return
    options = config.quadratics
    pairs = [f"N={n}, S={s}" for n, s in options.gain.pairs]
    figure, axes = panels(2, 3, size=(3.6, 2.8))
    arrays: dict[str, Any] = {}
    n, k = options.floors.middle
    sweeps = (
        (axes[0, 0], "bias", "error", options.bias.steps, "exact gradients: where it ends",
         "K, local steps"),
        (axes[0, 1], "floors", "clients", options.floors.clients, f"noise, K={k}", "N, clients"),
        (axes[0, 2], "floors", "steps", options.floors.steps, f"noise, N={n}", "K, local steps"),
    )  # fmt: skip
    for place, part, key, sizes, title, label in sweeps:
        for method, found in squares[part].items():
            values = _log10(found[key])
            arrays[f"{part} {key} {method}"] = values
            place.plot(
                sizes, 10 ** values.mean(axis=1), marker="o", markersize=3,
                label=TITLES[method], **_LOOK[method],
            )  # fmt: skip
        place.set(title=title, xlabel=label, xscale="log", yscale="log")
        place.set_xticks(sizes, [str(size) for size in sizes])
        place.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[0, 0].set_ylabel("squared gradient, last / first")
    axes[0, 1].set_ylabel("squared gradient, last rounds")
    noise = options.gain.noises[-1]
    for place, pair in zip(axes[1], pairs[:3], strict=False):
        for method in (m for m in squares["gain"] if not m.endswith(HALF)):
            curve = squares["gain"][method][pair]["curve"][-1]
            arrays[f"gain {pair} {method}"] = curve
            place.semilogy(np.arange(1, len(curve) + 1), 10**curve, **_LOOK[method])
        place.set(title=f"noise {noise:g}, settings chosen, {pair}", xlabel="round")
    for place in axes[1, len(pairs[:3]) :]:
        place.set_axis_off()
    axes[1, 0].set_ylabel("squared gradient")
    legend(figure, axes[0, 0])
    run.figure("quadratics", figure, **arrays)


if __name__ == "__main__":
    start(main)
