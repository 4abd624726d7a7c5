"""1-bit Adam (arXiv 2102.02888): Adam's convergence with one bit a coordinate on the wire.

After a short warm-up Adam's second moment is frozen and the momentum travels as packed signs with
error feedback on both sides. Tested with eight workers on digits and on a byte-level Transformer,
beside Adam and the variants that should fail: without error feedback, without the mask of
coordinates that have no second moment, and compressed gradients fed to Adam. Bytes are read from
the compiled programs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from kernels_pallas.timing import in_turns
from rlib import compression, data, nn, optim, parallel, training
from rlib.experiment import (
    COLOURS,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    capped,
    legend,
    named_key,
    panels,
    slow_network,
    start,
    styled,
)

AXIS = "data"
DIVERGED = 1000.0  # nats, which stand for more
METHODS = ("adam", "onebit", "onebit-auto", "no-mask", "no-feedback", "compressed-gradients")
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Train every task with every method, and judge the claims."""
    run = run or Run()
    methods = run.select(METHODS)
    tasks = {name: Task(config, name, run) for name in ("digits", "text") if config[name].methods}
    units = {
        (name, method, seed): f"fit/{name}/{method}/seed{seed}"
        for name, task in tasks.items()
        for method in methods
        if method in task.options.methods
        for seed in run.seeds(config)
    }
    costs = {unit: tasks[name].options.cost for (name, *_), unit in units.items()}
    costs |= {f"wire/{name}": 5.0 for name in tasks}
    costs |= {"speed": 0.5 * config.speed.repeats} if config.speed.repeats else {}
    run.plan(costs | slow_network.costs(config.network))
    found: dict[str, dict[str, list[Values]]] = {name: {} for name in tasks}
    for (name, method, seed), unit in units.items():
        fit = functools.partial(tasks[name].fit, unit, method, seed)
        found[name].setdefault(method, []).append(run.cached(unit, fit))
    wire = {name: run.cached(f"wire/{name}", task.wire) for name, task in tasks.items()}
    links = slow_network.measured(run, "experiments.onebit_adam:network_trainings", config.network)
    speed = run.cached("speed", lambda: _speed(config.speed)) if config.speed.repeats else {}
    _draw(run, config, found, wire)
    slow_network.draw_network(run, links)
    rows = [*_rows(found, wire, speed), *slow_network.network_rows(links)]
    claims = [*_claims(config, found, wire, speed), *_network_claims(links)]
    return Report(rows, claims, _notes(config, wire))


class Plan(NamedTuple):
    """An optimiser and the stages in which it runs."""

    optimizer: optax.GradientTransformation
    stages: tuple[str, ...]


