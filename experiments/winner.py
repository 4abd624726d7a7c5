"""WINNER (arXiv 2509.09719): noise at initialisation against the spectral bottleneck of SIREN.

A sine network that starts without energy in the band of its target collapses to the zero function.
WINNER adds Gaussian noise to its first two weight matrices, scaled by the target's spectral
centroid. Tested on band-limited noise over several bands, a photograph, a texture, a recorded
sound and a noisy photograph, beside SIREN with every first-layer frequency of a grid (equal steps
each), and Fourier features, FINER, Gaussian and WIRE networks, tuned on a draw of their own.
"""

import functools
import io
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from scipy.io import wavfile

from rlib import data, nn, parallel, spectral, training
from rlib.experiment import (
    COLOURS,
    TUNING_SEED,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    choose,
    legend,
    named_key,
    panels,
    picture,
    start,
    styled,
)

LAST, BEST = "PSNR, median of the last tenth of the steps (dB)", "PSNR at the best step (dB)"
BANDS, RECORDINGS = "Band-limited noise", "Recordings"
TUNED = "winner-tuned"
Values = dict[str, Any]
Results = dict[str, list[Values]]  # method -> one per seed
PUBLISHED = {  # mean PSNR in dB, on other pictures and sounds, larger networks, more steps
    ("siren-3000", "sound"): 34.8,
    ("winner", "sound"): 64.5,
    ("siren-30", "photograph"): 38.9,
    ("winner", "photograph"): 44.9,
}


class Signal(NamedTuple):
    """A target and how long it is fitted: x (N, d) and y (N, C) in [-1, 1]."""

    name: str
    kind: str  # of WINNER's schedule
    x: np.ndarray
    y: np.ndarray
    hidden: int
    steps: int
    siren: tuple[int, ...]
    published: str  # the setting of SIREN in the paper
    seeds: int
    tuned_seeds: int
    original: np.ndarray | None = None  # where y is noisy
    picture_shape: tuple[int, ...] | None = None
    rate: int = 0  # Hz, of a sound
    all_rivals: bool = False  # report every tuned method, not the best rival alone

    @property
    def clean(self) -> np.ndarray:
        return self.y if self.original is None else self.original

    @property
    def shape(self) -> tuple[int, ...]:
        return self.y.shape if self.picture_shape is None else self.picture_shape

    @property
    def psi(self) -> float:
        return spectral.spectral_centroid(self.y)

    @property
    def zero_psnr(self) -> float:
        """PSNR of the output that is zero everywhere."""
        return float(spectral.psnr(np.mean(np.square(self.clean, dtype=np.float64))))


