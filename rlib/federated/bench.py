"""How fast a round is: `python -m rlib.federated.bench`.

In one run and in turns, so that ratios can be trusted on a busy machine: the round as one compiled
call, with clients one after another or side by side, beside what one would write first, a Python
loop over clients of compiled local training (a scan over its steps), and a loop over clients and
steps. The convolutional network is timed with stock convolutions and with `rlib.nn`'s. Then what a
round costs, and what memory it needs, by the number of clients that keep state.

Arguments name the parts (`PARTS`), all without; `--clients` and `--repeats` make it shorter.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

from kernels_pallas.timing import in_turns
from rlib import nn
from rlib.federated.averaging import fedavg
from rlib.federated.clients import ClientData, LocalWork, client_data
from rlib.federated.engine import make_rounds, make_train_step
from rlib.federated.fedspeed import fedspeed
from rlib.parallel import make_mesh, place

PARTS = ("forms", "sizes", "devices")
RATE = 0.05
Tree = Any


class StockConvNet(nnx.Module):
    """`nn.ConvNet` of stock parts: `nnx.Conv`, `nnx.max_pool`."""

    def __init__(self, shape, widths, hidden, outputs, *, rngs: nnx.Rngs):
        height, width, channels = shape
        sizes = [channels, *widths]
        self.convolutions = nnx.List(nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairwise(sizes))
        scale = 2 ** len(widths)
        sizes = [height // scale * (width // scale) * widths[-1], *hidden, outputs]
        self.layers = nnx.List(nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(sizes))

    def __call__(self, x):
        for convolution in self.convolutions:
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class FlatPerceptron(nn.Perceptron):
    """`nn.Perceptron` of pictures."""

    def __call__(self, x):
        return super().__call__(x.reshape(len(x), -1))


def network(name: str) -> nnx.Module:
    """By name: "cnn", "stock cnn", "mlp", "tiny mlp"."""
    rngs = nnx.Rngs(0)
    match name:
        case "cnn":
            return nn.ConvNet((28, 28, 1), (16, 32), (), 10, rngs=rngs)
        case "stock cnn":
            return StockConvNet((28, 28, 1), (16, 32), (), 10, rngs=rngs)
        case "mlp":
            return FlatPerceptron((784, 128, 10), rngs=rngs)
    return FlatPerceptron((64, 32, 10), rngs=rngs)


def problem(name: str) -> tuple[Tree, Callable[..., Any], tuple[int, ...]]:
    """Parameters, loss of each example, shape of a picture."""
    graphdef, params = nnx.split(network(name))

    def loss(params: Tree, batch: Tree, key: Any):
        logits = nnx.merge(graphdef, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return params, loss, (8, 8, 1) if name == "tiny mlp" else (28, 28, 1)


def clients_of(count: int, each: int, shape: tuple[int, ...], most: int = 20_000) -> ClientData:
    """Noise; beyond `most` examples clients share them, so that memory is what they keep."""
    draw = np.random.default_rng(0)
    total = min(count * each, most)
    examples = {
        "x": draw.random((total, *shape), np.float32),
        "y": draw.integers(0, 10, total, np.int32),
    }
    parts = [np.arange(i * each, (i + 1) * each) % total for i in range(count)]
    return jax.tree.map(jnp.asarray, client_data(examples, parts))


def one_call(name: str, held: ClientData, work: LocalWork, sampled: int, **options: Any):
    """A round of FedAvg as one compiled call that goes on from its own state."""
    params, loss, _ = problem(name)
    made = make_rounds(
        fedavg(optax.sgd(RATE)), loss, work, len(held.sizes), sampled, weights="equal", **options
    )
    train = make_train_step(made, params)
    state = [train.init(params)]

    def run():
        state[0], metrics = train.step(state[0], held)
        return metrics

    return run


def by_hand(name: str, held: ClientData, work: LocalWork, sampled: int, scanned: bool):
    """A Python loop over clients of compiled training: a scan over steps, or step by step."""
    params, loss, _ = problem(name)

    def step(params: Tree, batch: Tree) -> tuple[Tree, None]:
        grads = jax.grad(lambda p: jnp.mean(loss(p, batch, None)))(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), None

    @jax.jit
    def local(params: Tree, batches: Tree) -> Tree:
        return lax.scan(step, params, batches)[0]

    one = jax.jit(lambda params, batch: step(params, batch)[0])
    mean = jax.jit(lambda models: jax.tree.map(lambda *x: sum(x) / len(x), *models))
    x, y = (np.asarray(held.examples[key]) for key in ("x", "y"))
    draw, state = np.random.default_rng(0), [params]

    def run():
        models = []
        for client in draw.choice(len(held.sizes), sampled, replace=False):
            own = np.asarray(held.rows[client])
            rows = own[draw.integers(0, len(own), (work.steps, work.batch_size))]
            batches = {"x": x[rows], "y": y[rows]}
            if scanned:
                models.append(local(state[0], batches))
                continue
            model = state[0]
            for k in range(work.steps or 0):
                model = one(model, {name: batch[k] for name, batch in batches.items()})
            models.append(model)
        state[0] = mean(models)
        return state[0]

    return run


def forms(console: Console, repeats: int) -> None:
    """A round of ten clients, 10 steps of 32, in all forms."""
    work = LocalWork(batch_size=32, steps=10)
    for names in (("cnn", "stock cnn"), ("mlp",), ("tiny mlp",)):
        held = clients_of(20, 64, problem(names[0])[2])
        runs: dict[str, Callable[[], Any]] = {}
        for name in names:
            runs |= {
                f"{name}: loop over clients": by_hand(name, held, work, 10, True),
                f"{name}: loop over clients and steps": by_hand(name, held, work, 10, False),
            }
        name = names[0]
        runs |= {
            f"{name}: one call, as chosen": one_call(name, held, work, 10),
            f"{name}: one call, one by one": one_call(name, held, work, 10, at_once=1),
            f"{name}: one call, side by side": one_call(name, held, work, 10, at_once=10),
        }
        seconds = dict(zip(runs, in_turns(runs.values(), repeats), strict=True))
        chosen = seconds[f"{name}: one call, as chosen"]
        table = _table(
            "a round of 10 clients, 10 steps of 32", "form", "ms", "its time over the chosen one's"
        )
        for form, values in seconds.items():
            ratios = np.divide(values, chosen)
            table.add_row(
                form,
                f"{1e3 * np.median(values):.2f}",
                f"{np.median(ratios):.2f} ({np.quantile(ratios, 0.1):.2f} to "
                f"{np.quantile(ratios, 0.9):.2f})",
            )
        console.print(table)


def sizes(console: Console, repeats: int, most: int) -> None:
    """Rounds of FedSpeed, whose clients keep a dual variable, by clients and by those sampled."""
    work = LocalWork(batch_size=32, steps=10)
    params, loss, shape = problem("mlp")
    count = sum(x.size for x in jax.tree.leaves(params))
    table = _table(
        f"FedSpeed, {count} parameters; each client keeps as many",
        "clients", "sampled", "ms a round", "rounds/s", "kept (GB)", "temporary (MB)",
    )  # fmt: skip
    grid = [(n, s) for n in (10, 100, 1000, 10_000) for s in (10, 100) if s <= n <= most]
    for n, s in grid:
        held = clients_of(n, 64, shape)
        made = make_rounds(fedspeed(optax.sgd(RATE), ascent=0.0), loss, work, n, s)
        train = make_train_step(made, params)
        state = [train.init(params)]
        step: Any = train.step
        memory = step.lower(state[0], held).compile().memory_analysis()

        def run(state=state, step=step, held=held):
            state[0], metrics = step(state[0], held)
            return metrics

        seconds = np.median(in_turns([run], repeats))
        table.add_row(
            str(n), str(s), f"{1e3 * seconds:.1f}", f"{1 / seconds:.1f}",
            f"{4e-9 * count * n:.2f}", f"{1e-6 * memory.temp_size_in_bytes:.1f}",
        )  # fmt: skip
    console.print(table)


def devices(console: Console, repeats: int) -> None:
    """A round over one, two, ... devices of this process."""
    work = LocalWork(batch_size=32, steps=10)
    held = clients_of(20, 64, (28, 28, 1))
    runs = {}
    for name in ("cnn", "mlp"):
        count = 1
        while count <= len(jax.devices()):
            mesh = make_mesh({"data": count}, jax.devices()[:count])
            runs[f"{name}, {count} devices"] = one_call(
                name, place(mesh, held), work, 10, mesh=mesh
            )
            count *= 2
    table = _table("a round of 10 clients, 10 steps of 32", "devices", "ms")
    for name, values in zip(runs, in_turns(runs.values(), repeats), strict=True):
        table.add_row(name, f"{1e3 * np.median(values):.2f}")
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="part", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clients", type=int, default=10_000, help="the most that keep state")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console()
    device = jax.devices()[0]
    console.print(f"{len(jax.devices())} x {device.device_kind}, jax {jax.__version__}")
    for name, run in {
        "forms": partial(forms, console, given.repeats),
        "sizes": partial(sizes, console, given.repeats, given.clients),
        "devices": partial(devices, console, given.repeats),
    }.items():
        if name in given.parts:
            run()


if __name__ == "__main__":
    main()