class Task:
    """A model and its data, to be trained by any method on the run's mesh."""

    def __init__(self, config: ConfigDict, name: str, run: Run):
        self.name, self.options, self.run = name, config[name], run
        self.mesh = run.mesh(config)
        self.params, self.frozen, self.apply = self._model(0)
        self._steps: dict[tuple[str, str], parallel.TrainStep] = {}

    def _model(self, seed: int):
        key = named_key(seed, self.name, "weights")
        options = self.options
        network: nnx.Module
        if self.name == "digits":
            network = nn.Perceptron((64, *options.hidden, 10), rngs=nnx.Rngs(key))
        else:
            network = nn.Transformer(
                256,
                layers=options.layers,
                embed=options.embed,
                heads=options.heads,
                rngs=nnx.Rngs(key),
            )
        graphdef, params, frozen = nnx.split(network, nnx.Param, ...)
        return params, frozen, lambda p, f, x: nnx.merge(graphdef, p, f)(x)

    def loss(self, params: Any, frozen: Any, batch: Any, key: Any):
        if self.name == "digits":
            logits = self.apply(params, frozen, _flat(batch["image"]))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.mean(losses), {}
        tokens = batch["tokens"]
        return nn.next_token_loss(self.apply(params, frozen, tokens), tokens), {}

    def plan(self, method: str) -> Plan:
        """The method's optimiser; all methods share rate, betas and eps."""
        options = self.options
        rate = options.learning_rate
        make = functools.partial(
            optim.onebit_adam, rate, b2=options.b2, eps=options.eps, axis_name=AXIS,
            v_floor=options.v_floor,
        )  # fmt: skip
        if method == "adam":
            return Plan(make(window=options.steps), ("warmup",))
        if method == "compressed-gradients":
            feedback = optim.scale_by_error_compensation(
                compression.ScaledSign(), axis_name=AXIS, scope="leaf"
            )
            return Plan(
                optax.chain(feedback, optax.adam(rate, b2=options.b2, eps=options.eps)), ("rest",)
            )
        variants = {
            "onebit": {},
            "onebit-auto": {"window": options.window},
            "no-mask": {"v_floor": None},
            "no-feedback": {"error_feedback": False},
        }
        return Plan(make(**variants[method]), ("warmup", "compressed"))

    def step(self, method: str, stage: str) -> parallel.TrainStep:
        if (method, stage) not in self._steps:
            self._steps[method, stage] = parallel.make_train_step(
                self.loss, self.plan(method).optimizer, self.mesh, self.params, self.frozen,
                worker_axis=AXIS, stage=stage,
            )  # fmt: skip
        return self._steps[method, stage]

    def phases(self, method: str) -> list[training.Phase]:
        options, stages = self.options, self.plan(method).stages
        if len(stages) == 1:
            return [training.Phase(self.step(method, stages[0]), options.steps)]
        warm, compressed = (self.step(method, stage) for stage in stages)
        if method == "onebit-auto":
            until = lambda state: _stable(state, options.stable)
            return [
                training.Phase(warm, options.steps, until),
                training.Phase(compressed, options.steps),
            ]
        rest = options.steps - options.warmup
        return [training.Phase(warm, options.warmup), training.Phase(compressed, rest)]

    def stream(self, seed: int) -> Any:
        options = self.options
        workers = self.mesh.shape[AXIS]
        more = {} if self.name == "digits" else {"length": options.length}
        name = "digits" if self.name == "digits" else "python_source"
        return iter(
            data.stream(
                name,
                batch_size=options.batch * workers,
                seed=seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                **more,
            )
        )

    def fit(self, unit: str, method: str, seed: int) -> Values:
        """Training loss along the steps, and loss (and accuracy) on held-out data."""
        params, frozen, _ = self._model(seed)
        phases = self.phases(method)
        state = phases[0].train.init(params, frozen)
        total = self.options.steps
        if method == "onebit-auto":
            state, history = self._auto(unit, phases, state, seed)
        else:
            state, history = self.run.fit(
                unit, phases, state, self.stream(seed), chunk=self.options.chunk
            )
        result = {"loss": history["loss"][:total], **self._evaluate(state)}
        norms = optax.tree.get(state.opt_state, "v_norms")
        if norms is not None:
            result["v_norms"] = np.asarray(norms)
        result["warmup"] = int(state.phase_start) if int(state.phase) else total
        return result

    def _auto(self, unit: str, phases: list[training.Phase], state: Any, seed: int):
        """The second phase has what the first left of the steps."""
        stream, chunk = self.stream(seed), self.options.chunk
        state, warm = self.run.fit(f"{unit}/warmup", phases[:1], state, stream, chunk=chunk)
        done = int(state.step)
        rest = phases[1]._replace(steps=self.options.steps - done)
        if rest.steps == 0:
            return state, warm
        plain = phases[0]._replace(steps=done, until=None)
        state, history = self.run.fit(f"{unit}/rest", [plain, rest], state, stream, chunk=chunk)
        return state, {"loss": np.concatenate([warm["loss"], history["loss"]])}

    def _evaluate(self, state: parallel.TrainState) -> Values:
        replicate = parallel.named(self.mesh, jax.sharding.PartitionSpec())
        params, frozen = jax.device_put((state.params, state.frozen), replicate)
        if self.name == "digits":
            logits = {}
            for split in ("train", "test"):
                arrays = data.arrays("digits", split)
                logits[split] = (
                    self.apply(params, frozen, _flat(arrays["image"])),
                    arrays["label"],
                )
            losses = optax.softmax_cross_entropy_with_integer_labels(*logits["train"])
            right = jnp.argmax(logits["test"][0], axis=-1) == logits["test"][1]
            return {"final": float(losses.mean()), "accuracy": float(right.mean())}
        rows = data.arrays("python_source", "test")["tokens"][: self.options.test_rows]
        rows = rows[:, : self.options.length]
        loss = jax.jit(lambda p, f: nn.next_token_loss(self.apply(p, f, rows), rows))
        return {"final": float(loss(params, frozen))}

    def wire(self) -> Values:
        """Bytes that a worker sends in a step of each stage, from the compiled programs."""
        sent = {}
        rows = self.options.batch * self.mesh.shape[AXIS]
        whole = lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        batch = jax.tree.map(whole, next(self.stream(0)))
        for stage in ("warmup", "compressed"):
            step = self.step("onebit", stage)
            key = jax.eval_shape(lambda: jax.random.key(0))
            state = jax.eval_shape(step.init, self.params, self.frozen, key)
            report = parallel.wire_bytes(step.step.lower(state, batch).compile(), self.mesh)
            sent[stage] = report.total(AXIS)
        sent["parameters"] = sum(x.size for x in jax.tree.leaves(self.params))
        return sent