class Setting(NamedTuple):
    """A network to fit: `scale` is w_first, sigma / Nyquist, k, s or w by the network."""

    network: str
    learning_rate: float
    scale: float


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Fit every method to every signal, and judge the claims."""
    run = run or Run()
    _check(config)
    signals = [*_bands(config, run), *_recordings(config, run)]
    frequencies = sorted({w for signal in signals for w in signal.siren})
    methods = run.select(["winner", *(f"siren-{w}" for w in frequencies), *config.tuned])
    run.plan(_costs(config, signals, methods))
    fitter = Fitter(config, run)
    candidates = [method for method in methods if method in config.tuned]
    for signal in signals:
        fitter.placed(signal)  # a mesh that does not divide a signal is told before any fit
    tuned = {s.name: _tune(fitter, s, candidates) for s in signals}
    run.plan(_costs(config, signals, methods, tuned))
    found = {s.name: _fit_all(fitter, s, methods, tuned[s.name]) for s in signals}
    speed = run.cached("speed", lambda: _speed(config, fitter))
    _draw(run, signals, found, fitter)
    return Report(
        _rows(signals, found, speed), _claims(signals, found, speed), _notes(signals, tuned)
    )


def _check(config: ConfigDict) -> None:
    """Refuse, in one line, what would fail later in many."""

    def need(ok: bool, key: str, rule: str) -> None:
        if not ok:
            raise UsageError(f"--config.{key}: {rule}")

    edges = config.bands.edges
    is_band = lambda e: isinstance(e, tuple) and len(e) == 2 and 0 <= e[0] < e[1] <= 1
    need(bool(edges) and all(map(is_band, edges)), "bands.edges", "pairs 0 <= low < high <= 1")
    for part in ("bands", "pictures", "sound"):
        options = config[part]
        numbers = all(isinstance(w, (int, float)) and w > 0 for w in options.siren)
        need(bool(options.siren) and numbers, f"{part}.siren", "positive first-layer frequencies")
        need(options.steps >= 10, f"{part}.steps", "at least 10")
    for method, settings in config.tuned.items():
        pairs = all(isinstance(s, tuple) and len(s) == 2 for s in settings)
        need(bool(settings) and pairs, f"tuned.{method}", "pairs of (rate, scale)")
    need(config.model.layers >= 2, "model.layers", "at least 2")
    need(config.chunk >= 1, "chunk", "at least 1")
    sizes = ("bands.samples", "pictures.size", "pictures.shrink", "sound.samples", "speed.samples")
    for key in (*sizes, "speed.chunk_rows", "speed.repeats", "speed.steps"):
        part, name = key.split(".")
        need(config[part][name] >= 1, key, "at least 1")


# Signals


def _bands(config: ConfigDict, run: Run) -> list[Signal]:
    made = []
    for low, high in config.bands.edges:
        y = spectral.band_limited_noise(config.bands.samples, low, high).astype(np.float32)
        made.append(
            Signal(
                name=f"band {low:g}-{high:g}",
                kind="audio",
                x=spectral.grid(len(y)).astype(np.float32),
                y=y,
                hidden=config.model.width,
                steps=config.bands.steps,
                siren=tuple(config.bands.siren),
                published="siren-3000",
                seeds=len(run.seeds(config)),
                tuned_seeds=len(run.seeds(config.bands.tuned)),
                all_rivals=True,
            )
        )
    return made


def _recordings(config: ConfigDict, run: Run) -> list[Signal]:
    size = config.pictures.size
    try:
        photograph = _cut(
            data.load_picture(config.pictures.photograph), size, config.pictures.shrink
        )
        texture = _cut(data.load_picture(config.pictures.texture), size, 1)
        waveform, rate = data.load_sound(config.sound.name)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    photons, readout = config.denoising.photons, config.denoising.readout
    draw = np.random.default_rng(0)
    noisy = (
        draw.poisson(photons * photograph) + readout * draw.normal(size=photograph.shape)
    ) / photons
    pictures = [
        ("photograph", photograph, photograph),
        ("texture", texture, texture),
        ("denoising", noisy, photograph),
    ]
    made = [
        Signal(
            name=name,
            kind="image",
            x=spectral.grid(size, size).astype(np.float32),
            y=_pixels(image),
            hidden=config.pictures.width,
            steps=config.pictures.steps,
            siren=tuple(config.pictures.siren),
            published="siren-30",
            seeds=len(run.seeds(config.pictures)),
            tuned_seeds=len(run.seeds(config.pictures)),
            original=None if clean is image else _pixels(clean),
            picture_shape=image.shape,
        )
        for name, image, clean in pictures
    ]
    y = _loudest(waveform.mean(axis=1), config.sound.samples)[:, None]
    made.append(
        Signal(
            name="sound",
            kind="audio",
            x=spectral.grid(len(y)).astype(np.float32),
            y=y,
            hidden=config.sound.width,
            steps=config.sound.steps,
            siren=tuple(config.sound.siren),
            published="siren-3000",
            seeds=len(run.seeds(config.sound)),
            tuned_seeds=len(run.seeds(config.sound)),
            rate=rate,
        )
    )
    return made


def _cut(image: np.ndarray, size: int, shrink: int) -> np.ndarray:
    """The middle `size` x `size` pixels, grey, after averaging blocks of `shrink` x `shrink`."""
    grey = image.mean(axis=-1)
    side = size * shrink
    if side > min(grey.shape):
        raise ValueError(
            f"a picture of {grey.shape} pixels has no square of {side}; lower the size"
        )
    top, left = ((n - side) // 2 for n in grey.shape)
    square = grey[top : top + side, left : left + side]
    return square.reshape(size, shrink, size, shrink).mean(axis=(1, 3))[..., None]


def _pixels(image: np.ndarray) -> np.ndarray:
    return (2 * image.reshape(-1, image.shape[-1]) - 1).astype(np.float32)


def _loudest(waveform: np.ndarray, samples: int) -> np.ndarray:
    """The stretch of most energy, with peak 1."""
    if len(waveform) < samples:
        raise UsageError(f"the sound has {len(waveform)} samples, {samples} are asked for")
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    first = int(np.argmax(energy[samples:] - energy[:-samples]))
    stretch = waveform[first : first + samples]
    peak = np.abs(stretch).max()
    if peak == 0:
        raise UsageError("the sound is silent")
    return (stretch / peak).astype(np.float32)


# Fits


def _network(setting: Setting, signal: Signal, layers: int, rngs: nnx.Rngs) -> nn.CoordinateNetwork:
    shape = (signal.x.shape[1], signal.hidden, signal.y.shape[1], layers)
    scale = setting.scale
    match setting.network:
        case "siren" | "winner":
            return nn.Siren(*shape, w_first=scale, rngs=rngs)
        case "finer":
            return nn.Finer(*shape, k=scale, rngs=rngs)
        case "gauss":
            return nn.Gaussian(*shape, scale=scale, rngs=rngs)
        case "wire":
            return nn.Wire(*shape, w=scale, scale=scale, rngs=rngs)
        case "fourier":
            nyquist = (signal.shape[0] - 1) / 4  # cycles per unit length on [-1, 1]
            # The feature layer takes the place of one hidden layer: equal numbers of parameters.
            d, hidden, channels, _ = shape
            sizes = (d, hidden, channels, layers - 1)
            return nn.FourierMLP(*sizes, sigma=scale * nyquist, features=hidden // 2, rngs=rngs)
    raise ValueError(f"no network {setting.network!r}")


def _loss(graphdef: nnx.GraphDef, params: Any, frozen: Any, batch: Any, key: jax.Array):
    x, y, clean = batch
    output = nnx.merge(graphdef, params, frozen)(x)
    error = jnp.mean(jnp.square(output - y))
    return error, {"clean": jnp.mean(jnp.square(output - clean))}


def _predict(graphdef: nnx.GraphDef, params: Any, frozen: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params, frozen)(x)


class Fitter:
    """Fits networks to signals; networks of one shape and rate share a compiled program."""

    def __init__(self, config: ConfigDict, run: Run):
        self.config, self.run = config, run
        self.mesh = run.mesh(config)
        self._programs: dict[Any, parallel.TrainStep] = {}
        self._placed: dict[str, Any] = {}
        self._predict = jax.jit(
            _predict, static_argnums=0, out_shardings=parallel.named(self.mesh, PartitionSpec())
        )

    def initial(self, signal: Signal, setting: Setting, seed: int) -> tuple[Any, Any, Any]:
        """(graphdef, parameters, constants); all methods share a seed's base draw."""
        rngs = nnx.Rngs(named_key(seed, signal.name, "weights"))
        network = _network(setting, signal, self.config.model.layers, rngs)
        graphdef, params, frozen = nnx.split(network, nnx.Param, ...)
        if setting.network == "winner":
            s0, s1 = spectral.noise_scales(signal.psi, signal.y.shape[1], kind=signal.kind)
            key = named_key(seed, signal.name, "noise")
            params = spectral.winner_init(params, s0, s1, network.w0[...], key)
        return graphdef, params, frozen

    def training(
        self, signal: Signal, setting: Setting, seed: int, microbatches: int = 1
    ) -> tuple[parallel.TrainStep, parallel.TrainState, Any]:
        """The step, compiled once for all draws and scales of a network, its first state, graph."""
        graphdef, params, frozen = self.initial(signal, setting, seed)
        shapes = (signal.x.shape, signal.y.shape, signal.hidden, signal.kind)
        key = (graphdef, setting.learning_rate, shapes, microbatches)
        if key not in self._programs:
            options = self.config.optimizer
            decay = options.decay[signal.kind]
            rate = optax.exponential_decay(
                setting.learning_rate, options.decay_steps, decay, staircase=True
            )
            self._programs[key] = parallel.make_train_step(
                functools.partial(_loss, graphdef),
                optax.adam(rate),
                self.mesh,
                params,
                frozen,
                microbatches=microbatches,
            )
        train = self._programs[key]
        return train, train.init(params, frozen), graphdef

    def placed(self, signal: Signal) -> Any:
        """The signal on the mesh."""
        if signal.name not in self._placed:
            batch = (signal.x, signal.y, signal.clean)
            try:
                self._placed[signal.name] = parallel.shard_batch(self.mesh, batch)
            except ValueError as error:
                raise UsageError(f"signal {signal.name!r}: {error}") from error
        return self._placed[signal.name]

    def predict(self, signal: Signal, state: parallel.TrainState, graphdef: Any) -> np.ndarray:
        x = self.placed(signal)[0]
        return np.asarray(self._predict(graphdef, state.params, state.frozen, x))

    def fit(self, unit: str, signal: Signal, setting: Setting, seed: int) -> Values:
        """Mean squared error over the steps; the outputs before and after, of draw 0."""

        def compute() -> Values:
            train, state, graphdef = self.training(signal, setting, seed)
            before = self.predict(signal, state, graphdef)
            state, history = self.run.fit(
                unit,
                [training.Phase(train, signal.steps)],
                state,
                self.placed(signal),
                chunk=self.config.chunk,
            )
            after = self.predict(signal, state, graphdef)
            outputs = {"before": before, "after": after} if seed == 0 else {}
            return {"clean": history["clean"], **outputs}

        return self.run.cached(unit, compute)


