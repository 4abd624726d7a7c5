import jax
import numpy as np
import pytest

from rlib.parallel import make_mesh, mesh_shape, place, shard_batch


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({"data": -1}, (8,)), ({"data": 4, "model": 2}, (4, 2)), ({"data": 2, "model": -1}, (2, 4))],
)
def test_shapes(sizes, shape):
    assert mesh_shape(sizes, 8) == shape
    mesh = make_mesh(sizes)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == tuple(sizes)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3}, {"data": 3, "model": -1}, {"data": 0}, {"data": -1, "model": -1}, {"data": 4}],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh data="):
        mesh_shape(sizes, 8)


def test_a_batch_is_split_and_its_values_stay():
    mesh = make_mesh({"data": 8})
    host = np.arange(48.0).reshape(16, 3)
    placed = shard_batch(mesh, host)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, host)
    assert {s.data.shape for s in place(mesh, host).addressable_shards} == {(16, 3)}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="data=8"):
        shard_batch(make_mesh({"data": 8}), np.zeros((12, 2)))


def test_a_mesh_of_some_devices():
    assert make_mesh({"data": -1}, jax.devices()[:3]).shape == {"data": 3}