def _speed(options: ConfigDict) -> Values:
    """Median seconds a step of one worker's optimiser, with donated arrays, in turns."""
    draw = np.random.default_rng(0)
    grads = [draw.normal(size=options.size).astype(np.float32) for _ in range(options.tensors)]
    plans = {
        "adam": (optax.adam(1e-3), {}),
        "1-bit adam": (optim.onebit_adam(1e-3), {"stage": "compressed"}),
        "1-bit adam, no mask": (optim.onebit_adam(1e-3, v_floor=None), {"stage": "compressed"}),
    }
    steps, states = {}, {}
    for name, (plain, extra) in plans.items():
        tx = optax.with_extra_args_support(plain)

        def step(params, state, grads, tx=tx, extra=extra):
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.asarray, grads)
        state = tx.init(params)
        if extra:
            _, state = jax.jit(functools.partial(tx.update, stage="warmup"))(params, state)
        steps[name] = jax.jit(step, donate_argnums=(0, 1))
        states[name] = params, state
    grads = jax.tree.map(jnp.asarray, grads)

    def advance(name: str) -> Any:
        states[name] = steps[name](*states[name], grads)
        return states[name]

    calls = [functools.partial(advance, name) for name in plans]
    seconds = in_turns(calls, options.steps * options.repeats, warm=options.steps)
    medians = np.median(seconds.reshape(len(plans), options.repeats, options.steps), axis=2)
    return dict(zip(plans, medians, strict=True))


# Real processes over real TCP


def network_trainings(options: ConfigDict) -> dict[str, slow_network.Training]:
    """What `slow_network.measured` times: Adam by float32 and bfloat16 means, and 1-bit Adam."""
    mesh = parallel.make_mesh({AXIS: options.hosts})
    network = nn.Transformer(
        256, layers=options.layers, embed=options.embed, heads=options.heads, rngs=nnx.Rngs(0)
    )
    graphdef, params, frozen = nnx.split(network, nnx.Param, ...)

    def loss(params: Any, frozen: Any, batch: Any, key: Any):
        logits = nnx.merge(graphdef, params, frozen)(batch["tokens"])
        return nn.next_token_loss(logits, batch["tokens"]), {}

    def step(stage: str, dtype: Any = jnp.float32) -> parallel.TrainStep:
        optimizer = optim.onebit_adam(
            options.learning_rate,
            b2=options.b2,
            axis_name=AXIS,
            v_floor=options.v_floor,
            warmup_dtype=dtype,
        )
        return parallel.make_train_step(
            loss, optimizer, mesh, params, frozen, worker_axis=AXIS, stage=stage
        )

    def batches():
        rows = options.batch * options.hosts
        return iter(data.stream("python_source", batch_size=rows, seed=0, length=options.length))

    warm = round(options.warmup * options.steps)
    half = step("warmup", jnp.bfloat16)
    plans = {
        "adam": [("float32", step("warmup"), options.steps)],
        "adam, bfloat16": [("bfloat16", half, options.steps)],
        "1-bit adam": [
            ("bfloat16", half, warm),
            ("compressed", step("compressed"), options.steps - warm),
        ],
    }
    return {
        name: slow_network.Training(phases, params, frozen, batches)
        for name, phases in plans.items()
    }


