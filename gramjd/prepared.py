"""Prepared ops: those of a function of tensors, recorded once and run again without the Python around them.

What the library does with the factors of a step depends on their sizes alone: which plan contracts which
blocks, what is reshaped to what, which shares are added. When the same has been asked often enough, the ops
below autograd are recorded and written as a Python function, one line for each op. Later calls run that.

- **Key.** Prepared ops are trusted for tensors with the sizes, strides, offsets, dtypes and devices of those
  that they were recorded with, the same of which share memory, and for a key of the caller's, which names
  everything else that the ops depend on.
- **Refused.** A function is called as it is, always, if an op decides by the values of tensors, has a result
  of a size that depends on them, draws random numbers, writes into an argument, or reads a tensor that is no
  argument. A tensor that is the same in all calls is an exception, if :func:`fetched` gets it: the prepared
  ops get it again, and do not keep it.
- **Verified.** Prepared ops are kept if their first run gives the bits that the function gave.
- **Views.** A reshape of a reshape is one view of the memory, ``as_strided``, since the strides are known.
- **Memory.** A tensor is freed after the last line that reads it.
"""

from __future__ import annotations

import math
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramjd import host_memory
from gramjd.internals import (
    SeenOps,
    SeenReads,
    callable_of,
    geometry,
    is_fixed,
    is_watched,
    memory_of,
    written,
)

OFTEN = 4  # calls with one key, before the ops of the next one are recorded
LONGEST = 4000  # ops: with more, they take the time, and not what is around them
MOST = 1024  # keys remembered
EXACT = 2**16  # bytes of a result of which every bit is compared
SMALL = 2**20  # bytes of memory of a tensor that is kept until all ops are recorded

Tensors = Sequence[Tensor]
Function = Callable[[Sequence[Any]], tuple[Tensors, Any]]
_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # size, strides, offset


@dataclass(frozen=True)
class Prepared:
    """The ops of a function of tensors."""

    source: str  # in Python
    run: Callable[[Sequence[Any]], Tensors] = field(repr=False)
    others: Any  # what the function returns besides tensors


_known: OrderedDict[Hashable, Prepared | int | str] = (
    OrderedDict()
)  # calls so far, or why nothing is prepared


def call(function: Function, key: Hashable, tensors: Sequence[Tensor | None]) -> tuple[Tensors, Any]:
    """``function(tensors)``, by prepared ops if there are any.

    Args:
        function: returns tensors that it made, or views of its arguments; and something that is the same
            for all tensors with this key and this geometry.
        key: of everything that the function's ops depend on, besides the geometry of the tensors.
        tensors: all that the function reads, or ``None``.
    """
    shapes = geometry(tensors)
    if shapes is None:
        return function(tensors)
    full = (key, shapes)
    known = _known.get(full, 0)
    if type(known) is Prepared:
        return known.run(tensors), known.others
    if isinstance(known, str) or is_watched():
        return function(tensors)
    if isinstance(known, int) and known < OFTEN:
        _remember(full, known + 1)
        return function(tensors)
    found, ops = record(function, tensors)
    _remember(full, ops)
    return found


def _remember(key: Hashable, known: Prepared | int | str) -> None:
    _known[key] = known
    _known.move_to_end(key)
    while len(_known) > MOST:
        with suppress(KeyError):  # another thread was faster
            _known.popitem(last=False)


def fetched(get: Callable[[], Tensor]) -> Tensor:
    """``get()``, a tensor that depends on a key of :func:`call` alone; prepared ops call ``get`` again."""
    recording: _Recording | None = getattr(_running, "recording", None)
    return get() if recording is None else recording.fetched(get)


def all_ops() -> list[Prepared]:
    """All prepared ops, those that were recorded last come last; ``print(ops.source)`` shows them."""
    return [each for each in _known.values() if isinstance(each, Prepared)]


def forget() -> None:
    """Forget all prepared ops."""
    _known.clear()


