"""Components with one fault each: what `check` is to catch. A copy of this file is a user's own module in the tests."""

import dataclasses

import torch
from torch import nn

from implicit_bench.adjoints import IFT, JFB, Unroll
from implicit_bench.core import Solver, State
from implicit_bench.models import Dense, DenseCell
from implicit_bench.solvers import Picard, Tsit5


class WrongOrder(Tsit5):
    tableau = Tsit5.tableau._replace(a=(Tsit5.tableau.a[0], (-0.0085, 0.3265), *Tsit5.tableau.a[2:]))


class Uncounted(Picard):
    """Looks at f behind the counter's back."""

    def step(self, F, state, reduce):
        getattr(F, "F", F)(state.z, state.t)
        return super().step(F, state, reduce)


class TwoCalls(Picard):
    """Says one_call."""

    def step(self, F, state, reduce):
        return super().step(F, super().step(F, state, reduce), reduce)


class Lying(Picard):
    """Its F, and so the residual, is a tenth of what it is."""

    def step(self, F, state, reduce):
        state = super().step(F, state, reduce)
        return state._replace(F=state.F / 10, fz=None)


class Leaking(Picard):
    """Steers every row by all of them."""

    def step(self, F, state, reduce):
        return super().step(F, state._replace(z=state.z + 1e-13 * state.z.mean(0), fz=None), reduce)


class Stuck(Solver):
    def step(self, F, state, reduce):
        return State(state.z, F(state.z, state.t), state.t)


class Early(Tsit5):
    """Says that it is there when it is half-way."""

    def init(self, F, z0, t1, reduce):
        self.t1 = t1
        return super().init(F, z0, t1, reduce)

    def step(self, F, state, reduce):
        state = super().step(F, state, reduce)
        return state._replace(t=torch.where(state.t > self.t1 / 2, self.t1, state.t))


class Quitting(Tsit5):
    """Says that its step has become too small when it is tired."""

    def moves(self, state, going):
        return super().moves(state, going) & (state.t < 1.5)


class Lax(Tsit5):
    """A thousandth of the tolerance makes it ten times as accurate."""

    def error(self, *given):
        return super().error(*given) * (self.rtol / 1e-3) ** (2 / 3)


class Deaf(Solver):
    """Has tolerances, and takes Euler steps of a sixteenth whatever they are."""

    has_time = True
    rtol = atol = 1e-3

    def step(self, F, state, reduce):
        z, t = state.z + state.F / 16, state.t + 1 / 16
        return State(z, F(z, t), t)


class Wide(Picard):
    def init(self, F, z0, t1, reduce):
        return super().init(F, z0.double(), t1, reduce)


class Overwriting(Picard):
    def step(self, F, state, reduce):
        z = state.z.add_(state.F)
        return State(z, F(z, state.t), state.t)


class Remembering(Picard):
    """Damps one solve more than the last."""

    solves = 0

    def init(self, F, z0, t1, reduce):
        Remembering.solves += 1
        return super().init(F, z0, t1, reduce)

    def step(self, F, state, reduce):
        z = state.z + state.F * (1 - 0.05 * (Remembering.solves % 7))
        return State(z, F(z, state.t), state.t)


class Raising(Picard):
    def step(self, F, state, reduce):
        raise ZeroDivisionError("of its own\nin two lines")


class Hiding(Picard):
    """Takes a NaN for a root."""

    def step(self, F, state, reduce):
        state = super().step(F, state, reduce)
        return state._replace(F=state.F.nan_to_num(0.0), fz=None)


class Healing(Picard):
    """Makes a number of a NaN."""

    def init(self, F, z0, t1, reduce):
        return super().init(F, z0.nan_to_num(0.0), t1, reduce)


class Crowded(Picard):
    """Damps by the number of rows."""

    def step(self, F, state, reduce):
        z = state.z + state.F / (1 + len(state.z) / 100)
        return State(z, F(z, state.t), state.t)


class Detached(IFT):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z.detach(), solution, log


class Zero(JFB):
    """A gradient, but of nothing."""

    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z.detach() + 0 * z, solution, log


class Backwards(JFB):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return 2 * z.detach() - z, solution, log


class Exploding(JFB):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z + (z - z.detach()).abs().sqrt(), solution, log


class Meddling(JFB):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z, dataclasses.replace(solution, value=solution.value + 1e-12), log


class Boasting(JFB):
    exact = True


class Miscounting(IFT):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        log.forward_calls += 1
        return z, solution, log


class Hoarding(Unroll):
    def __call__(self, F, z0, solve, wrt):
        self.last = super().__call__(F, z0, solve, wrt)
        return self.last


class Changing(JFB):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z * 1.001, solution, log


class WideGradient(JFB):
    def __call__(self, F, z0, solve, wrt):
        z, solution, log = super().__call__(F, z0, solve, wrt)
        return z.double(), solution, log


class Of(Dense):
    """The dense network around another cell."""

    cell_class: type[DenseCell] = DenseCell

    def __init__(self, shape, classes, hidden=16):
        super().__init__(shape, classes, hidden)
        self.cell = self.cell_class(hidden)


class Restless(DenseCell):
    def forward(self, z, ctx, t):
        return nn.functional.dropout(super().forward(z, ctx, t), 0.3)


class Coupled(DenseCell):
    def forward(self, z, ctx, t):
        return super().forward(z - z.mean(0), ctx, t)


class CoupledInBegin(DenseCell):
    def begin(self, x):
        return super().begin(x - x.mean(0))


class Cut(DenseCell):
    def forward(self, z, ctx, t):
        return super().forward(z, ctx.detach(), t)


class Normed(DenseCell):
    def forward(self, z, ctx, t):
        return super().forward(z, ctx, t) + z / z.norm(dim=1, keepdim=True)


class Bent(DenseCell):
    """A backward that is not the derivative."""

    def forward(self, z, ctx, t):
        return super().forward(1.5 * z.detach() - 0.5 * z, ctx, t)


class Rooted(DenseCell):
    """A root of zero, and so a gradient of NaN."""

    def forward(self, z, ctx, t):
        return super().forward(z, ctx, t) + (z - z.detach()).abs().sqrt()


class Narrow(DenseCell):
    def forward(self, z, ctx, t):
        return super().forward(z, ctx, t).float()


class InPlace(DenseCell):
    def forward(self, z, ctx, t):
        out = super().forward(z, ctx, t)
        z.data.mul_(0.5)
        return out


CELLS = (Restless, Coupled, CoupledInBegin, Cut, Normed, Bent, Rooted, Narrow, InPlace)
NETWORKS = {cell.__name__: type(cell.__name__, (Of,), {"cell_class": cell}) for cell in CELLS}


class WrongHead(Of):
    def __init__(self, shape, classes, hidden=16):
        super().__init__(shape, classes, hidden)
        self.head = nn.Linear(hidden, classes + 1)


class WrongGuess(Of):
    def predictor(self):
        return nn.Linear(self.hidden, 3)
