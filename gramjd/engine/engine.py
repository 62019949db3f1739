"""``Engine``: Gramians in ordinary training loops around existing modules."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import NoneType
from typing import Any, overload

import torch
from torch import Tensor, nn

from gramjd import distributed, gramians, pytree
from gramjd.blocks import Block
from gramjd.contraction import Options
from gramjd.engine.analysis.graph import walk
from gramjd.engine.analysis.reach import reach
from gramjd.engine.recording.compiled import StandIns
from gramjd.engine.recording.nodes import forget
from gramjd.engine.recording.watcher import AfterHook, BeforeHook, Watcher
from gramjd.engine.registry import Registry
from gramjd.engine.sharded import Lockstep, refuse_flat, refuse_parallel
from gramjd.engine.slow_path import warn_of_rows
from gramjd.engine.solving import finite
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.program import Solution
from gramjd.engine.solving.proofs import Proofs, describe
from gramjd.engine.solving.solve import Request, solve
from gramjd.engine.solving.strategies import STRATEGIES
from gramjd.engine.step import Scaled, Step, Weightings
from gramjd.errors import CheckFailedError, NotCoveredError, NotFiniteError
from gramjd.explanation import Explanation, explanation
from gramjd.jacobian import Factors, FactorsOrSum, GramianSum, Jacobian, Output, Sink, SketchSum, groups
from gramjd.jacobian.lazy import Groups, Per
from gramjd.jacobian.projection import Projection
from gramjd.objectives import Losses, Weights, joined
from gramjd.rounding import own_precision
from gramjd.sketched import SketchedGramian
from gramjd.verification.schedule import Check

_NOT_GIVEN: Any = ...  # the batch dimension may be the last positional argument, as in TorchJD


class Engine:
    """Computes the Gramian of the Jacobian of a tensor with respect to modules' parameters.

    The Jacobian itself is never stored (Quinton and Rey, arXiv 2406.16232, Section 6). A drop-in
    replacement for ``torchjd.autogram.Engine``. A complex parameter counts as its real and imaginary
    parts, so that the Gramian is ``Re(J Jᴴ)``.

    Args:
        modules: modules, each of which means its whole subtree; or one iterable of modules,
            each of which means its direct parameters. Overlaps count once.
        batch_dim: the dimension of the outputs that counts independent samples; ``None`` for any other
            computation. You must pass it, by name or after an iterable of modules.
        check: when the blocks are proved equal to autograd's gradients with random weights. ``"first"``:
            once for each structure of the graph; the positions of the samples are measured until it is
            proven that they cannot change. ``"always"``: in each call. ``"never"``.
        audit: with ``check="first"``, what was proven is verified again in the second, fourth, eighth …
            call of a structure and in each ``audit``-th one; ``None`` for no audits.
        strategies: the allowed strategies to obtain blocks, best first. ``"losses"``: one ordinary
            backward pass for each loss, for up to sixteen losses without a batch dimension, if all rows
            fit into memory; as long as an engine has met no other outputs, it records no further forward
            passes. ``"ops"``: the ops that the forward pass ran. ``"functional"``: a replay of a module call
            under ``vmap(vjp)``. ``"rows"``: one backward pass for each row of ``J``.
        memory_budget: bytes of working memory that the products of :meth:`compute_gramian` may use beside
            the result, and that the factors of :meth:`backward` may take; ``None``: parts of the free memory.
        accumulate_dtype: the dtype in which products are added up, and of the Gramian; ``None``: float32
            for parameters in float16 or bfloat16, else the dtype of the parameters.
        ways: deprecated, the former name of ``strategies``.

    Raises:
        TypeError: an argument is not a module.
        ValueError: there is no module, an option is unknown, ``memory_budget`` is not a positive
            number of bytes, or ``accumulate_dtype`` is not a floating dtype.
        NotImplementedError: a module is a ``FullyShardedDataParallel``; use ``fully_shard``.

    Examples:
        >>> engine = Engine(model, batch_dim=0)
        >>> losses = criterion(model(input), target)  # shape: [m]
        >>> gramian = engine.compute_gramian(losses)  # shape: [m, m]
        >>> losses.backward(weighting(gramian))
    """

    def __init__(
        self,
        *modules: nn.Module | Iterable[nn.Module] | int | None,
        batch_dim: int | None = _NOT_GIVEN,
        check: Check = "first",
        audit: int | None = 256,
        strategies: Sequence[str] = tuple(STRATEGIES),
        memory_budget: int | None = None,
        accumulate_dtype: torch.dtype | None = None,
        ways: Sequence[str] | None = None,
    ) -> None:
        found, recurse, batch_dim = _parse(modules, batch_dim)
        if ways is not None:
            warnings.warn(
                "Engine takes strategies= in place of ways, its former name.",
                DeprecationWarning,
                stacklevel=2,
            )
            strategies = ways
        _refuse_options(check, audit, strategies)
        self._modules, self._recurse, self._batch_dim = found, recurse, batch_dim
        self._check, self._audit = check, audit
        self._strategies = tuple([each for each in STRATEGIES if each in strategies])
        self._options = Options(memory_budget, accumulate_dtype)
        self._proofs = Proofs(audit if check == "first" else None)
        refuse_flat(found)
        self._registry = registry = Registry(found, recurse)
        self._watcher = Watcher(registry.held, self._strategies)
        watcher = weakref.ref(self._watcher)
        registry.stand_ins = StandIns(watcher)
        registry.held()  # sharded parameters are seen before a forward gathers them
        handles: list[Any] = [registry.stand_ins]
        for module in registry.hooked():
            before, after = BeforeHook(watcher), AfterHook(watcher)
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True, always_call=True),
            ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    # fmt: off
    @overload
    def compute_gramian(self, losses: Losses, /, *, group: Any = ..., rows: str = ..., flat: bool = ...,
                        sketch: None = None) -> Tensor: ...
    @overload
    def compute_gramian(self, losses: Losses, /, *, group: None = None, rows: str = ..., flat: bool = ...,
                        sketch: int | Projection) -> SketchedGramian: ...
    # fmt: on

    def compute_gramian(
        self, losses: Losses, /, *, group: Any = None, rows: str = "all", flat: bool = False,
        sketch: int | Projection | None = None,
    ) -> Tensor | SketchedGramian:  # fmt: skip
        """The generalized Gramian ``G = J Jᵀ`` of an output with respect to the parameters.

        Args:
            losses: the output to differentiate: a tensor of any shape with a graph. The graph is kept, so
                that ``losses.backward(weights)`` can follow. A list or tuple of tensors means all their
                entries, one after the other. With a ``batch_dim``, it means their stack along a new last
                dimension (a new first one, if ``batch_dim`` is negative).
            group: a ``torch.distributed`` process group, or a ``DeviceMesh`` of one dimension. Each rank
                calls this method with the output of its own samples; a rank may have none. The Gramian is
                that of all samples, in order of ranks. With ``batch_dim=None``, each objective is a sum
                over ranks (a task loss), each rank's output is its share, and the Gramian is that of the
                sums. :func:`gramjd.distributed.local_weights` helps with the step that follows.
            rows: with a group, ``"all"``, or ``"local"`` for only the rows of this rank's samples.
            flat: whether to return a matrix, as TorchJD 0.12 and newer: :func:`gramjd.gramians.flatten`.
            sketch: for thousands of losses: return a :class:`~gramjd.SketchedGramian` with so many columns,
                or by a :class:`~gramjd.Projection`. Its memory grows with the number of losses, not with
                the square of it. See :meth:`gramjd.Jacobian.gramian`.

        Returns:
            ``[*losses.shape, *reversed(losses.shape)]``, exactly symmetric, detached, on the
            losses' device: ``[m, m]`` for losses ``[m]``, the squared norm of the gradient for a
            scalar. With ``flat``, ``[m, m]`` for ``m = losses.numel()``. With a group, both halves of the
            shape count the samples of all ranks; with ``rows="local"``, the first half counts those of
            this rank.

        Raises:
            NoGraphError: the output has no graph, or it has been freed.
            NotCoveredError: no trainable registered parameter takes part in the output.
            NotSeparableError: ``batch_dim`` is not a dimension of independent samples.
            CheckFailedError: none of the allowed strategies gives a Gramian that agrees with autograd.
            NotFiniteError: the output has NaN or infinite entries, or its gradients have.
            ValueError: the output is empty, or has no dimension ``batch_dim``; ``rows`` without a group;
                ``rows="local"`` with ``flat``; a ``sketch`` with a group.
            TypeError: the output is complex.
            RanksDisagreeError: ranks have different models or settings; all of them raise it.
            RankFailedError: another rank could not take part; it raises what it failed by.
        """
        output: Tensor = joined(losses, self._batch_dim)
        self._refuse(output, group, rows, flat)
        if sketch is not None:
            return self._sketched(output, Projection.of(sketch), flat, group)
        if group is None:
            gramian = self._streamed(output, GramianSum(self._options, output.device))
        else:
            gramian = self._gramian_of_ranks(self._jacobian_of_ranks(output, group), None, group, rows)
        finite_output = torch.isfinite(output.detach()).all().to(gramian.device)
        right = torch.isfinite(gramian).all() & finite_output
        if not bool(right if rows != "local" else distributed.everywhere(group, right)):  # one for all
            raise self._not_finite(gramian, output, group is not None)
        gramian = gramian.to(output.device)
        return gramians.flatten(gramian) if flat else gramian

    # fmt: off
    @overload
    def backward(self, losses: Losses, /, weighting: Weights, *, per: None = None, flat: bool = ...,
                 inputs: Tensor | Iterable[Tensor] | None = ..., retain_graph: bool = ...,
                 scaler: Any = ..., group: Any = ..., averaged: bool = ...) -> Tensor: ...
    @overload
    def backward(self, losses: Losses, /, weighting: Weightings, *, per: Groups, flat: bool = ...,
                 inputs: None = None, retain_graph: bool = ..., scaler: Any = ..., group: Any = ...,
                 averaged: bool = ...) -> dict[str, Tensor]: ...
    @overload
    def backward(self, losses: Losses, /, weighting: Weightings, *, per: Per, flat: bool = ...,
                 inputs: Tensor | Iterable[Tensor] | None = ..., retain_graph: bool = ...,
                 scaler: Any = ..., group: Any = ..., averaged: bool = ...) -> Any: ...
    # fmt: on

    def backward(self, losses: Losses, /, weighting: Weightings, *, per: Per = None, flat: bool = False,
                 inputs: Tensor | Iterable[Tensor] | None = None, retain_graph: bool = False,
                 scaler: Any = None, group: Any = None, averaged: bool = True) -> Any:  # fmt: skip
        """A step of Jacobian descent: Gramian, weights, and the weighted gradient added to ``.grad``.

        It does the same as ``weights = weighting(engine.compute_gramian(losses));
        losses.backward(weights)``, for all leaves, registered or not (*partial* Jacobian descent). If all
        leaves are registered, no second backward pass runs: the gradients are products of the factors, as in
        :meth:`gramjd.Jacobian.backward`. This takes less time and more memory, and the graph stays until
        you delete the losses (``del losses``). For weights from the Gramian of a representation (MGDA-UB),
        call :func:`gramjd.backward` with this tensor. Factors that take more than ``memory_budget`` bytes, or
        more than a quarter of the free memory, are not kept: a second backward pass runs in their place.

        Args:
            losses: as in :meth:`compute_gramian`: a tensor of any shape, or a list or tuple of tensors.
            weighting: from their Gramian to one weight for each, such as those of
                ``gramjd.weighting`` and of ``torchjd.aggregation``.
            per: groups of parameters, as in :meth:`gramjd.Jacobian.gramian`. Each group gets its own
                weights, from its own Gramian, and every leaf must be in a group. ``weighting`` may be a
                mapping from groups to weightings. It must be one if the weightings have a state.
            flat: whether the weighting takes ``[m, m]`` and returns ``[m]``, as TorchJD's do.
            inputs: the leaves that get gradients; all of them by default.
            retain_graph: whether a backward pass for the gradients keeps the graph, as in ``torch``.
            scaler: a ``GradScaler``, for mixed precision. ``.grad`` then has the gradients of
                ``scaler.scale(losses)``, which ``scaler.step(optimizer)`` unscales. The weighting gets the
                Gramian of the unscaled losses. If gradients overflow, ``.grad`` becomes infinite, and the
                scaler skips the step and lowers its scale. The weights are then NaN; with ``per``, the
                dictionary is empty. With a process group, an overflow is an error.
            group: a process group, as in :meth:`compute_gramian`: the weights are those of the losses of
                all ranks, and ``.grad`` gets this rank's share of the gradient.
            averaged: with a group, whether gradients are averaged over it, as by
                ``DistributedDataParallel`` and ``fully_shard``; see :func:`gramjd.distributed.local_weights`.

        Returns:
            The weights, shaped like the losses (of all ranks, with a group), detached; with ``per`` a
            dictionary of them by group.

        Raises:
            NotCoveredError: no trainable registered parameter takes part; with ``per``, a leaf is in no
                group.
            TypeError, ValueError: the weights are no tensor, are not shaped like the losses, or not finite;
                options contradict each other.
            GramjdError: as :meth:`compute_gramian`.

        Examples:
            >>> losses = criterion(model(input), target)  # shape: [m]
            >>> weights = engine.backward(losses, UPGradWeighting())
        """
        output = joined(losses, self._batch_dim)
        scaled = Scaled.by(scaler, output)
        leaves = [inputs] if isinstance(inputs, Tensor) else inputs
        step = Step(
            weighting, per, flat, None if leaves is None else list(leaves), scaled.scale, retain_graph
        )
        output = scaled.output
        if group is not None:
            jac = self._jacobian_of_ranks(output, group)
            gramian = self._gramian_of_ranks(jac, per, group, "all")
            some = gramian if per is None else next(iter(gramian.values()))
            shape = some.shape[: output.ndim]
            dim = self._batch_dim

            def local(weights: Tensor) -> Tensor:
                return distributed.local_weights(weights, output, group, batch_dim=dim, averaged=averaged)

            return step.take(step.of_use(jac, output), gramian, output, shape, local)
        _refuse_empty(output)

        def alone() -> Any:
            jac, gramian = self._for_step(output, step)
            if per is None and not bool(torch.isfinite(gramian).all()):
                raise self._not_finite(gramian, output, False)
            return step.take(jac, gramian, output, output.shape, _all)

        return scaled.attempt(alone, lambda: reach([output]).leaves.values(), per)

    def _sketched(self, output: Tensor, projection: Projection, flat: bool, group: Any) -> SketchedGramian:
        if group is not None:
            raise ValueError("A sketched Gramian is of one process: leave group out.")
        rows = self._streamed(output, SketchSum(projection, self._options, output.device)).to(output.device)
        if not bool(torch.isfinite(output.detach()).all()) and not self._registry.shards.units:
            raise finite.of_output(output, self._batch_dim)
        if not bool(torch.isfinite(rows).all()):
            raise finite.unexplained("sketched Gramian")
        found = SketchedGramian(rows, projection.error)
        return found.flatten() if flat else found

    def _not_finite(self, gramian: Tensor, output: Tensor, in_step: bool) -> NotFiniteError:
        """The error for such a Gramian; it says where from, unless ranks that are in step must not look."""
        if in_step or self._registry.shards.units:
            return finite.unexplained("Gramian")
        dim = self._batch_dim
        if not bool(torch.isfinite(output.detach()).all()):
            return finite.of_output(output, dim)
        return finite.of_gramian(gramian, output, None if dim is None else dim % output.ndim)

    def _jacobian_of_ranks(self, output: Tensor, group: Any) -> Jacobian:
        """The Jacobian of this rank's output by all registered parameters; ranks may use different ones."""
        with distributed.taking_part(group, getattr(output, "device", torch.device("cpu"))):
            jac = self.jacobian(output)
            parameters, spec = pytree.flatten(self._registry.named())
            known = dict(zip(jac.names, jac.blocks, strict=True))
            names = pytree.paths(pytree.unflatten(spec, parameters))
            blocks = [known.get(name, []) for name in names]
            out = jac.outputs
            return Jacobian.of(blocks, parameters, spec, out.each, out.spec, out.samples)

    def _gramian_of_ranks(self, jac: Jacobian, per: Per, group: Any, rows: str) -> Any:
        """The Gramian over a process group; a dictionary of those of groups of parameters."""
        settings = {"batch_dim": self._batch_dim, "check": self._check, "strategies": self._strategies}
        which = {"": range(len(jac.parameters))} if per is None else groups.partition(jac.names, per)
        found = distributed.gramian(jac, which, self._options, group, rows, settings)
        return found[""] if per is None else found

    @own_precision
    def _streamed(self, output: Tensor, total: GramianSum | SketchSum) -> Tensor:
        """The result of a sum that is given the blocks of each region as the backward pass leaves it."""
        problem = self._solve(output, total, deferred=True)[0].problem
        shape = Output(0, tuple(output.shape), problem.batch_dim)
        return total.result(shape, next(iter(problem.parameters.values())))

    def jacobian(self, output: Losses, /) -> Jacobian[Tensor, dict[str, Tensor]]:
        """The lazy Jacobian of an output with respect to the parameters, by name.

        Args:
            output: as ``losses`` of :meth:`compute_gramian`. An output without samples is allowed: its
                Jacobian has no rows.

        Returns:
            A :class:`~gramjd.Jacobian` with as many rows as the output has entries.

        Raises:
            GramjdError, TypeError, ValueError: as :meth:`compute_gramian`.
        """
        return self._jacobian(joined(output, self._batch_dim))[0]

    @own_precision
    def _for_step(self, output: Tensor, step: Step) -> tuple[Jacobian | None, Any]:
        """The Gramian; the Jacobian, too, if its factors are of use for the step and fit into memory."""
        self._validate(output)
        budget = self._options.factors_budget(output.device)
        if step.per is None and not step.by_factors(output, list(self._registry.named().values())):
            budget = 0
        elif step.per is not None or self._registry.shards.units:  # ranks in step all do the same
            budget = sys.maxsize
        found = FactorsOrSum(self._options, output.device, budget)
        request = self._solve(output, found)[0]
        if found.blocks is not None:
            jac = self._jacobian_of(found.blocks, request)
            return jac, jac.gramian(step.per, **asdict(self._options))
        shape = Output(0, tuple(output.shape), request.problem.batch_dim)
        return None, found.total.result(shape, next(iter(request.problem.parameters.values())))

    @own_precision
    def _jacobian(self, output: Tensor) -> tuple[Jacobian[Tensor, dict[str, Tensor]], Request, Solution]:
        """The lazy Jacobian, and what is known of its graph."""
        found = Factors()
        request, solution = self._solve(output, found)
        return self._jacobian_of(found.blocks, request), request, solution

    def _jacobian_of(self, found: Mapping[str, Sequence[Block]], request: Request
                     ) -> Jacobian[Tensor, dict[str, Tensor]]:  # fmt: skip
        problem, named = request.problem, request.problem.parameters
        if self._registry.shards.units:  # the parameters that the optimizer has
            held = self._registry.named()
            named = {name: held[name] for name in problem.parameters}
        by_id = {id(p): found.get(name, []) for name, p in named.items()}
        parameters, spec = pytree.flatten(named)
        shape = Output(0, tuple(problem.output.shape), problem.batch_dim)
        blocks = [by_id[id(p)] for p in parameters]
        return Jacobian.of(blocks, parameters, spec, [shape], pytree.LEAF, problem.samples)

    def _solve(self, output: Tensor, sink: Sink, deferred: bool = False) -> tuple[Request, Solution]:
        """Give ``sink`` the blocks of the parameters that an output depends on.

        If ``deferred``, the caller looks whether the output is finite, where nothing is left to prove: on a
        GPU, each such question waits for the device.
        """
        lockstep, skipped = self._registry.lockstep(), self._watcher.skips
        with torch.no_grad():
            try:
                request = self._request(output, lockstep, deferred)
            except Exception as error:
                if lockstep is not None:  # the others must not wait
                    lockstep.agree(False, [], 0, error)
                raise
            solution = self._solution(request, sink)
        before = request.known.program
        warned = before is not None and "rows" in before.strategies.values()
        if request.problem.samples and not warned and self._strategies != ("rows",):
            closed = not self._finalizer.alive
            warn_of_rows(request.problem, solution.program, closed=closed, skipped=skipped)
        return request, solution

    def _solution(self, request: Request, sink: Sink) -> Solution:
        """Solve what is requested, and remember what that proves or refutes."""
        try:
            solution = solve(request, sink)
        except CheckFailedError:
            if request.known.audit:
                self._proofs.refute(request.known)
            raise
        finally:
            forget(request.problem.graph.nodes)
        if self._check != "always":
            self._proofs.keep(request.known, solution)
        self._watcher.learn(has_read={*solution.program.strategies.values()} != {"losses"})
        return solution

    def _request(self, output: Tensor, lockstep: Lockstep | None, deferred: bool) -> Request:
        """The output's graph, and what is known of its like."""
        batch_dim = self._validate(output)
        graph = walk(output)
        named = self._used(graph.leaves)
        _refuse_complex(output)
        held = tuple(map(id, self._registry.held()[0]))
        samples = None if batch_dim is None else output.shape[batch_dim]
        known = self._proofs.recall(graph, held, tuple(output.shape), samples)
        waits = deferred and lockstep is None and known.is_steady(batch_dim)
        if not waits and not bool(torch.isfinite(output.detach()).all()):
            raise finite.of_output(output, batch_dim)
        problem = Problem(output, batch_dim, graph, named, lockstep)
        return Request(problem, known, self._strategies, self._check != "never", self._options)

    def _used(self, leaves: dict[int, Tensor]) -> dict[str, Tensor]:
        """The parameters, by name, that are among the leaves of a graph."""
        named = self._registry.named(whole=True)
        refuse_parallel(named, leaves)
        used = {name: p for name, p in named.items() if id(p) in leaves}
        if not used:
            self._raise_not_covered()
        return used

    def explain(self, output: Losses, /) -> Explanation:
        """Explain the Gramian of an output: every use of every parameter, with its op and its plan.

        For a parameter that takes per-row backward passes, a column gives the reason. The last line gives the
        evidence for the result: a proof of this call, an earlier proof, or a measurement. The arguments and
        errors are those of :meth:`compute_gramian`.
        """
        jacobian, request, solution = self._jacobian(joined(output, self._batch_dim))
        proof = describe(request, solution, self._check == "always")
        return explanation(jacobian, self._options, proof, str(solution.program))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        modules = ", ".join(type(module).__name__ for module in self._modules)
        state = "" if self._finalizer.alive else ", closed"
        return (
            f"Engine({modules}, batch_dim={self._batch_dim}, parameters={len(self._registry.named())}, "
            f"check={self._check!r}{state})"
        )

    def close(self) -> None:
        """Remove the engine's hooks; the modules are as they were. May be called again."""
        self._finalizer()

    def __reduce__(self) -> Any:
        given = self._modules if self._recurse else [self._modules]
        keywords = {
            "batch_dim": self._batch_dim,
            "check": self._check,
            "audit": self._audit,
            "strategies": self._strategies,
        }
        return _rebuild, (given, {**keywords, **asdict(self._options)})

    def _refuse(self, output: Any, group: Any, rows: str, flat: bool) -> None:
        """Raise for options that contradict each other, and what one process can have no Gramian of."""
        if flat and rows == "local":
            raise ValueError("The rows of one rank are no square matrix: leave flat=True out.")
        if group is None:
            distributed.refuse_rows(rows)
            _refuse_empty(output)
            self._validate(output)

    def _validate(self, output: Any) -> int | None:
        """The batch dimension as a dimension of this output."""
        if not isinstance(output, Tensor):
            what = type(output).__name__
            raise TypeError(f"compute_gramian expects a tensor or a list of tensors, got a {what}.")
        dim = self._batch_dim
        if dim is not None and not -output.ndim <= dim < output.ndim:
            raise ValueError(
                f"batch_dim={dim} is not a dimension of an output of shape {list(output.shape)}. Pass "
                "losses that still have their batch dimension (reduction='none'), or batch_dim=None."
            )
        if dim is None or output.shape[dim] > 0:
            _refuse_empty(output)
        return dim if dim is None else dim % output.ndim

    def _raise_not_covered(self) -> None:
        names = ", ".join(type(module).__name__ for module in self._modules[:3])
        if not self._registry.named():
            raise NotCoveredError(
                f"The registered modules ({names}) have no parameter that requires gradients. Register "
                "modules with trainable parameters, or call requires_grad_() on them."
            )
        raise NotCoveredError(
            f"No parameter of the registered modules ({names}) takes part in the output. Compute the "
            "output from their outputs, and with gradients enabled."
        )