def record(
    function: Function, tensors: Sequence[Tensor | None]
) -> tuple[tuple[Tensors, Any], Prepared | str]:
    """The result of ``function(tensors)``, and its ops prepared, or why they cannot be."""
    recording = _Recording(tensors)
    outer = getattr(_running, "recording", None)
    _running.recording = recording
    try:
        with torch.no_grad(), SeenReads(recording.refuse), SeenOps(recording.see):
            found, others = function(tensors)
    finally:
        _running.recording = outer
    outputs = [recording.text(t) for t in found]
    if recording.refusal is not None:
        return (found, others), recording.refusal
    ops = recording.prepared(outputs, others)
    expected = [_digest(t) for t in found]
    del found  # large results are never there twice
    again = ops.run(tensors)
    if [_digest(t) for t in again] != expected:
        return function(tensors), "its first run gave other numbers"
    return (again, others), ops


def _digest(t: Tensor) -> tuple[Any, ...]:
    """All bits of a small tensor; of a large one, sums that differ for other bits, but for rare accidents."""
    real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    bits = real.contiguous().flatten().view(_BITS[min(4, real.dtype.itemsize)])
    known = bits.tolist() if bits.nbytes <= EXACT else [int(bits[::step].sum()) for step in (1, 2, 3, 5, 7)]
    return t.shape, t.stride(), t.dtype, known


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # sums of these do not overflow


_running = threading.local()  # the recording of each thread


