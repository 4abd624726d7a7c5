"""Stored reports, and the table that is made of them."""

import pytest

from experiments import Method
from experiments import __main__ as listing
from rlib.experiment import Report, Row, UsageError, judge, results

STORED = """# Results

Some words.

## toy, preset default

> It works,
> mostly.

### Old

gone

## toy, preset full

### Stays
"""
TOY = Method("toy", "the toy", "1234.5678", "rlib/toy.py", "it works")


def report(preset="default", **more):
    claims = [
        judge("good", [1.0, 1.1], at_least=0),
        judge("also", [1.0, 1.1], at_least=0),
        judge("bad", [1.0, 1.1], at_most=0),
    ]
    rows = [Row("a", "b", "metric", [1.0])]
    environment = {"commit": "abc", "jax": "1"}
    facts = {"experiment": "toy", "preset": preset, "environment": environment} | more
    facts = {"selection": {"seeds": None, "only": []}} | facts
    return Report(rows, claims, figures=["figures/one.png"], **facts)


def test_a_report_takes_its_place_and_the_summary_stays():
    made = results.record(STORED, report())
    assert made.count("## toy, preset default") == 1
    assert "> It works,\n> mostly.\n\n### metric\n" in made
    assert "gone" not in made and "figures/" not in made and "abc" not in made
    assert made.endswith("## toy, preset full\n\n### Stays\n") and made.startswith("# Results\n")
    assert results.record(made, report()) == made


def test_a_new_report_comes_last():
    made = results.record(STORED, report("other"))
    assert made.index("preset other") > made.index("### Stays")
    assert made.startswith(STORED.rstrip())


def test_a_report_of_some_methods_is_refused():
    for selection in ({"only": ["a"]}, {"config": ["--config.steps=3"]}, {"seeds": 2}):
        with pytest.raises(UsageError, match="toy: not the whole preset"):
            results.record(STORED, report(selection=selection))


def test_the_table_counts_verdicts_and_tells_the_summary():
    lines = results.table([TOY], results.record(STORED, report())).splitlines()
    assert lines[3:] == ["", "Of all claims: 2 held, 1 not held."]
    assert lines[2] == (
        "| the toy | [1234.5678](https://arxiv.org/abs/1234.5678) | "
        "`python -m experiments.toy` | 2 held, 1 not held | It works, > mostly. |"
    ).replace("> ", "")


def test_a_method_without_results_has_an_empty_row():
    assert results.table([TOY], "# Results\n").splitlines()[2].endswith("|  |  |")


def test_the_table_stands_between_its_marks():
    readme = f"top\n{results.BEGIN}old\n{results.END}bottom\n"
    made = results.with_table(readme, "| new |\n")
    assert made == f"top\n{results.BEGIN}\n| new |\n\n{results.END}bottom\n"
    assert results.with_table(made, "| new |\n") == made
    with pytest.raises(UsageError, match="no place"):
        results.with_table("top\n", "")


def test_the_command_records_and_lists(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listing, "ROOT", tmp_path)
    monkeypatch.setattr(listing, "METHODS", (TOY,))
    (tmp_path / "RESULTS.md").write_text(STORED)
    (tmp_path / "README.md").write_text(results.BEGIN + results.END)
    (tmp_path / "report.json").write_text(report().to_json())
    assert listing.main(["record", str(tmp_path)]) == 0
    assert "2 held, 1 not held" in (tmp_path / "README.md").read_text()
    assert listing.main(["record", str(tmp_path / "none")]) == 1
    (tmp_path / "bad").mkdir()
    for text in ('{"rows": [', "{}"):
        (tmp_path / "bad/report.json").write_text(text)
        before = (tmp_path / "RESULTS.md").read_text()
        assert listing.main(["record", str(tmp_path), str(tmp_path / "bad")]) == 1
        assert (tmp_path / "RESULTS.md").read_text() == before
    assert listing.main([]) == 0
    shown = capsys.readouterr()
    assert "experiments.toy" in shown.out and "none" in shown.err
