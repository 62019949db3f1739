"""The registry of op rules: given an op's arguments and cotangents, the block of one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gramjd.blocks import Block
from gramjd.internals import constant_in_graphs

Op = Callable[..., Any]
Rule = Callable[..., Block]
R = TypeVar("R", bound=Rule)
# Which dimensions of an argument meet those of the output: "left", "right", or a function.
Align = str | Callable[[Mapping[Any, Any], str, int], int | None]


@dataclass(frozen=True, eq=False)
class Entry:
    """The rule of one argument of an op."""

    rule: Rule
    needs: frozenset[str]  # arguments whose values the rule reads, besides its own
    align: Align
    when: Callable[[Mapping[Any, Any]], bool] | None  # does the rule cover a call's arguments?

    @property
    def is_ours(self) -> bool:
        """Whether it is a rule of this library: its ops depend on its arguments alone."""
        return self.rule.__module__.startswith(_OURS)


@dataclass
class OpRules:
    """All rules of one op, and the names of its arguments in order."""

    names: tuple[str, ...]
    variadic: bool  # may more positional arguments follow?
    number: int  # its place in the registry
    entries: dict[str, Entry] = field(default_factory=dict)
    align: Align | None = None  # of an op that may have no rule
    only_structure: bool = True  # do ``when``s ask for settings, shapes and dtypes alone? True of ours


_RULES: dict[Op, OpRules] = {}
_BY_NUMBER: list[OpRules] = []
_VERSION = [0]  # grows with every rule that is registered
_OURS = __name__.partition(".")[0] + "."


def register_rule(
    *ops: Op,
    wrt: str,
    needs: Iterable[str] = (),
    align: Align = "left",
    when: Callable[[Mapping[Any, Any]], bool] | None = None,
) -> Callable[[R], R]:
    """Decorator: register the rule of one argument of an op (and of its aliases).

    The rule is a function ``rule(c, *arguments) -> Block`` with the op's own argument names. All
    tensors are canonical: ``c [K, B, *output]`` are the cotangents of the op's output, and an
    argument named in ``needs`` is ``[B, *argument]``, as ``B`` calls of the op would have received
    it, sample by sample. The argument ``wrt`` itself arrives as it is, without ``B``. Tensors that
    are not in ``needs`` arrive as ``None`` and are not kept alive between forward and backward.

    Args:
        ops: the op, as ``torch.overrides`` reports it (``F.linear``, ``torch.Tensor.add``, ...).
        wrt: name of the argument whose block the rule returns.
        needs: names of the tensor arguments whose values the rule reads.
        align: which end of an argument's dimensions corresponds to the output's, where a batch
            dimension of the output has to be found in the argument: ``"left"`` (linear, embedding)
            or ``"right"`` (broadcasting ops). Where neither holds, a function ``(arguments, name,
            dim)`` that maps a dimension of the output to one of the named argument, or to ``None``;
            ``arguments`` are the call's by name, with sizes for tensors, and ``"output"``.
        when: a function from a call's arguments, by name, to whether the rule covers the call. If it does
            not, the block is ``Dense``.

    ``Engine`` compares the result of a rule with autograd. For a wrong rule, it warns and takes a slower
    strategy.

    Raises:
        ValueError: ``wrt`` is not an argument of the rule, or the rules of one op disagree on the
            names of its arguments.
    """
    if align not in ("left", "right") and not callable(align):
        raise ValueError(f"align must be 'left', 'right' or a function, not {align!r}.")

    def register(rule: R) -> R:
        parameters = list(inspect.signature(rule).parameters.values())[1:]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        names = tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
        if wrt not in names:
            raise ValueError(f"The rule {rule.__qualname__} has no argument {wrt!r}; it has {names}.")
        for op in ops:
            known = _known(op, names, variadic)
            if not known.entries:  # names of its alignment give way
                known.names, known.variadic = names, variadic
            if known.names != names:
                raise ValueError(
                    f"The rules of one op must name the same arguments: {rule.__qualname__} has "
                    f"{names}, an earlier rule of {op} has {known.names}."
                )
            known.entries[wrt] = Entry(rule, frozenset(needs) - {wrt}, align, when)
            known.only_structure = known.only_structure and (
                when is None or when.__module__.startswith(_OURS)
            )
            _VERSION[0] += 1
        return rule

    return register


def register_alignment(*ops: Op, names: Sequence[str], align: Align) -> None:
    """Say which dimensions of an op's arguments meet those of its output, where it has no rule.

    So the op can be called for one sample. ``Engine`` does not replay it, even if it has a decomposition.

    Args:
        ops: the op, as :func:`register_rule` takes it.
        names: of its arguments, in order.
        align: see :func:`register_rule`.
    """
    for op in ops:
        _known(op, tuple(names), False).align = align


def _known(op: Op, names: tuple[str, ...], variadic: bool) -> OpRules:
    """The rules of an op, none yet if it is new here."""
    if op not in _RULES:
        _RULES[op] = OpRules(names, variadic, len(_BY_NUMBER))
        _BY_NUMBER.append(_RULES[op])
    return _RULES[op]


def rules_of(op: Op) -> OpRules | None:
    """The rules of an op, if it has any."""
    number = _number_of(op)
    return None if number is None else _BY_NUMBER[number]


@constant_in_graphs
def _number_of(op: Op) -> int | None:
    """Compilers do not recognise every op as the key that it is; they take a number for granted."""
    try:
        known = _RULES.get(op)
    except TypeError:  # an unhashable callable has no rule
        return None
    return known.number if known else None


def version() -> int:
    """A number that differs after a rule has been registered."""
    return _VERSION[0]


def alignment(op: Op) -> Align | None:
    """How the dimensions of an op meet, by one of its rules; ``None`` if nothing is known."""
    known = rules_of(op)
    if known is None:
        return None
    return next((entry.align for entry in known.entries.values()), known.align)


def meets(align: Align, arguments: Mapping[Any, Any], name: str, dim: int) -> int | None:
    """The dimension of an argument that holds the samples in dimension ``dim`` of the output.

    Raises:
        ValueError: the call names arguments that the rules of the op do not know.
    """
    try:
        if callable(align):
            return align(arguments, name, dim)
        if align == "right":
            dim -= len(arguments["output"]) - len(arguments[name])
        return dim if 0 <= dim < len(arguments[name]) else None
    except KeyError as error:
        given = [key for key in arguments if isinstance(key, str) and key != "output"]
        raise ValueError(f"no rule of the op knows the arguments {given}") from error


def weights_of(op: Op) -> frozenset[str]:
    """The arguments that have rules, of an op whose input, the first, has none: all samples share them."""
    known = rules_of(op)
    if known is None or known.names[0] in known.entries:
        return frozenset()
    return frozenset([name for name, entry in known.entries.items() if entry.align == "left"])


@constant_in_graphs
def op_name(op: Op) -> str:
    """The readable name of an op: ``linear``, ``Tensor.add``, ``Tensor.T``."""
    if getattr(op, "__name__", "") == "__get__":  # a property of tensors
        op = op.__self__  # type: ignore[attr-defined]
        return f"Tensor.{op.__name__}"
    kind = getattr(op, "__objclass__", None)  # of methods written in C
    name = getattr(op, "__name__", None) or repr(op)
    return f"Tensor.{name}" if kind is not None else name


def registered() -> list[tuple[Op, str]]:
    """Every (op, argument) that has a rule; the tests go through all of them."""
    return [(op, name) for op, known in _RULES.items() for name in known.entries]


@dataclass(frozen=True)
class Call:
    """One call of an op: its arguments by name (by position where it has no rules)."""

    op: Op
    names: tuple[str | int, ...]
    values: tuple[Any, ...]
    positional: int  # how many of them, from the first, are positional

    @staticmethod
    def of(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Name the arguments of ``op(*args, **kwargs)``."""
        known = rules_of(op)
        given, names = len(args), known.names if known is not None else ()
        positional: tuple[str | int, ...] = tuple(range(given))
        if known is not None and kwargs.keys() <= set(names) and (given <= len(names) or known.variadic):
            positional = (*names[:given], *range(len(names), given))
        return Call(op, (*positional, *kwargs), (*args, *kwargs.values()), given)

    def entry(self, name: str | int) -> Entry | None:
        """The rule of one argument, if one is registered and covers this call."""
        known = rules_of(self.op)
        entry = known.entries.get(name) if known and isinstance(name, str) else None
        covers = entry and (entry.when is None or entry.when(dict(zip(self.names, self.values))))  # noqa: B905
        return entry if covers else None

    def with_op(self, op: Op) -> Call:
        """The call of another op with the same arguments."""
        return Call(op, self.names, self.values, self.positional)

    def __call__(self, values: Sequence[Any]) -> Any:
        """Call the op with these values in place of its own."""
        named = zip(map(str, self.names[self.positional :]), values[self.positional :], strict=True)
        return self.op(*values[: self.positional], **dict(named))
