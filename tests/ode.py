"""Differential equations with known answers, steps of given sizes, order conditions: for the tests of ODE solvers."""

import functools
import math

import numpy as np
import torch
from problems import PER_SAMPLE, contraction, f64, random
from scipy.integrate import solve_ivp

from implicit_bench.core import EndTime, Status, solve


class Spy(EndTime):
    """An end time that remembers every state it is asked about."""

    def watch(self, reduce):
        watch, self.seen = super().watch(reduce), []
        inner = watch.open
        watch.open = lambda state, k: self.seen.append(state) or inner(state, k)
        return watch


def exp_sin(z, t):
    """z' = z cos t, z = z0 e^(sin t): the field depends on time."""
    return z * torch.cos(t).unsqueeze(1)


def decay(rates):
    """z' = -r z (1 + sin(3t) / 2), another rate in each row; elementwise, so that rows are bit for bit their own."""
    return lambda z, t: -rates * z * (1 + 0.5 * torch.sin(3 * t)[:, None])


RATES = f64([[0.1], [1.0], [8.0], [40.0]])


def beside_nan(solver, nan, when):
    """`decay` solved clean, and with the field of row `nan` NaN beyond the time `when`: (clean, sick).

    The sick row ends by itself, at once or as a step too small, and the others keep every bit.
    """
    bad = torch.arange(4)[:, None] == nan

    def broken(z, t):
        return torch.where(bad & (t[:, None] > when), torch.nan, decay(RATES)(z, t))

    z0 = f64([[1.0, 2.0]] * 4)
    good, s = (solve(F, z0, solver=solver, stop=EndTime(2.0), reduce=PER_SAMPLE) for F in (decay(RATES), broken))
    assert s.status[nan] == (Status.NONFINITE if when < 0 else Status.STEP_TOO_SMALL)
    for i in set(range(4)) - {nan}:
        assert torch.equal(s.value[i], good.value[i])
    return good, s


def decayed(rates, z0, t):
    return z0 * torch.exp(-rates * (t + (1 - math.cos(3 * t)) / 6))


W = contraction(8, 3.0, seed=3)
PROBLEMS = {  # field, start, end
    "decay": (lambda z, t: -z, f64([[1.0, -0.5, 2.0]]), 3.0),
    "oscillator": (lambda z, t: torch.stack((z[:, 1], -z[:, 0]), 1), f64([[1.0, 0.0]]), 6.0),
    "logistic": (lambda z, t: z * (1 - z), f64([[0.1, 0.3]]), 8.0),
    "lotka_volterra": (
        lambda z, t: torch.stack((z[:, 0] * (1.5 - z[:, 1]), z[:, 1] * (z[:, 0] - 3)), 1), f64([[10.0, 5.0]]), 4.0),
    "network": (lambda z, t: torch.tanh(z @ W) * torch.cos(t)[:, None] - 0.3 * z, random(3, 8, seed=1), 5.0),
    "forced": (exp_sin, f64([[1.5, -0.3]]), 6.0),
    "stiff": (lambda z, t: -300 * (z - torch.cos(t)[:, None]), f64([[2.0]]), 0.5),
}  # fmt: skip
NON_STIFF = [name for name in PROBLEMS if name != "stiff"]
TOLERANCES = [1e-3, 1e-4, 1e-5, 1e-6]

def numpy_field(F, shape):
    return lambda t, z: F(torch.from_numpy(z).view(shape), f64([t] * shape[0])).flatten().numpy()


@functools.cache
def exact_at(name, t1):
    """z(t1) by scipy, to twelve digits."""
    F, z0, _ = PROBLEMS[name]
    method = "Radau" if name == "stiff" else "DOP853"
    run = solve_ivp(numpy_field(F, z0.shape), (0, t1), z0.flatten().numpy(), method=method, rtol=1e-12, atol=1e-13)
    return torch.from_numpy(run.y[:, -1]).view(z0.shape)


def start(solver, F, z0, h, t1=math.inf, t0=0.0, reduce=PER_SAMPLE):
    """The solver's first state, moved to time t0, its next step being h."""
    state = solver.init(F, z0, t1, reduce)
    t = torch.full_like(state.t, t0)
    return state._replace(t=t, F=F(z0, t), mem=state.mem._replace(dt=torch.full_like(state.mem.dt, h)))


def march(solver, F, z0, hs, t0=0.0, reduce=PER_SAMPLE):
    """The states after steps of these sizes, whatever the solver would rather take."""
    state = start(solver, F, z0, hs[0], t0=t0, reduce=reduce)
    for h in hs:
        state = state._replace(mem=state.mem._replace(dt=torch.full_like(state.mem.dt, h)))
        state = solver.step(F, state, reduce)
        yield state


def stage_matrix(tableau):
    """A (s, s), c (s), b (s) and b_hat of an FSAL tableau; of one without error weights, b_hat = b."""
    s = len(tableau.a) + 1
    a, c = np.zeros((s, s)), np.array([0.0, *tableau.c])
    for i, row in enumerate(tableau.a, 1):
        a[i, : len(row)] = row
    b = a[-1]
    return a, c, b, b - np.array(tableau.e or [0.0] * s)


def defects(tableau):
    """The worst defect of the order conditions of orders 1 to 5 (17 rooted trees), of b and of b_hat."""
    a, c, b, b_hat = stage_matrix(tableau)
    ac, ac2, ac3, aac = a @ c, a @ c**2, a @ c**3, a @ (a @ c)
    trees = {  # Phi(tree) as a function of the stages, and 1 / its weight
        1: [(np.ones(len(c)), 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (ac, 6)],
        4: [(c**3, 4), (c * ac, 8), (ac2, 12), (aac, 24)],
        5: [(c**4, 5), (c**2 * ac, 10), (ac**2, 20), (c * ac2, 15), (ac3, 20), (c * aac, 30), (a @ (c * ac), 40),
            (a @ ac2, 60), (a @ aac, 120)],
    }  # fmt: skip

    def worst(weights, order):
        return max(abs(weights @ phi - 1 / gamma) for phi, gamma in trees[order])

    return [worst(b, k) for k in range(1, 6)], [worst(b_hat, k) for k in range(1, 6)]
