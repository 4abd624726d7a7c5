"""Wire accounting: what a compiled program sends, read from its optimised HLO.

The compiler decides what travels: it merges, splits, replaces and repeats collectives. So bytes are
counted in the text of the compiled program, which CPU, TPU and GPU compilers give alike.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

#: Bytes sent per operand byte in a ring of g devices.
_SENT = {
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
    "reduce-scatter": lambda g: (g - 1) / g,
}
_UNCOUNTED = ("collective-broadcast", "ragged-all-to-all", "send")
#: The axis of a row that crosses the network between TPU slices.
SLICES = "slices"
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class WireRow:
    """Collectives of one kind, over the same axes, of one dtype.

    Fields:
        kind: "all-gather", "all-reduce", "all-to-all", "collective-permute" or "reduce-scatter".
        axes: the mesh axes, in the mesh's order, along which its groups extend; "slices" before
            them where it crosses the network between TPU slices.
        dtype: of the operands, in HLO's spelling ("f32", "bf16", "u8"). A collective that merges
            operands of two dtypes counts in two rows.
        count: how often one execution of the program runs it.
        bytes_sent: by each device (by the busiest, where groups or pairs are uneven).

    >>> row = WireRow("all-reduce", ("data",), "f32", count=2, bytes_sent=3000.0)
    >>> row.bytes_sent / row.count
    1500.0
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int
    bytes_sent: float


