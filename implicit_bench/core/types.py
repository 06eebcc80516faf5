"""The words the mathematics is written in: field, state, status, solution.

Shapes: B rows (samples) of D numbers. A state of any shape is flattened to (B, D); the cell knows how to unflatten it.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""F(z (B, D), t (B,)) -> (B, D). Equilibrium problems: F = f(z, x) - z. Differential equations: F = dz/dt itself."""


class Status(enum.IntEnum):
    """How a row's solve ended, and what a user can do about it."""

    advice: str

    def __new__(cls, value: int, advice: str = "") -> Status:
        status = int.__new__(cls, value)
        status._value_, status.advice = value, advice
        return status

    CONVERGED = 0, "the residual met the tolerance"
    REACHED_END = 1, "the end time, or the fixed number of steps, was reached"
    MAX_STEPS = 2, "cap before tolerance: raise stop.max_steps, loosen stop.tol (float32 ends near 1e-6), change solver"
    STALLED = 3, "the residual stopped falling: use another solver or damping, or regularise the Jacobian"
    NONFINITE = 4, "the state became infinite or NaN: lower the learning rate or damp the solver"
    STEP_TOO_SMALL = 5, ("the step size underflowed: the field is too stiff or not finite (loosen solver.rtol), or the "
                         "homotopy's path turns back (use solver=anderson or another start)")  # fmt: skip


class State(NamedTuple):
    """Where a solve stands. `F` is the field already evaluated at `z`, so that a residual costs no evaluation."""

    z: Tensor  # (B, D)
    F: Tensor  # (B, D)
    t: Tensor  # (B,)
    mem: Any = None  # a solver's own history
    fz: Tensor | None = None  # z + F, where it is known anyway

    def finite(self) -> Tensor:
        """(B,) bool: which rows hold no NaN and no infinity."""
        z, F = (a.detach().sum(1, dtype=_wide(a.dtype)) for a in (self.z, self.F))
        return (z + F).isfinite()


@dataclass(frozen=True)
class Stats:
    steps: Tensor  # (B,) int64: solver steps until the row ended
    nfe: Tensor  # (B,) int64: evaluations of F until the row ended
    calls: int  # evaluations of F in all, what the solve cost
    t: Tensor  # (B,) the time reached
    residual: Tensor  # (B,) relative residual |F| / |z + F| of the value; NaN for an ODE, where |F| is a speed
    trace: Tensor | None = None  # (steps + 1, B) the residual after every step, NaN after a row's end


@dataclass(frozen=True)
class Solution:
    value: Tensor  # (B, D)
    field: Tensor  # (B, D), F at `value`
    status: Tensor  # (B,) int64, see Status
    stats: Stats

    @property
    def fixed_point(self) -> Tensor:
        """f(value) = value + F: one more application of the cell at no cost, what an equilibrium layer puts out."""
        return self.value + self.field


class Solver:
    """Settings and two pure functions; the loop is `solve`. A row that has ended must stay finite (adjoint=unroll)."""

    has_time: ClassVar[bool] = False  # it integrates in t and can land on an end time
    one_call: ClassVar[bool] = True  # a step is one evaluation of F
    needs_map: ClassVar[bool] = False  # F must be a FixedPoint whatever the stop

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        return self.at(F, z0, torch.zeros(len(z0), dtype=_wide(z0.dtype), device=z0.device))

    @staticmethod
    def at(F: Field, z: Tensor, t: Tensor, mem: Any = None) -> State:
        """The state at z, one evaluation; a FixedPoint's f(z) is kept, for the stop and for root solvers."""
        Fz, fz = F.both(z, t) if hasattr(F, "both") else (F(z, t), None)
        return State(z, Fz, t, mem, fz)

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        raise NotImplementedError

    def moves(self, state: State, going: Tensor) -> Tensor:
        """(R,) bool: which of the rows that go on still can; one that cannot ends as STEP_TOO_SMALL."""
        return going