def _network_claims(links: dict[float, slow_network.Measured]) -> list[Claim]:
    claims = []
    for megabits, found in links.items():
        link = f"{megabits:g} Mbit/s"
        claims += [
            slow_network.step_claim(
                f"{link}: compressed steps are 5 times faster than float32",
                found, "seconds", "float32", "compressed", at_least=5,
            ),
            slow_network.step_claim(
                f"{link}: they put 28 times fewer bytes on the wire",
                found, "bytes", "float32", "compressed", at_least=28,
            ),
            slow_network.training_claim(
                f"{link}: the training is 3 times faster end to end",
                found, "adam", "1-bit adam", at_least=3,
            ),
        ]  # fmt: skip
    return claims


def _flat(images: Any) -> jax.Array:
    return jnp.reshape(images, (len(images), -1)).astype(jnp.float32) / 16


def _stable(state: parallel.TrainState, bound: float) -> bool:
    return bound <= optim.second_moment_stability(state.opt_state) <= 1 / bound


# The report


def _rows(found, wire, speed: Values) -> list[Row]:
    rows = []
    for name, results in found.items():
        for method, runs in results.items():
            title = "Final loss (nats) and accuracy"
            rows.append(
                Row(method, f"{name}, loss", title, capped([r["final"] for r in runs], DIVERGED))
            )
            if "accuracy" in runs[0]:
                rows.append(Row(method, f"{name}, accuracy", title, [r["accuracy"] for r in runs]))
            rows.append(
                Row(method, f"{name}, warm-up steps", title, [float(r["warmup"]) for r in runs])
            )
        title = "Bytes a worker sends in a step"
        stages = ("warmup", "compressed")
        rows += [Row(f"{name}, {s}", "bytes", title, [float(wire[name][s])]) for s in stages]
    title = "One worker's optimiser, milliseconds a step"
    rows += [Row(name, "time", title, list(1e3 * seconds)) for name, seconds in speed.items()]
    return rows


def _claims(config: ConfigDict, found, wire, speed: Values) -> list[Claim]:
    claims = Claims(speed)
    for name, results in found.items():
        margin, of_task = config[name].margin, Claims(results)
        difference = functools.partial(_difference, results)
        for method in ("onebit", "onebit-auto"):
            sentence = f"{name}: {method}'s final loss is Adam's, within {margin:g} nats"
            pair = (method, "adam")
            of_task.add(sentence, pair, functools.partial(difference, *pair), within=margin)
        for method in ("no-feedback", "compressed-gradients", "no-mask"):
            sentence = f"{name}: {method} ends at least {margin:g} nats above 1-bit Adam"
            pair = (method, "onebit")
            of_task.add(sentence, pair, functools.partial(difference, *pair), at_least=margin)
        ratio = wire[name]["warmup"] / wire[name]["compressed"]
        sentence = f"{name}: a compressed step sends 28 times less than a float32 ring all-reduce"
        of_task.add(sentence, (), lambda ratio=ratio: [ratio], exact=True, at_least=28)
        total = _total_ratio(wire[name], 0.15)
        sentence = f"{name}: with 15 % warm-up in bfloat16, 4.8 times less in all than bfloat16"
        of_task.add(sentence, (), lambda total=total: [total], exact=True, at_least=4.8)
        claims += of_task
    for method in ("1-bit adam", "1-bit adam, no mask"):
        sentence = f"one worker: a compressed step of {method} takes at most 1.3 times Adam's"
        times = lambda method=method: speed[method] / speed["adam"]
        claims.add(sentence, (method, "adam"), times, at_most=1.3)
    return claims