def _own_settings(config: ConfigDict, signal: Signal) -> dict[str, Setting]:
    """The published protocol: one rate for WINNER and for SIREN at every w_first of the grid."""
    rate = config.optimizer.learning_rate
    grid = {f"siren-{w}": Setting("siren", rate, float(w)) for w in signal.siren}
    return {"winner": Setting("winner", rate, 30.0), **grid}


def _tuned_settings(config: ConfigDict, method: str) -> list[Setting]:
    network = method.removesuffix("-tuned")
    return [Setting(network, rate, scale) for rate, scale in config.tuned[method]]


def _tuning_unit(signal: Signal, method: str, index: int) -> str:
    return f"tune/{signal.name}/{method}/{index}"


def _unit(signal: Signal, method: str, seed: int) -> str:
    return f"fit/{signal.name}/{method}/seed{seed}"


def _tune(fitter: Fitter, signal: Signal, methods: list[str]) -> dict[str, Setting]:
    """The best setting of each tuned method, on a draw that no result uses.

    Where not all rivals are asked for, the one best rival stays, beside WINNER.
    """
    trials = {
        (method, setting): _psnr(
            fitter.fit(_tuning_unit(signal, method, index), signal, setting, TUNING_SEED),
            _metric(signal),
        )
        for method in methods
        for index, setting in enumerate(_tuned_settings(fitter.config, method))
    }
    group = lambda method: method if signal.all_rivals or method == TUNED else "the best rival"
    groups = {group(m): [trial for trial in trials if group(trial[0]) == group(m)] for m in methods}
    return dict(choose(tried, [-trials[t] for t in tried]) for tried in groups.values())


