"""Function transforms in the style of ``torch.func``: a function in, a function out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from torch import Tensor

from gramjd import pytree
from gramjd.functional.arguments import Arguments, InDims
from gramjd.functional.capture import Captured, capture
from gramjd.functional.per_sample_mode import Function
from gramjd.functional.refusals import explained
from gramjd.internals import is_compiling
from gramjd.jacobian import Jacobian, Output
from gramjd.jacobian.projection import Projection
from gramjd.pytree import PyTree
from gramjd.sketched import SketchedGramian
from gramjd.uses.known_calls import KnownCalls
from gramjd.verification import Call, Generators, Verifier
from gramjd.verification.schedule import Check

Argnums = int | tuple[int, ...]
Out = TypeVar("Out")  # of a function: a tensor, or a PyTree of them
In = TypeVar("In", bound=Any)  # its first argument; the bound lets type checkers infer those of a lambda
Rest = ParamSpec("Rest")  # its other arguments
Key = TypeVar("Key")
Several = Mapping[Any, Any] | Sequence[Any]  # a PyTree that is no tensor, for type checkers

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _Options(TypedDict, total=False):
        randomness: str
        chunk_size: int | None
        check: Check
        audit: int | None


# fmt: off
@overload
def jacobian(func: Callable[Concatenate[In, Rest], Out], argnums: Literal[0] = 0, in_dims: InDims = ..., *,
             has_aux: Literal[False] = False, **options: Unpack[_Options]
             ) -> Callable[..., Jacobian[Out, In]]: ...
@overload
def jacobian(func: Callable[Concatenate[In, Rest], tuple[Out, Any]], argnums: Literal[0] = 0,
             in_dims: InDims = ..., *, has_aux: Literal[True], **options: Unpack[_Options]
             ) -> Callable[..., tuple[Jacobian[Out, In], Any]]: ...
@overload
def jacobian(func: Callable[..., Out], argnums: Argnums, in_dims: InDims = ..., *,
             has_aux: Literal[False] = False, **options: Unpack[_Options]
             ) -> Callable[..., Jacobian[Out]]: ...
@overload
def jacobian(func: Callable[..., tuple[Out, Any]], argnums: Argnums, in_dims: InDims = ..., *,
             has_aux: Literal[True], **options: Unpack[_Options]
             ) -> Callable[..., tuple[Jacobian[Out], Any]]: ...
@overload
def jacobian(func: Callable[..., Any], argnums: Argnums = ..., in_dims: InDims = ..., *, has_aux: bool,
             **options: Unpack[_Options]) -> Callable[..., Any]: ...
# fmt: on


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    check: Check = "first",
    audit: int | None = 256,
) -> Callable[..., Any]:
    """Transform a per-sample function into one that returns its lazy Jacobian over a batch.

    ``func`` runs once, and three times more where results are verified: see ``check``.
    The transforms of ``torch.func`` can map and differentiate all results. As of torch 2.13,
    ``torch.compile(fullgraph=True)`` makes one graph of a call.

    What a call verifies is remembered for ``func``. A transform that is made anew in each step, of the same
    function or of a lambda of the same code over the same objects, does not verify it again.

    Args:
        func: a pure function of one sample, ``func(params, *sample) -> output``; the arguments to
            differentiate with respect to are any PyTrees of real or complex tensors, the output any PyTree
            of real tensors.
        argnums: position of the argument to differentiate with respect to, or a tuple of several,
            whose Jacobian is then with respect to the tuple. All samples share them.
        in_dims: which dimension of each argument is the batch, as in ``torch.func.vmap``: one entry for each
            positional argument, an ``int``, ``None`` or a PyTree of them that is a prefix of the argument.
            ``None`` means that all samples share the argument, such as those that ``argnums`` names. A single
            ``int`` counts for all other arguments. A single ``None`` means that there is no batch: the
            function gets the arguments as they are. Keyword arguments are batched along dimension 0, if there
            is a batch.
        has_aux: ``func`` returns ``(output, aux)``; the result is then ``(jacobian, aux)``. Tensors in
            ``aux`` are returned as a batch. Other values are those of the last call of ``func``.
        randomness, chunk_size: as in ``torch.func.vmap``.
        check: when results are proved equal to ``torch.func``'s gradient with random weights, by one more
            forward and backward pass, and one of each of two samples without ``vmap``. ``"first"``: the first
            result of each structure (kinds of arguments, and ops that received parameters), and later ones
            by ``audit``. ``"always"``: each result. ``"never"``. Inside other transforms, and while the call
            is traced, nothing is proved.
        audit: with ``check="first"``, the result is proved again in the second, fourth, eighth … call of a
            structure, and in every ``audit``-th; ``None``: never again.

    Returns:
        A function of ``func``'s arguments, batched as ``in_dims`` says, that returns a
        :class:`~gramjd.Jacobian`. An output of shape ``S`` per sample counts as an output ``[B, *S]``
        there.

    Raises:
        TypeError: parameters or outputs hold something other than tensors of numbers, or a tensor subclass.
        ValueError: batch sizes differ, no argument is batched, or a differentiated one is; ``argnums``
            or ``in_dims`` do not fit the arguments; there is no output, or one without entries; ``check``
            or ``audit`` is none of the above.
        NotImplementedError: the function writes into a parameter in place, or does what no transform of
            torch takes (``.item()``, checkpoints).
        RuntimeError: the function writes into a tensor that an earlier op's gradient needs.
        CheckFailedError: the result differs from that of ``torch.func``, now or since an earlier call.

    Examples:
        >>> J = gramjd.jacobian(per_sample_loss)(params, inputs, targets)
        >>> weights = gramjd.weighting.upgrad(J.gramian())
        >>> gradient = J.vjp(weights)
    """
    lazy = jacobian_and_value(
        func, argnums, in_dims, has_aux=has_aux, randomness=randomness, chunk_size=chunk_size, check=check,
        audit=audit,
    )  # fmt: skip

    def transformed(*args: Any, **kwargs: Any) -> Any:
        found, value = lazy(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return transformed


# fmt: off
@overload
def jacobian_and_value(func: Callable[Concatenate[In, Rest], Out], argnums: Literal[0] = 0,
                       in_dims: InDims = ..., *, has_aux: Literal[False] = False, **options: Unpack[_Options]
                       ) -> Callable[..., tuple[Jacobian[Out, In], Out]]: ...
@overload
def jacobian_and_value(func: Callable[Concatenate[In, Rest], tuple[Out, Any]], argnums: Literal[0] = 0,
                       in_dims: InDims = ..., *, has_aux: Literal[True], **options: Unpack[_Options]
                       ) -> Callable[..., tuple[Jacobian[Out, In], tuple[Out, Any]]]: ...
@overload
def jacobian_and_value(func: Callable[..., Out], argnums: Argnums, in_dims: InDims = ..., *,
                       has_aux: Literal[False] = False, **options: Unpack[_Options]
                       ) -> Callable[..., tuple[Jacobian[Out], Out]]: ...
@overload
def jacobian_and_value(func: Callable[..., tuple[Out, Any]], argnums: Argnums, in_dims: InDims = ..., *,
                       has_aux: Literal[True], **options: Unpack[_Options]
                       ) -> Callable[..., tuple[Jacobian[Out], tuple[Out, Any]]]: ...
@overload
def jacobian_and_value(func: Callable[..., Any], argnums: Argnums = ..., in_dims: InDims = ..., *,
                       has_aux: bool, **options: Unpack[_Options]
                       ) -> Callable[..., tuple[Jacobian[Any], Any]]: ...
# fmt: on


def jacobian_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    check: Check = "first",
    audit: int | None = 256,
) -> Callable[..., tuple[Jacobian[Any], Any]]:
    """Like :func:`jacobian`, but return the function's values, too, from one run of the function.

    The arguments are those of :func:`jacobian`.

    Returns:
        A function that returns ``(jacobian, value)``, or ``(jacobian, (value, aux))`` if ``has_aux``. Values
        are ``[B, *S]`` for an output of shape ``S`` per sample, in a PyTree like the output.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, CheckFailedError: as :func:`jacobian`.
    """
    if not callable(func):
        raise TypeError(f"A transform takes a function of one sample, not {func!r}.")
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    options = numbers, repr(in_dims), has_aux, randomness, chunk_size
    verifier = Verifier(func, options, check, audit)
    shared, known_calls = in_dims is None, KnownCalls()

    def transformed(*args: Any, **kwargs: Any) -> tuple[Jacobian[Any], Any]:
        given = Arguments.of(args, kwargs, numbers, in_dims, single=isinstance(argnums, int))

        def captured(run: Function, given: Arguments) -> Captured:
            return capture(
                run,
                given.parameters,
                given.batch,
                batch_independent=given.batch_independent,
                randomness=randomness,
                chunk_size=chunk_size,
                shared=shared,
                known_calls=known_calls,
            )

        def run_of(given: Arguments) -> Function:
            return _Run(func, given, has_aux)

        run = _Run(func, given, has_aux)
        if is_compiling():
            found = captured(run, given)
        elif not verifier.applies(given):
            with explained():
                found = captured(run, given)
        else:
            generators = Generators(shared or randomness != "error", given.parameters)
            with explained():
                found = captured(run, given)
            call = Call(given, run_of, captured, generators, randomness, chunk_size, shared)
            verifier.verify(call, found)
        outputs = _outputs(found.outputs, batched=in_dims is not None)
        samples = len(found.outputs[0])
        lazy = Jacobian.of(
            found.blocks, given.parameters, given.parameters_spec, outputs, run.output_spec, samples
        )
        values, aux = found.outputs, found.aux
        if in_dims is None:
            values, aux = [x.squeeze(0) for x in values], [x.squeeze(0) for x in aux]
        value = pytree.unflatten(run.output_spec, values)
        return lazy, ((value, run.with_tensors(aux)) if has_aux else value)

    return transformed


# fmt: off
@overload
def gramian(func: Callable[..., Tensor], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
            ) -> Callable[..., Tensor]: ...
@overload
def gramian(func: Callable[..., Tensor], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[False] = False, sketch: int | Projection, **options: Unpack[_Options]
            ) -> Callable[..., SketchedGramian]: ...
@overload
def gramian(func: Callable[..., tuple[Tensor, Any]], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[True], sketch: None = None, **options: Unpack[_Options]
            ) -> Callable[..., tuple[Tensor, Any]]: ...
@overload
def gramian(func: Callable[..., tuple[Tensor, Any]], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[True], sketch: int | Projection, **options: Unpack[_Options]
            ) -> Callable[..., tuple[SketchedGramian, Any]]: ...
@overload
def gramian(func: Callable[..., dict[Key, Tensor]], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
            ) -> Callable[..., dict[Key, dict[Key, Tensor]]]: ...
@overload
def gramian(func: Callable[..., list[Tensor]], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
            ) -> Callable[..., list[list[Tensor]]]: ...
@overload
def gramian(func: Callable[..., tuple[Tensor, ...]], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
            ) -> Callable[..., tuple[tuple[Tensor, ...], ...]]: ...
@overload
def gramian(func: Callable[..., Several], argnums: Argnums = ..., in_dims: InDims = ..., *,
            has_aux: bool = ..., sketch: int | Projection | None = ..., **options: Unpack[_Options]
            ) -> Callable[..., Any]: ...
# fmt: on


def gramian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    check: Check = "first",
    audit: int | None = 256,
    sketch: int | Projection | None = None,
) -> Callable[..., Any]:
    """Transform a per-sample function into one that returns the Gramian of its Jacobian.

    The Jacobian is never stored (Quinton and Rey, arXiv 2406.16232, Section 6). The arguments are those of
    :func:`jacobian`, and one more:

    Args:
        sketch: for thousands of samples: return ``S Sᵀ`` of a sketch ``S`` of the rows in place of
            ``J Jᵀ``, detached. Pass the number of its columns, or a :class:`~gramjd.Projection`; see
            :meth:`gramjd.Jacobian.gramian`.

    Returns:
        A function that returns ``G = J Jᵀ`` of shape ``[B, *S, *reversed(S), B]`` for an output of shape
        ``S`` per sample, in the dtype of the parameters (float32 for half precision), exactly symmetric. For
        a PyTree of outputs, a PyTree of PyTrees as of ``torch.func.hessian``. ``(G, aux)`` if ``has_aux``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, CheckFailedError: as :func:`jacobian`;
            ``ValueError`` also for a sketch of several outputs.
    """
    lazy = jacobian(
        func, argnums, in_dims, has_aux=has_aux, randomness=randomness, chunk_size=chunk_size, check=check,
        audit=audit,
    )  # fmt: skip

    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = lazy(*args, **kwargs)
        if has_aux:
            return found[0].gramian(sketch=sketch), found[1]
        return found.gramian(sketch=sketch)

    return transformed


# fmt: off
@overload
def gramian_and_value(func: Callable[..., Tensor], argnums: Argnums = ..., in_dims: InDims = ..., *,
                      has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[Tensor, Tensor]]: ...
@overload
def gramian_and_value(func: Callable[..., Tensor], argnums: Argnums = ..., in_dims: InDims = ..., *,
                      has_aux: Literal[False] = False, sketch: int | Projection, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[SketchedGramian, Tensor]]: ...
@overload
def gramian_and_value(func: Callable[..., tuple[Tensor, Any]], argnums: Argnums = ..., in_dims: InDims = ...,
                      *, has_aux: Literal[True], sketch: None = None, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[Tensor, tuple[Tensor, Any]]]: ...
@overload
def gramian_and_value(func: Callable[..., tuple[Tensor, Any]], argnums: Argnums = ..., in_dims: InDims = ...,
                      *, has_aux: Literal[True], sketch: int | Projection, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[SketchedGramian, tuple[Tensor, Any]]]: ...
@overload
def gramian_and_value(func: Callable[..., dict[Key, Tensor]], argnums: Argnums = ..., in_dims: InDims = ...,
                      *, has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[dict[Key, dict[Key, Tensor]], dict[Key, Tensor]]]: ...
@overload
def gramian_and_value(func: Callable[..., list[Tensor]], argnums: Argnums = ..., in_dims: InDims = ..., *,
                      has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[list[list[Tensor]], list[Tensor]]]: ...
@overload
def gramian_and_value(func: Callable[..., tuple[Tensor, ...]], argnums: Argnums = ..., in_dims: InDims = ...,
                      *, has_aux: Literal[False] = False, sketch: None = None, **options: Unpack[_Options]
                      ) -> Callable[..., tuple[tuple[tuple[Tensor, ...], ...], tuple[Tensor, ...]]]: ...
@overload
def gramian_and_value(func: Callable[..., Several], argnums: Argnums = ..., in_dims: InDims = ..., *,
                      has_aux: bool = ..., sketch: int | Projection | None = ..., **options: Unpack[_Options]
                      ) -> Callable[..., tuple[Any, Any]]: ...
# fmt: on


def gramian_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    check: Check = "first",
    audit: int | None = 256,
    sketch: int | Projection | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """Like :func:`gramian`, but return the function's values, too, from one run of the function.

    The arguments are those of :func:`gramian`.

    Returns:
        A function that returns ``(G, value)``, or ``(G, (value, aux))`` if ``has_aux``. For an output of
        shape ``S`` per sample, ``G`` is ``[B, *S, *reversed(S), B]`` and the value ``[B, *S]``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError, CheckFailedError: as :func:`gramian`.
    """
    lazy = jacobian_and_value(
        func, argnums, in_dims, has_aux=has_aux, randomness=randomness, chunk_size=chunk_size, check=check,
        audit=audit,
    )  # fmt: skip

    def transformed(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        found, value = lazy(*args, **kwargs)
        return found.gramian(sketch=sketch), value

    return transformed


class _Run:
    """The function on lists of tensors; remembers the structure of what it returned."""

    def __init__(self, func: Callable[..., Any], given: Arguments, has_aux: bool) -> None:
        self.func, self.given, self.has_aux = func, given, has_aux
        self.output_spec: Any = None
        self._aux: tuple[list[Any], Any] = ([], None)

    def __call__(self, parameters: Sequence[Tensor], batch: Sequence[Tensor]
                 ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        args, kwargs = self.given.of_sample(parameters, batch)
        found, aux = self.func(*args, **kwargs), None
        if self.has_aux:
            if not (isinstance(found, tuple) and len(found) == 2):
                raise TypeError("With has_aux=True, the function must return a tuple (output, aux).")
            found, aux = found
        outputs, self.output_spec = pytree.tensor_leaves(found, "The function's output")
        if not outputs:
            raise ValueError("The function returned no tensor, so there is no Jacobian.")
        for out in outputs:
            if out.numel() == 0:
                raise ValueError(f"The function returned a tensor without entries, {list(out.shape)}.")
            if not out.is_floating_point():
                raise TypeError(
                    f"The function's output must hold real floating-point tensors, not {out.dtype}. "
                    "Return others through has_aux=True, complex ones as real ones (torch.view_as_real)."
                )
        leaves, spec = pytree.flatten(aux)
        self._aux = [pytree.PLACEHOLDER if isinstance(x, Tensor) else x for x in leaves], spec
        return outputs, [x for x in leaves if isinstance(x, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PyTree:
        """The auxiliary output with these tensors in it."""
        leaves, spec = self._aux
        rest = iter(tensors)
        return pytree.unflatten(spec, [next(rest) if x is pytree.PLACEHOLDER else x for x in leaves])


def _outputs(values: Sequence[Tensor], batched: bool) -> list[Output]:
    """The rows of each output: ``values`` are ``[B, *S]``, or ``[1, *S]`` if batch-independent."""
    outputs: list[Output] = []
    for value in values:
        start = outputs[-1].stop if outputs else 0
        shape = tuple(value.shape) if batched else tuple(value.shape[1:])
        outputs.append(Output(start, shape, 0 if batched else None))
    return outputs
