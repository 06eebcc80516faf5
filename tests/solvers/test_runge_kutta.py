"""Runge-Kutta methods, adaptive and of fixed steps: their tableaux, orders, counts, control and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ode import PROBLEMS, RATES, Spy, beside_nan, decay, decayed, defects, exact_at, exp_sin, march, stage_matrix, start
from problems import BATCH, PER_SAMPLE, Watched, affine, close, contraction, f64, random, tanh_map

from implicit_bench.core import EndTime, FixedPoint, FixedSteps, Residual, Status, solve
from implicit_bench.solvers import RK4, Bosh3, Dopri5, Euler, Picard, Tsit5

ADAPTIVE = {Bosh3: (3, 3), Dopri5: (5, 6), Tsit5: (5, 6)}  # order, evaluations an attempt
FIXED = {Euler: (1, 1), RK4: (4, 4)}
ORDERS = {**ADAPTIVE, **FIXED}
both = pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
adaptive = pytest.mark.parametrize("method", ADAPTIVE)


# ------------------------------------------------------------------------------------------------------------ tableaux


@pytest.mark.parametrize("method", ORDERS)
def test_a_tableau_meets_the_conditions_of_its_order_and_no_more(method):
    order = ORDERS[method][0]
    a, c, _, _ = stage_matrix(method.tableau)
    main, embedded = defects(method.tableau)
    assert abs(a.sum(1) - c).max() < 1e-14  # every stage sits at its time
    assert max(main[:order]) < 1e-14
    assert order == 5 or main[order] > 1e-3
    if method in ADAPTIVE:  # the embedded solution is one order lower, or it would estimate nothing
        assert abs(sum(method.tableau.e)) < 1e-14
        assert max(embedded[: order - 1]) < (1e-11 if method is Tsit5 else 1e-14)  # Tsit5's e has 15 decimals at best
        assert embedded[order - 1] > 1e-4
        assert method.order == order


@pytest.mark.parametrize("method", ORDERS)
def test_the_error_of_equal_steps_falls_with_the_order(method):
    """On a field that depends on time, halving the step divides the error by 2^order."""
    F, z0, _ = PROBLEMS["network"]
    exact, (order, calls), errors = exact_at("network", 1.0), ORDERS[method], []
    for n in (64, 128, 256) if order == 1 else (16, 32, 64):
        watched = Watched(F)
        if method in FIXED:
            s = solve(watched, z0, solver=method(1 / n), stop=EndTime(1.0))
            assert watched.calls == s.stats.calls == 1 + calls * n
            errors.append(float((s.value - exact).norm()))
        else:  # a tolerance that accepts anything
            *_, end = march(method(1e9, 1e9), watched, z0, [1 / n] * n)
            assert watched.calls == 3 + calls * n  # one more to start by hand
            errors.append(float((end.z - exact).norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + 0.5


# ------------------------------------------------------------------------------------------------------ adaptive steps


def embedded_error(method, F, z, h, rtol, atol, reduce):
    """One attempt written out: the new state, F there, and the error."""
    tableau = method.tableau
    k = [F(z, f64([0.0] * len(z)))]
    for row, c in zip(tableau.a, tableau.c):
        end = z + h * sum(w * s for w, s in zip(row, k))
        k.append(F(end, f64([c] * len(z)) * h.flatten()))
    e = h * sum(w * s for w, s in zip(tableau.e, k)) / (atol + rtol * torch.maximum(z.abs(), end.abs()))
    return end, k[-1], (e**2).mean(1).sqrt() if reduce is PER_SAMPLE else (e**2).mean().sqrt().expand(len(z))


@adaptive
@both
@pytest.mark.parametrize("controller", ["pi", "i"])
def test_an_attempt_is_accepted_and_the_next_step_chosen_by_its_error(method, reduce, controller):
    """And t, z, F move only if it is accepted."""
    z0, rtol, atol, k = f64([[1.5, -0.3], [0.1, 0.2]]), 1e-5, 1e-7, method.order
    seen = set()
    for h in (0.001 * 1.5**n for n in range(26)):
        solver = method(rtol, atol, controller)
        old = start(solver, exp_sin, z0, h, reduce=reduce)
        new = solver.step(exp_sin, old, reduce)
        end, F_end, error = embedded_error(method, exp_sin, z0, f64([[h], [h]]), rtol, atol, reduce)
        for i in range(2):
            accepted, e = float(error[i]) <= 1, float(error[i])
            close(new.z[i], end[i] if accepted else z0[i], 1e-13)
            close(new.F[i], F_end[i] if accepted else old.F[i], 1e-13)
            close(new.t[i], f64(h if accepted else 0.0), 1e-14)
            least = 1.0 if accepted and controller == "i" else 0.2
            most = 10.0 if accepted else 1.0
            factor = min(most, max(least, 0.9 * e ** (-0.7 / k if accepted and controller == "pi" else -1 / k)))
            dt = new.mem.dt.expand(2, 1)[i]
            assert math.isclose(float(dt), h * factor, rel_tol=1e-6)
            seen.add((accepted, least < factor < most))
    assert seen >= {(True, True), (False, True), (False, False)}


@adaptive
def test_pi_control_remembers_the_last_accepted_error(method):
    """h <- h .9 error^(-.7/k) previous^(.4/k); a rejected attempt in between is not remembered; none below 1e-4."""
    rtol, atol, k, z0 = 1e-4, 1e-6, method.order, f64([[1.5, -0.3]])
    solver = method(rtol, atol)

    def error(z, h):
        return float(embedded_error(method, frozen, z, f64([[h]]), rtol, atol, BATCH)[2])

    def frozen(z, t):  # autonomous
        return torch.sin(3 * z)

    for first, floor in ((0.1 if k == 5 else 0.02, 0.0), (1e-3, 1e-4)):
        state = start(solver, frozen, z0, first, reduce=BATCH)
        previous = max(error(z0, first), floor)
        assert previous < 1
        one = solver.step(frozen, state, BATCH)
        two = solver.step(frozen, one._replace(mem=one.mem._replace(dt=f64([[2.0]]))), BATCH)
        assert torch.equal(one.z, two.z)  # rejected
        h = first * 1.3
        three = solver.step(frozen, two._replace(mem=two.mem._replace(dt=f64([[h]]))), BATCH)
        e = error(one.z, h)
        assert e < 1
        factor = min(10.0, 0.9 * e ** (-0.7 / k) * previous ** (0.4 / k))
        assert math.isclose(float(three.mem.dt), h * factor, rel_tol=1e-6)


@adaptive
@both
def test_every_attempt_costs_its_stages_less_one_and_the_start_two(method, reduce):
    """Rejected attempts count: a kink makes some. F of the state is never evaluated twice."""
    watched, stop = Watched(lambda z, t: -50 * torch.relu(z - 1) + torch.sin(20 * t)[:, None]), Spy(2.0)
    s = solve(watched, f64([[3.0], [1.1]]), solver=method(1e-6, 1e-6), stop=stop, reduce=reduce)
    calls = ADAPTIVE[method][1]
    assert torch.equal(s.stats.nfe, 2 + calls * s.stats.steps)
    assert watched.calls == s.stats.calls == 2 + calls * int(s.stats.steps.max())
    times = torch.stack([state.t for state in stop.seen])
    assert bool(((times[1:] > times[:-1]).sum(0) < s.stats.steps).all()), "no attempt was rejected"
    last = stop.seen[-1]
    assert torch.equal(last.F, watched.f(last.z, last.t))


@adaptive
@pytest.mark.parametrize("controller", ["pi", "i"])
def test_error_follows_the_tolerance(method, controller):
    for tol in (1e-3, 1e-5, 1e-7):
        s = solve(exp_sin, f64([[1.0]]), solver=method(tol, tol, controller), stop=EndTime(5.0, 10_000))
        assert float((s.value - math.exp(math.sin(5.0))).abs()) < 20 * tol


@adaptive
def test_per_sample_each_row_steps_as_if_alone(method):
    z0 = f64([[1.0, 2.0]] * 4)
    batch = solve(decay(RATES), z0, solver=method(), stop=EndTime(2.0), reduce=PER_SAMPLE)
    close(batch.value, decayed(RATES, z0, 2.0), 2e-2)
    assert len(set(batch.stats.steps.tolist())) == 4
    for i in range(4):
        row = solve(decay(RATES[i : i + 1]), z0[i : i + 1], solver=method(), stop=EndTime(2.0), reduce=PER_SAMPLE)
        assert torch.equal(batch.value[i : i + 1], row.value)
        assert (batch.stats.steps[i], batch.stats.nfe[i]) == (row.stats.steps, row.stats.nfe)


def test_batch_wide_is_one_system_to_the_loop_too():
    """R = 1: one step size, one time, one row of everything that steers."""
    stop = Spy(2.0)
    solve(decay(RATES), f64([[1.0, 2.0]] * 4), solver=Dopri5(), stop=stop, reduce=BATCH)
    assert {tuple(state.mem.dt.shape) for state in stop.seen} == {(1, 1)}
    assert {tuple(state.t.shape) for state in stop.seen} == {(4,)}
    old = start(Dopri5(), decay(RATES), f64([[1.0, 2.0]] * 4), 100.0, reduce=BATCH)
    rejected = Dopri5().step(decay(RATES), old, BATCH)
    assert Dopri5().moves(rejected, torch.tensor([True])).shape == (1,)


@adaptive
@settings(max_examples=10, deadline=None)
@given(nan=st.integers(0, 3), when=st.sampled_from([-1.0, 0.0, 0.3]))
def test_a_nan_row_never_disturbs_its_neighbours(method, nan, when):
    """Its field is NaN at once, or beyond a time; it ends by itself and the others keep every bit."""
    good, s = beside_nan(method(), nan, when)
    for i in set(range(4)) - {nan}:
        assert s.stats.nfe[i] == good.stats.nfe[i]
    if when >= 0:
        assert bool(s.value.isfinite().all())


@adaptive
@both
def test_a_field_that_ends_before_its_time_makes_the_step_too_small(method, reduce):
    F = Watched(lambda z, t: torch.where(t[:, None] > 0.5, torch.nan, torch.ones_like(z)))
    s = solve(F, torch.zeros(2, 1), solver=method(), stop=EndTime(1.0), reduce=reduce)
    assert s.status.tolist() == [Status.STEP_TOO_SMALL] * 2
    torch.testing.assert_close(s.value, torch.full((2, 1), 0.5), rtol=0, atol=1e-5)
    assert F.calls < 400  # and not 1000 attempts


@adaptive
@settings(max_examples=20, deadline=None)
@given(t1=st.floats(0.0625, 5.0, width=32))
def test_the_last_step_lands_on_the_end_whatever_the_rounding(method, t1):
    stop = Spy(t1)
    s = solve(exp_sin, torch.ones(1, 1), solver=method(1e-2, 1e-2), stop=stop)
    assert s.status.tolist() == [Status.REACHED_END]
    assert float(stop.seen[-1].t) == t1
    assert all(b.t - a.t > 1e-6 * t1 for a, b in itertools.pairwise(stop.seen) if b.t > a.t)  # with no crumb left


@adaptive
def test_the_flow_reaches_picards_fixed_point(method):
    F = tanh_map(contraction(4, 0.8), random(3, 4, seed=1))
    z0, stop = torch.zeros(3, 4).double(), Residual(1e-8, max_steps=2000)
    flow, picard = (solve(F, z0, solver=s, stop=stop, reduce=PER_SAMPLE) for s in (method(1e-9, 1e-9), Picard()))
    assert flow.status.tolist() == [Status.CONVERGED] * 3
    close(flow.value, picard.value, 1e-7)


@pytest.mark.parametrize("controller", ["", "p", "PI"])
def test_an_unknown_controller_is_refused_in_a_sentence(controller):
    with pytest.raises(ValueError, match=rf"solver\.controller='{controller}' must be pi or i"):
        Bosh3(controller=controller)


# --------------------------------------------------------------------------------------------------------- fixed steps


@both
def test_euler_of_step_one_is_picard(reduce):
    F, z0 = tanh_map(contraction(4, 0.8), random(3, 4, seed=1)), torch.zeros(3, 4).double()
    for stop in (Residual(1e-9, max_steps=300), FixedSteps(7)):
        euler, picard = (solve(F, z0, solver=s, stop=stop, reduce=reduce) for s in (Euler(1.0), Picard()))
        close(euler.value, picard.value, 1e-14)  # z + (f - z) against f
        assert torch.equal(euler.stats.nfe, picard.stats.nfe)
        assert torch.equal(euler.status, picard.status)
    assert Euler.one_call
    assert not RK4.one_call


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("t1", "dt", "steps"),
    [(1.0, 0.1, 10), (0.7, 0.1, 7), (1.0, 0.3, 4), (0.05, 0.1, 1), (0.9, 0.3, 3), (3.0, 0.01, 300)],
)
def test_fixed_steps_land_on_the_end_in_the_least_number(method, dtype, t1, dt, steps):
    """No rounding makes one step more; the last is shortened."""
    stop, calls = Spy(t1), FIXED[method][1]
    s = solve(lambda z, t: torch.ones_like(z), torch.zeros(2, 3, dtype=dtype), solver=method(dt), stop=stop)
    assert s.status.tolist() == [Status.REACHED_END] * 2
    assert s.stats.nfe.tolist() == [1 + calls * steps] * 2
    assert torch.equal(stop.seen[-1].t, torch.full((2,), t1, dtype=torch.promote_types(dtype, torch.float32)))
    assert s.value.dtype == dtype
    tolerance = {torch.bfloat16: 0.2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    close(s.value.double(), f64([[t1] * 3] * 2), t1 * tolerance)


def test_a_shortened_last_step_is_a_step_of_that_length():
    """Four Euler steps to t = 1 on z' = -z: three of .3, one of .1."""
    s = solve(lambda z, t: -z, f64([[1.0]]), solver=Euler(0.3), stop=EndTime(1.0))
    close(s.value, f64([[0.7**3 * 0.9]]), 1e-15)
    s = solve(affine((0.5,)), f64([[2.0]]), solver=Euler(0.3), stop=Residual(1e-30, max_steps=5))
    close(s.value, f64([[1 + 0.85**5]]), 1e-15)