def _all(weights: Tensor) -> Tensor:
    """The weights of one process: all are its own."""
    return weights


def _refuse_empty(output: Any) -> None:
    if isinstance(output, Tensor) and output.numel() == 0:
        raise ValueError(f"The output is empty (shape {list(output.shape)}): there is no objective.")


def _refuse_complex(output: Tensor) -> None:
    if output.is_complex():
        raise TypeError(
            f"The output is complex ({output.dtype}), and a Gramian is of the gradients of real objectives. "
            "Take real ones of it: torch.view_as_real(output), or output.abs()."
        )


def _parse(modules: Sequence[Any], batch_dim: Any) -> tuple[list[nn.Module], bool, int | None]:
    """The modules, whether they mean their subtrees, and the batch dimension."""
    positional = list(modules)
    if batch_dim is _NOT_GIVEN:
        if len(positional) < 2 or not isinstance(positional[-1], (int, NoneType)):
            raise TypeError(
                "Engine needs a batch_dim: the dimension of the outputs that holds independent samples "
                "(usually 0), or None if there is none."
            )
        batch_dim = positional.pop()
    if not isinstance(batch_dim, (int, NoneType)):
        raise TypeError(f"batch_dim must be an int or None, not {batch_dim!r}.")
    one_iterable = len(positional) == 1 and not isinstance(positional[0], nn.Module)
    if one_iterable and isinstance(positional[0], Iterable):
        positional = list(positional[0])
    for module in positional:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Engine takes modules, or one iterable of modules; got a {type(module).__name__}."
            )
    if not positional:
        raise ValueError("Engine needs at least one module.")
    return list(dict.fromkeys(positional)), not one_iterable, batch_dim


def _refuse_options(check: Any, audit: Any, strategies: Sequence[str]) -> None:
    """Raise ``ValueError`` for options that an engine does not have."""
    if check not in ("first", "always", "never"):
        raise ValueError(f"check must be 'first', 'always' or 'never', not {check!r}.")
    if audit is not None and (not isinstance(audit, int) or audit < 1):
        raise ValueError(f"audit must be a positive number of calls, or None, not {audit!r}.")
    if not strategies or not set(strategies) <= set(STRATEGIES):
        raise ValueError(f"strategies must be some of {tuple(STRATEGIES)}, not {strategies!r}.")


def _rebuild(modules: Sequence[Any], keywords: dict[str, Any]) -> Engine:
    """An engine like the one that was copied or unpickled, with hooks of its own."""
    return Engine(*modules, **keywords)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
