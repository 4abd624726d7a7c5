"""Wire accounting: each collective against bytes computed by hand, each syntax of the compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlib.parallel import h100_mesh, make_mesh, make_train_step, tpu_mesh
from rlib.parallel.wire import WireReport, WireRow, wire_bytes, wire_bytes_of_text

# kind: (what to run on a device's array, bytes sent with o operand bytes and g devices)
COLLECTIVES = {
    "all-reduce": (lax.psum, lambda o, g: 2 * o * (g - 1) / g),
    "all-gather": (lax.all_gather, lambda o, g: o * (g - 1)),
    "reduce-scatter": (
        lambda x, axes: lax.psum_scatter(x, axes, tiled=True),
        lambda o, g: o * (g - 1) / g,
    ),
    "all-to-all": (
        lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True),
        lambda o, g: o * (g - 1) / g,
    ),
    "collective-permute": (
        lambda x, axes: lax.ppermute(
            x, axes, [(i, (i + 1) % lax.axis_size(axes)) for i in range(lax.axis_size(axes))]
        ),
        lambda o, g: o,
    ),
}
MESHES = [
    ({"data": 8}, ("data",)),
    ({"data": 4, "model": 2}, ("data",)),
    ({"data": 4, "model": 2}, ("model",)),
    ({"data": 4, "model": 2}, ("data", "model")),
]
TWO = {"data": 4, "model": 2}


def report(mesh, f, shape=(8, 5), dtype=jnp.float32, platform="cpu") -> WireReport:
    """Compile `f` of an array that has this shape on each device."""
    spec = P(mesh.axis_names)
    local = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    whole = jax.ShapeDtypeStruct(
        (mesh.size * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, spec)
    )
    compiled = jax.jit(local).trace(whole).lower(lowering_platforms=(platform,)).compile()
    return wire_bytes(compiled, mesh)


@pytest.mark.parametrize(("sizes", "axes"), MESHES)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_each_collective(kind, sizes, axes):
    mesh = make_mesh(sizes)
    run, cost = COLLECTIVES[kind]
    group = np.prod([sizes[axis] for axis in axes])
    counted = report(mesh, lambda x: run(x, axes))
    assert counted == WireReport((WireRow(kind, axes, "f32", 1, cost(8 * 5 * 4, group)),))
    assert counted.total() == counted.total(axes[0]) == cost(160, group)
    assert counted.total("model") == (counted.total() if "model" in axes else 0)


def test_payloads_are_counted_in_their_own_dtype():
    mesh = make_mesh(TWO)

    def exchange(x):
        packed = lax.all_to_all(x, "data", 0, 0, tiled=True)
        scale = lax.pmax(jnp.sum(packed.astype(jnp.float32)), "model")
        return lax.all_gather(packed, "data", tiled=True) * scale.astype(jnp.uint8)

    counted = report(mesh, exchange, (32, 128), jnp.uint8)
    assert counted.total(dtype="u8") == 32 * 128 * 3 / 4 + 32 * 128 * 3
    assert counted.total(dtype="u8", kind="all-to-all") == 32 * 128 * 3 / 4
    assert counted.total("model") == counted.total(dtype="f32") == 4


def tanh_of_sum(axis):
    return lambda x: jnp.tanh(lax.psum(x, axis))


def repeat(f, n):
    return lambda x: lax.scan(lambda x, _: (f(x), None), x, None, length=n)[0]


LOOPS = {
    "scan": (repeat(tanh_of_sum("data"), 7), {"data": 7}),
    "scan of one": (repeat(tanh_of_sum("data"), 1), {"data": 1}),
    "from 2 to 11": (
        lambda x: lax.fori_loop(2, 11, lambda i, x: i * tanh_of_sum("data")(x), x),
        {"data": 9},
    ),
    "unrolled": (
        lambda x: lax.scan(lambda x, _: (tanh_of_sum("data")(x), None), x, None, 12, unroll=4)[0],
        {"data": 12},
    ),
    "nested": (
        repeat(lambda x: repeat(tanh_of_sum("data"), 5)(tanh_of_sum("model")(x)), 3),
        {"data": 15, "model": 3},
    ),
}


def check_loop(mesh, name, shape, platform):
    f, counts = LOOPS[name]
    counted = report(mesh, f, shape, platform=platform)
    assert {row.axes: row.count for row in counted.rows} == {(k,): n for k, n in counts.items()}
    for axis, n in counts.items():
        size = mesh.shape[axis]
        assert counted.total(axis) == n * 2 * np.prod(shape) * 4 * (size - 1) / size
    assert not counted.notes


@pytest.mark.parametrize("name", LOOPS)
def test_loops_multiply(name):
    check_loop(make_mesh(TWO), name, (8, 4), "cpu")


def test_an_unknown_trip_count_is_counted_once_and_noted():
    counted = report(
        make_mesh(TWO), lambda x: lax.while_loop(lambda x: x[0, 0] < 9, tanh_of_sum("data"), x)
    )
    assert counted.total() == 2 * 160 * 3 / 4
    assert len(counted.notes) == 1 and "unknown trip count" in counted.notes[0]
    assert counted.notes[0] in str(counted)
    quiet = report(make_mesh(TWO), lambda x: lax.while_loop(lambda x: x[0, 0] < 9, jnp.tanh, x))
    assert quiet == WireReport(())


def test_a_conditional_counts_the_branch_that_sends_most():
    def f(x):
        def small(x):
            return x + lax.psum(lax.psum(x[:2], "data") + 1, "model").sum()

        return lax.cond(x[0, 0] > 0, small, tanh_of_sum("data"), x)

    counted = report(make_mesh(TWO), f)
    assert counted.rows == (WireRow("all-reduce", ("data",), "f32", 1, 240),)
    assert "branches differ" in counted.notes[0]

    def g(x):
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "data") + 1, tanh_of_sum("data"), x)

    counted = report(make_mesh(TWO), g)
    assert counted.total() == 240 and not counted.notes


def test_what_stays_at_home_is_free():
    counted = report(make_mesh(TWO), jnp.sin)
    assert counted == WireReport(()) and counted.total() == 0
    assert "total" in str(counted)
    alone = make_mesh({"data": 8, "model": 1})
    assert report(alone, lambda x: lax.psum(jnp.sin(x), "model")).rows == ()


def test_another_mesh_is_refused():
    text = "HloModule f, num_partitions=8\n\nENTRY %main (x: f32[]) -> f32[] {\n}"
    with pytest.raises(ValueError, match="runs on 8 devices, the mesh has 4"):
        wire_bytes_of_text(text, AbstractMesh((4,), ("data",)))
    with pytest.raises(ValueError, match="no ENTRY"):
        wire_bytes_of_text("nothing", AbstractMesh((4,), ("data",)))


def test_a_data_parallel_step_sends_its_gradients_and_metrics():
    mesh = make_mesh({"data": -1})
    params = {"in": jnp.ones((3, 16)), "bias": jnp.ones((16,)), "out": jnp.ones((16, 2))}

    def loss(params, frozen, batch, key):
        error = jnp.tanh(batch @ params["in"] + params["bias"]) @ params["out"]
        return jnp.mean(error**2), {"largest": jnp.max(error)}

    built = make_train_step(loss, optax.adam(1e-3), mesh, params)
    state = jax.eval_shape(built.init, params)
    batch = jax.ShapeDtypeStruct((32, 3), jnp.float32)
    counted = wire_bytes(built.step.lower(state, batch).compile(), mesh)
    metrics = 2  # the loss and its companion
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params)) + metrics
    assert counted.total("data") == counted.total() == 4 * numbers * 2 * 7 / 8
    assert {(row.kind, row.dtype) for row in counted.rows} == {("all-reduce", "f32")}
    assert not counted.notes


# What follows is not said by a CPU: shortened texts in the forms of the TPU and GPU compilers.


def module(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    head = f"HloModule m, num_partitions=8\n\n{before}\n"
    return f"{head}ENTRY %main (x: f32[64]) -> f32[] {{\n{body}\n}}\n"


X = "%x = f32[64]{0} parameter(0)"
GROUPS = {  # text: (axes on a 4 x 2 mesh, size of a group)
    "{{0,2,4,6},{1,3,5,7}}": (("data",), 4),
    "{{0,1},{2,3},{4,5},{6,7}}": (("model",), 2),
    "{{0,2},{4,6},{1,3},{5,7}}": (("data",), 2),
    "{{0},{1},{2},{3},{4},{5},{6},{7}}": ((), 1),
    "{{0,3},{1,2},{4,7},{5,6}}": (("data", "model"), 2),
    "{}": (("data", "model"), 8),
    "[1,8]<=[8]": (("data", "model"), 8),
    "[4,2]<=[8]": (("model",), 2),
    "[2,4]<=[4,2]T(1,0)": (("data",), 4),
    "[4,2]<=[2,2,2]T(0,2,1)": (("data",), 2),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": (("data",), 4),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": (("model",), 2),
    "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}": (("data",), 4),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}": (("data", "model"), 8),
    "mesh['axis_0'=8] {'axis_0':(1)4}": (("data",), 4),
    "mesh['axis_0'=8] {'axis_0':(4)2}": (("model",), 2),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(2)2}": (("data",), 2),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(1)2}": (("model",), 2),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}": (("data",), 4),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_the_syntaxes_of_groups(groups):
    axes, size = GROUPS[groups]
    tail = ', dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(f)/{0,1}"}'
    text = module(X, f"ROOT %y = f32[] all-gather(%x), channel_id=1, replica_groups={groups}{tail}")
    rows = wire_bytes_of_text(text, AbstractMesh((4, 2), ("data", "model"))).rows
    expected = (WireRow("all-gather", axes, "f32", 1, 256 * (size - 1)),)
    assert rows == (expected if axes else ())


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0}}", ("data",)),
        ("{{0,1},{1,0}}", ("model",)),
        ("{{0,0},{1,4}}", ("data", "model")),
        ("{{0,0},{1,1}}", ()),
        ("{}", ()),
    ],
)
def test_pairs_of_a_permute(pairs, axes):
    text = module(X, f"ROOT %y = f32[64]{{0}} collective-permute(%x), source_target_pairs={pairs}")
    rows = wire_bytes_of_text(text, AbstractMesh((4, 2), ("data", "model"))).rows
    assert rows == ((WireRow("collective-permute", axes, "f32", 1, 256),) if axes else ())


DATA = "channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}"


def rows_of(*lines, before=""):
    text = module(*lines, before=before)
    return wire_bytes_of_text(text, AbstractMesh((4, 2), ("data", "model")))


def test_gpu_starts_count_once_and_by_their_operands():
    counted = rows_of(
        X,
        "%b = u8[100]{0} fusion(%x), kind=kLoop, calls=%pack",
        f"%s = ((f32[64]{{0}}, u8[100]{{0}}), (f32[256]{{0}}, u8[400]{{0}})) all-gather-start(%x, "
        f"/*index=1*/%b), {DATA}, dimensions={{0}}",
        "%d = (f32[256]{0}, u8[400]{0}) all-gather-done(%s)",
        f"%a = ((f32[64]{{0}}), f32[64]{{0}}) all-to-all-start(%x), {DATA}, dimensions={{0}}",
        "ROOT %e = f32[64]{0} all-to-all-done(%a)",
        before="%pack (p: f32[64]) -> u8[100] {\n  ROOT %q = u8[100]{0} convert(%p)\n}\n"
        f"%orphan (p: f32[64]) -> f32[64] {{\n  %p = f32[64]{{0}} parameter(0)\n"
        f"  ROOT %q = f32[64]{{0}} all-to-all(%p), {DATA}, dimensions={{0}}\n}}\n",
    )
    assert counted.rows == (
        WireRow("all-gather", ("data",), "f32", 1, 768),
        WireRow("all-gather", ("data",), "u8", 1, 300),
        WireRow("all-to-all", ("data",), "f32", 1, 192),
    )


def test_wrapped_asynchronous_computations_count_at_the_start():
    counted = rows_of(
        X,
        "%s = ((f32[64]{0}), f32[64]{0}) async-start(%x), calls=%wrapped",
        "%u = ((f32[64]{0}), f32[64]{0}) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[64]{0} async-done(%u), calls=%wrapped",
        before="%wrapped (p: f32[64]) -> f32[64] {\n  %p = f32[64]{0} parameter(0)\n"
        f"  ROOT %q = f32[64]{{0}} all-reduce(%p), {DATA}, to_apply=%add\n}}\n",
    )
    assert counted.rows == (WireRow("all-reduce", ("data",), "f32", 1, 384),)


def test_gpu_conditionals_name_two_computations():
    branch = (
        "%{} (p: f32[64]) -> f32[64] {{\n  %p = f32[64]{{0}} parameter(0)\n"
        "  ROOT %q = f32[64]{{0}} {}\n}}\n"
    )
    counted = rows_of(
        X,
        "%c = pred[] constant(false)",
        "ROOT %y = f32[64]{0} conditional(%c, %x, %x), true_computation=%yes, "
        'false_computation=%no, metadata={op_name="jit(f)/cond"}',
        before=branch.format("yes", "negate(%p)")
        + branch.format("no", f"all-reduce(%p), {DATA}, to_apply=%add"),
    )
    assert counted.total() == 384 and len(counted.notes) == 1


def test_tpu_fusions_that_share_a_chain_are_one_collective():
    fused = (
        "%part.{0} (p: f32[64]) -> f32[256] {{\n"
        "  %p = f32[64]{{0:T(256)S(1)}} parameter(0)\n"
        "  ROOT %g = f32[256]{{0:T(256)S(1)}} all-gather(%p), {1}, dimensions={{0}}, "
        'frontend_attributes={{chain_id="{2}"}}\n}}\n'
    )
    counted = rows_of(
        "%x = f32[64]{0:T(256)} parameter(0)",
        *(
            f"%f.{i} = (f32[256]{{0:T(256)S(1)}}, u32[]{{:S(2)}}) fusion(%x), kind=kCustom, "
            f"output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%part.{i}"
            for i in range(4)
        ),
        before="".join(fused.format(i, DATA, chain) for i, chain in enumerate("0010")),
    )
    assert counted.rows == (WireRow("all-gather", ("data",), "f32", 2, 2 * 768),)


def test_tpu_fused_all_reduce_and_slice_is_a_reduce_scatter():
    counted = rows_of(
        X,
        "ROOT %y = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1",
        before="%all-reduce-scatter.clone.1 (p: f32[64]) -> f32[16] {\n"
        "  %p = f32[64]{0} parameter(0)\n"
        f"  %r = f32[64]{{0}} all-reduce(%p), {DATA}, to_apply=%add\n"
        "  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}\n}\n",
    )
    assert counted.rows == (WireRow("reduce-scatter", ("data",), "f32", 1, 192),)


@pytest.mark.parametrize(
    ("start", "limit", "step", "turns"),
    [(0, 7, 1, 7), (2, 11, 2, 5), (5, 5, 1, 0), (0, None, 1, None)],
)
def test_tpu_loops_without_a_trip_count(start, limit, step, turns):
    state = "(s32[]{:T(128)}, f32[64]{0:T(256)})"
    bound = "parameter(1)" if limit is None else f"constant({limit})"
    counted = rows_of(
        X,
        f"%zero = s32[]{{:T(128)}} constant({start})",
        "%i = s32[]{:T(128)S(6)} copy(%zero)",
        f"%t = {state} tuple(%i, %x)",
        f'ROOT %w = {state} while(%t), condition=%cond, body=%body, metadata={{op_name="while"}}',
        before=f"%cond (p: (s32[], f32[64])) -> pred[] {{\n  %n = s32[]{{:T(128)}} {bound}\n"
        f"  %p = {state} parameter(0)\n"
        '  %i = s32[]{:T(128)} get-tuple-element(%p), index=0, metadata={op_name="i"}\n'
        "  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT\n}\n"
        f"%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {{\n  %p = {state} parameter(0)\n"
        f"  %one = s32[]{{:T(128)}} constant({step})\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
        "  %c = s32[]{:T(128)S(6)} copy(%i)\n"
        "  %j = s32[]{:T(128)} add(%c, %one)\n"
        "  %v = f32[64]{0:T(256)} get-tuple-element(%p), index=1\n"
        f"  %r = f32[64]{{0:T(256)}} all-reduce(%v), {DATA}, to_apply=%add\n"
        f"  ROOT %t = {state} tuple(%j, %r)\n}}\n",
    )
    assert counted.total() == 384 * (1 if turns is None else turns)
    assert len(counted.notes) == (turns is None)


def test_a_condition_is_evaluated_once_more_than_the_body():
    counted = rows_of(
        X,
        "ROOT %w = f32[64]{0} while(%x), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}',
        before="%cond (p: f32[64]) -> pred[] {\n  %p = f32[64]{0} parameter(0)\n"
        f"  ROOT %r = pred[] all-reduce(%p), {DATA}, to_apply=%or\n}}\n"
        "%body (p: f32[64]) -> f32[64] {\n  ROOT %p = f32[64]{0} parameter(0)\n}\n",
    )
    assert counted.rows == (WireRow("all-reduce", ("data",), "f32", 6, 6 * 384),)


@pytest.mark.parametrize(
    ("array", "dtype", "size"),
    [
        ("s4[32,128]{1,0:T(64,128)(8,1)E(4)}", "s4", 2048),
        ("s4[32,128]{1,0}", "s4", 4096),
        ("pred[3]{0}", "pred", 3),
        ("f8e4m3fn[10]{0}", "f8e4m3fn", 10),
        ("bf16[5,<=3]{1,0:T(8,128)(2,1)S(1)}", "bf16", 30),
        ("c64[]", "c64", 8),
    ],
)
def test_sizes_of_dtypes(array, dtype, size):
    counted = rows_of(
        f"%x = {array} parameter(0)",
        f"ROOT %y = {array} collective-permute(%x), source_target_pairs={{{{0,1}}}}",
    )
    assert counted.rows == (WireRow("collective-permute", ("model",), dtype, 1, size),)


def test_what_is_not_counted_is_noted():
    counted = rows_of(
        X,
        "%s = (f32[64]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true",
        f"ROOT %y = f32[64]{{0}} ragged-all-to-all(%x, %x, %a, %b, %c, %d), {DATA}",
    )
    assert counted.rows == ()
    assert counted.notes == ("s: a send is not counted", "y: a ragged-all-to-all is not counted")


MACHINES = {
    "v5e": (lambda: tpu_mesh("v5e:4x4", {"data": 8, "model": 2}), "tpu"),
    "8 H100": (lambda: h100_mesh(TWO), "cuda"),
}


@pytest.mark.aot
@pytest.mark.parametrize("axes", [("data",), ("model",)])
@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
@pytest.mark.parametrize("machine", MACHINES)
def test_each_collective_of_a_machine(machine, dtype, kind, axes):
    make, platform = MACHINES[machine]
    mesh = make()
    run, cost = COLLECTIVES[kind]
    counted = report(mesh, lambda x: run(x, axes), (4096, 128), dtype, platform)
    size, group = 4096 * 128 * jnp.dtype(dtype).itemsize, mesh.shape[axes[0]]
    if platform == "tpu" and dtype is jnp.uint8 and "reduce" in kind:
        # Sums of bytes are all-reduces, in words of four of them.
        expected = WireRow("all-reduce", axes, "u32", 1, 2 * size * (group - 1) / group)
    else:
        name = "f32" if dtype is jnp.float32 else "u8"
        expected = WireRow(kind, axes, name, 1, cost(size, group))
    assert counted == WireReport((expected,))


@pytest.mark.aot
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_a_machine(machine, name):
    make, platform = MACHINES[machine]
    check_loop(make(), name, (1024, 128), platform)


@pytest.mark.aot
def test_a_small_gather_of_a_tpu_is_an_all_reduce():
    make, platform = MACHINES["v5e"]
    mesh = make()
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    gather = jax.jit(lambda x: 2 * x, out_shardings=NamedSharding(mesh, P()))
    counted = wire_bytes(gather.trace(x).lower(lowering_platforms=(platform,)).compile(), mesh)
    assert counted.rows == (WireRow("all-reduce", ("data",), "f32", 1, 2 * 256 * 7 / 8),)


@pytest.mark.aot
@pytest.mark.parametrize("machine", ["v5e", "v6e", "8 H100"])
def test_sharded_layers_send_the_same_bytes_however_they_are_compiled(machine):
    """Weights over both axes, rows over data: fused, chained, decomposed and scattered."""
    if machine == "8 H100":
        mesh, platform = h100_mesh(TWO), "cuda"
    else:
        mesh, platform = tpu_mesh(f"{machine}:4x4", {"data": 4, "model": 4}), "tpu"
    data, model = mesh.shape["data"], mesh.shape["model"]
    layers, rows, width = 6, 2048, 2048

    def loss(weights, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return x.astype(jnp.float32).mean()

    def array(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    weights = array(P(None, "data", "model"), layers, width, width)
    x = array(P("data"), rows * data, width)
    step = jax.jit(jax.grad(loss)).trace(weights, x)
    counted = wire_bytes(step.lower(lowering_platforms=(platform,)).compile(), mesh)
    shard, activations = 2 * width * width / data / model, 2 * rows * width / model
    over_data = 2 * shard * (data - 1) + 2 * shard * data * (data - 1) / data
    over_model = 3 * activations * (model - 1)  # two gathers and a reduce-scatter
    assert counted.total("data") == layers * over_data
    assert counted.total("model") == layers * over_model
    assert counted.total(kind="all-gather") + counted.total(kind="collective-permute") == layers * (
        2 * shard * (data - 1) + 2 * activations * (model - 1)
    )
    assert not counted.notes


def test_what_crosses_between_tpu_slices_is_told_apart():
    """Of an all-to-all over 2 slices of 4 devices half crosses, three of the rest stay inside."""
    megascale = "is_host_transfer=true, frontend_attributes={_xla_megascale_target="
    groups = "{{100000,100001,200000,200001},{100002,100003,200002,200003}}"
    text = (
        "HloModule m, num_partitions=4\n"
        "ENTRY %main (x: u8[4,8], y: f32[4]) -> u8[4,8] {\n"
        "  %x = u8[4,8]{1,0} parameter(0)\n  %y = f32[4]{0} parameter(1)\n"
        "  %t = token[] after-all()\n"
        f"  %s = (u8[4,8], u32[], token[]) send(%x, %t), channel_id=1, {megascale}{groups},"
        '_xla_megascale_transfer_type="ALL_TO_ALL"}\n'
        f'  %r = (f32[4], u32[], token[]) send(%y, %t), channel_id=2, {megascale}"{{1,2}}x{{0:3}}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %z = u8[4,8]{1,0} copy(%x)\n}\n"
    )
    report = wire_bytes_of_text(text, AbstractMesh((4, 2), ("data", "model")), slices=2)
    assert not report.notes
    assert report.total("slices", kind="all-to-all") == 32 / 2
    assert report.total("slices", kind="all-reduce") == 16
    assert report.total(kind="all-to-all") == 32 * 3 / 4
    assert {r.axes for r in report.rows} == {("slices", "model"), ("model",), ("slices", "data")}
    with pytest.raises(ValueError, match="do not share"):
        wire_bytes_of_text(text, AbstractMesh((1, 8), ("data", "model")), slices=2)
