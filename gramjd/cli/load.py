"""Loads a user's model, batch and losses by the ``FILE:FACTORY`` of the command line."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gramjd import pytree
from gramjd.internals import applied
from gramjd.objectives import Losses, joined

CONTRACT = """\
FILE:FACTORY names a function of no arguments in a Python file (or in an importable module) that returns
(model, batch, losses):

    def factory():
        model = torch.nn.Linear(5, 3)
        batch = torch.randn(16, 5), torch.randint(0, 3, (16,))

        def losses(model, batch):  # one loss for each sample, with a graph
            inputs, labels = batch
            return torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none")

        return model, batch, losses

The batch is whatever losses() takes; an iterator or a DataLoader in its place gives several. Or the function
yields (model, batch, losses) several times, with the same model. Device and precision are the model's own,
unless --device is given."""

MOST = 4  # batches that are taken, unless more are asked for


_FIRST: Any = object()


class CannotRunError(Exception):
    """The user's model could not be loaded or called; the message says what to mend."""


@dataclass(frozen=True)
class Problem:
    """A model and its losses on some batches."""

    model: nn.Module
    batches: Sequence[Any]
    function: Callable[[nn.Module, Any], Losses]
    batch_dim: int | None = 0  # by which a list of losses is joined

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def losses(self, batch: Any = _FIRST) -> Tensor:
        """Run the user's forward, on the first batch unless another is given.

        Raises:
            CannotRunError: it raised an exception, or did not return a tensor with a graph.
        """
        try:
            found = self.function(self.model, self.batches[0] if batch is _FIRST else batch)
            found = joined(found, self.batch_dim)
        except Exception as error:
            raise CannotRunError(f"losses(model, batch) raised {_brief(error)}") from error
        if not isinstance(found, Tensor) or not found.requires_grad:
            got = "a tensor without a graph" if isinstance(found, Tensor) else type(found).__name__
            raise CannotRunError(
                f"losses(model, batch) returned {got}; it must return a tensor of losses, or a list of "
                "them, computed from the model's trainable parameters."
            )
        return found

    def moved_to(self, device: torch.device | None) -> Problem:
        """Move the problem to a device; ``None`` leaves it where it is.

        Raises:
            CannotRunError: the model or a batch cannot be moved.
        """
        if device is None:
            return self
        try:
            batches = pytree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, list(self.batches))
            return replace(self, model=self.model.to(device), batches=batches)
        except Exception as error:
            raise CannotRunError(f"Moving the model to {str(device)!r} raised {_brief(error)}") from error

    def copied(self, *, double: bool = False) -> Problem:
        """Return the problem on a deep copy of the model; ``double`` converts it to float64 and complex128.

        Raises:
            CannotRunError: the model cannot be copied.
        """
        try:
            model = copy.deepcopy(self.model)
        except Exception as error:
            raise CannotRunError(
                f"The model cannot be copied: copy.deepcopy raised {_brief(error)}"
            ) from error
        if not double:
            return replace(self, model=model)
        # not model.double(), which turns complex buffers into real ones
        batches = pytree.map(_doubled, list(self.batches))
        return replace(self, model=applied(model, _doubled), batches=batches)


def _doubled(leaf: Any) -> Any:
    """A tensor of floating or complex numbers in float64 or complex128; anything else as it is."""
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return leaf.to(torch.complex128 if leaf.is_complex() else torch.float64)


def load(spec: str, most: int = MOST, batch_dim: int | None = 0) -> Problem:
    """The problem that ``FILE:FACTORY`` makes, with at most so many batches.

    Raises:
        CannotRunError: there is no such file, module or function; it raised an exception; or it did
            not return what :data:`CONTRACT` says.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise CannotRunError(f"Expected FILE:FACTORY, for instance model.py:factory, got {spec!r}.")
    module = _module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        there = "is not a function" if hasattr(module, name) else "does not exist"
        functions = [n for n, v in vars(module).items() if callable(v) and v.__module__ == module.__name__]
        raise CannotRunError(f"{name!r} {there} in {place}; defined there: {', '.join(functions) or 'none'}.")
    try:
        found = factory()
        several = list(itertools.islice(found, most)) if isinstance(found, Iterator) else [found]
    except Exception as error:
        raise CannotRunError(f"{spec} raised {_brief(error)}") from error
    if not several:
        raise CannotRunError(f"{spec} yielded nothing; it must yield (model, batch, losses).")
    problems = [_problem(spec, each, most) for each in several]
    if any(problem.model is not problems[0].model for problem in problems):
        raise CannotRunError(f"{spec} yielded several models; every (model, batch, losses) must be of one.")
    batches = [batch for problem in problems for batch in problem.batches]
    return replace(problems[0], batches=batches[:most], batch_dim=batch_dim)


def _batches(spec: str, batch: Any, most: int) -> list[Any]:
    """The batches that stand in the place of one."""
    if not isinstance(batch, (Iterator, DataLoader)):
        return [batch]
    try:
        found = list(itertools.islice(batch, most))
    except Exception as error:
        raise CannotRunError(f"The batches of {spec} raised {_brief(error)}") from error
    if not found:
        raise CannotRunError(f"The iterator of batches that {spec} returned is empty.")
    return found


def _problem(spec: str, found: Any, most: int) -> Problem:
    """The problem that a factory returned."""
    if not isinstance(found, tuple) or len(found) != 3:
        got = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise CannotRunError(f"{spec} must return (model, batch, losses), got {got}.")
    model, batch, losses = found
    if not isinstance(model, nn.Module):
        raise CannotRunError(
            f"The model that {spec} returned is no module but of type {type(model).__name__}."
        )
    if not callable(losses):
        raise CannotRunError(
            f"The losses that {spec} returned are of type {type(losses).__name__}; they must be a function "
            "losses(model, batch) that returns one loss for each sample."
        )
    return Problem(model, _batches(spec, batch, most), losses)


def _module(place: str) -> ModuleType:
    """The module of a file or of a dotted name, imported."""
    path = Path(place)
    if not path.is_file() and (path.suffix == ".py" or path.name != place):
        raise CannotRunError(f"There is no file {place!r} (seen from {Path.cwd()}).")
    try:
        if not path.is_file():
            return importlib.import_module(place)
        sys.path.insert(0, str(path.resolve().parent))  # as for a script: its neighbours can be imported
        spec = importlib.util.spec_from_file_location(f"gramjd_user_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise CannotRunError(f"{place!r} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
        spec.loader.exec_module(module)
        return module
    except CannotRunError:
        raise
    except Exception as error:
        raise CannotRunError(f"Importing {place!r} raised {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """Type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}."
