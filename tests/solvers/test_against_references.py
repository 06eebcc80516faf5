"""The ODE solvers against scipy and torchdiffeq, and vcab3 against bosh3, on listed problems at four tolerances."""

import functools

import pytest
import torch
from ode import NON_STIFF, PROBLEMS, TOLERANCES, Spy, exact_at, numpy_field
from problems import BATCH
from scipy.integrate import solve_ivp
from torchdiffeq import odeint

from implicit_bench.core import EndTime, Status, solve
from implicit_bench.solvers import RK4, Bosh3, Dopri5, Euler, Tsit5, Vcab3

each = pytest.mark.parametrize("name", PROBLEMS)
non_stiff = pytest.mark.parametrize("name", NON_STIFF)
at = pytest.mark.parametrize("tol", TOLERANCES, ids=lambda tol: f"{tol:.0e}")


@functools.cache
def run(name, method, *settings):
    """Its worst error and its evaluations."""
    F, z0, t1 = PROBLEMS[name]
    s = solve(F, z0, solver=method(*settings), stop=EndTime(t1, 100_000), reduce=BATCH)
    assert s.status.tolist() == [Status.REACHED_END] * len(z0)
    return float((s.value - exact_at(name, t1)).abs().max()), s.stats.calls


class Attempts:
    """A field for torchdiffeq that notes (t, h) of every attempt."""

    def __init__(self, F):
        self.F, self.made, self.calls = F, [], 0

    def __call__(self, t, z):
        self.calls += 1
        return self.F(z, t.expand(len(z)))

    def callback_step(self, t, z, h):
        self.made.append((float(t), float(h)))


@each
@at
@pytest.mark.parametrize("method", [Dopri5, Bosh3])
def test_with_controller_i_ours_makes_torchdiffeqs_attempts(name, tol, method):
    """Until one passes the end: ours is shortened to land there, torchdiffeq's may fail, and at last interpolates.

    Else dopri5's evaluations agree within one attempt, and its value within 10 tol or a tenth of its own error.
    bosh3's values are not compared: torchdiffeq's interpolant of it is some 100 tol off.
    """
    F, z0, t1 = PROBLEMS[name]
    theirs, stop, solver = Attempts(F), Spy(t1, 100_000), method(tol, tol, "i")
    times = torch.tensor([0.0, t1], dtype=torch.float64)
    end = odeint(theirs, z0, times, method=method.__name__.lower(), rtol=tol, atol=tol)[-1]
    s = solve(F, z0, solver=solver, stop=stop, reduce=BATCH)
    ours = [(float(state.t[0]), float(state.mem.dt)) for state in stop.seen]
    passing = [i for i, (t, h) in enumerate(theirs.made) if t + h > t1]
    same = passing[0] if name != "stiff" else 40  # at the limit of stability rounding errors grow
    assert ours[:same] == [pytest.approx(a, rel=1e-5) for a in theirs.made[:same]]
    calls = {Dopri5: 6, Bosh3: 3}[method]
    assert theirs.calls == 2 + calls * len(theirs.made)
    if name != "stiff":
        failed = len(theirs.made) - 1 - passing[0]  # attempts that torchdiffeq made in vain beyond the end
        assert -calls * failed - 6 <= s.stats.calls - theirs.calls <= 6
    else:
        assert s.stats.calls == pytest.approx(theirs.calls, rel=0.02)
    if method is Dopri5:
        error = float((end - exact_at(name, t1)).abs().max())
        assert float((s.value - end).abs().max()) < max(10 * tol, 0.1 * error)


@each
@pytest.mark.parametrize("solver", [Tsit5, Dopri5, Bosh3, Vcab3])
def test_all_converge_to_scipys_solution(name, solver):
    """A tolerance a thousand times smaller gives an error some hundred times smaller at least."""
    coarse, fine = (run(name, solver, tol, tol, "pi")[0] for tol in (1e-3, 1e-6))
    assert fine < 1e-4
    assert fine < coarse / 50 or coarse < 1e-6


@non_stiff
@at
def test_dopri5_and_bosh3_are_as_good_as_scipys_at_no_more_cost(name, tol):
    """scipy's RK45 and RK23 are the same pairs under I control, from another first step."""
    F, z0, t1 = PROBLEMS[name]
    exact = exact_at(name, t1).flatten()
    for ours, theirs in ((Dopri5, "RK45"), (Bosh3, "RK23")):
        r = solve_ivp(numpy_field(F, z0.shape), (0, t1), z0.flatten().numpy(), method=theirs, rtol=tol, atol=tol)
        error, calls = run(name, ours, tol, tol, "i")
        assert error < 10 * max(float((torch.from_numpy(r.y[:, -1]) - exact).abs().max()), tol)
        assert calls < 1.25 * r.nfev + 12


@non_stiff
@at
@pytest.mark.parametrize("controller", ["pi", "i"])
def test_vcab3_is_as_accurate_as_bosh3_for_as_many_evaluations(name, tol, controller):
    error, calls = run(name, Vcab3, tol, tol, controller)
    bosh3_error, bosh3_calls = run(name, Bosh3, tol, tol, controller)
    assert error <= 1.3 * bosh3_error
    assert calls <= 1.1 * bosh3_calls


@at
def test_on_a_stiff_field_vcab3_is_held_back_by_its_stability(tol):
    """h |lambda| < .54 a call against bosh3's 2.5 / 3: more calls, where that is what limits h."""
    (error, calls), (_, bosh3_calls) = (run("stiff", method, tol, tol, "pi") for method in (Vcab3, Bosh3))
    assert error < 10 * tol
    assert calls < 1.7 * bosh3_calls
    assert tol < 1e-3 or calls > 1.1 * bosh3_calls


def test_fixed_steps_against_scipy():
    for name in NON_STIFF:
        t1 = PROBLEMS[name][2]
        assert run(name, RK4, t1 / 200)[0] < 1e-4
        assert run(name, Euler, t1 / 1000)[0] == pytest.approx(run(name, Euler, t1 / 500)[0] / 2, rel=0.2)