def _fit_all(fitter: Fitter, signal: Signal, methods: list[str], tuned: dict[str, Setting]):
    """Method -> results, one per seed."""
    settings = {**_own_settings(fitter.config, signal), **tuned}
    results: dict[str, list[Values]] = {}
    for method, setting in settings.items():
        if method in methods or method in tuned:
            seeds = signal.tuned_seeds if method in tuned else signal.seeds
            results[method] = [
                fitter.fit(_unit(signal, method, seed), signal, setting, seed)
                for seed in range(seeds)
            ]
    return results


def _costs(
    config: ConfigDict,
    signals: list[Signal],
    methods: list[str],
    tuned: dict[str, dict[str, Setting]] | None = None,
) -> dict[str, float]:
    """Every unit of work and its operations; rivals are guessed before they are tuned."""
    speed = config.speed
    steps = speed.steps * speed.repeats
    costs = {"speed": 6.0 * speed.samples * speed.width**2 * config.model.layers * steps}
    costs["ntk"] = 5 * 6.0 * (512 * config.model.width) ** 2  # kernels between 512 points
    candidates = [m for m in methods if m in config.tuned]
    for signal in signals:
        fit = 6.0 * len(signal.x) * signal.hidden * (signal.hidden + 40) * signal.steps

        def add(unit: str, method: str, fit: float = fit) -> None:
            costs[unit] = fit * config.model.layers * (2.4 if method == "wire" else 1.0)

        for method in candidates:
            for index in range(len(config.tuned[method])):
                add(_tuning_unit(signal, method, index), method)
        if tuned is not None:
            reported = list(tuned[signal.name])
        else:
            rivals = [m for m in candidates if m != TUNED]
            kept = rivals if signal.all_rivals else rivals[:1]
            reported = [m for m in candidates if m == TUNED] + kept
        for method in reported:
            for seed in range(signal.tuned_seeds):
                add(_unit(signal, method, seed), method)
        for method in _own_settings(config, signal).keys() & set(methods):
            for seed in range(signal.seeds):
                add(_unit(signal, method, seed), method)
    return costs


