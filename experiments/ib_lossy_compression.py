"""Information bottleneck analysis by lossy compression (arXiv 2305.08013).

Mutual information of images and layers is estimated on short codes of them, by an autoencoder or
PCA, with nearest neighbours. Tested: eight estimators on Gaussians of known information, by
dimension and number of samples; pictures of 0 to 10 nats, where one coordinate less, raw pixels
and learnt critics on whole pictures are the baselines; and a classifier with noise in every layer,
whose I(X; L) and I(L; Y) are followed over training, beside shuffled pairs, which hold nothing.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.scipy.special import ndtr
from ml_collections import ConfigDict

from rlib import data, information, optim, training
from rlib.experiment import (
    COLOURS,
    TUNING_SEED,
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

#: Code of the pictures, estimator, whether on ranks.
MADE = (
    ("parameters", "wkl", False),
    ("parameters", "wkl", True),
    ("parameters", "ksg", False),
    ("pca", "wkl", False),
    ("pca", "kl", False),
    ("pca", "wkl", True),
    ("pca", "ksg", False),
    ("autoencoder", "wkl", False),
    ("autoencoder", "kl", False),
    ("autoencoder", "wkl", True),
    ("autoencoder", "ksg", False),
    ("pca-1", "wkl", False),
    ("pixels", "kl", False),
)
#: Kind -> how to draw it, number of parameters.
RENDERERS = {
    "bumps": (information.render_bumps, 2),
    "rectangles": (information.render_rectangles, 4),
}
PUBLISHED_CODE, BEST_CODE = "pca, wkl", "autoencoder, wkl of ranks"
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Measure the estimators, the codes and the paths, and judge the claims."""
    run = run or Run()
    seeds = len(run.seeds(config))
    bounds = dict.fromkeys([*config.gaussians.bounds, *config.images.bounds])
    methods = run.select([*information.ESTIMATORS, *bounds])
    trained = {name: config[name] for name in ("digits", "mnist") if config[name].epochs > 0}
    run.plan(_costs(run, config, methods, trained))
    table = _gaussians(run, config, methods, seeds)
    pictures = {name: _pictures(run, config, name, methods, seeds) for name in _kinds(config)}
    paths = {
        f"{name}, noise {noise:g}": _paths(run, name, options, noise, methods)
        for name, options in trained.items()
        for noise in options.noise
    }
    _draw_gaussians(run, config, table)
    _draw_pictures(run, config, pictures)
    _draw_paths(run, config, paths)
    rows = [
        *_gaussian_rows(config, table),
        *_picture_rows(config, pictures),
        *_path_rows(config, paths),
    ]
    claims = [
        *_gaussian_claims(config, table),
        *_picture_claims(config, pictures),
        *_path_claims(config, paths),
    ]
    return Report(rows, claims, _notes(config, table, pictures, paths))


@functools.partial(jax.jit, static_argnames=("estimator", "ranks"))
def _each(x: jax.Array, y: jax.Array, estimator: str, ranks: bool = False) -> jax.Array:
    """Estimates of a stack of samples."""

    def one(pair):
        if ranks:
            pair = [information.gaussianise(part) for part in pair]
        return information.mutual_information(*pair, estimator=estimator)

    return lax.map(one, (x, y))


@functools.partial(jax.jit, static_argnames=("bound", "steps", "batch", "looks"))
def _learnt(keys: jax.Array, x: jax.Array, y: jax.Array, rate: float, **options: Any) -> jax.Array:
    """Estimates along the training of critics on a stack of samples, (stack, looks)."""
    fit = functools.partial(information.fit_critic, learning_rate=rate, **options)
    return jax.vmap(fit)(keys, x, y)


