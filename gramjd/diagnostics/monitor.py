"""``Monitor``: the diagnostics of a training run, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gramjd.diagnostics import figures, numbers
from gramjd.diagnostics.numbers import Labels, Source
from gramjd.jacobian import Jacobian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

When = int | Callable[[int], bool] | None


class Writer(Protocol):
    """The methods of ``torch.utils.tensorboard.SummaryWriter`` that a monitor calls."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None: ...


class Monitor:
    """Logs what the Gramians of a training run say, as numbers and as figures.

    Args:
        writer: a ``SummaryWriter`` or anything with its ``add_scalar`` and ``add_figure``; ``None``
            to keep the history alone.
        scalars: the steps at which numbers are taken: every ``scalars``-th step; the steps for which a
            function returns true; or none (``None``). At other steps a call costs nothing.
        figures: the steps at which figures are drawn, likewise; needs matplotlib.
        prefix: the beginning of each tag.
        per: the layers in figures, as for :func:`gramjd.diagnostics.layers`, such as the model.

    Attributes:
        steps: the steps at which numbers were taken.
        history: these numbers by name: ``conflict_rate``, ``effective_rank``, ``mean_norm``,
            ``largest_norm``, ``outliers`` (how many) and, where weights were given,
            ``angle_to_mean`` (degrees), ``raised`` (the share of objectives that the step raises, to
            first order) and ``least_descent`` (the smallest cosine of a gradient and the step).
        weights: the weights of these steps, if they were given.

    Raises:
        ValueError: a number of steps is not positive, or figures are asked for without a writer.

    Examples:
        >>> monitor = Monitor(SummaryWriter(), scalars=10, figures=500, per=model)
        >>> J = engine.jacobian(losses)
        >>> gramian = J.gramian()
        >>> weights = upgrad(gramian)
        >>> monitor.log(step, gramian, weights, labels=labels, jacobian=J)
        >>> J.backward(weights)
    """

    def __init__(self, writer: Writer | None = None, *, scalars: When = 1, figures: When = None,
                 prefix: str = "gradients/", per: Any = None) -> None:  # fmt: skip
        for name, when in (("scalars", scalars), ("figures", figures)):
            if isinstance(when, int) and when < 1:
                raise ValueError(
                    f"{name} must be a positive number of steps, a function or None; got {when!r}."
                )
        if figures is not None and writer is None:
            raise ValueError("Figures go to a writer: pass one, or figures=None.")
        self.writer, self.prefix, self.per = writer, prefix, per
        self._scalars, self._figures = scalars, figures
        self.steps: list[int] = []
        self.history: dict[str, list[float]] = {}
        self.weights: list[Tensor] = []

    def __repr__(self) -> str:
        last = f", last={self.steps[-1]}" if self.steps else ""
        writer = type(self.writer).__name__ if self.writer is not None else None
        return (
            f"Monitor(steps={len(self.steps)}{last}, numbers={list(self.history)}, "
            f"scalars={self._scalars!r}, figures={self._figures!r}, writer={writer})"
        )

    def log(self, step: int, source: Source, weights: Tensor | None = None, *, labels: Labels | None = None,
            jacobian: Jacobian | None = None) -> None:  # fmt: skip
        """Take the numbers and draw the figures that are due at a step.

        Args:
            step: the number of the step.
            source: the Gramian of the step, or its Jacobian, of which the Gramian is then computed.
            weights: the weights of the step, shaped like the objectives; pass them always or never.
            labels: a label for each objective, for the figures.
            jacobian: the Jacobian of the step, to draw its layers, if ``source`` is a Gramian.

        Raises:
            ValueError: the weights or labels do not fit the objectives; weights came or went.
        """
        scalars, drawing = _due(self._scalars, step), _due(self._figures, step)
        if not scalars and not drawing:
            return
        gramian = numbers.matrix(source)
        if scalars:
            self._take(step, dict(_numbers(gramian, weights)))
            if weights is not None:
                self.weights.append(weights.detach().cpu())
        if drawing and self.writer is not None:
            jacobian = source if isinstance(source, Jacobian) else jacobian
            for name, ax in self._drawn(gramian, jacobian, weights, labels):
                self.writer.add_figure(self.prefix + name, ax.figure, step)

    def _take(self, step: int, found: dict[str, float]) -> None:
        if self.steps and found.keys() != self.history.keys():
            raise ValueError(
                f"At step {step} there is {sorted(found)}, but {sorted(self.history)} before: pass weights "
                "at every step or at none, and two objectives or more."
            )
        self.steps.append(step)
        for name, value in found.items():
            self.history.setdefault(name, []).append(value)
            if self.writer is not None:
                self.writer.add_scalar(self.prefix + name, value, step)

    def _drawn(self, gramian: Tensor, jacobian: Jacobian | None, weights: Tensor | None,
               labels: Labels | None) -> Iterator[tuple[str, Axes]]:  # fmt: skip
        yield "similarity", figures.plot_similarity(gramian, labels=labels)
        yield "norms", figures.plot_norms(gramian, labels=labels)
        yield "spectrum", figures.plot_spectrum(gramian)
        kinds = len(gramian) if labels is None else len(numbers.numbered(labels, len(gramian))[0])
        if jacobian is not None and kinds > 1:
            yield "layers", figures.plot_layers(jacobian, labels=labels, per=self.per)
        if weights is not None:
            yield "descent", figures.plot_descent(gramian, weights)
        if self.weights and len({len(w) for w in self.weights}) == 1:
            yield "weights", figures.plot_weights(self.steps, self.weights)


def _numbers(gramian: Tensor, weights: Tensor | None) -> Iterator[tuple[str, float]]:
    norms = numbers.norms(gramian)
    if len(gramian) > 1:
        yield "conflict_rate", numbers.conflict_rate(gramian)
    yield "effective_rank", numbers.effective_rank(gramian)
    yield "mean_norm", float(norms.mean())
    yield "largest_norm", float(norms.max())
    yield "outliers", float(len(numbers.outliers(gramian)))
    if weights is not None:
        descent = numbers.descent(gramian, weights)
        yield "angle_to_mean", numbers.angle(gramian, weights)
        yield "raised", float((descent < 0).double().mean())
        yield "least_descent", float(descent.min())


def _due(when: When, step: int) -> bool:
    if when is None:
        return False
    return step % when == 0 if isinstance(when, int) else bool(when(step))