class _Recording:
    """The lines, as the ops run."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.refusal: str | None = None
        self.pauses = False
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self.count = 0
        self.small: list[Tensor] = []  # kept, or those that C++ alone has would come back as other objects
        self.tensors: dict[int, _Known] = {}
        self.views: dict[tuple[str, Any], str] = {}  # names by base and geometry
        self.given = len(tensors)
        self.arguments = {memory_of(t) for t in tensors if t is not None}
        for n, t in enumerate(tensors):
            if t is None:
                continue
            self.tensors[id(t)] = _Known(weakref.ref(t), _geometry(t), f"x{n}")
            self.views[f"x{n}", _geometry(t)] = f"x{n}"

    def _reference(self, tensor: Tensor) -> Callable[[], Tensor | None]:
        if tensor.untyped_storage().nbytes() <= SMALL:
            self.small.append(tensor)
        return weakref.ref(tensor)

    def refuse(self, function: str) -> None:
        """Note that a function has read the values of a tensor."""
        if not self.pauses:
            self.refusal = self.refusal or f"{function} depends on the values of tensors"

    def see(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> None:
        """Note one op that has run."""
        if self.refusal is not None or self.pauses:
            return
        if len(self.lines) >= LONGEST:
            self.refusal = f"it has more than {LONGEST} ops"
            return
        if not is_fixed(op, args):
            self.refusal = f"{op} depends on the values of tensors"
            return
        if any(memory_of(t) in self.arguments for t in written(op, args, kwargs)):
            self.refusal = f"{op} writes into an argument"
            return
        if isinstance(found, Tensor):
            known = self._known(found)
            base = None if known else self._base(found, (*args, *kwargs.values()))
            if base is not None:
                self.tensors[id(found)] = _Known(self._reference(found), _geometry(found), None, base)
                return
            text = self._call(op, args, kwargs, found)
            if known is None:
                self._add(text, [self._new(found)])
            elif known.geometry == _geometry(found):
                self._add(text, [])
            else:
                self.refusal = f"{op} changes the size of a tensor"
        elif isinstance(found, (list, tuple)) and all(t is None or isinstance(t, Tensor) for t in found):
            text = self._call(op, args, kwargs, None)
            names = ["_" if t is None else self._new(t) for t in found]
            self.lines.append(_Line(text, names, several=True))
        else:
            self.refusal = f"{op} returns no tensor"

    def fetched(self, get: Callable[[], Tensor]) -> Tensor:
        """``get()``, whose ops are no lines; there is one that calls it."""
        self.pauses = True
        try:
            found = get()
        finally:
            self.pauses = False
        if self._known(found) is None:
            name = f"get{len(self.constants)}"
            self.constants[name] = get
            self._add(f"{name}()", [self._new(found)])
            self.arguments.add(memory_of(found))
        return found

    def prepared(self, outputs: Sequence[str], others: Any) -> Prepared:
        """The lines as a function that returns these tensors."""
        names = [f"x{n}" for n in range(self.given)]
        last: dict[str, int] = {}
        for n, line in enumerate(self.lines):
            last.update(dict.fromkeys([*line.names, *_NAME.findall(line.text)], n))
        lines = [f"[{', '.join(names)}] = tensors"]
        for n, line in enumerate(self.lines):
            results = f"{', '.join(line.names)}{',' if line.several else ''} = " if line.names else ""
            lines.append(results + line.text)
            freed = [name for name, at in last.items() if at == n and name not in outputs]
            lines += [f"del {', '.join(freed)}"] * bool(freed)
        lines.append(f"return [{', '.join(outputs)}]")
        source = "def ops(tensors):\n" + "".join(f"    {line}\n" for line in lines)
        scope = {"empty": host_memory.again, "as_strided": torch.as_strided, **self.constants}
        exec(compile(source, "<prepared>", "exec"), scope)
        return Prepared(source, scope["ops"], others)

    def _known(self, tensor: Tensor) -> _Known | None:
        known = self.tensors.get(id(tensor))
        return known if known is not None and known.reference() is tensor else None

    def _base(self, found: Tensor, arguments: Sequence[Any]) -> str | None:
        """The name of the tensor whose memory a view shows, where entries are the same numbers."""
        for t in arguments:
            if isinstance(t, Tensor) and t.dtype == found.dtype and memory_of(t) == memory_of(found):
                if (t.is_conj(), t.is_neg()) != (found.is_conj(), found.is_neg()):
                    return None  # the memory alone does not tell
                known = self._known(t)
                return None if known is None else known.base or known.name
        return None

    def _viewed(self, base: str, geometry: _Geometry) -> str:
        """The name of a view of a tensor: its own, that of an older line, or that of a new one."""
        if (base, geometry) not in self.views:
            size, stride, offset = geometry
            name, self.count = f"v{self.count}", self.count + 1
            self._add(f"as_strided({base}, {size}, {stride}, {offset})", [name])
            self.views[base, geometry] = name
        return self.views[base, geometry]

    def _new(self, tensor: Tensor) -> str:
        name, self.count = f"v{self.count}", self.count + 1
        self.tensors[id(tensor)] = _Known(self._reference(tensor), _geometry(tensor), name)
        self.views[name, _geometry(tensor)] = name
        return name

    def _add(self, text: str, names: list[str]) -> None:
        self.lines.append(_Line(text, names))

    def _call(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Tensor | None) -> str:
        if op is torch.ops.aten.new_empty.default and found is not None and _is_large(found):
            return f"empty({tuple(found.shape)}, {self.text(args[0])})"
        name = f"{op}".replace("aten.", "").replace(".", "_")
        self.constants[name] = callable_of(op)
        given = [self.text(value) for value in args]
        named = [f"{key}={self.text(value)}" for key, value in kwargs.items()]
        return f"{name}({', '.join([*given, *named])})"

    def text(self, value: Any) -> str:
        """An argument in Python."""
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.text, value))}]"
        if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _name(self, tensor: Tensor) -> str:
        known = self._known(tensor)
        if known is None:
            self.refusal = self.refusal or "it reads a tensor that is not among its arguments"
            return ""
        if known.name is not None:
            return known.name
        return self._viewed(known.base or "", known.geometry)


@dataclass(frozen=True)
class _Known:
    """A tensor of a recording."""

    reference: Callable[[], Tensor | None]
    geometry: _Geometry
    name: str | None  # None: a view of ``base``, of which there is a line where something reads it
    base: str | None = None


@dataclass(frozen=True)
class _Line:
    text: str
    names: Sequence[str]  # of its results
    several: bool = False  # returned as a list


_NAME = re.compile(r"\bv\d+\b")  # in the text of a line


def _geometry(t: Tensor) -> _Geometry:
    return tuple(t.shape), tuple(t.stride()), int(t.storage_offset())


def _is_large(tensor: Tensor) -> bool:
    return tensor.nbytes >= host_memory.LEAST and tensor.device.type == "cpu"
