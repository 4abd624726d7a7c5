"""What is measured is complete, compared, and told; what cannot run does not stop the rest."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import bench, flash_attention
from kernels_pallas.attention.bench import Case


@pytest.fixture(scope="module")
def records():
    def fails(case):
        raise RuntimeError(f"no {case.length}\nand more")

    def fails_later(case):
        return lambda q, k, v: jnp.zeros(())

    def halved(case):
        return lambda q, k, v: 0.5 * flash_attention(q, k, v, causal=case.causal)

    cases = [Case(24, heads=4, kv_heads=2, size=8, causal=causal) for causal in (False, True)]
    more = {"fails": fails, "fails later": fails_later, "halved": halved}
    return bench.measure(cases, repeats=2, more=more)


def of(records, name):
    return [record for record in records if record.name == name]


def test_records_are_complete(records):
    names = [record.name for record in records[: len(records) // 2]]
    assert names[:2] == ["ours: xla", "ours: reference"]
    assert set(bench.RIVALS) < set(names)
    for record in records:
        if record.reason:
            continue
        assert set(record.seconds) == set(record.temporary) == set(bench.PARTS)
        for values in record.seconds.values():
            assert len(values) == 2 and min(values) > 0
        assert record.rate("backward") > 0


@pytest.mark.parametrize("name", ["ours: reference", bench.BASELINE, bench.EINSUM])
def test_rivals_are_the_same_attention(records, name):
    for record in of(records, name):
        assert record.difference < 1e-5 and not record.differs


def test_what_fails_is_listed_in_one_line_and_what_differs_is_marked(records):
    assert [record.reason for record in of(records, "fails")] == ["no 24"] * 2
    for name in ("fails later", "jax.nn, cuDNN", "jax Pallas splash, TPU", "jax Pallas mgpu"):
        for record in of(records, name):
            assert record.reason and "\n" not in record.reason and not record.seconds
    for record in of(records, "halved"):
        assert record.differs and not record.reason
        np.testing.assert_allclose(record.difference, 0.5, rtol=1e-5)
    text = bench.table(records)
    assert text.count("DIFFERS") == 2 and text.count("no 24") == 2
    assert "N=24, 4 heads of 8 over 2 of keys, causal, float32" in text


def test_one_alone_is_compared_with_ours():
    case = Case(16, heads=2, size=4)
    (record,) = bench.measure([case], repeats=1, parts=["forward"], only=[bench.EINSUM])
    assert record.name == bench.EINSUM and list(record.seconds) == ["forward"]
    assert 0 < record.difference < 1e-5
    with pytest.raises(ValueError, match="no attention 'fastest'; there are ours: xla"):
        bench.measure([case], only=["fastest"])


def test_operations_are_counted_as_usual():
    assert Case(4096).operations == 4 * 4096**2 * 64 * 4
    assert 2 * Case(4096, causal=True).operations == Case(4096).operations
    record = bench.Record(Case(1000), "", "", 0.0, {"both": [1.0, 2.0, 9.0]})
    assert record.rate("both") == 3.5 * Case(1000).operations / 2


def test_a_program_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 16)
    case = Case(64, heads=2, size=8)
    found = bench.measure([case], repeats=1, only=[bench.BASELINE])
    assert "half of this machine's memory" in found[0].reason


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    arguments = "--lengths 16 8 --heads 2 --size 4 --repeats 1 --causal both --out"
    bench.main([*arguments.split(), str(tmp_path / "new")])
    told = json.loads((tmp_path / "new" / "attention.json").read_text())
    assert {"device", "jax", "date", "settings", "records"} < set(told)
    assert told["settings"]["lengths"] == [16, 8]
    lengths = [(r["case"]["causal"], r["case"]["length"]) for r in told["records"]]
    assert list(dict.fromkeys(lengths)) == [(False, 8), (False, 16), (True, 8), (True, 16)]
    assert not any(math.isnan(r["difference"] or 0.0) for r in told["records"])
    assert (tmp_path / "new" / "attention.png").stat().st_size > 5000
    assert "ours: xla" in capsys.readouterr().out


def test_heads_that_do_not_group_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--heads", "4", "--kv-heads", "3"])
    assert "do not divide into groups" in capsys.readouterr().err