@dataclass(frozen=True)
class WireReport:
    """What each device sends in one execution of a program; `str` gives a table.

    Fields:
        rows: sorted, without duplicates.
        notes: where the count is not exact, and why. Empty: exact, by the ring model.

    >>> report = WireReport((WireRow("all-reduce", ("data",), "f32", 2, 3000.0),))
    >>> report.total("data"), report.total("model")
    (3000.0, 0)
    >>> print(report)
    collective  axes  dtype  count  bytes sent per device
    all-reduce  data  f32        2                  3,000
    total                                           3,000
    """

    rows: tuple[WireRow, ...]
    notes: tuple[str, ...] = ()

    def total(
        self, axis: str | None = None, *, kind: str | None = None, dtype: str | None = None
    ) -> float:
        """Bytes sent per device, of the rows that extend along `axis` (alone or with others: 0
        means that nothing crosses it), and are of that kind and dtype."""
        return sum(
            row.bytes_sent
            for row in self.rows
            if (axis is None or axis in row.axes)
            and kind in (None, row.kind)
            and dtype in (None, row.dtype)
        )

    def __str__(self) -> str:
        lines = [("collective", "axes", "dtype", "count", "bytes sent per device")]
        for row in self.rows:
            sent = f"{row.bytes_sent:,.0f}"
            lines.append((row.kind, ", ".join(row.axes), row.dtype, f"{row.count:,}", sent))
        lines.append(("total", "", "", "", f"{self.total():,.0f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = (
            "  ".join(
                cell.rjust(width) if index > 2 else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        return "\n".join([*table, *(f"note: {note}" for note in self.notes)])


def wire_bytes(compiled: jax.stages.Compiled, mesh: Mesh | AbstractMesh) -> WireReport:
    """Bytes that each device sends, and collectives, in one execution of a compiled program.

    With o operand bytes on each device and groups of g devices, rings send 2o(g-1)/g for an
    all-reduce, o(g-1) for an all-gather, o(g-1)/g for an all-to-all or reduce-scatter; a permute
    sends o. Operands are as compiled: a CPU sends bfloat16 sums as float32, a TPU turns a small
    gather into an all-reduce. Groups of one device cost nothing.

    Loops count as often as they turn (if that cannot be read, once, with a note), asynchronous
    collectives once, and of a conditional the branch that sends most (with a note if branches
    differ). Noted, not counted: ragged exchanges, broadcasts, sends to the host. Not seen: what a
    hand-written kernel sends, and padding by the layouts of the machine.

    On several TPU slices the compiler splits an exchange in two: what stays in a slice counts as
    ever, what crosses has "slices" before its axes, so `total("slices")` is the load of the network
    between slices and the other rows that of the links within one.

    Args:
        compiled: `jax.jit(f).lower(...).compile()`, for devices here or elsewhere.
        mesh: the mesh, of the same device order, that the program was compiled for.

    Raises:
        ValueError: the program has no text, or runs on another number of devices than the mesh
            has; or the mesh lays its slices along no axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from rlib.parallel import make_mesh
        >>> mesh = make_mesh({"data": -1})
        >>> mean = lambda x: jax.lax.pmean(x, "data")
        >>> f = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=P("data"), out_specs=P()))
        >>> rows = jax.ShapeDtypeStruct((mesh.size, 1000), jnp.float32)
        >>> sent = wire_bytes(f.lower(rows).compile(), mesh).total(axis="data")
        >>> sent == 2 * 4000 * (mesh.size - 1) / mesh.size
        True
    """
    text = compiled.as_text()
    if not text:
        raise ValueError("this compiled program gives no HLO text to count in")
    devices = () if isinstance(mesh, AbstractMesh) else mesh.devices.flat
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return wire_bytes_of_text(text, mesh, max(slices, 1))


def wire_bytes_of_text(text: str, mesh: Mesh | AbstractMesh, slices: int = 1) -> WireReport:
    """As `wire_bytes`, from the text of an optimised HLO module (`compiled.as_text()`, a dump).

    `slices` TPU slices, if several, share the mesh's first axis in equal parts.

    Raises:
        ValueError: no HLO module, another number of devices than the mesh's, or slices that do not
            share the mesh's first axis.

    >>> from jax.sharding import AbstractMesh
    >>> hlo = '''ENTRY %main (x: u8[6]) -> u8[12] {
    ...   %x = u8[6]{0} parameter(0)
    ...   ROOT %y = u8[12]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
    ... }'''
    >>> print(wire_bytes_of_text(hlo, AbstractMesh((4, 2), ("data", "model"))))
    collective  axes   dtype  count  bytes sent per device
    all-gather  model  u8         1                      6
    total                                                6
    """
    header = text.split("\n", 1)[0]
    sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    if slices > 1:  # each has a program of its own
        first, *others = mesh.shape.values()
        if first % slices:
            raise ValueError(f"{slices} slices do not share the first axis of the mesh, {first}")
        mesh = AbstractMesh((first // slices, *others), mesh.axis_names)
    if (devices := math.prod(map(int, sizes))) not in (1, mesh.size):
        raise ValueError(f"the program runs on {devices} devices, the mesh has {mesh.size}")
    computations, entry = _parse(text)
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    notes: dict[str, None] = {}  # a set in order

    def sent(name: str, chains: set[str]) -> Iterator[WireRow]:
        """Rows of a computation and of what it calls; `chains` are those met in its caller."""
        operations = computations[name]
        for op in operations.values():
            kind = op.opcode.removesuffix("-start")
            if kind in _SENT:
                # A v5e repeats an asynchronous collective in every fusion that overlaps it.
                if chain := re.search(r'chain_id="\w+"', op.attributes):
                    if chain[0] in chains:
                        continue
                    chains.add(chain[0])
                # A TPU's fused all-reduce and slice; its emitter is that of a reduce-scatter.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                yield from _rows(kind, op, operations, mesh)
            elif kind == "send" and _transfer(op) in _SENT:
                yield from _between_slices(op, operations, mesh, slices)
            elif kind in _UNCOUNTED:
                notes[f"{op.name}: a {kind} is not counted"] = None
            elif kind == "while":
                body = list(sent(_called(op, "body")[0], set()))
                condition = list(sent(_called(op, "condition")[0], set()))
                turns = _trip_count(op, operations, computations)
                if turns is None and body + condition:
                    notes[f"{op.name}: unknown trip count, its body is counted once"] = None
                yield from _times(body, 1 if turns is None else turns)
                yield from _times(condition, 1 if turns is None else turns + 1)
            elif kind == "conditional":
                names = "branch_computations|true_computation|false_computation"
                branches = [_merged(sent(branch, set())) for branch in _called(op, names)]
                if any(branch != branches[0] for branch in branches):
                    notes[f"{op.name}: branches differ, the one that sends most is counted"] = None
                yield from max(branches, key=lambda rows: sum(row.bytes_sent for row in rows))
            elif not op.opcode.endswith(("-done", "-update")):
                for callee in _called(op, "calls|to_apply|called_computations"):
                    yield from sent(callee, chains if kind in ("fusion", "async") else set())

    return WireReport(_merged(sent(entry, set())), tuple(notes))


class _Op(NamedTuple):
    """An HLO instruction."""

    root: bool
    name: str
    type: str
    opcode: str
    operands: str
    attributes: str

    def inputs(self) -> list[str]:
        return _NAME.findall(self.operands)


_Computation = dict[str, _Op]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            operations = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            operations[match[2]] = _Op(bool(match[1]), *match.groups()[1:])
    return computations, entry


def _called(op: _Op, attributes: str) -> list[str]:
    found = re.findall(rf"(?:{attributes})=\{{?((?:%[\w.\-]+(?:, )?)+)", op.attributes)
    return _NAME.findall(" ".join(found))


def _merged(rows: Iterable[WireRow]) -> tuple[WireRow, ...]:
    totals: dict[tuple, WireRow] = {}
    for row in rows:
        if row.count:
            key = (row.kind, row.axes, row.dtype)
            old = totals.get(key, replace(row, count=0, bytes_sent=0))
            count, sent = old.count + row.count, old.bytes_sent + row.bytes_sent
            totals[key] = replace(row, count=count, bytes_sent=sent)
    return tuple(totals[key] for key in sorted(totals))


def _times(rows: Iterable[WireRow], n: int) -> Iterator[WireRow]:
    return (replace(row, count=n * row.count, bytes_sent=n * row.bytes_sent) for row in rows)


def _rows(
    kind: str, op: _Op, operations: _Computation, mesh: Mesh | AbstractMesh
) -> Iterator[WireRow]:
    """The rows of one collective, one for each dtype."""
    groups = _groups(op.attributes, mesh.size)
    extends = [False] * len(mesh.axis_names)
    for group in groups:
        coordinates = np.unravel_index(group, tuple(mesh.shape.values()))
        extends = [e or len(set(c.tolist())) > 1 for e, c in zip(extends, coordinates, strict=True)]
    if not any(extends):
        return
    axes = tuple(name for name, along in zip(mesh.axis_names, extends, strict=True) if along)
    for dtype, o in _operand_bytes(op, operations).items():
        yield WireRow(kind, axes, dtype, 1, o * _SENT[kind](max(map(len, groups))))


def _operand_bytes(op: _Op, operations: _Computation) -> dict[str, float]:
    by_dtype: dict[str, float] = {}
    for name in op.inputs():
        if operations[name].type.startswith("token"):
            continue
        for dtype, shape, layout in _ARRAY.findall(operations[name].type):
            length = math.prod(int(size.strip("<=")) for size in shape.split(",") if size)
            by_dtype[dtype] = by_dtype.get(dtype, 0) + length * _width(dtype, layout)
    return by_dtype


def _between_slices(
    op: _Op, operations: _Computation, mesh: Mesh | AbstractMesh, slices: int
) -> Iterator[WireRow]:
    """The rows of an exchange between TPU slices; `mesh` is that of one slice.

    Device d of slice s is number 100000 s + d. A device exchanges with its twins in the other
    slices, or, all to all, with the members of a listed group, of which some are in its own slice.
    """
    kind = _transfer(op)
    axes: tuple[str, ...] = (SLICES, mesh.axis_names[0])
    if targets := re.search(r"_xla_megascale_target=\{(\{[\d,{}]*\})\}", op.attributes):
        listed = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", targets[1])]
        inside = [[d % 100_000 for d in group if d // 100_000 == 1] for group in listed]
        groups = str(inside).replace(" ", "").replace("[", "{").replace("]", "}")
        local = op._replace(attributes=f"replica_groups={groups}")
        for row in _rows(kind, local, operations, mesh):
            axes = (SLICES, *row.axes)
            yield replace(row, bytes_sent=row.bytes_sent / slices)
    for dtype, o in _operand_bytes(op, operations).items():
        yield WireRow(kind, axes, dtype, 1, o * _SENT[kind](slices))


def _transfer(op: _Op) -> str:
    """Kind of a send between TPU slices, "" for another one."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
    name = found[1].lower().replace("_", "-") if found else ""
    return "collective-permute" if name == "one-to-one" else name


def _width(dtype: str, layout: str) -> float:
    """Bytes of an element; those of less than a byte are packed where the layout says E(bits)."""
    if packed := re.search(r"E\((\d+)\)", layout):
        return int(packed[1]) / 8
    bits = re.search(r"\d+", dtype)
    return math.ceil(int(bits[0]) / 8) if bits else float(dtype == "pred")


def _groups(attributes: str, n: int) -> list[list[int]]:
    """The groups of a collective among n devices; of a permute, the pairs."""
    groups, pairs = "replica_groups=", "source_target_pairs="
    if listed := re.search(rf"({groups}|{pairs})\{{((?:\{{[\d,]*\}},?)*)\}}", attributes):
        everyone = [[*range(n)]] if listed[1] == groups else []
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[2])] or everyone
    if iota := re.search(groups + r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape(_ints(iota[1])).tolist()
    order = r"(?:, device_ids=\(([\[\]\d,]+(?:T\([\d,]+\))?)\))?"
    if not (named := re.search(groups + rf"mesh\[(.*?)\]{order} \{{(.*?)\}}", attributes)):
        raise ValueError(f"cannot read the device groups of a collective: {attributes[:200]}")
    # A mesh of the compiler's own. 'axis_1':(2)4 is a part of an axis: cut the axis into 2, 4 and
    # the rest; the groups extend along the 4.
    parts = re.findall(r"('[^']+')(?::\((\d+)\)(\d+))?", named[3])
    shape, inside = [], []
    for axis, size in re.findall(r"('[^']+')=(\d+)", named[1]):
        spans = [
            (int(start or 1), int(start or 1) * int(length or size))
            for name, start, length in parts
            if name == axis
        ]
        for low, high in itertools.pairwise(sorted({1, int(size), *itertools.chain(*spans)})):
            shape.append(high // low)
            inside.append(any(start <= low and high <= stop for start, stop in spans))
    devices = _iota(named[2] or f"[{n}]").reshape(shape)
    width = math.prod(size for size, along in zip(shape, inside, strict=True) if along)
    return devices.transpose(np.argsort(inside, kind="stable")).reshape(-1, width).tolist()


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.strip("[]()").split(",")]


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0): 0 to 7, reshaped to (2, 4), transposed, flattened. A plain list is itself."""
    if not text.startswith("["):
        return np.array(_ints(text))
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return devices.transpose(_ints(order) if order else None).ravel()


def _trip_count(
    loop: _Op, operations: _Computation, computations: dict[str, _Computation]
) -> int | None:
    """How often a loop turns; None if that cannot be read."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    # The TPU compiler leaves no such mark: read `for (i = start; i < limit; i += step)`.
    condition, body = (computations[_called(loop, key)[0]] for key in ("condition", "body"))
    test, after = (next(op for op in ops.values() if op.root) for ops in (condition, body))
    before = _source(operations, loop.inputs()[0])
    if test.opcode != "compare" or not before.opcode == after.opcode == "tuple":
        return None
    index = _counter(condition, test.inputs()[0])
    limit = _constant(condition, test.inputs()[1])
    if index is None or limit is None or "direction=LT" not in test.attributes:
        return None
    start = _constant(operations, before.inputs()[index])
    update = _source(body, after.inputs()[index])
    if start is None or update.opcode != "add" or _counter(body, update.inputs()[0]) != index:
        return None
    step = _constant(body, update.inputs()[1])
    return max(0, math.ceil((limit - start) / step)) if step else None


def _source(operations: _Computation, name: str) -> _Op:
    """The instruction that makes a value, behind its copies."""
    while operations[name].opcode in ("bitcast", "copy"):
        name = operations[name].inputs()[0]
    return operations[name]


def _constant(operations: _Computation, name: str) -> int | None:
    op = _source(operations, name)
    scalar = op.opcode == "constant" and re.fullmatch(r"-?\d+", op.operands)
    return int(op.operands) if scalar else None


def _counter(operations: _Computation, name: str) -> int | None:
    """Which element of a computation's parameter a value is."""
    op = _source(operations, name)
    if op.opcode != "get-tuple-element" or operations[op.inputs()[0]].opcode != "parameter":
        return None
    return int(op.attributes.partition("index=")[2].split(",")[0])
