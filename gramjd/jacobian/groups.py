"""Selects parameters by name: groups and choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence


def partition(names: Sequence[str], per: str | Mapping[str, Sequence[str]] | Callable[[str], str]
              ) -> dict[str, list[int]]:  # fmt: skip
    """Groups of parameters, as positions in ``names``; each parameter is in exactly one."""
    if per == "parameter":
        _refuse_namesakes(names, names)
        return {name: [n] for n, name in enumerate(names)}
    if isinstance(per, str):
        raise ValueError(f"per must be None, 'parameter', a function or a mapping, not {per!r}.")
    found: dict[str, list[int]] = {}
    if callable(per):
        for n, name in enumerate(names):
            found.setdefault(per(name), []).append(n)
        return found
    found = {group: chosen(names, mine) for group, mine in per.items()}
    taken = [n for which in found.values() for n in which]
    twice = sorted({names[n] for n in taken if taken.count(n) > 1})
    missing = [name for n, name in enumerate(names) if n not in taken]
    if twice or missing:
        raise ValueError(
            f"Groups must hold every parameter once; missing are {missing}, and in several are {twice}."
        )
    return found


def chosen(names: Sequence[str], wanted: str | Sequence[str] | Callable[[str], bool]) -> list[int]:
    """Positions of the wanted names."""
    if isinstance(wanted, str):
        wanted = [wanted]
    if callable(wanted):
        which = [n for n, name in enumerate(names) if wanted(name)]
    else:
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(
                f"There is no parameter {unknown[0]!r} in this Jacobian; there are {list(names)}."
            )
        which = [names.index(name) for name in wanted]
    if not which:
        raise ValueError(f"No parameter was chosen; there are {list(names)}.")
    _refuse_namesakes(names, [names[n] for n in which])
    return which


def _refuse_namesakes(names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise if a wanted name is that of two parameters, as the keys "a", "b" in a row and "a.b" give."""
    count = Counter(names)
    twice = sorted({name for name in wanted if count[name] > 1})
    if twice:
        raise ValueError(f"Several parameters are called {twice[0]!r}: rename a key of theirs.")
