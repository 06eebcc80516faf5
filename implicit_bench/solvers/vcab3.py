from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, State
from ..core.solve import OpenRows
from .runge_kutta import Bosh3, attempt, weighted
from .step_size import Adaptive, Verdict


class Past(NamedTuple):
    last: Tensor  # (R, 1) the last accepted step
    span: Tensor  # (R, 1) the last two
    phi1: Tensor  # (B, D) F_n - F_n-1
    phi2: Tensor  # (B, D) phi1 - (last / the one before) (F_n-1 - F_n-2)
    size: Tensor  # (R, 1) of phi2 / 3, in units of the tolerance
    accepted: Tensor  # (R, 1) steps since the row (re)started, counted while any is starting
    flag: OpenRows  # counts the rows that have not accepted two
    starting: int  # its last reading


class Vcab3(Adaptive):
    """Variable-coefficient Adams-Bashforth of order 3 (Hairer, Norsett & Wanner, Solving ODEs I, III.5).

    The polynomial through the last three F gives z <- z + h F + (h r / 2) phi1 + (c / 3) phi2 with r = h / last and
    c = h r (h + 1.5 last) / span. The last term is AB3 - AB2, the error, known before any evaluation; its tolerance is
    that of the step's start, as usual in Adams codes. The first two accepted steps are Bogacki and Shampine's; then h
    at most doubles. safety=.86, not .9, keeps the error at one tolerance near Bosh3's or below. A step after which the
    same error is estimated more than `jump` times the tolerance has met a discontinuity: it is rejected, and the row
    starts again from its beginning, after one attempt more by Adams where the host learns of it late (CUDA).

    Cost: one evaluation an accepted step, none a rejected one; where rows disagree, or the host does not look (CUDA),
    one for all, in which a rejected row stands still. Three while any row is starting, and 2 before that. Memory: 6
    states. Stable for h |lambda| < .54 against Bosh3's 2.5 on three evaluations: not for stiff fields.
    """

    order = 3
    safety, ratio, jump = 0.86, 2.0, 100.0

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        state = super().init(F, z0, t1, reduce)
        one, none = torch.ones_like(state.mem.dt), torch.zeros_like(state.F)
        past = Past(one, one, none, none, one, torch.zeros_like(one), OpenRows(z0.is_cuda), len(one))
        return state._replace(mem=state.mem._replace(past=past))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        dt, past = state.mem.dt, state.mem.past
        last, span, phi1, phi2, size, accepted, flag, starting = past
        r = dt / last
        hr = dt * r
        c = hr * dt.add(last, alpha=1.5) / span
        error = c * size
        if state.mem.t1 < torch.inf:
            error.masked_fill_(dt == 0, torch.inf)  # a row that has landed stands still
        ahead = Verdict(error <= 1.0)
        if ahead.none and not starting:
            return state._replace(mem=self.decide(state, error)[2]._replace(past=past))
        h, k = dt, c
        if h.dtype != state.z.dtype:
            h, hr, k, r = (a.to(state.z.dtype) for a in (dt, hr, c, r))
        new = torch.addcmul(state.z, h, state.F).addcmul_(hr, phi1, value=1 / 2).addcmul_(k, phi2, value=1 / 3)
        if not starting:
            new = ahead(new, state.z)
            _, Fz, _, _, fz = self.at(F, new, state.t + dt.squeeze(1))
        else:
            fz = None
            new, Fz, error = self._start(F, state, ahead(new, state.z), error, reduce)
        new1 = Fz - state.F
        new2 = torch.addcmul(new1, r, phi1, value=-1)
        with torch.no_grad():
            new_size = reduce.rms(new2 / self.tolerance(new.abs())) / 3
            smooth = c * new_size <= self.jump  # else F is not, beyond this step, or not even finite
            if starting:
                smooth = torch.where(accepted < 2, new_size < torch.inf, smooth)
            error = torch.where(smooth | (error > 1.0), error, torch.inf)
            ratio = torch.where(accepted < 2, self.grow, self.ratio) if starting else self.ratio
            take, t, control = self.decide(state, error, ratio)
            if starting or take.count is None or take.count != ahead.count:
                again = ~smooth & ahead.accept & (new_size < torch.inf)
                accepted = torch.where(again, 0, accepted + take.accept)
                going = (accepted < 2).squeeze(1)
                starting = flag.read(going if control.stuck is None else going & ~control.stuck)
            last, span, size = take(dt, last), take(dt + last, span), take(new_size, size)
        past = Past(last, span, take(new1, phi1), take(new2, phi2), size, accepted, flag, starting)
        mem = control._replace(past=past)
        return State(take(new, state.z), take(Fz, state.F), t, mem, fz if take.all else None)

    def _start(self, F: Field, state: State, adams: Tensor, adams_error: Tensor,
               reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Some rows are starting: their attempt is Bogacki and Shampine's, in three calls that all rows share."""
        dt, starting = state.mem.dt, state.mem.past.accepted < 2
        new, stages = attempt(Bosh3.tableau, F, state, torch.where(starting, dt, 0.0))
        new = Verdict(starting)(new, adams)
        stages.append(F(new, state.t + dt.squeeze(1)))
        with torch.no_grad():
            error = self.error(weighted(Bosh3.tableau.e, stages).mul_(dt), state.z, new, reduce)
            return new, stages[-1], torch.where(starting & (dt > 0), error, adams_error)
