"""Blocks of every parameter of an output: each region by the first strategy that passes the proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gramjd.blocks import Block
from gramjd.contraction import Options
from gramjd.contraction.accumulator import Sink
from gramjd.contraction.consistency import INCONSISTENT, is_consistent
from gramjd.engine.analysis.layouts import Layout
from gramjd.engine.recording.nodes import Cotangents, forget
from gramjd.engine.sharded import Lockstep, needs_weights
from gramjd.engine.solving import backward, finite, refusals
from gramjd.engine.solving.compiled_code import refuse_unrepeatable
from gramjd.engine.solving.lay_out import Finding, Laid, lay_out
from gramjd.engine.solving.part import Part, part_of
from gramjd.engine.solving.passes import Passes
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.program import Known, Layouts, Pattern, Program, Separation, Solution
from gramjd.engine.solving.repeated import give_blocks
from gramjd.engine.solving.separation import Masks, patterns, patterns_for, spread, stays_within
from gramjd.engine.solving.strategies import FROM_USES, STRATEGIES, Found, Material, are_few, blocks_by_ops
from gramjd.engine.solving.stream import Later, Stream
from gramjd.engine.solving.verify import agrees
from gramjd.errors import CheckFailedError

_PATTERNS_A_CALL = 2  # backward passes of the proof of separation; until it is whole, layouts are measured
_ROWS = 'Until then, Engine(..., strategies=("rows",)) is exact.'
_RANKS = {strategy: rank for rank, strategy in enumerate(STRATEGIES)}


@dataclass(frozen=True)
class Request:
    """The request of one call of an engine."""

    problem: Problem
    known: Known
    strategies: Sequence[str]  # that are allowed
    check: bool  # whether results are verified
    options: Options  # of the contraction


@dataclass(frozen=True)
class Solved:
    """The findings of one region."""

    number: int
    laid: Laid
    pattern: Pattern | None  # None: one that was verified before
    strategies: Mapping[int, str] = field(default_factory=dict)  # of each parameter that has blocks, by id
    causes: Mapping[int, str] = field(default_factory=dict)  # why others have none


def solve(request: Request, sink: Sink) -> Solution:
    """Give ``sink`` the blocks of every parameter, by the first strategy that is exact for it.

    Those of a region as soon as the backward pass has been through it, where that is possible. Measures
    and verifies what is not known yet.

    Raises:
        NotFiniteError: gradients have NaN or infinite entries.
        NotSeparableError: there is cross-sample dependence.
        CheckFailedError: no strategy is left for a parameter, or an audit failed.
    """
    problem, program = request.problem, request.known.program or Program()
    if problem.lockstep is not None:  # whatever the data are, all ranks run the same backward passes
        request = replace(request, strategies=[each for each in request.strategies if each != "rows"])
    if not problem.samples and problem.lockstep is None:
        return Solution(program)
    if problem.graph.compiled and request.check and problem.lockstep is None:  # ranks in step must not differ
        output, inputs = problem.output, [*problem.parameters.values()]
        refuse_unrepeatable(problem.graph.compiled, output, problem.parameters,
                            lambda v: backward.gradients(output, inputs, v.unsqueeze(0)))  # fmt: skip
    if "losses" in request.strategies and are_few(problem, request.options):
        return Solution(_whole(request, program, "losses", problem.parameters, sink))
    if not set(FROM_USES) & set(request.strategies) and problem.lockstep is None:
        return Solution(_rest(request, program, problem.parameters, Finding(), sink))
    return _Run(request, request.known.program or Program.of(problem), sink).solution()


def _whole(request: Request, program: Program, strategy: str, parameters: Mapping[str, Tensor], sink: Sink
           ) -> Program:  # fmt: skip
    """Blocks by a strategy that differentiates the whole output; what it adds to the program."""
    material = Material(request.problem, program, program.causes)
    sink.add(STRATEGIES[strategy](material, parameters).blocks)
    chosen = dict.fromkeys(map(id, parameters.values()), strategy)
    return replace(program, strategies={**program.strategies, **chosen})


def _rest(request: Request, program: Program, left: Mapping[str, Tensor], finding: Finding, sink: Sink
          ) -> Program:  # fmt: skip
    """Rows of the parameters that are left, if this strategy is allowed."""
    if "rows" not in request.strategies:
        raise refusals.no_strategy(request.problem, program, left, request.strategies)
    if len(request.strategies) > 1:  # rows alone are exact whatever batch_dim is
        refusals.refuse_dependence(request.problem, program, left, finding)
    return _whole(request, program, "rows", left, sink)


class _Run:
    """Solves the regions of a problem one after the other, as its backward pass reaches them."""

    def __init__(self, request: Request, program: Program, sink: Sink) -> None:
        problem, known = request.problem, request.known
        self.request, self.problem, self.known, self.program = request, problem, known, program
        self.sink = sink
        # what is opaque may be exact in one step, and not in the next
        due = problem.is_opaque or not program.complete or bool(known.audit)
        checking = request.check and due
        self.probing = checking or (problem.batch_dim is not None and known.layouts is None)
        # with ranks in step, none may ask for one more pass later
        self.checking = checking or (request.check and self.probing and problem.lockstep is not None)
        # ranks in step cannot ask for all entries later
        self.passes = Passes(problem, known.calls, self.checking, projected=problem.lockstep is None)
        self.from_uses = [each for each in request.strategies if each in FROM_USES]
        self.parameters = _of_regions(problem, program)
        # nothing to prove: the blocks of these parameters come from their recorded uses alone
        steady = program.complete and not self.probing and problem.lockstep is None
        self.by_ops = _by_ops(program) if steady and "ops" in self.from_uses else frozenset()
        self.repeated: list[Tensor] = []  # parameters whose uses were solved as those of an earlier call
        self.solved: list[Solved] = []
        self.late: set[int] = set()

    def solution(self) -> Solution:
        """Solve all regions; what that proves."""
        problem, passes, lockstep = self.problem, self.passes, self.problem.lockstep
        masks = self._run_passes(lockstep)
        nodes = problem.graph.nodes
        stream = Stream(nodes, self.program.regions, self._early(), self._solve_region)
        with passes.waiting():
            basis = backward.basis(problem.output, problem.batch_dim)
            backward.stream(problem.output, nodes, basis, stream, problem.graph.batched)
        with nullcontext() if lockstep is None else lockstep.gather(self._weighted()):
            if not problem.samples:
                return Solution(self.program)
            if lockstep is not None and self.probing:
                self._refuse_overflow()
            stream.finish()
        return self._finish(masks)

    def _run_passes(self, lockstep: Lockstep | None) -> list[Masks] | None:
        """Run the weighted passes that will be asked for; with ranks in step, the masks of the separation."""
        problem = self.problem
        if lockstep is not None:
            return self._in_step(lockstep)
        if self.probing:
            self._refuse_overflow()  # or what is measured now would be wrong, and remembered
            if problem.fewest_digits != problem.output.dtype:  # rounding will be asked for
                _ = self.passes.again
        return None

    def _early(self) -> frozenset[int]:
        """The regions that are solved while the backward pass is in progress."""
        if self.problem.lockstep is not None:
            return frozenset()
        return frozenset(range(len(self.program.regions))) - self.program.waiting - self.program.late

    def _weighted(self) -> list[Any]:
        return [node for node in self.problem.graph.nodes if needs_weights(node)]

    def _in_step(self, lockstep: Lockstep) -> list[Masks] | None:
        """Run the passes that any rank needs; the masks of the proof of separation."""
        problem = self.problem
        lockstep.agree(self.probing, lockstep.units_of(self._weighted()), problem.samples, None)
        if not lockstep.passes:
            return None
        self.passes.run_all()
        if not self.request.check:
            return None
        return spread(problem, patterns(problem.samples, patterns_for(lockstep.most)))

    def _refuse_overflow(self) -> None:
        """Raise where a pass met NaN or infinity."""
        if self.passes.first.is_finite:
            return
        if self.problem.lockstep is not None:
            raise finite.unexplained("gradient")
        raise finite.of_gradient(self.problem.output, self.problem.batch_dim)

    def _solve_region(self, number: int, nodes: list[Any], cotangents: list[Cotangents]) -> None:
        """Lay out, build and verify a region, and give its blocks to the sink."""
        region, known = self.program.regions[number], self.known.layouts
        layouts = None if known is None else known[number]
        if region.parameters <= self.by_ops and self._repeat(number, nodes, cotangents, layouts):
            return
        try:
            self._solve_anew(number, nodes, cotangents, layouts)
        except Later:
            self.late.add(number)  # also the next time: the order of the sum decides on its rounding
            raise

    def _solve_anew(self, number: int, nodes: Sequence[Any], cotangents: Sequence[Cotangents],
                    layouts: Sequence[Layouts] | None) -> None:  # fmt: skip
        """Solve a region whose layouts are not known, or whose blocks are not proven or not repeated."""
        problem, program, passes = self.problem, self.program, self.passes
        region, parameters = program.regions[number], self.parameters[number]
        measuring, waits = problem.batch_dim is not None and layouts is None, number in program.waiting
        part = part_of(problem, region.nodes, parameters, nodes, cotangents, passes, measuring, waits)
        laid = lay_out(part, passes, layouts)
        # that of proven layouts was verified when they were proven
        pattern = part.pattern(laid.layouts) if measuring or waits or not program.complete else None
        blocks, solved = self._build(number, part, laid, pattern)
        if self.checking and problem.lockstep is None:  # with ranks in step, none may fail alone
            self._verify_contraction(blocks)
        self.solved.append(solved)
        self.sink.add(blocks)
        forget(part.nodes)
        if self.probing:
            passes.forget(region.nodes)

    def _verify_contraction(self, blocks: Found) -> None:
        """Raise where the Gramian of some parameters is not that of their gradients, which are verified."""
        if not is_consistent([*blocks.values()], self.passes.v, self.request.options):
            raise CheckFailedError(INCONSISTENT.format(", ".join(blocks)) + _ROWS)

    def _repeat(self, number: int, nodes: Sequence[Any], cotangents: Sequence[Cotangents],
                layouts: Sequence[Layouts] | None) -> bool:  # fmt: skip
        """Solve a region of which all is proven, if its recorded uses are alike to those of earlier calls."""
        if layouts is None:
            layouts = [(Layout(0),) * len(cs) for cs in cotangents]  # without a batch dimension
        region, parameters = self.program.regions[number], self.parameters[number]
        part = Part(self.problem, region.nodes, parameters, nodes, range(len(nodes)), cotangents)
        material = Material(self.problem, self.program, part=part, layouts=layouts)
        if not give_blocks(blocks_by_ops, material, parameters, self.sink):
            return False
        self.repeated += parameters.values()
        forget(nodes)
        return True

    def _build(self, number: int, part: Part, laid: Laid, pattern: Pattern | None) -> tuple[Found, Solved]:
        """Blocks of a region's parameters by the ops or by replays of calls, where these are exact."""
        program = self.program
        verified = pattern is None or pattern in program.patterns.get(number, ())
        verifies = self.checking or (self.request.check and not verified)
        verify = self._verifier(part, laid, verified) if verifies else None
        causes = dict(part.causes)
        blocks: dict[str, Sequence[Block]] = {}
        strategies: dict[int, str] = {}
        for strategy in self.from_uses:
            planned = {name: p for name, p in part.parameters.items()
                       if name not in blocks and id(p) not in program.outside
                       and _RANKS[program.strategies.get(id(p), strategy)] <= _RANKS[strategy]}  # fmt: skip
            if not planned:
                continue
            material = Material(self.problem, program, causes, part, laid.layouts, laid.finding.mixed)
            candidate = STRATEGIES[strategy](material, planned)
            if candidate.causes:
                causes = {**candidate.causes, **causes}
            for name, mine in candidate.blocks.items():
                p = planned[name]
                if verify is not None and not verify(name, mine):
                    causes[id(p)] = "its uses that were seen do not add up to autograd's gradient"
                    continue
                blocks[name], strategies[id(p)] = mine, strategy
            if len(blocks) == len(part.parameters):
                break
        return blocks, Solved(number, laid, pattern, strategies, causes)

    def _verifier(self, part: Part, laid: Laid, verified: bool) -> Callable[[str, Sequence[Block]], bool]:
        """The comparison of blocks with autograd's gradient.

        Where the same was ``verified`` before, a difference in an audit is an error, but for opaque nodes.
        """
        passes = self.passes if self.passes.checking else self.passes.with_gradients
        message = self.known.audit if verified and not part.is_opaque else ""
        precision = self.problem.fewest_digits if message else None

        def verify(name: str, blocks: Sequence[Block]) -> bool:
            if agrees(passes, name, blocks, laid.scattered):
                return True
            if message and not agrees(passes, name, blocks, others=True, precision=precision):
                raise CheckFailedError(message.format(name))
            return False

        return verify

    def _finish(self, masks: list[Masks] | None) -> Solution:
        """Rows for what is left, and what the call has proven."""
        request, problem, program = self.request, self.problem, self.program
        laid = [solved.laid for solved in self.solved]
        strategies = _joined([solved.strategies for solved in self.solved])
        strategies |= dict.fromkeys(map(id, self.repeated), "ops")
        causes = _joined([solved.causes for solved in self.solved])
        found = replace(program, late=program.late | self.late, patterns=self._patterns(),
                        strategies={**program.strategies, **strategies},
                        causes={**causes, **program.causes})  # fmt: skip
        left = {name: p for name, p in problem.parameters.items() if id(p) not in strategies}
        if left:
            found = _rest(request, found, left, Finding.of([each.finding for each in laid]), self.sink)
        proven = self.checking and False not in [each.seen for each in laid] and self.passes.conclusive
        found = replace(found, complete=program.complete or proven or not request.check)
        if problem.batch_dim is None or not found.complete or False in [each.lasts for each in laid]:
            return Solution(found)
        layouts = {solved.number: solved.laid.layouts for solved in self.solved}
        return Solution(found, _separation(request, found, layouts, masks))

    def _patterns(self) -> Mapping[int, frozenset[Pattern]]:
        """The patterns that are verified of each region, with those of this call."""
        known = self.program.patterns
        new = {solved.number: known.get(solved.number, frozenset()) | {solved.pattern}
               for solved in self.solved if solved.pattern is not None}  # fmt: skip
        return {**known, **new} if new else known


