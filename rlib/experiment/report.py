"""What a run found: rows of measurements, claims with verdicts, figures."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: From here on numbers are shown by their powers of ten.
HUGE = 1e6
Verdict = Literal["held", "not held", "inconclusive"]


@dataclass(frozen=True)
class Row:
    """A measurement.

    Fields:
        method, group: what was measured on what, for example a signal.
        metric: with its unit, for example "PSNR (dB)".
        values: one per seed, array-like; kept as a list of floats, NaN and infinities included.
        published: the paper's number where one compares, else None.

    >>> row = Row("winner", "camera", "PSNR (dB)", [30.0, 32.0])
    >>> row.mean, round(row.spread, 4)
    (31.0, 1.4142)
    """

    method: str
    group: str
    metric: str
    values: Any
    published: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "values", _floats(self.values).tolist())

    @property
    def mean(self) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        with np.errstate(invalid="ignore"):
            return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Claim:
    """A sentence, what was measured (mean, 95 % interval over seeds), the bound and the verdict.

    >>> judge("a beats b", [2.0, 2.1, 1.9], at_least=3.0)
    Claim(claim='a beats b', measured=2.0, interval=(1.75..., 2.24...), bound='>= 3',
          verdict='not held')
    """

    claim: str
    measured: float
    interval: tuple[float, float] | None
    bound: str
    verdict: Verdict


def judge(
    sentence: str,
    values: ArrayLike,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    within: float | None = None,
    exact: bool = False,
    confidence: float = 0.95,
) -> Claim:
    """Judge a bound on a mean by its t interval.

    Args:
        values: one per seed, array-like; for a comparison the paired differences.
        at_least, at_most, within: one of them; the bound, on the absolute value for `within`.
        exact: the values are no sample, for example bytes of a compiled program.

    Returns:
        "held" if the whole interval meets the bound, "not held" if none of it does,
        "inconclusive" otherwise, for fewer than two values, and if a value is not finite.

    Raises:
        ValueError: no values, or not exactly one bound.

    >>> judge("a beats b", [2.0, 2.1, 1.9], at_least=1.0).verdict
    'held'
    """
    if [at_least, at_most, within].count(None) != 2:
        raise ValueError("give one of at_least, at_most and within")
    sample = _floats(values)
    if sample.size == 0:
        raise ValueError(f"no values for the claim {sentence!r}")
    with np.errstate(invalid="ignore"):
        mean = float(sample.mean())
    bounds = {">=": at_least, "<=": at_most, "within +-": within}
    bound = next(f"{sign} {limit:g}" for sign, limit in bounds.items() if limit is not None)
    if not math.isfinite(mean) or (sample.size < 2 and not exact):
        return Claim(sentence, mean, None, bound, "inconclusive")
    half = 0.0
    if not exact:
        from scipy import stats  # takes a second, which not every process needs

        quantile = stats.t.ppf((1 + confidence) / 2, sample.size - 1)
        half = float(quantile * sample.std(ddof=1) / math.sqrt(sample.size))
    low, high = mean - half, mean + half
    floor = at_least if at_least is not None else -math.inf if within is None else -within
    ceiling = at_most if at_most is not None else math.inf if within is None else within
    verdict: Verdict = "inconclusive"
    if floor <= low and high <= ceiling:
        verdict = "held"
    elif high < floor or low > ceiling:
        verdict = "not held"
    return Claim(sentence, mean, (low, high), bound, verdict)


def capped(values: ArrayLike, most: float = float(np.finfo(np.float32).max)) -> np.ndarray:
    """Errors of trainings, of which some may have diverged, as finite numbers to report and judge.

    Args:
        values: of any shape.
        most: stands for what is above it, and for what is not finite.

    >>> capped([0.5, 3e4, float("nan")], 1000.0)
    array([5.e-01, 1.e+03, 1.e+03])
    """
    given = np.asarray(values, float)
    return np.where(np.isfinite(given), np.minimum(given, most), most)


class Claims(list[Claim]):
    """The claims of which every method was run.

    Args:
        ran: the methods that were run.

    >>> claims = Claims(["a", "b"])
    >>> claims.add("a beats b", ["a", "b"], lambda: [2.0, 2.1, 1.9], at_least=1.0)
    >>> claims.add("a beats c", ["a", "c"], lambda: [1.0, 1.1, 0.9], at_least=1.0)
    >>> [(claim.claim, claim.verdict) for claim in claims]
    [('a beats b', 'held')]
    """

    def __init__(self, ran: Iterable[str]):
        super().__init__()
        self._ran = frozenset(ran)

    def add(
        self, sentence: str, needs: Iterable[str], values: Callable[[], ArrayLike], **bound: Any
    ) -> None:
        """Judge the values, with the arguments of `judge`, if all methods of `needs` were run."""
        if self._ran.issuperset(needs):
            self.append(judge(sentence, values(), **bound))


@dataclass(frozen=True)
class Report:
    """The result of an experiment's `main`; `start` fills in the fields after `notes`.

    >>> report = Report([Row("winner", "camera", "PSNR (dB)", [30.0, 32.0])], notes=["two seeds"])
    >>> report.value("winner", "camera", "PSNR (dB)").mean
    31.0
    >>> Report.from_json(report.to_json()) == report
    True
    """

    rows: list[Row]
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    experiment: str = ""
    preset: str = ""
    figures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "claims", list(self.claims))  # `Claims` would not become JSON

    def value(self, method: str, group: str, metric: str) -> Row:
        """The row of a measurement."""
        for row in self.rows:
            if (row.method, row.group, row.metric) == (method, group, metric):
                return row
        raise KeyError((method, group, metric))

    def to_json(self) -> str:
        content = asdict(self)
        for row, source in zip(content["rows"], self.rows, strict=True):
            row |= {"mean": source.mean, "spread": source.spread}
        return json.dumps(_plain(content), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        content = json.loads(text)
        rows = [
            Row(**{k: v for k, v in row.items() if k not in ("mean", "spread")})
            for row in content["rows"]
        ]
        claims = [
            Claim(
                claim=claim["claim"],
                measured=float(claim["measured"]),
                interval=tuple(claim["interval"]) if claim["interval"] else None,
                bound=claim["bound"],
                verdict=claim["verdict"],
            )
            for claim in content["claims"]
        ]
        return cls(**{**content, "rows": rows, "claims": claims})

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, head, lines) of each metric, methods down and groups across, then the claims."""
        made = []
        for metric in dict.fromkeys(row.metric for row in self.rows):
            rows = [row for row in self.rows if row.metric == metric]
            groups = list(dict.fromkeys(row.group for row in rows))
            cells = {(row.method, row.group): _cell(row) for row in rows}
            lines = [
                [method, *(cells.get((method, group), "") for group in groups)]
                for method in dict.fromkeys(row.method for row in rows)
            ]
            if any(row.published is not None for row in rows):
                metric += ", in brackets the paper's"
            made.append((metric, ["method", *groups], lines))
        if self.claims:
            head = ["claim", "measured", "95 % interval", "bound", "verdict"]
            made.append(("Claims", head, [_claim_cells(claim) for claim in self.claims]))
        return made

    def markdown(self) -> str:
        """The report as Markdown, figures included by their relative paths."""
        parts = [f"# {self.experiment}, preset {self.preset}"]
        for title, head, lines in self.tables():
            parts.append(f"## {title}\n\n" + _markdown_table(head, lines))
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes))
        if self.figures:
            pictures = (f"![{path}]({path})" for path in self.figures)
            parts.append("## Figures\n\n" + "\n\n".join(pictures))
        facts = {**{f"{k} (s)": v for k, v in self.seconds.items()}, **self.environment}
        parts.append("## Environment\n\n" + _markdown_table(["", ""], _facts(facts)))
        return "\n\n".join(parts) + "\n"

    def show(self, console: Console) -> None:
        """Print the tables."""
        for title, head, lines in self.tables():
            table = Table(title=title, title_justify="left", title_style="bold")
            for name in head:
                table.add_column(name, overflow="fold")
            for line in lines:
                table.add_row(*(escape(cell) for cell in line))
            console.print(table)
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)


def _floats(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, np.float64).ravel()


def _plain(node: Any) -> Any:
    """JSON has no NaN and no infinities: they become strings, which `float` reads."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def _cell(row: Row) -> str:
    size = abs(row.mean)
    style = ".1e" if size >= HUGE or 0 < size < 0.01 else ".1f" if size >= 10 else ".3f"
    text = f"{row.mean:{style}}"
    if len(row.values) > 1:
        text += f" ± {row.spread:{style}}"
    return text if row.published is None else f"{text} [{row.published:g}]"


def _claim_cells(claim: Claim) -> list[str]:
    numbers = (claim.measured, *(claim.interval or ()))
    measured, *ends = (f"{v:{'.1e' if abs(v) >= HUGE else '.2f'}}" for v in numbers)
    return [claim.claim, measured, " to ".join(ends), claim.bound, claim.verdict]


def _facts(facts: dict[str, Any]) -> list[list[str]]:
    return [[name, f"{v:.1f}" if isinstance(v, float) else str(v)] for name, v in facts.items()]


def _markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (head, *lines)]
    rows.insert(1, " | ".join("---" for _ in head))
    return "\n".join(f"| {row} |" for row in rows)