@pytest.mark.parametrize("dt", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_step_is_refused_in_a_sentence(dt):
    with pytest.raises(ValueError, match=rf"solver\.dt={dt} must be positive and finite"):
        RK4(dt)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", ORDERS)
@both
def test_the_gradient_through_the_steps_is_exact(method, reduce):
    """Steps of given sizes, against finite differences, for the start and for a parameter."""
    z0, w = random(2, 3, seed=1).requires_grad_(), random(3, 3, seed=2, scale=0.5).requires_grad_()

    def end(z0, w):
        def F(z, t):
            return torch.tanh(z @ w) * torch.cos(t)[:, None]

        if method in FIXED:
            return solve(F, z0, solver=method(0.3), stop=EndTime(1.0), reduce=reduce).value
        *_, last = march(method(1e9, 1e9), F, z0, [0.3, 0.5, 0.2], reduce=reduce)
        return last.z

    assert torch.autograd.gradcheck(end, (z0, w))


@adaptive
def test_the_gradient_through_a_solve_with_rejections_is_that_of_its_accepted_steps(method):
    """What a rejected attempt did has no part in it, and the sizes of the steps are constants."""
    w = f64([[1.3, -0.4]]).requires_grad_()

    def F(z, t):
        return torch.sin(w * z * 5) * torch.cos(9 * t)[:, None]

    z0, stop = f64([[0.4, 1.0]]), Spy(1.5)
    s = solve(F, z0, solver=method(1e-3, 1e-3, "i"), stop=stop, reduce=BATCH)
    times = [float(state.t[0]) for state in stop.seen]
    hs = [b - a for a, b in itertools.pairwise(times) if b > a]
    assert len(hs) < int(s.stats.steps[0])
    *_, again = march(method(1e9, 1e9), F, z0, hs, reduce=BATCH)
    close(s.value, again.z, 1e-12)
    got, wanted = (torch.autograd.grad(z.sum(), w)[0] for z in (s.value, again.z))
    close(got, wanted, 1e-10)


@pytest.mark.parametrize("solver", [Bosh3(), Dopri5(), Tsit5(), Euler(0.5), RK4(0.5)])
def test_a_trace_has_the_residual_after_every_step(solver):
    F = tanh_map(contraction(4, 0.8), random(3, 4, seed=1))
    z0, stop = torch.zeros(3, 4).double(), Residual(1e-3, max_steps=200)
    s = solve(F, z0, solver=solver, stop=stop, reduce=PER_SAMPLE, trace=True)
    assert s.status.tolist() == [Status.CONVERGED] * 3
    for i, k in enumerate(s.stats.steps.tolist()):
        assert float(s.stats.trace[k, i]) == float(s.stats.residual[i]) <= 1e-3
        assert bool((s.stats.trace[:k, i] > 1e-3).all())


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_time_and_steps_are_kept_in_float32_or_better(method, dtype):
    stop = Spy(0.7)
    z0 = torch.ones(2, 8, dtype=dtype)
    s = solve(FixedPoint(lambda z, t: 0.5 * z), z0, solver=method(1e-2, 1e-2), stop=stop)
    assert stop.seen[-1].t.dtype == stop.seen[-1].mem.dt.dtype == torch.float32
    assert s.value.dtype == dtype
    torch.testing.assert_close(s.value.float(), torch.full((2, 8), math.exp(-0.35)), rtol=2e-2, atol=0)