def _critics(
    run: Run, unit: str, bound: str, config: ConfigDict, draw: Callable, seeds: int, truth
):
    """Tune the rate and the number of steps on a draw of its own; {estimates (seeds, mi), ...}."""
    options = config.critics
    sizes = {"steps": options.steps, "batch": options.batch, "looks": options.looks}

    def fit(seed: int, rate: float) -> np.ndarray:
        keys = jax.random.split(named_key(seed, unit), len(truth))
        return np.asarray(_learnt(keys, *draw(seed), rate, bound=bound, **sizes))

    def errors() -> np.ndarray:
        tuned = np.stack([fit(TUNING_SEED, rate) for rate in options.learning_rates])
        return np.abs(tuned - np.asarray(truth)[:, None]).mean(axis=1).ravel()  # of rates and looks

    pairs = list(itertools.product(options.learning_rates, range(options.looks)))
    rate, look = run.choose(f"{unit}/tuned", pairs, errors)
    estimates = _by_seed(run, unit, lambda seed: fit(seed, rate)[:, look], seeds)
    steps = options.steps // options.looks * (look + 1)
    return {"estimates": estimates, "rate": rate, "steps": steps}


def _by_seed(run: Run, unit: str, estimate: Callable[[int], Any], seeds: int) -> np.ndarray:
    """Estimates (seeds, mi); a run with more seeds continues one with fewer."""
    one = lambda seed: run.cached(
        f"{unit}/seed{seed}", lambda: {"estimates": np.asarray(estimate(seed))}
    )
    return np.stack([one(seed)["estimates"] for seed in range(seeds)])


# Gaussians


def _cells(config: ConfigDict) -> list[tuple[int, int]]:
    return list(config.gaussians.cells) if config.gaussians.mi else []


def _of_gaussians(config: ConfigDict, methods: list[str]) -> list[str]:
    return [m for m in methods if m in (*information.ESTIMATORS, *config.gaussians.bounds)]


def _cell_name(d: int, n: int) -> str:
    return f"{d}+{d}, N={n}"


@functools.partial(jax.jit, static_argnames=("d", "n", "turned"))
def _normal_pairs(key: jax.Array, truth: jax.Array, d: int, n: int, turned: bool):
    """Stacks of X and Y, (mi, n, d) each."""
    pair = functools.partial(information.gaussian_pair, dx=d, dy=d, n=n, rotate=turned)
    return jax.vmap(pair)(jax.random.split(key, len(truth)), truth)


def _gaussians(run: Run, config: ConfigDict, methods: list[str], seeds: int):
    """Method -> cell -> {estimates (seeds, mi), and how a critic was tuned}."""
    truth = jnp.asarray(config.gaussians.mi, jnp.float32)
    methods = _of_gaussians(config, methods)
    table: dict[str, dict[str, Values]] = {method: {} for method in methods}
    for d, n in _cells(config):
        cell = _cell_name(d, n)

        def draw(seed, d=d, n=n, cell=cell):
            return _normal_pairs(named_key(seed, "gaussians", cell), truth, d, n, True)

        for method in methods:
            unit = f"gaussians/{cell}/{method}"
            if method in information.BOUNDS:
                found = _critics(run, unit, method, config, draw, seeds, config.gaussians.mi)
            else:
                estimate = lambda seed, draw=draw, method=method: _each(*draw(seed), method)
                found = {"estimates": _by_seed(run, unit, estimate, seeds)}
            table[method][cell] = found
    return table


# Pictures


def _kinds(config: ConfigDict) -> dict[str, tuple[str, bool]]:
    """Name -> (kind, whether parameters are turned)."""
    options, kinds = config.images, {}
    for name in options.kinds if options.mi else ():
        kind, _, turned = name.partition(", ")
        if kind not in RENDERERS or turned not in ("", "turned"):
            raise UsageError(f"images.kinds: {name!r} is none of {', '.join(RENDERERS)}, turned")
        kinds[name] = (kind, turned != "")
    return kinds


def _method_name(code: str, estimator: str, ranks: bool) -> str:
    return f"{code}, {estimator}{' of ranks' if ranks else ''}"


def _render(kind: str, parameters: jax.Array, size: int) -> jax.Array:
    *stack, n, d = parameters.shape
    return RENDERERS[kind][0](parameters.reshape(-1, d), size).reshape(*stack, n, size, size, 1)


def _drawn(config: ConfigDict, kind: str, turned: bool, seed: int):
    """Parameters and pictures of X and Y: stacks over mutual information."""
    options, d = config.images, RENDERERS[kind][1]
    key = named_key(seed, "images", kind, str(turned))
    truth = jnp.asarray(options.mi, jnp.float32)
    pair = _normal_pairs(key, truth, d, options.samples, turned)
    parameters = [ndtr(part) for part in pair]
    return parameters, [_render(kind, part, options.size) for part in parameters]