@runtime_checkable
class OwnLoop(Protocol):  # a solver of another library
    def solve(self, F: Field, z0: Tensor, stop: Stop) -> Solution: ...


class Watch(Protocol):
    """One solve as its stop sees it. R = B rows, or 1 where the batch is one system."""

    score: Tensor | None  # (R,) of the state last opened, least at the best iterate; None: the last is the best

    def open(self, state: State, k: int) -> Tensor:
        """(R,) bool: which rows go on after step k. A NaN row must come out False. Called without autograd."""

    def verdict(self, state: State) -> Tensor:
        """(R,) Status of the states returned; what the loop or the solver knows of a row's end comes on top."""


class Stop(Protocol):
    t1: float  # end time, inf unless the stop is an end time
    max_steps: int
    needs_equilibrium: bool  # is |F| = 0 the goal? then F must be f - z

    def watch(self, reduce: Reduce) -> Watch: ...


class Reduce:
    """Every norm and inner product that steers a solve.

    per_sample: a row's step size, mixing weights and stopping depend on that row alone; scalars are (R, 1), R = B.
    Otherwise the batch is one long vector, R = 1: what batch-coupled cells (batch statistics) need.
    Sums are float32 or better whatever the state's dtype. Stacks of k states are (B, k, D): bmm copies a (k, B, D) one.
    """

    def __init__(self, per_sample: bool):
        self.per_sample = per_sample

    def norm(self, a: Tensor) -> Tensor:
        """Euclidean norm, (B, D) -> (R, 1)."""
        dim = -1 if self.per_sample else (-2, -1)
        norm: Tensor = torch.linalg.vector_norm(a, dim=dim, keepdim=True, dtype=_wide(a.dtype))
        return norm

    def rms(self, a: Tensor) -> Tensor:
        """Root mean square, the norm in which ODE solvers measure error, (B, D) -> (R, 1)."""
        return self.norm(a) / math.sqrt(self.numbers(a))

    def numbers(self, a: Tensor) -> int:
        """How many numbers of (B, D) one norm is over."""
        return a.shape[-1] if self.per_sample else a.numel()

    def whole(self, rows: Tensor) -> Tensor:
        """(B,) bool -> (R,): of each row, or of all where the batch is one system."""
        return rows if self.per_sample else rows.all().unsqueeze(0)

    def dots(self, V: Tensor, w: Tensor) -> Tensor:
        """<V_i, w>: (B, k, D), (B, D) -> (R, k)."""
        return self.products(V, w.unsqueeze(1)).squeeze(1)

    def products(self, V: Tensor, W: Tensor) -> Tensor:
        """<W_j, V_i>: (B, k, D), (B, l, D) -> (R, l, k), in one pass over V."""
        sums = torch.bmm(W.to(_wide(W.dtype)), V.to(_wide(V.dtype)).mT)
        return sums if self.per_sample else sums.sum(0, keepdim=True)

    def combine(self, h: Tensor, V: Tensor) -> Tensor:
        """sum_i h_i V_i: (R, k), (B, k, D) -> (B, D), in V's dtype."""
        return torch.bmm(h.to(V.dtype).unsqueeze(1).expand(len(V), -1, -1), V).squeeze(1)


class FixedPoint:
    """The field of an equilibrium problem: F(z, t) = f(z, t) - z, with the map f at hand for the adjoints."""

    def __init__(self, f: Field):
        self.f = f

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.both(z, t)[0]

    def both(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """F and f at z; no f where it is narrower than the state, as under autocast."""
        fz = self.f(z, t)
        return fz - z, fz if fz.dtype == z.dtype else None


def relative(size: Tensor, of: Tensor) -> Tensor:
    """size / of, at most 1e30 where `of` is zero and size is finite."""
    return size / of.add(size, alpha=1e-30).clamp_min(torch.finfo(torch.float32).tiny)


_wide = functools.cache(lambda dtype: torch.promote_types(dtype, torch.float32))
