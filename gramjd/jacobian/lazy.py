"""``Jacobian``: products with a Jacobian that is never stored."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from gramjd import distributed, pytree
from gramjd.blocks import Block
from gramjd.complexes import as_given, as_real, entries, real_block
from gramjd.contraction import Options, products
from gramjd.contraction.outputs import Output, Outputs
from gramjd.contraction.products import Part
from gramjd.jacobian import groups, operator
from gramjd.jacobian.accumulate import accumulate
from gramjd.jacobian.generic import In, Out, Typed
from gramjd.jacobian.projection import Projection
from gramjd.jacobian.sketches import sketch
from gramjd.pytree import PyTree, PyTreeSpec
from gramjd.sketched import SketchedGramian

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator
    from typing_extensions import TypedDict, Unpack

    class _Options(TypedDict, total=False):
        memory_budget: int | None
        accumulate_dtype: torch.dtype | None

    class _GramianOptions(_Options, total=False):
        group: Any
        rows: str


Groups = str | Mapping[str, Sequence[str]] | Callable[[str], str]
Per = Groups | None
Key = TypeVar("Key")  # of a dictionary of outputs
OtherKey = TypeVar("OtherKey")
Tuple = TypeVar("Tuple", bound=tuple[Tensor, ...])  # of outputs
OtherTuple = TypeVar("OtherTuple", bound=tuple[Tensor, ...])


@dataclass(frozen=True, eq=False)
class Jacobian(Typed[Out, In]):
    """The Jacobian ``J`` of outputs with respect to parameters, in factors; ``J`` is never stored.

    :func:`gramjd.jacobian` and :meth:`gramjd.Engine.jacobian` return Jacobians. As an operator, a Jacobian
    maps flat parameters to flat outputs (leaves one after the other): ``J @ v`` and ``J.T @ w`` are products
    with vectors, and ``J @ J.T`` is the Gramian as a matrix. The factors are not copied. If a tensor that
    they are made of is written in place, later products raise a ``RuntimeError``.

    A complex parameter counts as its real and imaginary parts, so that the Gramian is ``Re(J Jᴴ)``. In flat
    vectors, both parts lie side by side. :meth:`vjp`, :meth:`jvp`, :meth:`dense` and :meth:`backward` take
    and return complex tensors, with gradients in torch's convention.

    Type checkers see a ``Jacobian[Out, In]``, with the types of the outputs and of the parameters. The
    defaults are ``Tensor`` and ``Any``. An engine's is a ``Jacobian[Tensor, dict[str, Tensor]]``.

    Attributes:
        parameters: what was differentiated with respect to, in a flat list.
        outputs: shapes of the outputs (with their batch dimension).
    """

    parts: Sequence[Part]
    parameters: Sequence[Tensor]
    parameters_spec: PyTreeSpec
    outputs: Outputs

    @staticmethod
    def of(blocks: Sequence[Sequence[Block]], parameters: Sequence[Tensor], parameters_spec: PyTreeSpec,
           outputs: Sequence[Output], outputs_spec: PyTreeSpec, samples: int) -> Jacobian[Any]:  # fmt: skip
        """The Jacobian of one batch, from the blocks of each parameter."""
        real = [
            list(map(real_block, mine)) if p.is_complex() else mine
            for p, mine in zip(parameters, blocks, strict=True)
        ]
        part = Part.watched(real, samples)
        return Jacobian([part], parameters, parameters_spec, Outputs(outputs, outputs_spec, samples))

    @staticmethod
    def cat(jacobians: Sequence[Jacobian[Out, In]]) -> Jacobian[Out, In]:
        """The Jacobian over all samples of several micro-batches, without copying any factor.

        Raises:
            ValueError: there is none, an output has no batch dimension, or they are of different
                parameters or of outputs that differ in more than the number of samples.
        """
        if not jacobians:
            raise ValueError("Jacobian.cat needs at least one Jacobian.")
        first = jacobians[0]
        if any(out.batch_dim is None for out in first.outputs.each):
            raise ValueError("Jacobian.cat needs outputs with a batch dimension to concatenate along.")
        samples = sum(j.outputs.samples for j in jacobians)
        each = [out.with_samples(samples) for out in first.outputs.each]
        for j in jacobians:
            check_parameters(first, j)
            if j.outputs.spec != first.outputs.spec or any(
                out.batch_dim is None or out.with_samples(samples) != want
                for out, want in zip(j.outputs.each, each, strict=True)
            ):
                raise ValueError(f"Cannot concatenate {j!r} to {first!r}: their outputs differ in shape.")
        found = [part for j in jacobians for part in j.parts]
        return replace(first, parts=found, outputs=Outputs(each, first.outputs.spec, samples))

    @property
    def samples(self) -> int:
        """``B``; 1 without a batch dimension."""
        return self.outputs.samples

    @property
    def objectives(self) -> int:
        """Objectives per sample, of all outputs together: ``K``."""
        return self.outputs.objectives

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, entries of all parameters)``, of the matrix."""
        return self.outputs.rows, sum(map(entries, self.parameters))

    @property
    def blocks(self) -> list[list[Block]]:
        """The blocks of each parameter, of all micro-batches one after the other."""
        return [[b for part in self.parts for b in part.blocks[n]] for n in range(len(self.parameters))]

    @property
    def intact(self) -> Sequence[Part]:
        """``parts``; an error if somebody has written into their factors."""
        for part in self.parts:
            if (n := part.written()) is not None:
                raise RuntimeError(
                    f"A tensor that the Jacobian of {self.names[n]!r} is made of, such as an input of the "
                    "function, was written in place since. Ask for products before, or pass a clone."
                )
        return self.parts

    @property
    def names(self) -> list[str]:
        """Names of the parameters: the keys that lead to each in its PyTree, joined by dots."""
        return pytree.paths(pytree.unflatten(self.parameters_spec, list(self.parameters)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products: that of the parameters, or of their real parts if they are complex."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The device of products: that of the first parameter. Gradients lie where their parameters do."""
        return self._like.device

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def __repr__(self) -> str:
        shapes = [list(out.shape) for out in self.outputs.each]
        shown = shapes[0] if len(shapes) == 1 else shapes
        rows, entries = self.shape
        stored = sum(part.memory() for part in self.parts) / 2**20
        return (
            f"Jacobian(outputs={shown}, rows={rows}, parameters={len(self.parameters)}, entries={entries}, "
            f"dtype={self.dtype}, device={self._like.device}, stored={stored:.1f} MiB)"
        )

    # products

    # fmt: off
    @overload
    def gramian(self: Jacobian[Tensor, In], per: None = None, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> Tensor: ...
    @overload
    def gramian(self: Jacobian[Tensor, In], per: Groups, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> dict[str, Tensor]: ...
    @overload
    def gramian(self, per: None = None, *, memory_budget: int | None = ..., accumulate_dtype: None = None,
                group: None = None, rows: str = ..., sketch: int | Projection) -> SketchedGramian: ...
    @overload
    def gramian(self, per: Groups, *, memory_budget: int | None = ..., accumulate_dtype: None = None,
                group: None = None, rows: str = ..., sketch: int | Projection
                ) -> dict[str, SketchedGramian]: ...
    @overload
    def gramian(self: Jacobian[dict[Key, Tensor], In], per: None = None, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> dict[Key, dict[Key, Tensor]]: ...
    @overload
    def gramian(self: Jacobian[dict[Key, Tensor], In], per: Groups, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> dict[str, dict[Key, dict[Key, Tensor]]]: ...
    @overload
    def gramian(self: Jacobian[list[Tensor], In], per: None = None, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> list[list[Tensor]]: ...
    @overload
    def gramian(self: Jacobian[list[Tensor], In], per: Groups, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> dict[str, list[list[Tensor]]]: ...
    @overload
    def gramian(self: Jacobian[Tuple, In], per: None = None, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> tuple[tuple[Tensor, ...], ...]: ...
    @overload
    def gramian(self: Jacobian[Tuple, In], per: Groups, *, sketch: None = None,
                **options: Unpack[_GramianOptions]) -> dict[str, tuple[tuple[Tensor, ...], ...]]: ...
    @overload
    def gramian(self, per: Per = None, *, sketch: int | Projection | None = ...,
                **options: Unpack[_GramianOptions]) -> Any: ...
    # fmt: on

    def gramian(self, per: Per = None, *, memory_budget: int | None = None,
                accumulate_dtype: torch.dtype | None = None, group: Any = None, rows: str = "all",
                sketch: int | Projection | None = None) -> PyTree:  # fmt: skip
        """The generalized Gramian ``G = J Jᵀ``.

        Args:
            per: ``None`` for the whole; ``"parameter"`` for the share of each parameter; or groups
                of parameters, as a function from a parameter's name to its group's, or a mapping
                from groups to names. The shares add up to the whole.
            memory_budget: bytes of working memory beside the result. The Jacobian keeps rows that are built
                for weights with many positions, because they make :meth:`vjp` and :meth:`backward`
                faster. These rows take up to half of the budget; by default, up to an eighth of the free
                memory.
            accumulate_dtype: dtype in which half-precision products are added up.
            group: a ``torch.distributed`` process group, or a ``DeviceMesh`` of one dimension. Each rank
                calls this method with the Jacobian of its own samples. The Gramian is that of all samples,
                in order of ranks, detached. Ranks may have different numbers of samples, or none
                (:meth:`without_samples`). Outputs without a batch dimension are sums over ranks, of which
                each rank has a share: the Gramian is that of the sums.
            rows: with a group, ``"all"``, or ``"local"`` for only the rows of this rank's samples.
            sketch: for more objectives than columns: the number of columns of a count sketch ``S`` of the
                rows, or a :class:`~gramjd.Projection`. The result is then ``S Sᵀ`` in place of ``J Jᵀ``: a
                detached :class:`~gramjd.SketchedGramian`. It is never formed, so memory grows with the number
                of objectives, not with the square of it. Its ``error`` says how precise its entries are.

        Returns:
            For a tensor output, ``[*shape, *reversed(shape)]``, exactly symmetric. For a PyTree of
            outputs, a PyTree of PyTrees as of ``torch.func.hessian``: entry ``[i][j]`` has shape
            ``[*shape_i, *reversed(shape_j)]``. With ``per``, a dictionary of these by name.

        Raises:
            ValueError: groups leave out a parameter, name one twice, or name one that does not exist;
                ``rows`` without a group; a sketch of several outputs, with a group or with an
                ``accumulate_dtype``.
            RuntimeError: a tensor that the Jacobian is made of was written in place.
            RanksDisagreeError: ranks have different models or settings; all of them raise it.
            RankFailedError: another rank could not take part; it raises what it failed by.
        """
        which = {"": range(len(self.parameters))} if per is None else groups.partition(self.names, per)
        if sketch is not None:
            if group is not None or rows != "all" or accumulate_dtype is not None:
                raise ValueError("A sketched Gramian is of one process, and takes no accumulate_dtype.")
            given = Projection.of(sketch)
            shares = {
                name: self if per is None else self.select([self.names[n] for n in mine])
                for name, mine in which.items()
            }
            sketches = {name: jac._sketched(given, memory_budget) for name, jac in shares.items()}
            return sketches[""] if per is None else sketches
        options = Options(memory_budget, accumulate_dtype)
        if group is not None:
            found = distributed.gramian(self, which, options, group, rows)
            return found[""] if per is None else found
        distributed.refuse_rows(rows)
        parts_now, K = self.intact, self.objectives

        def share(which: Sequence[int]) -> PyTree:
            if len(parts_now) == 1:
                total = products.keeping(parts_now[0], which, K, options, self._like)
            else:
                total = products.gramian(parts_now, which, K, options, self._like)
            return self.outputs.square(total, self.outputs)

        return share(which[""]) if per is None else {name: share(mine) for name, mine in which.items()}

    # fmt: off
    @overload
    def cross(self: Jacobian[Tensor, In], other: Jacobian[Tensor, In], **options: Unpack[_Options]
              ) -> Tensor: ...
    @overload
    def cross(self: Jacobian[dict[Key, Tensor], In], other: Jacobian[dict[OtherKey, Tensor], In],
              **options: Unpack[_Options]) -> dict[Key, dict[OtherKey, Tensor]]: ...
    @overload
    def cross(self: Jacobian[list[Tensor], In], other: Jacobian[list[Tensor], In], **options: Unpack[_Options]
              ) -> list[list[Tensor]]: ...
    @overload
    def cross(self: Jacobian[Tuple, In], other: Jacobian[OtherTuple, In], **options: Unpack[_Options]
              ) -> tuple[tuple[Tensor, ...], ...]: ...
    @overload
    def cross(self, other: Jacobian[Any, In], **options: Unpack[_Options]) -> Any: ...
    # fmt: on

    def cross(self, other: Jacobian[Any, Any], *, memory_budget: int | None = None,
              accumulate_dtype: torch.dtype | None = None) -> PyTree:  # fmt: skip
        """``J₁ J₂ᵀ``, the inner products of the rows of two Jacobians over the same parameters.

        Args:
            other: a Jacobian with parameters of the same structure and shapes, such as of another batch.
            memory_budget: bytes of working memory beside the result.
            accumulate_dtype: dtype in which half-precision products are added up.

        Returns:
            ``[*shape₁, *reversed(shape₂)]`` for outputs of these shapes. For PyTrees of outputs, a PyTree of
            PyTrees of such tensors.

        Raises:
            ValueError: the Jacobians are of different parameters.
            RuntimeError: a tensor that a Jacobian is made of was written in place.
        """
        check_parameters(self, other)
        total = products.cross(
            self.intact,
            other.intact,
            range(len(self.parameters)),
            (self.objectives, other.objectives),
            Options(memory_budget, accumulate_dtype),
            self._like,
        )
        return self.outputs.square(total, other.outputs)

    def squared_norms(self, *, memory_budget: int | None = None) -> Out:
        """Squared norm of every row: the diagonal of the Gramian, without the rest of it.

        Args:
            memory_budget: bytes of working memory beside the result.

        Returns:
            A tensor shaped like the output; for a PyTree of outputs, a PyTree of such tensors.

        Raises:
            RuntimeError: a tensor that the Jacobian is made of was written in place.
        """
        options = Options(memory_budget)
        found: Out = self.outputs.unpack(
            products.squared_norms(self.intact, self.objectives, options, self._like)
        )
        return found

    def norms(self, *, memory_budget: int | None = None) -> Out:
        """Norm of every row, without the Gramian, for instance to clip the gradients of samples.

        Args:
            memory_budget: bytes of working memory beside the result.

        Returns:
            A tensor shaped like the output; for a PyTree of outputs, a PyTree of such tensors.

        Raises:
            RuntimeError: a tensor that the Jacobian is made of was written in place.
        """
        return pytree.map(Tensor.sqrt, self.squared_norms(memory_budget=memory_budget))

    def diagonal(self, *, memory_budget: int | None = None) -> Tensor:
        """The Gramian of each sample by itself: the diagonal over samples of :meth:`gramian`.

        Args:
            memory_budget: bytes of working memory beside the result.

        Returns:
            ``[B, *S, *reversed(S)]`` for an output of shape ``S`` per sample.

        Raises:
            ValueError: the output is a PyTree of several tensors.
        """
        if len(self.outputs.each) != 1:
            raise ValueError("diagonal() is of one output tensor; this Jacobian has several.")
        out, K = self.outputs.each[0], self.objectives
        rows = products.diagonal(self.intact, K, Options(memory_budget), self._like)  # [K, B, K]
        sizes = [n for d, n in enumerate(out.shape) if d != out.batch_dim]
        square = rows.transpose(0, 1).reshape(self.samples, *sizes, *sizes)
        order = range(1 + len(sizes), 1 + 2 * len(sizes))
        return square.permute([*range(1 + len(sizes)), *reversed(order)])

    def sketch(self, dim: int, *, seed: int = 0, kind: str = "rademacher", memory_budget: int | None = None
               ) -> Out:  # fmt: skip
        """``J Ω``, a random projection of every row to ``dim`` numbers, without forming ``J``.

        Inner products of sketches are those of gradients, on average over seeds (Johnson and Lindenstrauss).
        ``Ω`` is a function of ``seed`` and of the names and shapes of the parameters: any two batches,
        processes and devices share it, whatever the order of the parameters. It is made some entries at a
        time, by a counter-based generator, and never stored.

        Args:
            dim: columns of ``Ω``.
            seed: any integer.
            kind: which random matrix, and so which variance an inner product of two rows ``x`` and ``y`` has.
                ``"rademacher"``: random signs; ``(‖x‖²‖y‖² + ⟨x, y⟩² - 2 Σ_i x_i² y_i²) / dim``.
                ``"gaussian"``: normal numbers, the same on all devices but for rounding;
                ``(‖x‖²‖y‖² + ⟨x, y⟩²) / dim``.
                ``"countsketch"``: each entry is added to one column with a random sign (Charikar et al.,
                *Finding frequent items in data streams*, 2002), in a small part of the time. Of a matrix with
                more than ``4 dim`` entries, the column is the sum of one for the row and one for the rest, so
                that cotangents and activations may be sketched one by one (TensorSketch, Pham and Pagh, *Fast
                and scalable polynomial kernels via explicit feature maps*, 2013), with a variance of at most
                ``8 ‖x‖²‖y‖² / dim``; of other parameters it is at most that of ``"rademacher"``.
                ``"factored"``, which is coarser: the longer side of a parameter's gradient, as
                a matrix of its first dimension by all others, is projected to about ``√dim / 2`` columns by
                random signs, and the shorter one to 16 times as many if it has more, so that cotangents and
                activations are projected one by one (as in LoGra, arXiv 2405.13954). The entries of what is
                left are added to columns of the sketch with random signs. Unbiased, too, but the variance
                falls with ``√dim`` in place of ``dim``: up to about ``4 ‖x‖⁴ / √dim`` for a row with itself,
                see :attr:`gramjd.Projection.error`. Parameters of one dimension have at most the variance of
                ``"rademacher"``.
            memory_budget: bytes of working memory beside the result; a factored sketch needs the ``L`` and
                ``R`` of one parameter beside it.

        Returns:
            ``[*shape, dim]`` for an output of this shape; a PyTree of them where outputs are. In float32 for
            parameters in half precision.

        Raises:
            ValueError: an option is none of these; two parameters have one name.
        """
        projection, options = Projection(dim, seed, kind), Options(memory_budget)
        shapes = [(*p.shape, 2) if p.is_complex() else p.shape for p in self.parameters]
        found = sketch(self.intact, self.names, shapes, self.objectives, projection, options, self._like)
        return self.outputs.unpack(found)

    def vjp(self, w: Out) -> In:
        """``Jᵀ w``, the weighted gradient, without a second backward pass.

        Args:
            w: weights shaped like the outputs (a PyTree of tensors if they are one), or ``n`` of
                them at once, with a leading dimension ``n``.

        Returns:
            A PyTree like the parameters, in their shapes and dtypes, each with a leading ``n`` if the
            weights have one.

        Raises:
            ValueError: the weights are not shaped like the outputs, or are on another device.
        """
        (rows, batched), given = self._packed(w), self.intact

        def one(row: Tensor) -> list[Tensor]:
            return _pulled(given, self.parameters, row)

        found = torch.vmap(one)(rows) if batched else one(rows[0])
        return pytree.unflatten(self.parameters_spec, list(found))

    def jvp(self, v: In) -> Out:
        """``J v``: the change of the outputs along a direction in parameter space.

        Args:
            v: a PyTree like the parameters.

        Returns:
            A PyTree shaped like the outputs.

        Raises:
            ValueError: ``v`` is not shaped like the parameters.
        """
        given, spec = pytree.flatten(v)
        if spec != self.parameters_spec:
            raise ValueError(f"Expected a direction in the structure {self.parameters_spec}, got {spec}.")
        for name, p, tangent in zip(self.names, self.parameters, given, strict=True):
            if tangent.shape != p.shape:
                raise ValueError(
                    f"Expected a direction of shape {list(p.shape)} for parameter {name!r}, got "
                    f"{list(tangent.shape)}."
                )
        pairs = zip(given, self.parameters, strict=True)
        tangents = [as_real(v.to(p.dtype)) if p.is_complex() else v for v, p in pairs]
        return self.outputs.unpack(products.jvp(self.intact, tangents, self.objectives, self._like))

    @overload
    def dense(self: Jacobian[Tensor, In]) -> In: ...
    @overload
    def dense(self: Jacobian[dict[Key, Tensor], In]) -> dict[Key, In]: ...
    @overload
    def dense(self: Jacobian[list[Tensor], In]) -> list[In]: ...
    @overload
    def dense(self: Jacobian[Tuple, In]) -> tuple[In, ...]: ...
    @overload
    def dense(self) -> Any: ...

    def dense(self) -> Any:
        """The rows of ``J``, formed.

        Returns:
            A PyTree like the parameters, with a tensor ``[*shape, *p.shape]`` for each parameter ``p``, for
            an output of shape ``shape``. For a PyTree of outputs, a PyTree of these.

        Raises:
            RuntimeError: a tensor that the Jacobian is made of was written in place.
        """
        given = self.intact
        columns = [
            self.outputs.unpack(as_given(products.dense(given, number, self.objectives, as_real(p)), p))
            for number, p in enumerate(self.parameters)
        ]
        leaves = [pytree.leaves(column) for column in columns]
        rows = [pytree.unflatten(self.parameters_spec, list(mine)) for mine in zip(*leaves, strict=True)]
        return pytree.unflatten(self.outputs.spec, rows)

    def backward(self, w: Tensor | None = None) -> None:
        """Add ``Jᵀ w`` to ``.grad`` of the parameters, as ``losses.backward(w)`` would add it.

        No second backward pass runs: the gradients are products of the factors. Autograd accumulates them
        into ``.grad``, so that hooks of the parameters run as usual. Other parameters get nothing, such as
        those that are not registered with the engine. With ``fully_shard``, each rank gets its shard of the
        gradient, averaged over ranks.

        Args:
            w: weights shaped like the output; may be left out for a scalar output.

        Raises:
            ValueError: the weights are not shaped like the output.
            RuntimeError: the parameters are not leaf tensors that require gradients.
        """
        # without samples as autograd: zeros, which the ranks of a process group wait for
        wanted = distributed.are_sharded(self.parameters)
        if not self.samples:
            wanted = [True] * len(wanted)
        for part in self.parts:
            wanted = [is_wanted or bool(mine) for is_wanted, mine in zip(wanted, part.blocks, strict=True)]
        used = [n for n, is_wanted in enumerate(wanted) if is_wanted]
        leaves = [self.parameters[n] for n in used]
        for n, p in zip(used, leaves, strict=True):
            if not (p.is_leaf and p.requires_grad):
                raise RuntimeError(
                    f"Parameter {self.names[n]!r} is not a leaf tensor that requires gradients, so it has "
                    "no .grad to add to. Use J.vjp(w), which returns the gradients."
                )
        if w is None:
            if self.outputs.rows != 1:
                raise ValueError("Jacobian.backward needs weights, except for one scalar output.")
            w = self.outputs.unpack(torch.ones(1, 1, dtype=self.dtype, device=self._like.device))
        rows, batched = self._packed(w)
        if batched:
            raise ValueError("Jacobian.backward takes one tensor of weights; see vjp for a batch of them.")
        with torch.no_grad():
            chosen = [part.of_parameters(used) for part in self.intact]
            found = _pulled(chosen, leaves, rows[0])
            if True in distributed.are_sharded(leaves):
                found = [distributed.averaged(g, p) for g, p in zip(found, leaves, strict=True)]
        accumulate(leaves, found)

    # other views of it

    def select(self, names: str | Sequence[str] | Callable[[str], bool]
               ) -> Jacobian[Out, dict[str, Tensor]]:  # fmt: skip
        """The Jacobian with respect to some of the parameters, which become a dictionary by name.

        Args:
            names: the name or names of the parameters to keep, or a function that says whether to keep one.

        Raises:
            ValueError: there is no parameter of some name, or none is left.
        """
        which = groups.chosen(self.names, names)
        order, spec = pytree.flatten({self.names[n]: n for n in which})
        found = [part.of_parameters(order) for part in self.parts]
        kept = [self.parameters[n] for n in order]
        chosen: Jacobian[Any] = replace(self, parts=found, parameters=kept, parameters_spec=spec)
        return chosen

    def without_samples(self) -> Jacobian[Out, In]:
        """A Jacobian without samples, of the same outputs and parameters.

        A rank that has no samples passes it to ``gramian(group=...)``. Make it from the Jacobian of any
        sample.

        Raises:
            ValueError: an output has no batch dimension.
        """
        if any(out.batch_dim is None for out in self.outputs.each):
            raise ValueError("without_samples is of outputs that have a batch dimension.")
        each = [out.with_samples(0) for out in self.outputs.each]
        empty = Part([[] for _ in self.parameters], 0)
        return replace(self, parts=[empty], outputs=Outputs(each, self.outputs.spec, 0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
           ) -> Jacobian[Out, In]:  # fmt: skip
        """Move the Jacobian to another device, or to another floating-point dtype.

        Returns:
            A Jacobian. Its parameters are detached copies.

        Raises:
            RuntimeError: a tensor that the Jacobian is made of was written in place.
        """
        return replace(
            self,
            parts=[part.moved(device, dtype) for part in self.intact],
            parameters=[_moved(p.detach(), device, dtype) for p in self.parameters],
        )

    def __matmul__(self, right: Any) -> Tensor:
        return operator.times(self, right)

    @property
    def T(self) -> operator.Transposed:
        """``Jᵀ``: ``J.T @ w`` for flat weights ``[rows]`` or ``[rows, n]``."""
        return operator.Transposed(self)

    def as_linear_operator(self) -> LinearOperator:
        """``J`` as a ``scipy.sparse.linalg.LinearOperator``; needs scipy.

        ``A @ A.H`` is the Gramian as an operator, for instance for the eigenvalues of a kernel too
        large to form (``scipy.sparse.linalg.eigsh``).
        """
        return operator.as_linear_operator(self)

    def _sketched(self, projection: Projection, memory_budget: int | None) -> SketchedGramian:
        if len(self.outputs.each) != 1:
            raise ValueError(
                "A sketched Gramian is of one output tensor; this Jacobian has several. For each of them, "
                "J.sketch(dim) has the rows."
            )
        with torch.no_grad():
            p = projection
            rows = self.sketch(p.dim, seed=p.seed, kind=p.kind, memory_budget=memory_budget)
            return SketchedGramian(pytree.leaves(rows)[0].detach(), p.error)

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the products."""
        return as_real(self.parameters[0])

    def _packed(self, w: PyTree) -> tuple[Tensor, bool]:
        """Weights as rows, see :meth:`Outputs.pack`."""
        device = self._like.device
        if any(leaf.device != device for leaf in pytree.leaves(w)):
            raise ValueError(f"The weights are not on the Jacobian's device, {device}: move them, w.to(...).")
        return self.outputs.pack(w, "weights")


def _pulled(given: Sequence[Part], parameters: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """``Jᵀ w`` for ``w [K, B]``, in the shapes and dtypes of the parameters."""
    if True not in map(torch.is_complex, parameters):
        return products.vjp(given, parameters, w)
    found = products.vjp(given, list(map(as_real, parameters)), w)
    return [as_given(g, p) for g, p in zip(found, parameters, strict=True)]


def _moved(parameter: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """A parameter on another device or in another dtype; complex ones have parts of that dtype."""
    if dtype is not None and parameter.is_complex():
        dtype = dtype.to_complex()
    return parameter.to(device=device, dtype=dtype)


def check_parameters(first: Jacobian[Any], other: Jacobian[Any]) -> None:
    """Raise unless another Jacobian is of parameters in the same structure and shapes."""
    mine, theirs = ([(n, tuple(p.shape)) for n, p in zip(j.names, j.parameters, strict=True)]
                    for j in (first, other))  # fmt: skip
    if mine != theirs:
        raise ValueError(
            f"The Jacobians are of different parameters: {dict(mine)} and {dict(theirs)}. Use select() "
            "to restrict both to the same ones."
        )
