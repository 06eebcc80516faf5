"""The path against its closed form, where it leads, what a step costs, and what happens where it turns back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    BATCH,
    PER_SAMPLE,
    CentredCell,
    TanhCell,
    affine,
    close,
    contraction,
    f64,
    network,
    random,
    root,
    tanh_map,
)

from implicit_bench.adjoints import IFT, Backsolve, Solve
from implicit_bench.core import EndTime, FixedPoint, Residual, Status, solve
from implicit_bench.models import ImplicitLayer, Zero
from implicit_bench.solvers import Homotopy

W, CTX, A = contraction(5, 0.9), random(3, 5, seed=1), random(3, 5, seed=2)
ONE, TIGHT = EndTime(1.0), Residual(1e-12, max_steps=60)
NO_GRADIENT = "solver=homotopy has no gradient through its steps; use adjoint=ift, or torch.no_grad"


def counted(f):
    """A field f(z) - z that keeps the times it was called at."""
    times = []
    return FixedPoint(lambda z, t: times.append(t) or f(z)), times


def run(f, z0, solver=None, stop=ONE, reduce=PER_SAMPLE):
    return solve(FixedPoint(lambda z, t: f(z)), z0, solver=solver or Homotopy(), stop=stop, reduce=reduce)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["rows", "batch"])
@pytest.mark.parametrize("lam", [0.25, 0.8, 1.0])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_an_affine_path_is_its_closed_form(rtol, lam, reduce):
    """(I - lam W) z = lam b + (1 - lam) a, up to rtol |z - H| through the inverse of I - lam W."""
    s = run(lambda z: z @ W + CTX, A, Homotopy(rtol, corrector=5), EndTime(lam), reduce)
    matrix = torch.eye(5).double() - lam * W.T
    exact = torch.linalg.solve(matrix, (lam * CTX + (1 - lam) * A).T).T
    bound = rtol * torch.linalg.matrix_norm(torch.linalg.inv(matrix), 2) * exact.norm(dim=1) * 1.01
    off = (s.value - exact).norm(dim=1) if reduce is PER_SAMPLE else (s.value - exact).norm().view(1)
    assert bool((off <= (bound if reduce is PER_SAMPLE else bound.norm())).all())
    assert s.status.tolist() == [Status.REACHED_END] * 3
    field = s.value @ W + CTX - s.value
    close(s.field, field, 1e-12)  # of the map, whatever lam


@pytest.mark.parametrize("t1", [0.3, 0.7, 1.0])
def test_the_last_step_lands_on_the_end(t1):
    F, solver = tanh_map(W, CTX), Homotopy()
    state = solver.init(F, A, t1, PER_SAMPLE)
    for _ in range(20):
        state = solver.step(F, state, PER_SAMPLE)
    assert state.t.tolist() == [t1] * 3


def test_a_step_is_the_formula():
    """One number a row, one plain corrector step: the whole path by hand, every step accepted, each twice the last."""
    r, c, a = (0.5, -0.8), (3.0, 2.0), 2.0
    s = run(lambda z: f64([[r[0]], [r[1]]]) * z + f64([[c[0]], [c[1]]]), f64([[a], [a]]), Homotopy(0.9, corrector=1))
    for row in range(2):
        z, lam = a, 0.0
        for goal in (0.1, 0.3, 0.7, 1.0):
            predicted = z + (goal * (r[row] * z + c[row]) + (1 - goal) * a - z) / (1 - lam * r[row])
            z, lam = goal * (r[row] * predicted + c[row]) + (1 - goal) * a, goal
        close(s.value[row], f64([z]), 1e-12)
        exact = c[row] / (1 - r[row])
        assert 0.01 < abs(z - exact) < 1.0  # such a coarse path ends beside the fixed point


@pytest.mark.parametrize("rtol", [5e-3, 2e-3, 1e-3, 5e-4])
def test_the_next_step_is_the_formula(rtol):
    """From z = .2 at lam = .3 to .4, on z^2 + .2 from 0. With rtol = 5e-4 it is refused and all but dlam stays."""
    f = lambda z: z * z + 0.2  # noqa: E731
    solver = Homotopy(rtol, corrector=1)
    start = solver.init(FixedPoint(lambda z, t: f(z)), f64([[0.0]]), 1.0, PER_SAMPLE)
    start = start._replace(z=f64([[0.2]]), F=f64([[f(0.2) - 0.2]]), t=f64([0.3]))
    after = solver.step(FixedPoint(lambda z, t: f(z)), start, PER_SAMPLE)
    z = 0.4 * f(0.2 + (0.4 * f(0.2) - 0.2) / (1 - 0.3 * 2 * 0.2))
    error = abs(0.4 * f(z) - z) / (0.4 * f(z))
    assert 5e-4 < error < 1e-3
    close(after.mem.dlam, f64([[0.1 * math.sqrt(rtol / (2 * error))]]), 1e-12)
    accepted = error <= rtol
    close(after.z, f64([[z if accepted else 0.2]]), 1e-14)
    close(after.F, f(after.z) - after.z, 1e-14)
    close(after.t, f64([0.4 if accepted else 0.3]), 1e-15)


def test_a_step_into_the_void_is_tried_again_at_half():
    """f is NaN beyond -.9. The path ends before, at -.82, but the first tangent goes to -1.5."""
    s = run(lambda z: torch.where(z < -0.9, torch.nan, z * z - 1.5), f64([[0.0]]), Homotopy(first_step=1.0))
    assert s.status.tolist() == [Status.REACHED_END]
    close(s.value, f64([[(1 - math.sqrt(7)) / 2]]), 1e-2)


def test_evaluations_are_counted_exactly():
    """A scalar affine path: lam = .1, .3, .7, 1, each by one product, one evaluation ahead and three corrected ones."""
    F, times = counted(lambda z: 0.5 * z + 0.5)
    s = solve(F, f64([[2.0]]), solver=Homotopy(), stop=ONE)
    assert s.stats.steps.tolist() == [4]
    assert s.stats.nfe.tolist() == [s.stats.calls] == [len(times)] == [1 + 4 * (1 + 1 + 3)]
    assert not any(bool(t.any()) for t in times)  # f is the same map all along: it never hears of lam
    F, times = counted(lambda z: torch.tanh(z @ W + CTX))
    s = solve(F, A, solver=Homotopy(), stop=Residual(1e-8), reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED] * 3
    assert s.stats.calls == len(times) == int(s.stats.nfe.max())


@pytest.mark.parametrize("z0", [A, torch.zeros_like(A)], ids=["somewhere", "zero"])
@pytest.mark.parametrize("norm", [0.5, 0.95])
def test_two_sides_of_the_same_coin(norm, z0):
    """z(1) is the fixed point that Anderson finds, to the tolerance of the path; on to it under stop=residual."""
    map_ = tanh_map(contraction(5, norm), CTX)
    exact = root()(map_, torch.zeros_like(CTX)).value
    for rtol in (1e-1, 1e-3, 1e-5):
        s = solve(map_, z0, solver=Homotopy(rtol), stop=ONE, reduce=PER_SAMPLE)
        assert bool((s.stats.residual <= rtol).all())
        assert float(((s.value - exact).norm(dim=1) / exact.norm(dim=1)).max()) <= 1.01 * rtol / (1 - norm)
    s = solve(map_, z0, solver=Homotopy(), stop=TIGHT, reduce=PER_SAMPLE)
    assert s.status.tolist() == [Status.CONVERGED] * 3
    close(s.value, exact, 1e-10)


def test_at_the_end_of_the_path_it_goes_on_whatever_the_residual():
    """lam stands still there, so that the same step again would come to nothing else: none is refused."""
    F, solver = FixedPoint(lambda z, t: -20 * z**3), Homotopy()
    state = solver.init(F, f64([[1.0]]), math.inf, PER_SAMPLE)
    state = state._replace(t=torch.ones(1).double(), mem=state.mem._replace(dlam=f64([[1e-9]])))
    residuals = []
    for _ in range(12):
        state = solver.step(F, state, PER_SAMPLE)
        residuals.append(float(state.F.abs()))
        assert bool(solver.moves(state, torch.ones(1, dtype=torch.bool)).all())
    assert residuals[0] > 0.1
    assert residuals[-1] < 1e-12


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["rows", "batch"])
def test_it_needs_no_contraction(reduce):
    """Slopes below -1 leave I - lam J regular all the way, where Picard diverges."""
    s = solve(affine((-3.0, -20.0, 0.9)), f64([[2.0, 5.0]] * 3), solver=Homotopy(), stop=TIGHT, reduce=reduce)
    assert s.status.tolist() == [Status.CONVERGED] * 3
    close(s.value, torch.ones(3, 2).double(), 1e-10)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["rows", "batch"])
@pytest.mark.parametrize("stop", [ONE, Residual(1e-2, max_steps=500)], ids=["end", "residual"])
@pytest.mark.parametrize(
    ("f", "a", "fold"),
    [
        (lambda z: z - z * z + 1, -2.0, -(8 + math.sqrt(12)) / (10 - 2 * math.sqrt(12))),  # turns at lam = .118
        (lambda z: z * z + 1, 0.0, 1.0),  # no fixed point at all; turns at lam = 1/2
    ],
    ids=["quadratic", "none"],
)
def test_a_fold_is_the_end_of_the_path_and_never_a_solution(f, a, fold, stop, reduce):
    """H = z - lam f(z) - (1 - lam) a is a parabola in z, whose two roots meet where its discriminant vanishes."""
    s = run(f, f64([[a]]), Homotopy(1e-3), stop, reduce)
    assert s.status.tolist() == [Status.STEP_TOO_SMALL]
    assert "turns back" in Status.STEP_TOO_SMALL.advice
    assert int(s.stats.steps) < 100
    if stop is ONE:  # it stands at the fold; sqrt(rtol) is how well a double root is known
        assert abs(float(s.value) - fold) < 0.04 * abs(fold)


def test_from_the_right_side_of_the_fold_it_arrives():
    s = run(lambda z: z - z * z + 1, f64([[0.0], [0.5], [3.0]]), stop=TIGHT)
    assert s.status.tolist() == [Status.CONVERGED] * 3
    close(s.value, torch.ones(3, 1).double(), 1e-10)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-200, 100), min_size=1, max_size=4), st.sampled_from([1e-1, 1e-2, 1e-3]))
def test_what_it_calls_converged_has_converged(hundredths, rtol):
    """f(z) = z^2 + mu from 0: a fixed point where mu <= 1/4, none above; between, the fold is at lam^2 = 1 / (4 mu)."""
    mus = [m / 100 for m in hundredths]
    mu = f64([[m] for m in mus])
    s = run(lambda z: z * z + mu, torch.zeros_like(mu), Homotopy(rtol), Residual(1e-6, max_steps=200))
    residual = ((s.value**2 + mu - s.value).abs() / (s.value**2 + mu).abs().clamp_min(1e-300)).squeeze(1)
    for row, m in enumerate(mus):
        if s.status[row] == Status.CONVERGED:
            assert float(residual[row]) <= 1e-6
        assert s.status[row] == (Status.CONVERGED if m <= 0.24 else s.status[row])
        assert s.status[row] in ((Status.STEP_TOO_SMALL, Status.MAX_STEPS) if m > 0.3 else tuple(Status))


def test_a_sick_row_disturbs_nobody():
    """A row that turns back, one that goes NaN on its way and one that is NaN from the start, beside two sound ones."""
    mu = f64([[1.0], [0.1], [0.1], [0.1], [-1.5]])
    scale = f64([[1.0], [1.0], [math.nan], [1.0], [1.0]])
    z0 = torch.zeros(5, 3).double()

    def f(z, rows, limit):
        return torch.where(z.abs() > limit[rows], torch.nan, (z * z + mu[rows]) * scale[rows])

    limit = f64([[1e9], [0.05], [1e9], [1e9], [1e9]])
    for stop in (ONE, Residual(1e-8, max_steps=80)):
        s = run(lambda z: f(z, slice(None), limit), z0, stop=stop)
        end = Status.REACHED_END if stop is ONE else Status.CONVERGED
        assert s.status.tolist() == [Status.STEP_TOO_SMALL, Status.STEP_TOO_SMALL, Status.NONFINITE, end, end]
        assert bool(s.value.isfinite().all())
        alone = run(lambda z: f(z, slice(3, 5), limit), z0[3:], stop=stop)
        assert torch.equal(s.value[3:], alone.value)
        assert torch.equal(s.stats.steps[3:], alone.stats.steps)


def test_a_coupled_batch_is_one_path():
    cell = CentredCell(5, 0.8)
    ctx = cell.begin(A).detach()
    with torch.no_grad():
        s = run(lambda z: cell(z, ctx, None), torch.zeros_like(A), stop=TIGHT, reduce=BATCH)
        exact = root(reduce=BATCH)(FixedPoint(lambda z, t: cell(z, ctx, t)), torch.zeros_like(A)).value
    assert s.status.tolist() == [Status.CONVERGED] * 3
    assert len(set(s.stats.steps.tolist())) == 1
    close(s.value, exact, 1e-9)


def test_float32_and_a_cap():
    s = run(lambda z: torch.tanh(z @ W.float() + CTX.float()), A.float(), stop=Residual(1e-5))
    assert s.value.dtype == torch.float32
    assert s.status.tolist() == [Status.CONVERGED] * 3
    s = run(lambda z: torch.tanh(z @ W + CTX), A, stop=Residual(1e-9, max_steps=2))
    assert s.status.tolist() == [Status.MAX_STEPS] * 3


def test_the_implicit_gradient_is_that_of_any_solver():
    cell, x = TanhCell(5), random(3, 5, seed=4)

    def gradient(problem):
        ctx = cell.begin(x)
        z, *_ = IFT(rtol=1e-12)(FixedPoint(lambda z, t: cell(z, ctx, t)), torch.zeros_like(x), problem, ())
        return torch.autograd.grad(z.square().sum(), tuple(cell.parameters()))

    for ours, andersons in zip(gradient(Solve(Homotopy(), TIGHT, PER_SAMPLE)), gradient(root())):
        close(ours, andersons, 1e-9)


def test_a_start_that_all_rows_share_in_memory():
    one = A[:1].clone()
    shared, apart = (run(lambda z: torch.tanh(z @ W + CTX), z0) for z0 in (one.expand(3, -1), one.repeat(3, 1)))
    assert torch.equal(shared.value, apart.value)


def test_the_continuous_adjoint_is_refused():
    with pytest.raises(ValueError, match="solver=homotopy follows a path on which t is no time; use adjoint=ift"):
        ImplicitLayer(TanhCell(5), Zero(network(TanhCell(5))), Homotopy(), ONE, Backsolve())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Homotopy(rtol=0.0), r"solver.rtol=0.0 must lie in \(0, 1\), such as 1e-2"),
        (lambda: Homotopy(corrector=0), "solver.corrector=0 must be at least 1"),
        (lambda: Homotopy(first_step=0.0), "solver.min_step=0.0001 and solver.first_step=0.0 must lie in"),
        (lambda: Homotopy(linear_rtol=1.0), r"solver.linear_rtol=1.0 must lie in \(0, 1\), such as 1e-2"),
        (lambda: Homotopy(linear_max_iter=0), "solver.linear_max_iter=0 must be at least 1"),
        (lambda: run(lambda z: 0.5 * z, A, stop=EndTime(2.0)), "stop.t1=2.0 lies beyond the path of solver=homotopy"),
        (lambda: run(lambda z: z @ W.clone().requires_grad_(), A), NO_GRADIENT),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
