import io
import json

import numpy as np
import pytest
from rich.console import Console

from rlib.experiment import Claims, Report, Row, capped, judge


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ([2.0, 2.1, 1.9], {"at_least": 1}, "held"),
        ([2.0, 2.1, 1.9], {"at_least": 3}, "not held"),
        ([2.0, 2.1, 1.9], {"at_least": 2}, "inconclusive"),
        ([2.0, 2.1, 1.9], {"at_most": 3}, "held"),
        ([2.0, 2.1, 1.9], {"at_most": 1}, "not held"),
        ([2.0, 2.1, 1.9], {"at_most": 2}, "inconclusive"),
        ([2.0], {"at_least": 1}, "inconclusive"),
        ([2.0, np.nan], {"at_least": 1}, "inconclusive"),
        ([2.0, np.inf], {"at_least": 1}, "inconclusive"),
        ([np.inf, -np.inf], {"at_least": 1}, "inconclusive"),
        (np.float32([[2.0], [2.1], [1.9]]), {"at_least": 1}, "held"),
        ([0.0, 0.0], {"at_most": 0.1}, "held"),
    ],
)
def test_verdicts(values, bounds, verdict):
    assert judge("a claim", values, **bounds).verdict == verdict


def test_the_interval_is_students():
    claim = judge("a claim", [1.0, 2.0, 3.0, 4.0, 5.0], at_least=0)
    half = 2.7764451 * np.sqrt(2.5) / np.sqrt(5)
    assert claim.measured == 3
    assert claim.interval == pytest.approx((3 - half, 3 + half), abs=1e-6)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "at_most": 2}])
def test_one_bound_is_needed(bounds):
    with pytest.raises(ValueError, match="one of"):
        judge("a claim", [1.0], **bounds)


@pytest.fixture
def report():
    rows = [
        Row("a", "x", "PSNR (dB)", [10.0, 12.0], 11.5),
        Row("a", "y", "PSNR (dB)", [20.0]),
        Row("b", "y", "loss", [0.25, 0.5]),
    ]
    return Report(
        rows, [judge("a | b", [1.0, 2.0], at_least=0)], ["a note"], figures=["figures/f.png"]
    )


def test_json_there_and_back(report):
    assert Report.from_json(report.to_json()) == report


def test_what_is_not_finite_stays_and_the_json_is_valid():
    row = Row("a", "x", "loss", np.float32([np.nan, np.inf, -np.inf, 0.5]))
    infinite = Row("a", "y", "loss", [np.inf, np.inf])
    report = Report([row, infinite], [judge("a", row.values, at_most=0)])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(report.to_json(), parse_constant=refuse)
    again = Report.from_json(report.to_json())
    np.testing.assert_array_equal(again.rows[0].values, row.values)
    assert again.rows[1] == infinite
    assert infinite.mean == np.inf
    assert (again.claims[0].verdict, again.claims[0].interval) == ("inconclusive", None)
    assert "| a | nan ± nan | inf ± nan |" in report.markdown()


def test_rows_carry_mean_and_sample_spread(report):
    row = report.value("a", "x", "PSNR (dB)")
    assert (row.mean, row.spread) == (11.0, pytest.approx(np.sqrt(2)))
    with pytest.raises(KeyError):
        report.value("a", "z", "PSNR (dB)")


def test_markdown_holds_tables_claims_figures_and_notes(report):
    text = report.markdown()
    assert "| a | 11.0 ± 1.4 [11.5] | 20.0 |" in text
    assert "![figures/f.png](figures/f.png)" in text
    assert "- a note" in text
    assert "a \\| b" in text


def test_numbers_of_any_size_are_short():
    largest = float(np.finfo(np.float32).max)
    claims = [judge("a", [-largest, 1.0], at_most=0), judge("b", [0.251], at_least=0)]
    text = Report([Row("a", "x", "m", [largest])], claims).markdown()
    assert "| a | 3.4e+38 |" in text
    assert "| a | -1.7e+38 | -2.3e+39 to 2.0e+39 | <= 0 | inconclusive |" in text
    assert "| b | 0.25 |  | >= 0 | inconclusive |" in text


def test_it_is_shown_on_a_narrow_terminal(report):
    console = Console(file=io.StringIO(), width=60)
    report.show(console)
    assert "11.0" in console.file.getvalue()


def test_what_diverged_counts_as_the_most():
    assert capped([[1.0, np.inf], [-np.inf, -2.0]], 10).tolist() == [[1, 10], [10, -2]]
    assert np.isfinite(capped(np.float32([np.nan, np.inf, 3e38]))).all()


def test_claims_of_a_report_become_json():
    claims = Claims(["a"])
    claims.add("a", ["a"], lambda: [1.0, 2.0], at_least=0)
    report = Report([], claims)
    assert Report.from_json(report.to_json()) == report