@functools.partial(jax.jit, static_argnames=("d", "options"))
def _codes(key: jax.Array, others: jax.Array, x: jax.Array, y: jax.Array, d: int, options: Any):
    """Codes of stacks of pictures, by compressors fitted to others."""
    options = dict(options)
    pixels, noise = options.pop("pixels"), options.pop("pixel_noise")
    first, second, third = jax.random.split(key, 3)
    encode, error = information.fit_autoencoder(first, others, d, **options)
    project = information.principal_axes(others.reshape(len(others), -1), d)
    chosen = jax.random.choice(second, x[0, 0].size, (pixels,), replace=False)

    def coded(side: int, stack: jax.Array):
        flat = stack.reshape(*stack.shape[:2], -1)
        some = flat[:, :, chosen]
        keys = jax.random.fold_in(third, side)
        return {
            "pca": lax.map(project, flat),
            "autoencoder": lax.map(encode, stack),
            "pca-1": lax.map(lambda f: project(f)[:, :1], flat),
            "pixels": information.add_noise(keys, some, noise, relative=False),
        }

    codes = [coded(side, stack) for side, stack in enumerate((x, y))]
    return {name: (codes[0][name], codes[1][name]) for name in codes[0]}, error


def _image_unit(name: str, made: list[tuple[str, str, bool]]) -> str:
    return f"images/{name}/{'+'.join(dict.fromkeys(m[1] for m in made))}"


def _pictures(run: Run, config: ConfigDict, name: str, methods: list[str], seeds: int):
    """Method -> {estimates (seeds, mi)}; the autoencoder's error."""
    options, (kind, turned) = config.images, _kinds(config)[name]
    d = RENDERERS[kind][1]
    keys = ("channels", "widths", "steps", "batch", "learning_rate", "pixels", "pixel_noise")
    chosen = tuple((key, options[key]) for key in keys)
    made = [m for m in MADE if m[1] in methods]

    def measure(seed: int) -> Values:
        key = named_key(seed, "compressors", kind)
        parameters, pictures = _drawn(config, kind, turned, seed)
        uniform = jax.random.uniform(jax.random.fold_in(key, 1), (options.compressor_samples, d))
        others = _render(kind, uniform, options.size)
        codes, error = _codes(key, others, *pictures, d, chosen)
        codes["parameters"] = parameters
        found = {_method_name(*m): np.asarray(_each(*codes[m[0]], *m[1:])) for m in made}
        return {**found, "autoencoder's error": float(error)}

    def draw(seed: int):
        flat = [p.reshape(*p.shape[:2], -1) for p in _drawn(config, kind, turned, seed)[1]]
        return flat

    each = [
        run.cached(f"{_image_unit(name, made)}/seed{s}", functools.partial(measure, s))
        for s in range(seeds if made else 0)
    ]
    found = {_method_name(*m): np.stack([e[_method_name(*m)] for e in each]) for m in made}
    tuned = {}
    for bound in (b for b in options.bounds if b in methods):
        unit = f"images/{name}/{bound}"
        tuned[bound] = _critics(run, unit, bound, config, draw, seeds, options.mi)
        found[f"whole pictures, {bound}"] = tuned[bound]["estimates"]
    return {"estimates": found, "tuned": tuned, "error": [e["autoencoder's error"] for e in each]}


# Paths


