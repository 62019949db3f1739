"""Cotangents as a backward pass brings them, handed on by region.

A backward pass reaches the regions one after the other. As soon as it has been at all nodes of one, what
follows from their cotangents is computed, and the cotangents are freed: no more of them are alive
than parameters that are used again ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from threading import RLock
from typing import Any

from gramjd.engine.analysis.regions import Region
from gramjd.engine.recording.nodes import Cotangents


class Later(Exception):
    """Raised if a region needs a step that cannot run while a backward pass is in progress."""


class Stream:
    """Takes the cotangents that a backward pass brings, and hands each region's on when it has all.

    Args:
        nodes: of the graph.
        regions: of these nodes.
        early: numbers of the regions that may be handed on while the pass is in progress.
        hand_on: is given the number of a region, its nodes, and their cotangents. A region that it
            raises :class:`Later` for is left for :meth:`finish`.
    """

    def __init__(self, nodes: Sequence[Any], regions: Sequence[Region], early: Collection[int],
                 hand_on: Callable[[int, list[Any], list[Cotangents]], None]) -> None:  # fmt: skip
        self.early, self.hand_on = early, hand_on
        self.nodes = {
            n: [*map(nodes.__getitem__, region.nodes)] for n, region in enumerate(regions)
        }  # yet to do
        self.left = {n: set(mine) for n, mine in self.nodes.items()}  # those that nothing has come for
        self.region = {node: n for n, mine in self.nodes.items() for node in mine}
        self.cotangents: dict[Any, Cotangents] = {}
        self.error: Exception | None = None
        self.lock = RLock()  # autograd has a thread for each device

    def receive(self, node: Any, cotangents: Cotangents) -> None:
        """Take the cotangents of the outputs of a node."""
        with self.lock:
            number = self.region[node]
            if self.error is not None or number not in self.nodes:
                return
            self.cotangents[node] = cotangents
            left = self.left[number]
            left.discard(node)
            if not left and number in self.early:
                try:
                    self._done(number)
                except Later:
                    pass
                except Exception as error:  # raised when the pass is over: autograd has errors of its own
                    self.error = error

    def missing(self) -> list[Any]:
        """Nodes that nothing has come for."""
        return [node for mine in self.nodes.values() for node in mine if node not in self.cotangents]

    def finish(self) -> None:
        """Hand on what is left; the pass is over."""
        if self.error is not None:
            raise self.error
        for number in list(self.nodes):
            self._done(number)

    def _done(self, number: int) -> None:
        nodes = self.nodes[number]
        self.hand_on(number, nodes, [*map(self.cotangents.__getitem__, nodes)])
        for node in self.nodes.pop(number):
            del self.cotangents[node]
