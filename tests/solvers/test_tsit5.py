"""Tsitouras 5(4): where it lands, its first step, its rows, its ends. What it shares with others is next door."""

import math

import pytest
import torch
from ode import RATES, Spy, decay, decayed, exp_sin, numpy_field, start
from problems import BATCH, PER_SAMPLE, Watched, affine, close, contraction, f64, random, tanh_map
from scipy.integrate import solve_ivp

from implicit_bench.core import EndTime, FixedPoint, Residual, Status, solve
from implicit_bench.solvers import Tsit5


def forced(F, z0, h, solver=None):
    """One attempt of this size."""
    solver = solver or Tsit5(1e9, 1e9)  # accepts anything
    state = start(solver, F, z0, h)
    return state, solver.step(F, state, PER_SAMPLE)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7, 1e-9])
def test_error_follows_the_tolerance(tol):
    s = solve(exp_sin, f64([[1.0]]), solver=Tsit5(tol, tol), stop=EndTime(5.0))
    error = float((s.value - math.exp(math.sin(5.0))).abs())
    assert tol / 1000 < error < 20 * tol
    # the work of a fifth-order method grows by 10^(1/5) a digit
    coarse = solve(exp_sin, f64([[1.0]]), solver=Tsit5(tol * 100, tol * 100), stop=EndTime(5.0))
    assert int(s.stats.steps) < 100**0.2 * int(coarse.stats.steps) * 1.5


