from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State
from .memory import remember

Variant = Literal["correct", "paper", "paper_v1"]


class Broyden(Solver):
    """Broyden's good method (Broyden 1965; for DEQs Bai, Kolter & Koltun, arXiv 1909.01377) on F(z) = f(z) - z.

    z <- z + s, s = -H F, from H = -I, no line search; with y the change of F, H <- H + (s - H y) s^T H / (s^T H y).
    H is kept as the product of (I + s_j+1 s_j^T / |s_j|^2) over the steps (Kelley, Iterative Methods, SIAM 1995, 7.3):
    the steps are all the memory, and a triangular solve with their Gram matrix makes -H F two passes over them.
    With `window` steps stored (null: 12, which on convolution cells with GroupNorm take as many steps as 27 or fewer,
    to 1e-5, each cheaper; or the paper's 27) it restarts from -I: a factor is made by those before it,
    so that to drop or overwrite the oldest leaves no Broyden matrix, and stalls where the restart converges. An
    update that makes the Jacobian singular to half the digits is skipped, row by row: there y is rounding.

    Cost: one evaluation a step; window + 2 states of memory. Superlinear near the solution; 2 n steps on a linear
    problem of n unknowns (Gay 1979) if the window holds them. Fails far from it, where long steps go unchecked.
    variant=paper and paper_v1 are not this method but the first paper's code, faults included: see `Transposed`.
    """

    def __init__(self, window: int | None = None, variant: Variant = "correct"):
        if window is not None and window < 1:
            raise ValueError(f"solver.window={window} must be at least 1, or null for the variant's own")
        if variant not in get_args(Variant):
            raise ValueError(f"solver.variant={variant!r} must be correct, paper or paper_v1")
        self.couples = variant == "paper"  # the samples, whatever the reduction
        self.variant = variant
        self.window = window or (12 if variant == "correct" else 27)

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        state = super().init(F, z0, t1, reduce)
        if self.variant == "correct":
            return state._replace(mem=Steps.none(state.F, self.window, reduce))
        return state._replace(mem=Transposed.none(state.F, self.window, self.couples))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        step, mem = state.mem.advance(state.F, reduce)
        z = state.z + step
        return self.at(F, z, state.t, mem)


class Steps(NamedTuple):
    """H as the product of (I + s_j+1 s_j^T / |s_j|^2), newest first, and -I."""

    S: Tensor  # (B, window, D): the k steps since the last restart, then room
    gram: Tensor  # (R, k, k): <s_i, s_j>
    scale: Tensor  # (R, k): 1 / |s_j|^2, or 0 where the update by s_j was skipped

    @classmethod
    def none(cls, F: Tensor, window: int, reduce: Reduce) -> Steps:
        norm = reduce.norm(F)  # for R and the dtype of scalars
        return cls(F.new_empty(len(F), window, F.shape[1]), norm.new_empty(len(norm), 0, 0), norm[:, :0])

    def advance(self, F: Tensor, reduce: Reduce) -> tuple[Tensor, Steps]:
        """-H F, H being updated by the last step and F, and the memory with this step."""
        S, gram, scale = self
        k = scale.shape[1]
        step, dots = F, scale
        if k:
            # c_j = s_j . (F as the factors before j leave it) / |s_j|^2 is forward substitution; p = F + sum c_j s_j+1
            # is -H F by the old H, the last c is s . p / |s|^2, and the updated H gives p / (1 - that)
            dots = reduce.dots(S[:, :k], F)
            lower = (gram * -scale.unsqueeze(2)).roll(-1, 2)
            c = torch.linalg.solve_triangular(lower, (dots * scale).unsqueeze(2), upper=False, unitriangular=True)
            left = 1 - c[:, -1]  # s . H y / |s|^2
            sound = left.abs() > torch.finfo(left.dtype).eps ** 0.5
            gain = torch.where(sound, left, 1.0).reciprocal()
            scale = torch.cat((scale[:, :-1], scale[:, -1:] * sound), 1)
            c = c[:, :-1] * gain.unsqueeze(2)
            step = torch.addcmul(reduce.combine(c.squeeze(2), S[:, 1:k]), gain.to(F.dtype), F)
            dots = dots * gain + torch.bmm(gram[:, :, 1:], c).squeeze(2)  # <s_j, step>, without another pass
        if k == S.shape[1]:
            return step, Steps(S, gram[:, :0, :0], scale[:, :0])
        square = reduce.norm(step).square()
        gram = torch.cat((gram, dots.unsqueeze(1)), 1)
        gram = torch.cat((gram, torch.cat((dots, square), 1).unsqueeze(2)), 2)
        inverse = square.clamp_min(torch.finfo(square.dtype).tiny ** 0.75).reciprocal()
        return step, Steps(remember(S, k, step), gram, torch.cat((scale, inverse), 1))


class Transposed(NamedTuple):
    """The limited-memory Broyden of the first paper's code (arXiv 2201.12240), for protocol=faithful only.

    H = -I + sum_i v_i u_i^T, v = H^T s, u = (s - H y) / v.y, has two faults: u and v have changed places where H and
    H^T are applied; and v.y, a number a sample, is summed over the batch, which divides the updates by about its size.
    At a batch of 128 it takes as many steps as Picard. The newest term overwrites the oldest. Samples are coupled
    through v.y whatever `stop.per_sample` says: one NaN row spoils all. Version 1 has the first fault alone, which can
    diverge, so that it wants `stop.best=true`, as its code does. Memory: 2 window + 4 states.
    """

    summed: bool  # v.y over the batch
    k: int  # steps made
    U: Tensor  # (B, window, D)
    V: Tensor
    s: Tensor  # (B, D): the last step
    F: Tensor  # (B, D): where it started

    @classmethod
    def none(cls, F: Tensor, window: int, summed: bool) -> Transposed:
        stack = F.new_empty(len(F), window, F.shape[1])
        return cls(summed, 0, stack, stack.clone(), F, F)

    def advance(self, F: Tensor, reduce: Reduce) -> tuple[Tensor, Transposed]:
        summed, k, U, V, s, F0 = self
        if k == 0:
            return F, Transposed(summed, 1, U, V, F, F)
        rows = Reduce(per_sample=True)
        over = rows if not summed else Reduce(per_sample=False) if reduce.per_sample else reduce
        old, slot = min(k - 1, U.shape[1]), (k - 1) % U.shape[1]
        v = rows.combine(rows.dots(V[:, :old], s), U[:, :old]) - s
        p = F - rows.combine(rows.dots(U[:, :old], F), V[:, :old])  # s - H y, since s = -H F0
        normaliser = over.dots(v.unsqueeze(1), F - F0) + torch.finfo(F.dtype).eps
        U, V = remember(U, slot, (p / normaliser).to(F.dtype)), remember(V, slot, v)
        new = min(k, U.shape[1])
        step = F - rows.combine(rows.dots(U[:, :new], F), V[:, :new])
        return step, Transposed(summed, k + 1, U, V, step, F)