def _difference(results, a: str, b: str) -> np.ndarray:
    """Of final losses; NaN where the second diverged: nothing to compare with."""
    first, second = (np.array([r["final"] for r in results[m]]) for m in (a, b))
    return np.where(np.isfinite(second), capped(first, DIVERGED) - second, np.nan)


def _total_ratio(wire: Values, share: float) -> float:
    """Bytes of a bfloat16 all-reduce over those with a share of such steps and compressed ones."""
    half = wire["warmup"] / 2
    return half / (share * half + (1 - share) * wire["compressed"])


def _notes(config: ConfigDict, wire) -> list[str]:
    notes = [
        f"{n}: {w['parameters']:,} parameters, {config.workers} workers" for n, w in wire.items()
    ]
    notes.append(
        "Small tensors pay whole bytes and a scale for each chunk: the ratio grows with the model."
    )
    return notes


# Figures


@styled
def _draw(run: Run, config: ConfigDict, found, wire) -> None:
    colours = {"adam": "black", **dict(zip(METHODS[1:], COLOURS, strict=False))}
    for name, results in found.items():
        if not results:
            continue
        figure, axes = panels(1, 3, size=(3.4, 3.0))
        arrays: dict[str, Any] = {}
        for method, runs in results.items():
            curve = _smooth(np.stack([r["loss"] for r in runs]).mean(axis=0), config[name].smooth)
            steps = np.arange(len(curve))
            warm = min(float(np.mean([r["warmup"] for r in runs])), len(curve))
            late = np.maximum(steps - warm, 0)
            if method == "adam":
                sent = steps * wire[name]["warmup"]
            elif method == "compressed-gradients":
                sent = None
            else:
                sent = (
                    np.minimum(steps, warm) * wire[name]["warmup"] + late * wire[name]["compressed"]
                )
            look = {"color": colours[method], "linestyle": "--" if method == "adam" else "-"}
            axes[0, 0].plot(steps, curve, label=method, **look)
            if sent is not None:
                axes[0, 1].plot(sent / 1e6, curve, **look)
            arrays[method] = np.stack([r["loss"] for r in runs])
        if "adam" in results:
            norms = results["adam"][0]["v_norms"][1:]
            lag = config[name].window
            ratio = norms[:-lag] / np.maximum(norms[lag:], 1e-30)
            axes[0, 2].plot(np.arange(lag, len(norms)), ratio, color="black")
            for bound in (config[name].stable, 1 / config[name].stable):
                axes[0, 2].axhline(bound, linestyle=":", color="#999999")
            arrays["v_norms"] = norms
        # Whatever diverges leaves the panel.
        top = 2 * max(np.max(r["loss"]) for r in results["adam"]) if "adam" in results else None
        axes[0, 0].set(xlabel="step", ylabel="training loss (nats)", yscale="log", title=name)
        axes[0, 0].set_ylim(top=top)
        axes[0, 1].set(
            xlabel="megabytes sent by a worker", xscale="log", yscale="log", title="by bytes"
        )
        axes[0, 1].set_ylim(axes[0, 0].get_ylim())
        axes[0, 2].set(
            xlabel="step", title=f"second moment, {config[name].window} steps before / now"
        )
        axes[0, 2].set(ylim=(0, 2))
        legend(figure, axes[0, 0], columns=6)
        run.figure(name, figure, **arrays)


def _smooth(curve: np.ndarray, width: int) -> np.ndarray:
    return np.convolve(capped(curve, DIVERGED), np.ones(width) / width, mode="valid")


if __name__ == "__main__":
    start(main, memory_keys=("text.batch", "text.length"))