def test_agrees_with_scipy_on_a_nonlinear_system():
    def field(z, t):
        x, y = z[:, :1], z[:, 1:]
        return torch.cat([1.1 * x - 0.4 * x * y + 0.1 * torch.sin(t)[:, None], 0.1 * x * y - 0.4 * y], 1)

    z0 = f64([[10.0, 5.0], [2.0, 1.0]])
    for reduce in (PER_SAMPLE, BATCH):
        s = solve(field, z0, solver=Tsit5(1e-9, 1e-9), stop=EndTime(10.0, max_steps=5000), reduce=reduce)
        for i in range(2):
            run = solve_ivp(numpy_field(field, (1, 2)), (0, 10), z0[i].numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
            close(s.value[i], torch.from_numpy(run.y[:, -1]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t1", [0.1, 0.3, 0.7, 1.0, 9.9])
def test_lands_on_the_end_time_exactly_and_never_looks_beyond(t1, dtype):
    watched = Watched(exp_sin)
    stop = Spy(t1)
    z0 = torch.tensor([[1.0], [30.0]], dtype=dtype)
    s = solve(watched, z0, solver=Tsit5(), stop=stop, reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.REACHED_END] * 2
    assert torch.equal(stop.seen[-1].t, torch.full((2,), t1, dtype=dtype))
    assert max(float(t.max()) for t in watched.times) <= float(torch.tensor(t1, dtype=dtype)) * (1 + 1e-6)
    torch.testing.assert_close(s.value, z0 * math.exp(math.sin(t1)), rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_the_first_step_is_hairer_norsett_and_wanners(reduce):
    """On z' = -r z: |F| = r |z|, |F'| = r^2 |z| and h = min(1 / r, (.01 / max(|F|, |F'|))^(1/5)), norms scaled."""
    z0, atol, rtol = f64([[3.0, 3.0]]), 1e-4, 1e-3
    size = 3.0 / (atol + 3.0 * rtol)
    for r in (1e-2, 1.0, 1e2, 1e4):
        state = Tsit5(rtol, atol).init(lambda z, t, r=r: -r * z, z0, math.inf, reduce)
        h = min(1 / r, (0.01 / max(r * size, r * r * size)) ** 0.2)
        assert math.isclose(float(state.mem.dt), h, rel_tol=1e-9)
        assert float(Tsit5(rtol, atol).init(lambda z, t, r=r: -r * z, z0, h / 2, reduce).mem.dt) == h / 2
    assert math.isclose(float(Tsit5().init(lambda z, t: 0 * z, z0, math.inf, reduce).mem.dt), 1e-6)  # nothing moves


def test_a_clock_tells_the_time():
    s = solve(lambda z, t: torch.ones_like(z), f64([[0.0]]), solver=Tsit5(), stop=EndTime(0.7))
    close(s.value, f64([[0.7]]), 1e-14)
    s = solve(lambda z, t: t[:, None].expand_as(z), f64([[0.0]]), solver=Tsit5(), stop=EndTime(3.0))
    close(s.value, f64([[4.5]]), 1e-12)  # a start at which z and F both vanish


def test_batch_wide_all_rows_share_one_step():
    stop = Spy(2.0)
    s = solve(decay(RATES), f64([[1.0, 2.0]] * 4), solver=Tsit5(), stop=stop, reduce=BATCH)
    assert len(set(s.stats.steps.tolist())) == 1
    assert all(bool((state.t == state.t[0]).all()) for state in stop.seen)
    close(s.value, decayed(RATES, f64([[1.0, 2.0]]), 2.0), 1e-2)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_every_attempt_costs_six_and_the_start_two(reduce):
    """Rejected attempts count: a kink makes some."""
    watched, stop = Watched(lambda z, t: -50 * torch.relu(z - 1) + torch.sin(20 * t)[:, None]), Spy(2.0)
    s = solve(watched, f64([[3.0], [1.1]]), solver=Tsit5(1e-6, 1e-6), stop=stop, reduce=reduce)
    attempts = s.stats.steps
    assert torch.equal(s.stats.nfe, 2 + 6 * attempts)
    assert watched.calls == s.stats.calls == 2 + 6 * int(attempts.max())
    times = torch.stack([state.t for state in stop.seen])
    moved = (times[1:] > times[:-1]).sum(0)
    assert bool((moved < attempts).all()), "no attempt was rejected, so this tests less than it says"
    if reduce is PER_SAMPLE:
        assert attempts[0] != attempts[1]


def test_a_rejected_attempt_moves_nothing():
    old, new = forced(exp_sin, f64([[1.5]]), 3.0, solver=Tsit5(1e-8, 1e-8))
    assert torch.equal(old.z, new.z)
    assert torch.equal(old.F, new.F)
    assert torch.equal(old.t, new.t)
    assert math.isclose(float(new.mem.dt), 0.2 * 3.0)


def test_a_nan_rejects_the_attempt_and_shrinks_the_step():
    def edge(z, t):  # not defined beyond t = 1
        return torch.where(t[:, None] > 1, torch.nan, torch.ones_like(z))

    old, new = forced(edge, f64([[0.0]]), 2.0)
    assert torch.equal(old.z, new.z)
    assert math.isclose(float(new.mem.dt), 0.2 * 2.0)


def test_a_stiff_field_ends_at_the_cap():
    s = solve(
        lambda z, t: -1e6 * (z - torch.cos(t)[:, None]), f64([[2.0]]), solver=Tsit5(), stop=EndTime(1.0, max_steps=200)
    )
    assert s.status.tolist() == [Status.MAX_STEPS]
    assert s.stats.nfe.tolist() == [2 + 6 * 200]


def test_a_field_that_ends_before_its_time_makes_the_step_too_small():
    """Beyond t = .5 the field is NaN; the value stays at the brink, and its neighbour goes on to the end."""
    until = torch.tensor([[0.5], [9.0]])

    def F(z, t):
        return torch.where(t[:, None] > until, torch.nan, torch.ones_like(z))

    s = solve(F, torch.zeros(2, 1), solver=Tsit5(), stop=EndTime(1.0), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.STEP_TOO_SMALL, Status.REACHED_END]
    torch.testing.assert_close(s.value, torch.tensor([[0.5], [1.0]]), rtol=0, atol=1e-5)
    assert s.stats.steps[1] < 20 < s.stats.steps[0]


def test_a_solution_that_blows_up_never_reaches_the_end():
    """z' = z^2 from 1 is 1 / (1 - t): there is no z(2)."""
    for dtype in (torch.float32, torch.float64):
        s = solve(lambda z, t: z * z, torch.ones(1, 1, dtype=dtype), solver=Tsit5(1e-6, 1e-6), stop=EndTime(2.0))
        assert s.status.tolist()[0] in (Status.STEP_TOO_SMALL, Status.MAX_STEPS, Status.NONFINITE)
        assert bool(s.value.isfinite().all())


def test_the_flow_reaches_the_equilibrium():
    W, ctx = contraction(4, 0.8), random(3, 4, seed=1)
    s = solve(tanh_map(W, ctx), torch.zeros_like(ctx), solver=Tsit5(1e-9, 1e-9), stop=Residual(1e-7, max_steps=500),
              reduce=PER_SAMPLE)  # fmt: skip
    assert s.status.tolist() == [Status.CONVERGED] * 3
    close(s.value, torch.tanh(s.value @ W + ctx), 1e-6)
    assert torch.equal(s.stats.nfe, 2 + 6 * s.stats.steps)


def test_dz_dt_is_f_minus_z():
    """On dz/dt = r z + (1 - r) - z the error decays as e^((r - 1) t)."""
    s = solve(affine((0.5, -1.0)), f64([[2.0], [2.0]]), solver=Tsit5(1e-9, 1e-9), stop=EndTime(1.5), reduce=PER_SAMPLE)
    close(s.value, 1 + torch.exp(f64([[-0.5], [-2.0]]) * 1.5), 1e-7)


def test_stepping_at_the_residuals_own_tolerance_hovers():
    """Why protocol.step_tol is a tenth of protocol.tol and why pi is the default: an explicit ODE solver near its limit
    of stability need not stop, as step after step is too long or too short; pi damps that."""
    F = tanh_map(contraction(4, 0.8), random(3, 4, seed=1))

    def statuses(tol, controller):
        solver, stop = Tsit5(tol, tol, controller), Residual(1e-4, max_steps=300)
        return solve(F, torch.zeros(3, 4).double(), solver=solver, stop=stop, reduce=PER_SAMPLE).status.tolist()

    assert Status.MAX_STEPS in statuses(1e-3, "i")
    assert statuses(1e-3, "pi") == statuses(1e-5, "i") == statuses(1e-5, "pi") == [Status.CONVERGED] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_time_is_kept_in_float32_or_better(dtype):
    stop = Spy(0.7)
    s = solve(FixedPoint(lambda z, t: 0.5 * z), torch.ones(2, 8, dtype=dtype), solver=Tsit5(1e-2, 1e-2), stop=stop)
    assert stop.seen[-1].t.dtype == torch.float32
    assert s.value.dtype == dtype
    torch.testing.assert_close(s.value.float(), torch.full((2, 8), math.exp(-0.35)), rtol=2e-2, atol=0)


@pytest.mark.parametrize(("rtol", "atol"), [(-1e-3, 1e-3), (1e-3, 0.0)])
def test_an_impossible_tolerance_is_refused_in_a_sentence(rtol, atol):
    with pytest.raises(ValueError, match=f"solver.rtol={rtol} and solver.atol={atol} must be positive"):
        Tsit5(rtol, atol)
