"""What users write: stages; and what goes between them: one array or a tuple of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.channels import is_on_gpu

Value: TypeAlias = Any
"""One array, or a tuple of arrays."""


@runtime_checkable
class PipelineStage(Protocol):
    """A part of a model that one rank runs: two methods, and up to six more.

    `forward(x)` returns `(y, saved)`; `backward(saved, gy)` returns the gradient of x, or None, and
    adds the gradients of its parameters to its own arrays, so that they accumulate over the
    microbatches. x and y are one array or a tuple of arrays.

    Optional: `backward_input(saved, gy)` returns `(gx, rest)` and `backward_weight(rest)` does what
    is left, for schedules that split the backward (without them the input part does it all);
    `gradients()` returns the arrays that are reduced over data-parallel ranks; `unshard()` and
    `reshard()` gather and drop parameters.

    Skip connections: a stage where some end gets their values as further arguments,
    `forward(x, *skips)`, and returns their gradients too: `(gx, *gskips)`. A stage where some begin
    sends its y there as well; or returns `(y, saved, {target: value})` and is then called with
    `backward(saved, gy, {target: gradient})`.

    Arrays that a stage returns are read until the run ends: return new ones each time.
    """

    def forward(self, x: Value) -> tuple[Value, Any]:
        """Return the result of this stage and whatever its backward needs."""
        ...

    def backward(self, saved: Any, gy: Value) -> Value:
        """Return the gradient of x, and add up the gradients of the parameters."""
        ...


class ArraySpec(NamedTuple):
    """Shape and dtype of one array, and whether it lives on a GPU."""

    shape: tuple[int, ...]
    dtype: str
    device: bool = False

    @property
    def has_gradient(self) -> bool:
        """Whether its elements are floating-point or complex numbers."""
        return not self.dtype.startswith(("int", "uint", "bool"))

    def empty(self) -> Any:
        """A new array of this kind."""
        return self._new("empty")

    def zeros(self) -> Any:
        """A new array of this kind that holds zeros."""
        return self._new("zeros")

    def _new(self, how: str) -> Any:
        if self.dtype.startswith(("bfloat", "float8")):
            import_module("ml_dtypes")
        make = getattr(import_module("cupy") if self.device else np, how)
        return make(self.shape, np.dtype(self.dtype))


class ValueSpec(NamedTuple):
    """Of what a value consists: one array, or a tuple of them."""

    arrays: tuple[ArraySpec, ...]
    is_tuple: bool

    def __str__(self) -> str:
        texts = [f"{a.dtype} {a.shape}" for a in self.arrays]
        return f"({', '.join(texts)})" if self.is_tuple else "".join(texts)

    def value(self, arrays: Sequence[Any]) -> Value:
        """The value made of these arrays."""
        return tuple(arrays) if self.is_tuple else arrays[0]


_GRADIENT_FREE = ValueSpec((), True)
DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 "
    "complex128 bfloat16 float8_e4m3fn float8_e5m2"
).split()
HEADER_LENGTH = 64  # int64 numbers


def arrays_of(value: Value) -> tuple[Any, ...]:
    """The arrays of a value. Errors: UsageError where it is none."""
    arrays = value if isinstance(value, tuple) else (value,)
    for array in arrays:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise UsageError(
                f"a stage's value holds {type(array).__name__}; give an array or a tuple of arrays"
            )
    return arrays


@cache
def _name_of(dtype: Any) -> str:
    name: str = dtype.name  # which NumPy makes anew each time
    return name


def _spec_of_array(array: Any) -> ArraySpec:
    return ArraySpec(tuple(array.shape), _name_of(array.dtype), is_on_gpu(array))


def spec_of(value: Value) -> ValueSpec:
    """The spec of a value."""
    arrays = arrays_of(value)
    return ValueSpec(tuple(map(_spec_of_array, arrays)), isinstance(value, tuple))


def given_spec(given: Any) -> ValueSpec:
    """The spec that a user wrote: (shape, dtype), an array, a ValueSpec, or a list of specs."""
    if isinstance(given, ValueSpec):
        return given
    if isinstance(given, list):
        parts = [given_spec(item) for item in given]
        return ValueSpec(tuple(a for part in parts for a in part.arrays), True)
    if hasattr(given, "shape"):
        return spec_of(given)
    try:
        shape, dtype = given
        name = dtype if dtype in DTYPES else np.dtype(dtype).name
        return ValueSpec((ArraySpec(tuple(int(n) for n in shape), name),), False)
    except (TypeError, ValueError):
        raise UsageError(
            f"Pipeline: argument 'shapes' has {given!r}; give (shape, dtype), such as "
            "((32, 128), 'float32'), an array like it, or a list of these"
        ) from None


def gradient_spec(spec: ValueSpec) -> ValueSpec:
    """The gradient of a value: of those of its arrays that can have one."""
    arrays = tuple(a for a in spec.arrays if a.has_gradient)
    return ValueSpec(arrays, spec.is_tuple) if arrays else _GRADIENT_FREE


def gradient_arrays(spec: ValueSpec, gradient: Value) -> list[Any]:
    """The arrays of a gradient for a value of that spec; zeros for a None in a tuple.

    Errors: UsageError where it does not fit.
    """
    if gradient is None:
        if not any(array.has_gradient for array in spec.arrays):
            return []
        raise UsageError(f"the gradient of {spec} is None; return an array of that shape and dtype")
    parts = gradient if spec.is_tuple else (gradient,)
    if not isinstance(parts, tuple) or len(parts) != len(spec.arrays):
        count = len(parts) if isinstance(parts, tuple) else type(parts).__name__
        raise UsageError(
            f"the gradient is {count}, and the value is {spec}; return a tuple with one gradient "
            "for each of its arrays"
        )
    found = []
    for array, part in zip(spec.arrays, parts, strict=True):
        if not array.has_gradient:
            continue
        if part is None:
            part = array.zeros()
        shape, dtype = tuple(getattr(part, "shape", ())), getattr(part, "dtype", None)
        if shape != array.shape or dtype is None or _name_of(dtype) != array.dtype:
            raise UsageError(
                f"the gradient is {dtype or type(part).__name__} {shape}, and the value is "
                f"{array.dtype} {array.shape}; return a gradient of the same shape and dtype"
            )
        found.append(part)
    return found


def full_gradient(spec: ValueSpec, arrays: Sequence[Any]) -> Value:
    """The gradient as a stage gets it: None for arrays that cannot have one."""
    rest = iter(arrays)
    return spec.value([next(rest) if a.has_gradient else None for a in spec.arrays])


def add_gradients(first: Value, second: Value) -> Value:
    """The sum of two gradients of one value."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, tuple):
        return tuple(add_gradients(a, b) for a, b in zip(first, second, strict=True))
    return first + second