def _parts(rows: int, chunk_rows: int) -> int:
    """Into how many equal parts rows are cut, so that none has fewer than `chunk_rows`."""
    return max(n for n in range(1, max(1, rows // chunk_rows) + 1) if rows % n == 0)


def _speed(config: ConfigDict, fitter: Fitter) -> Values:
    """Samples per second of the training step, and its share of this machine's matmul rate.

    The two are timed by turns, so that a busy machine slows both.
    """
    options = config.speed
    signal = Signal(
        name="speed",
        kind="audio",
        x=spectral.grid(options.samples).astype(np.float32),
        y=spectral.band_limited_noise(options.samples, 0.5, 0.9).astype(np.float32),
        hidden=options.width,
        steps=options.steps,
        siren=(30,),
        published="siren-30",
        seeds=1,
        tuned_seeds=0,
    )
    on_cpu = jax.devices()[0].platform == "cpu"
    rows = options.samples // parallel.data_axis_size(fitter.mesh)
    train, state, _ = fitter.training(
        signal,
        Setting("winner", 1e-4, 30.0),
        seed=0,
        microbatches=_parts(rows, options.chunk_rows) if on_cpu else 1,
    )
    batch = fitter.placed(signal)
    square = jnp.ones((2048, 2048), jnp.float32)
    multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    phase = training.Phase(train, 1)
    state, _ = training.fit([phase], state, batch, chunk=options.steps)
    jax.block_until_ready(multiply(square, square))
    step_seconds, matmul_rates = [], []
    for repeat in range(options.repeats):
        begun = time.perf_counter()
        for _ in range(5):
            product = multiply(square, square)
        jax.block_until_ready(product)
        matmul_rates.append(5 * 2 * 2048**3 / (time.perf_counter() - begun))
        phase = training.Phase(train, 1 + (repeat + 1) * options.steps)
        begun = time.perf_counter()
        state, _ = training.fit([phase], state, batch, chunk=options.steps)
        step_seconds.append((time.perf_counter() - begun) / options.steps)
    # Products: 3 of H x H in each hidden layer, 2 of d x H in the first, 3 of H x C in the last.
    h = options.width
    operations = 2.0 * options.samples * (3 * h * h * (config.model.layers - 1) + 2 * h + 3 * h)
    seconds = np.array(step_seconds)
    devices = jax.device_count() if not on_cpu else 1
    return {
        "samples per second": options.samples / seconds,
        "fraction": operations / seconds / (np.array(matmul_rates) * devices),
    }


# The report


def _is_grid(method: str) -> bool:
    """SIREN at one w_first of the grid, at the published rate."""
    return method.startswith("siren-") and method != "siren-tuned"


def _best_siren(results: Results, metric: str = LAST) -> str:
    """The w_first with the best mean; "" if none was run."""
    grid = [m for m in results if _is_grid(m)]
    return max(grid, key=lambda m: np.mean(_values(results, m, metric)), default="")


def _best_rival(results: Results, metric: str = LAST) -> str:
    rivals = [m for m in results if m not in ("winner", TUNED) and not _is_grid(m)]
    return max(rivals, key=lambda m: np.mean(_values(results, m, metric)), default="")


def _psnr(result: Values, metric: str) -> float:
    """Of one fit. Near convergence Adam spikes, so one step says little: a median over the end."""
    errors = result["clean"]
    error = errors.min() if metric == BEST else np.median(errors[-max(1, len(errors) // 10) :])
    return float(spectral.psnr(error))


def _values(results: Results, method: str, metric: str) -> list[float]:
    return [_psnr(result, metric) for result in results[method]]


def _metric(signal: Signal) -> str:
    """Denoising is judged at the best step: every network ends by fitting the noise."""
    return BEST if signal.name == "denoising" else LAST


def _rows(signals: list[Signal], found: dict[str, Results], speed: Values) -> list[Row]:
    rows = []
    for metric in (LAST, BEST):
        for signal in signals:
            results = found[signal.name]
            title = f"{BANDS if signal.all_rivals else RECORDINGS}: {metric}"
            rows.append(Row("zero output", signal.name, title, [signal.zero_psnr]))
            if signal.original is not None:
                noise = np.mean(np.square(signal.y - signal.clean, dtype=np.float64))
                rows.append(Row("noisy input", signal.name, title, [float(spectral.psnr(noise))]))
            best = _best_siren(results, metric)
            if best in results:
                values = _values(results, best, metric)
                rows.append(Row("siren, best w_first", signal.name, title, values))
            for method in results:
                published = PUBLISHED.get((method, signal.name)) if metric == LAST else None
                values = _values(results, method, metric)
                rows.append(Row(method, signal.name, title, values, published))
    order = list(dict.fromkeys(row.method for row in sorted(rows, key=_rank)))
    rows.sort(key=lambda row: order.index(row.method))
    for name, values in speed.items():
        rows.append(Row("WINNER training step", name, "Speed", [float(v) for v in values]))
    return rows


def _rank(row: Row) -> tuple[int, float]:
    if _is_grid(row.method):
        return 1, float(row.method.removeprefix("siren-"))
    order = ("zero output", "noisy input", "siren, best w_first", "winner", TUNED)
    return (order.index(row.method), 0.0) if row.method in order else (len(order), 0.0)


def _differences(results: Results, a: str, b: str, metric: str = LAST) -> np.ndarray:
    """Paired over seeds."""
    return np.subtract(_values(results, a, metric), _values(results, b, metric))


def _claims(signals: list[Signal], found: dict[str, Results], speed: Values) -> list[Claim]:
    """Those claims of which everything was run."""
    bands = [s for s in signals if s.all_rivals]
    high, results = bands[-1], found[bands[-1].name]
    claims = Claims(results)
    claims.add(
        f"bottleneck: on {high.name} SIREN-30 stays at the zero output (dB apart)",
        ("siren-30",),
        lambda: np.abs(np.subtract(_values(results, "siren-30", LAST), high.zero_psnr)),
        at_most=0.1,
    )
    best = _best_siren(results)
    for other, name in (("siren-3000", "SIREN-3000"), (best, f"the best w_first, {best}")):
        pair = ("winner", other)
        values = functools.partial(_differences, results, *pair)
        claims.add(f"{high.name}: WINNER above {name} (dB)", pair, values, at_least=0)
    if {"winner", best} <= set(results):
        gaps = [_differences(found[s.name], "winner", _best_siren(found[s.name])) for s in bands]
        worst = min(range(len(bands)), key=lambda i: float(np.mean(gaps[i])))
        sentence = f"tuned without tuning, worst {bands[worst].name}: WINNER above its best w_first"
        claims.add(sentence, ("winner", best), lambda gap=gaps[worst]: gap, at_least=-3)
    behind = {}
    for method in (m for m in results if _is_grid(m)):
        gaps = [_differences(found[s.name], _best_siren(found[s.name]), method) for s in bands]
        behind[method] = max(gaps, key=np.mean)
    if len(behind) > 1:
        least = min(behind, key=lambda m: float(np.mean(behind[m])))
        sentence = (
            f"every fixed w_first falls behind some band's best; {least}, which does least (dB)"
        )
        claims.add(sentence, (least,), lambda: behind[least], at_least=10)
    for signal in (s for s in signals if not s.all_rivals):
        claims += _recording_claims(signal, found[signal.name])
    if jax.devices()[0].platform == "cpu":
        sentence = "speed: the training step's share of the measured float32 matmul rate"
        claims.add(sentence, (), lambda: speed["fraction"], at_least=0.7)
    return claims


def _recording_claims(signal: Signal, results: Results) -> list[Claim]:
    claims, metric = Claims(results), _metric(signal)
    best, rival = _best_siren(results, metric), _best_rival(results, metric)
    others = {
        f"published {signal.published}": ("winner", signal.published),
        f"best w_first, {best}": ("winner", best),
        f"best rival, {rival}, both tuned here": (TUNED, rival),
    }
    if best == signal.published:
        del others[f"best w_first, {best}"]
    for name, pair in others.items():
        sentence = f"{signal.name}: WINNER above {name} (dB{', best step' * (metric == BEST)})"
        claims.add(
            sentence, pair, functools.partial(_differences, results, *pair, metric), at_least=0
        )
    return claims


def _notes(signals: list[Signal], tuned: dict[str, dict[str, Setting]]) -> list[str]:
    notes = [
        "PSNR has peak 1 although the data span [-1, 1], as in the paper. Its numbers are of other "
        "sounds, of the whole camera picture, of networks of 4 x 222 and 4 x 256, and of 1,000 to "
        "4,000 epochs.",
        "Values are mean ± standard deviation over draws of the network: "
        + ", ".join(f"{s.name} {s.seeds}" for s in signals)
        + "; tuned methods on bands fewer. Bands differ in centre and in width.",
        "A fit that has converged amplifies rounding: on another number of devices or cores "
        "single values differ by decibels, medians and verdicts less.",
    ]
    for signal in signals:
        chosen = ", ".join(
            f"{method} rate {setting.learning_rate:g} scale {setting.scale:g}"
            for method, setting in tuned[signal.name].items()
        )
        notes.append(
            f"{signal.name}: spectral centroid {signal.psi:.3f}"
            + (f"; tuned: {chosen}" if chosen else "")
        )
    return notes


# Figures


@styled
def _draw(run: Run, signals: list[Signal], found: dict[str, Results], fitter: Fitter) -> None:
    bands = [s for s in signals if s.all_rivals]
    recordings = [s for s in signals if not s.all_rivals]
    _draw_bands(run, bands, found)
    _draw_spectra(run, bands[-1], found[bands[-1].name])
    _draw_ntk(run, bands[-1], fitter)
    for signal in recordings:
        if signal.picture_shape is not None:
            _draw_picture(run, signal, found[signal.name])
        else:
            _draw_sound(run, signal, found[signal.name])
    _draw_curves(run, [bands[-1], *recordings], found)


def _shown(signal: Signal, results: Results) -> dict[str, str]:
    """Method -> role: published SIREN, best SIREN, WINNER, best rival, WINNER tuned; as run."""
    metric = _metric(signal)
    roles = {
        signal.published: "published",
        _best_siren(results, metric): "best w_first",
        "winner": "published rate",
        _best_rival(results, _metric(signal)): "best rival, tuned",
        TUNED: "tuned",
    }
    return {m: role for m, role in roles.items() if m in results}


def _look(method: str, signal: Signal, results: Results) -> dict[str, Any]:
    """One colour a role in every figure; black is WINNER."""
    if method in ("winner", TUNED):
        return {"color": "black", "linestyle": "-" if method == "winner" else "--", "zorder": 3}
    roles = ("published", "best w_first", "best rival, tuned")
    return {"color": COLOURS[roles.index(_shown(signal, results)[method])]}


def _draw_bands(run: Run, bands: list[Signal], found: dict[str, Results]) -> None:
    figure, axes = panels(1, 2, size=(4.4, 3.6), sharey=True)
    psi = [s.psi for s in bands]
    arrays: dict[str, Any] = {"psi": psi, "zero output": [s.zero_psnr for s in bands]}
    methods = list(dict.fromkeys(m for s in bands for m in found[s.name]))
    siren = sorted((m for m in methods if _is_grid(m)), key=lambda m: float(m[6:]))
    others = [m for m in methods if m not in siren and m not in ("winner", TUNED)]
    titles = ("SIREN by w_first, published rate", "rates and scales tuned per band")
    sides = ([*siren, "winner"], [*others, "winner", TUNED])
    for ax, title, names in zip(axes[0], titles, sides, strict=True):
        for i, method in enumerate(names):
            if any(method not in found[s.name] for s in bands):
                continue
            values = [_values(found[s.name], method, LAST) for s in bands]
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)]}
            if method in ("winner", TUNED):
                look = {"color": "black", "linewidth": 2.2, "zorder": 3}
                look["linestyle"] = "-" if method == "winner" else "--"
            mean, spread = [np.mean(v) for v in values], [np.std(v) for v in values]
            ax.errorbar(
                psi, mean, spread, marker="o", markersize=3, capsize=2, label=method, **look
            )
            arrays[method] = values
        ax.plot(psi, arrays["zero output"], ":", color="#999999", label="zero output")
        ax.set(title=title, xlabel="spectral centroid of the target (1 is Nyquist)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    axes[0, 0].set_ylabel("PSNR (dB)")
    run.figure("psnr_against_centroid", figure, **arrays)


def _smooth(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An amplitude spectrum, averaged over groups of bins so that a line can be read."""
    frequency, amplitude = spectral.amplitude_spectrum(y[:, 0])
    width = max(1, len(frequency) // 128)
    count = len(frequency) // width * width
    blocks = np.sqrt(np.square(amplitude[:count]).reshape(-1, width).mean(axis=1))
    return frequency[:count].reshape(-1, width).mean(axis=1), np.maximum(blocks, 1e-4)


def _draw_spectra(run: Run, signal: Signal, results: Results) -> None:
    wanted = ("siren-30", "siren-3000", _best_siren(results), "winner")
    methods = [m for m in dict.fromkeys(wanted) if m in results]
    if not methods:
        return
    figure, axes = panels(1, len(methods), size=(2.6, 2.6), sharey=True)
    arrays: dict[str, Any] = {"target": signal.y}
    for ax, method in zip(axes[0], methods, strict=True):
        result = results[method][0]
        ax.fill_between(*_smooth(signal.y), 1e-4, color="#dddddd", label="target")
        ax.semilogy(*_smooth(result["before"]), color=COLOURS[1], label="output at initialisation")
        ax.semilogy(*_smooth(result["after"]), color=COLOURS[0], label="output after training")
        ax.set(title=method, xlabel="frequency / Nyquist", ylim=(1e-3, None))
        arrays |= {f"{method} before": result["before"], f"{method} after": result["after"]}
    axes[0, 0].set_ylabel(f"amplitude, {signal.name}")
    legend(figure, axes[0, 0])
    run.figure("spectra", figure, **arrays)


def _draw_ntk(run: Run, signal: Signal, fitter: Fitter) -> None:
    """Spectra of the tangent kernel at initialisation, on neighbouring samples of the signal."""
    points = min(512, len(signal.x) // 2)
    window = signal.x[len(signal.x) // 2 :][:points]

    def compute() -> Values:
        lines = {}
        settings = {f"siren-{w}": Setting("siren", 0.0, w) for w in (30, 300, 1000, 3000)}
        for name, setting in {**settings, "winner": Setting("winner", 0.0, 30.0)}.items():
            graphdef, params, frozen = fitter.initial(signal, setting, 0)
            apply = lambda p, x, g=graphdef, f=frozen: nnx.merge(g, p, f)(x)
            kernel = jax.jit(functools.partial(spectral.empirical_ntk, apply))(params, window)
            frequency, lines[name] = spectral.ntk_spectrum(kernel)
        return {"frequency": frequency, **lines}

    arrays = run.cached("ntk", compute)
    frequency = arrays["frequency"]
    figure, axes = panels(size=(4.4, 3.4))
    ax = axes[0, 0]
    for i, (name, values) in enumerate((k, v) for k, v in arrays.items() if k != "frequency"):
        look = {"color": COLOURS[i]}
        if name == "winner":
            look = {"color": "black", "linewidth": 2.2}
        ax.semilogy(frequency, np.maximum(values, 1e-12), label=name, **look)
    bins, amplitude = spectral.amplitude_spectrum(signal.y[:, 0])
    inside = bins[amplitude > amplitude.max() / 2]
    ax.axvspan(inside.min(), inside.max(), color="#dddddd", zorder=0, label="target's band")
    ax.set(xlabel="frequency / Nyquist", ylabel="strength of the tangent kernel")
    ax.set_title("tangent kernel at initialisation")
    legend(figure, ax, columns=3)
    run.figure("ntk_spectra", figure, **arrays)


def _draw_picture(run: Run, signal: Signal, results: Results) -> None:
    shown = _shown(signal, results)
    if not shown:
        return
    noisy = signal.original is not None
    clean = signal.clean.reshape(signal.shape)
    outputs = {m: results[m][0]["after"].reshape(signal.shape) for m in shown}
    scale = sorted(float(np.percentile(np.abs(out - clean), 99)) for out in outputs.values())
    bound = scale[len(scale) // 2]
    figure, axes = panels(2, 1 + len(shown), size=(1.9, 2.2))
    picture(axes[0, 0], clean, "target", vmin=-1, vmax=1)
    if noisy:
        picture(axes[1, 0], signal.y.reshape(signal.shape), "what is fitted", vmin=-1, vmax=1)
    else:
        axes[1, 0].set_axis_off()
    for column, (method, role) in enumerate(shown.items(), start=1):
        last, best = (_values(results, method, metric)[0] for metric in (LAST, BEST))
        title = f"{method}\n({role})\n{last:.1f} dB" + (f", best {best:.1f}" if noisy else "")
        picture(axes[0, column], outputs[method], title, vmin=-1, vmax=1)
        error = np.abs(outputs[method] - clean)
        shade = picture(axes[1, column], error, vmin=0, vmax=bound, cmap="magma")
    figure.colorbar(shade, ax=axes[1, :], shrink=0.8, label="absolute error")
    run.figure(signal.name, figure, target=clean, **outputs)


def _draw_sound(run: Run, signal: Signal, results: Results) -> None:
    shown = _shown(signal, results)
    arrays: dict[str, Any] = {"target": signal.y}
    run.write("sounds/original.wav", _wav(signal.y, signal.rate))
    figure, axes = panels(1, 2, size=(4.4, 3.2))
    milliseconds = 1e3 * np.arange(len(signal.y)) / signal.rate
    part = slice(len(signal.y) // 2, len(signal.y) // 2 + 160)
    axes[0, 0].plot(milliseconds[part], signal.y[part, 0], color="#cccccc", linewidth=5)
    axes[0, 1].fill_between(*_smooth(signal.y), 1e-4, color="#dddddd", label="target")
    for method, role in shown.items():
        output = results[method][0]["after"]
        run.write(f"sounds/{method}.wav", _wav(output, signal.rate))
        look = {**_look(method, signal, results), "linewidth": 1.2}
        axes[0, 0].plot(milliseconds[part], output[part, 0], **look)
        axes[0, 1].semilogy(*_smooth(output - signal.y), label=f"{method} ({role})", **look)
        arrays[method] = output
    axes[0, 0].set(xlabel="time (ms)", ylabel="amplitude", title="a stretch of the sound")
    axes[0, 1].set(xlabel="frequency / Nyquist", ylabel="amplitude", ylim=(1e-3, None))
    axes[0, 1].set_title("spectra of the target and of the errors")
    legend(figure, axes[0, 1], columns=3)
    run.figure("sound", figure, **arrays)


def _wav(y: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, np.round(np.clip(y, -1, 1) * 32767).astype(np.int16))
    return buffer.getvalue()


def _draw_curves(run: Run, signals: list[Signal], found: dict[str, Results]) -> None:
    figure, axes = panels(1, len(signals), size=(2.5, 2.9))
    arrays: dict[str, Any] = {}
    for ax, signal in zip(axes[0], signals, strict=True):
        results = found[signal.name]
        for method in _shown(signal, results):
            curves = np.stack([spectral.psnr(r["clean"]) for r in results[method]])
            ax.plot(curves.mean(axis=0), label=method, **_look(method, signal, results))
            arrays[f"{signal.name} {method}"] = curves
        ax.axhline(signal.zero_psnr, linestyle=":", color="#999999", label="zero output")
        ax.set(title=signal.name, xlabel="step")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25))
    axes[0, 0].set_ylabel("PSNR (dB)")
    run.figure("training_curves", figure, **arrays)


if __name__ == "__main__":
    start(main, memory_keys=("speed.samples", "sound.samples", "pictures.size"))