@functools.cache
def _images(dataset: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Images in [0, 1] and labels: those of the training part first; and how many these are."""
    parts = [data.images(dataset, split) for split in ("train", "test")]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, len(parts[0][1])


def _classes(options: ConfigDict) -> int:
    return int(_images(options.dataset)[1].max()) + 1


def _layer_names(options: ConfigDict) -> list[str]:
    widths = [f"conv {c}" for c in options.channels] + [str(w) for w in options.widths]
    return [*widths, "output"]


def _follower(options: ConfigDict, noise: float, estimators: list[str]) -> Callable[[int], Values]:
    """seed -> information of a classifier's layers, its loss and accuracy along the epochs."""
    *arrays, learnt = _images(options.dataset)
    arrays = [jnp.asarray(array) for array in arrays]
    classes = _classes(options)
    make = functools.partial(
        information.NoisyClassifier,
        arrays[0].shape[1:],
        classes,
        channels=options.channels,
        widths=options.widths,
        sigma=noise,
        dropout=options.dropout,
    )
    graphdef = nnx.split(make(rngs=nnx.Rngs(0)))[0]
    if options.batch > learnt:
        raise UsageError(f"a batch of {options.batch}, and {options.dataset} has {learnt} to learn")
    # The last look is at the end; what is trained after it is not looked at.
    looks = options.epochs // options.every + 1
    steps = looks * options.every * (learnt // options.batch)
    shown = slice({"all": 0, "test": learnt}[options.evaluated], None)

    def loss(images, labels, params, key, _):
        rows, key = jax.random.split(key)
        rows = jax.random.randint(rows, (options.batch,), 0, learnt)
        layers = nnx.merge(graphdef, params)(images[rows], key, training=True)
        return -jnp.mean(jnp.take_along_axis(layers[-1], labels[rows, None], axis=1)), None

    def look(images, labels, code, keys, params):
        layers = nnx.merge(graphdef, params)(images, keys[0])
        likelihood = jnp.take_along_axis(layers[-1], labels[:, None], axis=1)
        right = jnp.argmax(layers[-1], axis=1) == labels
        seen = {"loss": -jnp.mean(likelihood[:learnt]), "accuracy": jnp.mean(right[learnt:])}
        layers, labels = [layer[shown] for layer in layers], labels[shown]
        if options.layer_code == "autoencoder":
            layers = [short(keys[2], layer) for layer in layers]
        order = jax.random.permutation(keys[1], len(labels))
        pairs = (jnp.stack([code, code[order]]), jnp.stack([labels, labels[order]]))
        for name in estimators:
            path = lambda pair, name=name: information.information_path(
                keys[2], pair[0], layers, pair[1], classes, dim=options.dim, estimator=name
            )
            points = jnp.stack(lax.map(path, pairs), axis=1)
            seen |= {name: points[0], f"{name}, shuffled": points[1]}
        return seen

    def short(key, layer):
        """A layer's code by an autoencoder of its own, learnt anew at each look."""
        rows = layer.reshape(len(layer), 1, -1, 1)
        encode, _ = information.fit_autoencoder(
            key,
            rows,
            min(options.dim, rows.shape[2]),
            widths=options.layer_code_widths,
            steps=options.layer_code_steps,
        )
        return encode(rows)

    def coded(key, images):
        if options.code == "pca":
            flat = images[shown].reshape(-1, images[0].size)
            return information.principal_axes(flat, options.dim)(flat)
        encode, _ = information.fit_autoencoder(
            key,
            images[:learnt],
            options.dim,
            channels=options.code_channels,
            steps=options.code_steps,
            batch=options.code_batch,
            learning_rate=options.code_learning_rate,
        )
        return encode(images[shown])

    @jax.jit
    def follow(params, key, images, labels):
        first, second, *others = jax.random.split(key, 5)
        code = coded(first, images)
        return training.descend(
            functools.partial(loss, images, labels),
            params,
            optim.skip_nonfinite(optax.adam(options.learning_rate)),
            jax.random.split(second, steps),
            looks=looks,
            look=functools.partial(look, images, labels, code, others),
            before=True,
        ).seen

    def one(seed: int) -> Values:
        key = functools.partial(named_key, seed, options.dataset, f"{noise:g}")
        params = nnx.split(make(rngs=nnx.Rngs(key("weights"))))[1]
        seen = follow(params, key("path"), *arrays)
        return {name: np.asarray(values) for name, values in seen.items()}

    return one


def _of_path(options: ConfigDict, methods: list[str]) -> list[str]:
    return [m for m in methods if m in options.estimators]


def _path_unit(name: str, noise: float, estimators: list[str]) -> str:
    return f"path/{name}/{noise:g}/{'+'.join(estimators) or 'training'}"


def _paths(
    run: Run, name: str, options: ConfigDict, noise: float, methods: list[str]
) -> dict[str, np.ndarray]:
    """Quantity -> (seeds, looks, ...); of an estimator (seeds, looks, 2, layers)."""
    try:
        _images(options.dataset)
    except data.DataUnavailable as error:
        raise UsageError(f"{error}; or leave the part out: --config.{name}.epochs=0") from error
    estimators = _of_path(options, methods)
    follow = _follower(options, noise, estimators)
    unit = _path_unit(name, noise, estimators)
    each = [
        run.cached(f"{unit}/seed{seed}", functools.partial(follow, seed))
        for seed in run.seeds(options)
    ]
    return {key: np.stack([e[key] for e in each]) for key in each[0]}


def _unit_costs(unit: str, cost: float, tuned: bool, seeds: int) -> dict[str, float]:
    parts = [*(["tuned"] if tuned else []), *(f"seed{seed}" for seed in range(seeds))]
    return {f"{unit}/{part}": cost / len(parts) for part in parts}


def _costs(run: Run, config: ConfigDict, methods, trained) -> dict[str, float]:
    """Seconds, about."""
    costs, seeds = {}, len(run.seeds(config))
    options = config.critics
    learn = 1e-3 * options.steps * (len(options.learning_rates) + seeds)
    for d, n in _cells(config):
        for method in _of_gaussians(config, methods):
            scale = {"kde": 30.0, "wkl": 8.0}.get(method, 1.0)
            quick = 1 + 3e-10 * scale * n**2 * seeds * len(config.gaussians.mi)
            slow = method in information.BOUNDS
            unit = f"gaussians/{_cell_name(d, n)}/{method}"
            costs |= _unit_costs(unit, learn if slow else quick, slow, seeds)
    for name in _kinds(config):
        made = _image_unit(name, [m for m in MADE if m[1] in methods])
        costs |= {f"{made}/seed{seed}": 12.0 for seed in range(seeds)}
        bounds = [b for b in config.images.bounds if b in methods]
        for bound in bounds:
            costs |= _unit_costs(f"images/{name}/{bound}", 3 * learn, True, seeds)
    for name, part in trained.items():
        for noise in part.noise:
            each = 0.05 * part.epochs * (40 if part.channels else 1)
            unit = _path_unit(name, noise, _of_path(part, methods))
            costs |= {f"{unit}/seed{seed}": each for seed in run.seeds(part)}
    return costs


# The report


def _clip(values: Iterable[float]) -> list[float]:
    """Infinities count as float32's largest numbers; NaN stays, and leaves a claim inconclusive."""
    largest = float(np.finfo(np.float32).max)
    return np.clip(np.asarray(values, float), -largest, largest).tolist()


def _errors(estimates: np.ndarray, truth: Iterable[float]) -> np.ndarray:
    """Mean over the true values of the absolute error, one per seed."""
    return np.abs(estimates - np.asarray(truth)).mean(axis=1)


def _gaussian_rows(config: ConfigDict, table) -> list[Row]:
    truth = config.gaussians.mi
    rows = []
    for method, cells in table.items():
        for cell, found in cells.items():
            values = found["estimates"]
            title = f"Gaussians: mean absolute error over I = {', '.join(f'{t:g}' for t in truth)}"
            rows.append(Row(method, cell, f"{title} (nats)", _clip(_errors(values, truth))))
            for index in (0, len(truth) - 1):
                title = f"Gaussians: estimate where I = {truth[index]:g} (nats)"
                rows.append(Row(method, cell, title, _clip(values[:, index])))
    return rows


def _line(estimates: np.ndarray, truth: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and offset of estimate against truth, one per seed."""
    truth = np.asarray(truth)
    centred = truth - truth.mean()
    slope = estimates @ centred / (centred @ centred)
    return slope, estimates.mean(axis=1) - slope * truth.mean()


def _rms(estimates: np.ndarray, truth: Iterable[float]) -> np.ndarray:
    return np.sqrt(np.square(estimates - np.asarray(truth)).mean(axis=1))


def _picture_rows(config: ConfigDict, pictures) -> list[Row]:
    truth, rows = config.images.mi, []
    for kind, found in pictures.items():
        for method, estimates in found["estimates"].items():
            slope, offset = _line(estimates, truth)
            for title, values in {
                "slope of estimate against truth": slope,
                "offset (nats)": offset,
                "root mean square error (nats)": _rms(estimates, truth),
                f"estimate where I = {truth[0]:g} (nats)": estimates[:, 0],
            }.items():
                rows.append(Row(method, kind, f"Pictures: {title}", _clip(values)))
    return rows


def _path_rows(config: ConfigDict, paths) -> list[Row]:
    rows = []
    for name, found in paths.items():
        layers = _layer_names(config[name.split(",")[0]])
        for method, values in found.items():
            if values.ndim < 4:
                if method == "accuracy":
                    end = _clip(values[:, -1])
                    rows.append(Row("classifier", name, "Test accuracy at the end", end))
                continue
            for index, layer in enumerate(layers):
                to_input, to_label = values[:, :, 0, index], values[:, :, 1, index]
                rows.append(Row(method, layer, f"{name}: I(X; L) (nats)", _clip(to_input[:, -1])))
                rows.append(Row(method, layer, f"{name}: I(L; Y) (nats)", _clip(to_label[:, -1])))
                if "shuffled" not in method:
                    fall = to_input.max(axis=1) - to_input[:, -1]
                    title = f"{name}: I(X; L), greatest minus last (nats)"
                    rows.append(Row(method, layer, title, _clip(fall)))
    return rows


def _gaussian_claims(config: ConfigDict, table) -> list[Claim]:
    """Those claims of which everything was run."""
    claims = Claims(table)
    truth, cells = config.gaussians.mi, _cells(config)
    if not cells:
        return claims
    high = truth[-1]

    def error(method, cell):
        return _errors(table[method][cell]["estimates"], truth)

    def excess(a, b, cell):
        return lambda: _clip(error(a, cell) - error(b, cell))

    for d, n in cells:
        cell = _cell_name(d, n)
        bounds = [b for b in information.BOUNDS if b in table]
        if bounds:
            best = min(bounds, key=lambda b: float(error(b, cell).mean()))
            sentence = (
                f"Gaussians {cell}: the nearest neighbour's error is at most that of the best "
                f"critic, {best}, tuned (nats)"
            )
            claims.add(sentence, ("kl", best), excess("kl", best, cell), at_most=0)
        if d > 2:
            sentence = f"Gaussians {cell}: weights do not raise the error, WKL against KL (nats)"
            claims.add(sentence, ("kl", "wkl"), excess("wkl", "kl", cell), at_most=0)
    cell = _cell_name(*max(cells, key=lambda cell: (cell[1], -cell[0])))
    for bound in ("infonce", "mine"):
        under = lambda bound=bound: _clip(high - table[bound][cell]["estimates"][:, -1])
        sentence = f"Gaussians {cell}, I = {high:g}: {bound} is too low (nats)"
        claims.add(sentence, (bound,), under, at_least=0.1)
    return claims


def _picture_claims(config: ConfigDict, pictures) -> list[Claim]:
    """Those claims of which everything was run."""
    return [claim for kind, found in pictures.items() for claim in _claims_of(config, kind, found)]


def _claims_of(config: ConfigDict, kind: str, found) -> list[Claim]:
    truth, estimates = config.images.mi, found["estimates"]
    claims = Claims(estimates)
    slope = {method: _line(values, truth)[0] for method, values in estimates.items()}
    offset = {method: _line(values, truth)[1] for method, values in estimates.items()}
    error = {method: _rms(values, truth) for method, values in estimates.items()}

    def add(sentence: str, needs: Iterable[str], values: Callable[[], Any], **bound: float):
        claims.add(f"{kind}: {sentence}", needs, lambda: _clip(values()), **bound)

    for code in (PUBLISHED_CODE, BEST_CODE):
        add(
            f"estimates follow the truth, slope's distance from 1 ({code})",
            [code],
            lambda code=code: np.abs(slope[code] - 1),
            at_most=0.1,
        )
        add(
            f"and without offset, its absolute value ({code}, nats)",
            [code],
            lambda code=code: np.abs(offset[code]),
            at_most=0.25,
        )
    one = "pca-1, wkl"
    add(
        "a single coordinate loses slope (pca minus pca-1, wkl)",
        [PUBLISHED_CODE, one],
        lambda: slope[PUBLISHED_CODE] - slope[one],
        at_least=0.2,
    )
    add(
        "raw pixels are worse than guessing the middle, root mean square error (nats)",
        ["pixels, kl"],
        lambda: error["pixels, kl"],
        at_least=float(np.std(truth).round(2)),
    )
    whole = [m for m in estimates if m.startswith("whole")]
    if whole:
        best = min(whole, key=lambda m: float(np.mean(error[m])))
        for code in (PUBLISHED_CODE, BEST_CODE):
            add(
                f"{code} beats the better critic, {best}: difference of errors (nats)",
                [code, best],
                lambda code=code: error[code] - error[best],
                at_most=0,
            )
    for code in (PUBLISHED_CODE, "pca, ksg") if 0 in truth else ():
        add(
            f"independent pictures give 0, absolute value ({code}, nats)",
            [code],
            lambda code=code: np.abs(estimates[code][:, list(truth).index(0.0)]),
            at_most=0.1,
        )
    add(
        f"KSG saturates: on the parameters themselves it misses of {truth[-1]:g} (nats)",
        ["parameters, ksg"],
        lambda: truth[-1] - estimates["parameters, ksg"][:, -1],
        at_least=1,
    )
    return claims


def _path_claims(config: ConfigDict, paths) -> list[Claim]:
    """No claim on phases: what the estimates are worth."""
    claims: list[Claim] = []
    for name, found in paths.items():
        of_path = Claims(found)

        def add(sentence, method, values, most, name=name, of_path=of_path):
            sentence = f"{name}: {sentence} ({method}, nats)"
            of_path.add(sentence, (method,), lambda: _clip(values), at_most=most)

        for method in (m for m in ("wkl", "ksg") if m in found):
            to_label = found[method][:, -1, 1]
            rise = np.diff(to_label, axis=1).max(axis=1, initial=-np.inf)
            nothing = np.abs(found[f"{method}, shuffled"][:, -1, 0]).max(axis=1)
            if to_label.shape[1] > 1:
                add("I(L; Y) does not rise from layer to layer, largest rise", method, rise, 0.02)
            most = np.log(_classes(config[name.split(",")[0]]))
            above = to_label.max(axis=1) - most
            add(f"I(L; Y) exceeds its bound {most:.2f} in no layer", method, above, 0)
            add("inputs shuffled against layers give 0, largest", method, nothing, 0.1)
        claims += of_path
    return claims


def _notes(config: ConfigDict, table, pictures, paths) -> list[str]:
    notes = ["Negative estimates are the estimators' error; none is clipped."]
    tuned = {f"{c} {m}": v for m, cells in table.items() for c, v in cells.items() if "rate" in v}
    for kind, found in pictures.items():
        tuned |= {f"{kind} {bound}": values for bound, values in found["tuned"].items()}
    if tuned:
        chosen = ", ".join(f"{k}: {v['rate']:g}, {v['steps']}" for k, v in tuned.items())
        notes.append(
            "Critics see half of the samples and estimate on the others. Their rates and steps, "
            f"chosen by the true error on a draw of their own: {chosen}."
        )
    if pictures:
        sums = {d: float(np.abs(information.kl_weights(5, d)).sum()) for d in (4, 8, 20)}
        notes.append(
            "Sum of the absolute weights of wkl, k = 5: "
            + ", ".join(f"{v:.0f} in {d} dimensions" for d, v in sums.items())
            + ". In 4 dimensions wkl is kl; from 17 on as well, as its equations have no solution."
        )
        errors = [f"{k} {np.mean(f['error']):.3f}" for k, f in pictures.items() if f["error"]]
        if errors:
            notes.append(f"Mean absolute error of the autoencoder's pictures: {', '.join(errors)}.")
    if paths:
        notes.append(
            "Paths are of training and test images together, codes by ranks; noise is relative. "
            "Shuffled: inputs, or labels, of other images, whose information is 0."
        )
    return notes


# Figures


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)]}


@styled
def _draw_gaussians(run: Run, config: ConfigDict, table) -> None:
    cells, truth = _cells(config), np.asarray(config.gaussians.mi)
    if not cells:
        return
    sizes, dimensions = (sorted({cell[i] for cell in cells}) for i in (1, 0))
    figure, axes = panels(len(sizes), len(dimensions), size=(2.9, 2.5), sharex=True)
    for place in axes.flat:
        place.set_visible(False)
    for d, n in cells:
        place = axes[sizes.index(n), dimensions.index(d)]
        place.set(visible=True, xlabel="I(X; Y) (nats)")
        place.xaxis.set_tick_params(labelbottom=True)
        place.axhline(0, color="#999999", linewidth=0.8)
        for index, (method, found) in enumerate(table.items()):
            values = found[_cell_name(d, n)]["estimates"] - truth
            dashes = "-" if method in information.ESTIMATORS else "--"
            style = {**_look(index), "linestyle": dashes}
            place.errorbar(
                truth, values.mean(axis=0), values.std(axis=0),
                label=method, marker="o", markersize=2.5, capsize=2, **style,
            )  # fmt: skip
        place.set_yscale("symlog", linthresh=1)
        place.set_yticks([-10, -1, 0, 1, 10], ["-10", "-1", "0", "1", "10"])
        place.set_title(_cell_name(d, n))
    for place in axes[:, 0]:
        place.set_ylabel("estimate - truth (nats)")
    legend(figure, axes[0, 0], columns=min(8, 3 * len(dimensions)))
    arrays = {f"{m} {c}": v["estimates"] for m, cs in table.items() for c, v in cs.items()}
    run.figure("gaussians", figure, **arrays)


@styled
def _draw_pictures(run: Run, config: ConfigDict, pictures) -> None:
    if not pictures:
        return
    truth = np.asarray(config.images.mi)
    shown = [PUBLISHED_CODE, "pca, kl", BEST_CODE, "pca, ksg", "pca-1, wkl"]
    shown += [f"whole pictures, {bound}" for bound in config.images.bounds]
    figure, axes = panels(1, len(pictures), size=(3.1, 3.2), sharey=True)
    for place, (kind, found) in zip(axes[0], pictures.items(), strict=True):
        place.plot(truth, truth, color="black", linewidth=0.8, label="truth")
        for index, method in enumerate(shown):
            if method not in found["estimates"]:
                continue
            values = found["estimates"][method]
            place.errorbar(
                truth, values.mean(axis=0), values.std(axis=0),
                label=method, marker="o", markersize=2.5, capsize=2, **_look(index),
                linestyle="--" if method == "pca, kl" else "-",
            )  # fmt: skip
        place.set(title=kind, xlabel="true information (nats)")
    axes[0, 0].set_ylabel("estimate (nats)")
    legend(figure, axes[0, 0], columns=len(pictures))
    arrays = {f"{kind} {m}": v for kind, f in pictures.items() for m, v in f["estimates"].items()}
    run.figure("pictures", figure, **arrays)


@styled
def _draw_paths(run: Run, config: ConfigDict, paths) -> None:
    for name, found in paths.items():
        part = name.split(",")[0]
        options = config[part]
        shown = [m for m in options.estimators if m in found]
        if not shown:
            continue
        layers = _layer_names(options)
        epochs = options.every * np.arange(found["loss"].shape[1])
        figure, axes = panels(len(shown), 3, size=(3.2, 2.4))
        for (along, labels, plane), method in zip(axes, shown, strict=True):
            for index, layer in enumerate(layers):
                values = found[method][..., index]  # seeds, looks, 2
                mean, spread = values.mean(axis=0), values.std(axis=0)
                for place, side in ((along, 0), (labels, 1)):
                    low, high = (mean + sign * spread for sign in (-1, 1))
                    place.plot(epochs, mean[:, side], label=layer, **_look(index))
                    place.fill_between(
                        epochs, low[:, side], high[:, side], alpha=0.2, linewidth=0, **_look(index)
                    )
                plane.plot(mean[:, 0], mean[:, 1], linewidth=0.8, **_look(index))
                plane.plot(*mean[-1], marker="o", markersize=4, **_look(index))
            along.set(title=f"{name}: {method}", ylabel="I(X; L) (nats)", xlabel="epoch")
            labels.axhline(np.log(_classes(options)), color="#999999", linestyle=":")
            labels.set(ylabel="I(L; Y) (nats)", xlabel="epoch", title="dotted: most possible")
            plane.set(xlabel="I(X; L) (nats)", ylabel="I(L; Y) (nats)", title="mean path; dot: end")
        legend(figure, axes[0, 0])
        arrays = {k.replace(", ", " "): v for k, v in found.items()}
        run.figure(f"path_{part}_{name.split()[-1]}".replace(".", "_"), figure, **arrays)


if __name__ == "__main__":
    start(main, memory_keys=("images.samples", "images.size"))