def encode(spec: ValueSpec) -> list[NDArray[np.int64]]:
    """The spec as one header of HEADER_LENGTH numbers, and a longer one where it does not fit."""
    numbers = [int(spec.is_tuple), len(spec.arrays)]
    for array in spec.arrays:
        if array.dtype not in DTYPES:
            raise UsageError(
                f"a stage's value holds {array.dtype}; between stages go {', '.join(DTYPES)}"
            )
        numbers += [DTYPES.index(array.dtype), int(array.device), len(array.shape), *array.shape]
    head = np.zeros(HEADER_LENGTH, np.int64)
    head[0] = len(numbers)
    if len(numbers) < HEADER_LENGTH:
        head[1 : len(numbers) + 1] = numbers
        return [head]
    return [head, np.array(numbers, np.int64)]


def decode(numbers: Sequence[int]) -> ValueSpec:
    """The spec of a header's numbers, without their count."""
    is_tuple, count, *rest = numbers
    arrays = []
    for _ in range(count):
        code, device, ndim, *rest = rest
        arrays.append(ArraySpec(tuple(rest[:ndim]), DTYPES[code], bool(device)))
        rest = rest[ndim:]
    return ValueSpec(tuple(arrays), bool(is_tuple))


def has_method(unit: Any, name: str) -> bool:
    """Whether it has something of that name that can be called."""
    return callable(getattr(unit, name, None))


def stages_by_number(
    stages: Any, mine: Sequence[int], count: int, rank: int
) -> dict[int, PipelineStage]:
    """This rank's stages: from one stage, a list in order, a dict, or a function (number, count).

    Errors: UsageError that says what is missing.
    """
    if isinstance(stages, Mapping):
        found = {number: stages[number] for number in mine if number in stages}
    elif hasattr(stages, "forward") and not isinstance(stages, type):
        found = {mine[0]: stages} if mine else {}
    elif isinstance(stages, Sequence):
        if len(stages) != len(mine):
            raise UsageError(
                f"Pipeline (rank {rank}): argument 'stages' has {len(stages)} entries; this rank "
                f"holds {len(mine)} stages, {list(mine)}, in that order"
            )
        found = dict(zip(mine, stages, strict=True))
    elif isinstance(stages, Callable):  # type: ignore[arg-type]
        found = {number: stages(number % count, count) for number in mine}
    else:
        raise UsageError(
            f"Pipeline (rank {rank}): argument 'stages' is {type(stages).__name__}; give a stage, "
            "a list of them, a dict by number, or a function of (number, count)"
        )
    for number in mine:
        if number not in found:
            raise UsageError(
                f"Pipeline (rank {rank}): argument 'stages' lacks stage {number}; this rank holds "
                f"{list(mine)}"
            )
        unit = found[number]
        split = has_method(unit, "backward_input")
        for method in ("forward", "backward_weight" if split else "backward"):
            if not has_method(unit, method):
                raise UsageError(
                    f"Pipeline (rank {rank}): stage {number} is {type(unit).__name__}, which has "
                    f"no method {method}(); see meshring.PipelineStage"
                )
    return found


def cut(name: str, value: Any, count: int) -> list[Value]:
    """A list as it is; an array, or a tuple of arrays, cut along axis 0 into `count` parts.

    Parts differ by one row at most. Errors: UsageError for a list of another length.
    """
    if isinstance(value, list):
        if len(value) != count:
            raise UsageError(
                f"Pipeline.run: argument {name!r} has {len(value)} microbatches; the schedule has "
                f"{count}"
            )
        return value
    arrays = arrays_of(value)
    rows = {a.shape[0] if a.shape else 0 for a in arrays}
    if len(rows) != 1 or min(rows) < count:
        raise UsageError(
            f"Pipeline.run: argument {name!r} has {sorted(rows)} rows along axis 0, to be cut into "
            f"{count} microbatches; give at least {count}, the same for all arrays, or a list of "
            f"{count} microbatches"
        )
    edges = [i * min(rows) // count for i in range(count + 1)]
    pieces = [tuple(a[i:j] for a in arrays) for i, j in pairwise(edges)]
    return pieces if isinstance(value, tuple) else [piece[0] for piece in pieces]
