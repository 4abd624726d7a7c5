import jax
import numpy as np
import pytest

from rlib.parallel import make_mesh, map_over_mesh, mesh_shape, place, shard_batch


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


@pytest.mark.parametrize("rows", [3, 8, 11])
def test_rows_over_eight_devices_are_those_of_one(rows):
    mesh, x = make_mesh({"data": 4, "model": 2}), np.arange(2.0 * rows, dtype=np.float32)
    given = {"x": x.reshape(rows, 2), "y": np.arange(rows)}
    function = lambda own, scale: (own["x"] @ scale, {"y": own["y"] + 1})
    expected = map_over_mesh(function, None, shared=1)(given, np.array([2.0, 1.0], np.float32))
    found = map_over_mesh(function, mesh, shared=1)(given, np.array([2.0, 1.0], np.float32))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(found[0], given["x"] @ [2.0, 1.0])
    assert found[1]["y"].tolist() == list(range(1, rows + 1))