def _of_regions(problem: Problem, program: Program) -> list[dict[str, Tensor]]:
    """The parameters of each region, by name."""
    home = {p: number for number, region in enumerate(program.regions) for p in region.parameters}
    found: list[dict[str, Tensor]] = [{} for _ in program.regions]
    for name, p in problem.parameters.items():
        if id(p) in home:
            found[home[id(p)]][name] = p
    return found


def _by_ops(program: Program) -> frozenset[int]:
    """Ids of the parameters whose uses are all recorded, and give their blocks."""
    return frozenset([p for p, strategy in program.strategies.items() if strategy == "ops"]) - program.outside


def _joined(found: Sequence[Mapping[int, str]]) -> dict[int, str]:
    """What was found of the parameters of each region, as one."""
    joined: dict[int, str] = {}
    for each in found:
        joined |= each
    return joined


def _separation(request: Request, program: Program, layouts: Mapping[int, Sequence[Layouts]],
                masks: list[Masks] | None) -> Separation | None:  # fmt: skip
    """Extend the proof of the layouts by this call, if they are the same as before.

    With ranks in step, the masks are those of all patterns, if they were needed.
    """
    problem, before = request.problem, request.known.separation
    if request.known.unlisted:
        return None
    if before is not None and before.is_whole:
        return before
    samples, lockstep = problem.samples, problem.lockstep
    needed = patterns_for(samples if lockstep is None else lockstep.most)
    if not request.check:
        return Separation(layouts, samples, needed, needed, displaced=True)  # nobody has looked
    if before is None or lockstep is not None or (before.samples, before.layouts) != (samples, layouts):
        before = Separation(layouts, samples, 0, needed, displaced=before is not None and before.displaced)
    return before if before.failed else _extended(before, problem, program, masks)


def _extended(before: Separation, problem: Problem, program: Program, masks: list[Masks] | None
              ) -> Separation:  # fmt: skip
    """The proof with the next patterns; ``masks`` as of :func:`_separation`."""
    lockstep, needed = problem.lockstep, before.needed
    until = needed if lockstep is not None else min(needed, before.passed + _PATTERNS_A_CALL)
    chosen = patterns(problem.samples, needed)[before.passed : until]
    if lockstep is None:
        masks = spread(problem, chosen, first=not before.passed)
    if masks is None or not stays_within(problem, program, before.layouts, chosen, masks):
        return replace(before, failed=True)
    everywhere = before.everywhere if before.passed else masks[0].everywhere
    displaced = True in [mask.displaced or mask.everywhere != everywhere for mask in masks]
    if displaced and not before.displaced and before.passed:  # in graphs of other sizes, perhaps
        until = 0
    return replace(before, passed=until, displaced=displaced or before.displaced, everywhere=everywhere)
