"""What the tuner measures is what the kernels use."""

import shutil

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import mosaic_gpu, tune
from kernels_pallas.attention.problem import Band, Problem


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "blocks.json"
    shutil.copy(mosaic_gpu.TABLE, path)
    monkeypatch.setattr(mosaic_gpu, "TABLE", path)
    mosaic_gpu._table.cache_clear()
    yield path
    mosaic_gpu._table.cache_clear()


def array(length, size=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, length, 2, size), dtype)


def test_the_fastest_that_compiles_is_used_from_its_length_on(table):
    def timer(size, dtype, causal, length):
        def seconds(kernel, blocks):
            rows, stages = getattr(blocks, kernel)
            fits = rows * stages <= 128
            return abs(rows - 32) + abs(stages - 3) if fits else None

        return seconds

    before = mosaic_gpu.choose_blocks(Problem(1.0, Band(right=0)), array(4096), array(4096))
    mosaic_gpu._table.cache_clear()
    tune.tune([(128, "bfloat16", True, 2048)], timer)
    causal, full = Problem(1.0, Band(right=0)), Problem(1.0, Band())
    chosen = lambda problem, x: mosaic_gpu.choose_blocks(problem, x, x)
    best = mosaic_gpu.Blocks(*[(32, 3)] * 3)
    assert before != best
    assert chosen(causal, array(4096)) == chosen(causal, array(2048)) == best
    assert chosen(full, array(4096)) == chosen(causal, array(4096, dtype=jnp.float16)) == before


def test_head_sizes_between_are_those_of_the_larger(table):
    plain = Problem(1.0, Band())
    wide = mosaic_gpu.choose_blocks(plain, array(512, 64), array(512, 200))
    assert wide == mosaic_gpu.choose_blocks(plain, array(512, 256), array(512, 256))


def test_a_machine_without_a_hopper_gpu_is_told(capsys):
    if mosaic_gpu.why_not_on(jax.default_backend(), jax.devices()[0].device_kind) is None:
        pytest.skip("this machine has a Hopper GPU")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "it runs on Hopper GPUs, this is cpu" in capsys.readouterr().err
