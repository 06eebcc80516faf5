"""Broyden's method against a dense textbook one, scipy's, and what theory says of it; the paper's against its code."""

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late import Reads
from problems import BATCH, PER_SAMPLE, Watched, affine, close, contraction, f64, random, tanh_map, with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_bench.core import FixedPoint, FixedSteps, Reduce, Residual, Solver, Status, solve
from implicit_bench.solvers import Anderson, Broyden, Picard

W, CTX = contraction(6, 0.9), random(3, 6, seed=1)


def iterates(solver: Solver, F, z0, steps, reduce=PER_SAMPLE):
    """z_0 .. z_steps, whatever the residual."""
    state = solver.init(F, z0, torch.inf, reduce)
    out = [state.z]
    for _ in range(steps):
        state = solver.step(F, state, reduce)
        out.append(state.z)
    return torch.stack(out)


def textbook(f, z, steps, window=10**9):
    """One flat system with a dense H. A restart forgets H and the step that would have overfilled the window."""
    H, F, n, out = -torch.eye(len(z)).to(z), f(z) - z, 0, [z]
    for _ in range(steps):
        s = -H @ F
        z = z + s
        new = f(z) - z
        y, F = new - F, new
        if n == window:
            H, n = -torch.eye(len(z)).to(z), 0
        else:
            H, n = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y), n + 1
        out.append(z)
    return torch.stack(out)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_every_iterate_is_the_textbooks(window):
    F, z0, steps = tanh_map(W, CTX), random(3, 6, seed=2, scale=0.3), 14
    ours = iterates(Broyden(window), F, z0, steps)
    for i in range(3):
        close(ours[:, i], textbook(lambda z, i=i: torch.tanh(z @ W + CTX[i]), z0[i], steps, window), 1e-10)
    flat = textbook(lambda z: torch.tanh(z.view(3, 6) @ W + CTX).flatten(), z0.flatten(), steps, window)
    close(iterates(Broyden(window), F, z0, steps, BATCH).flatten(1), flat, 1e-10)


def test_every_iterate_is_scipys():
    z0 = torch.zeros(6).double()
    seen = [z0]

    def F(z):
        return torch.tanh(torch.from_numpy(z) @ W + CTX[0]).numpy() - z

    scipy.optimize.broyden1(F, z0.numpy(), alpha=1.0, iter=8, line_search=None,
                            callback=lambda z, _: seen.append(torch.from_numpy(z.copy())))  # fmt: skip
    close(iterates(Broyden(), tanh_map(W, CTX[:1]), z0.unsqueeze(0), 8).squeeze(1), torch.stack(seen), 1e-12)


@pytest.mark.parametrize("solver", [Broyden(), Anderson(ridge=1e-14)], ids=["broyden", "anderson"])
@pytest.mark.parametrize("method", ["broyden1", "anderson"])
@pytest.mark.parametrize("f", [lambda z: torch.tanh(z @ W + CTX), lambda z: z @ W + CTX], ids=["tanh", "affine"])
def test_the_root_is_scipys(f, method, solver):
    s = solve(FixedPoint(lambda z, t: f(z)), torch.zeros_like(CTX), solver=solver,
              stop=Residual(1e-13, max_steps=200), reduce=PER_SAMPLE)  # fmt: skip
    theirs = scipy.optimize.root(lambda z: f(torch.from_numpy(z)).numpy() - z, torch.zeros_like(CTX).numpy(),
                                 method=method, options={"fatol": 1e-12, "maxiter": 500})  # fmt: skip
    assert theirs.success
    assert s.status.tolist() == [Status.CONVERGED] * 3
    close(s.value, torch.from_numpy(theirs.x), 1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_linear_problem_of_n_unknowns_takes_2n_steps(n):
    """Gay 1979. The rows have matrices of their own, none of them a contraction."""
    A, b = random(4, n, n, seed=n), random(4, n, seed=1)
    exact = torch.linalg.solve(torch.eye(n).double() - A.mT, b)
    F = FixedPoint(lambda z, t: torch.einsum("bi,bij->bj", z, A) + b)
    z = iterates(Broyden(2 * n), F, torch.zeros_like(b), 2 * n)
    close(z[-1], exact, 1e-8)
    if n > 1:
        assert float((z[2 * n - 2] - exact).abs().max()) > 1e-6  # not before


def test_it_is_superlinear_and_ahead_of_picard_where_that_is_slow():
    F = FixedPoint(lambda z, t: torch.tanh(z @ with_spectrum([0.98, 0.9, -0.9, 0.5]) + 0.1))

    def steps(solver, tol):
        return int(solve(F, torch.zeros(1, 4).double(), solver=solver, stop=Residual(tol, max_steps=999)).stats.steps)

    assert steps(Broyden(), 1e-4) < steps(Picard(), 1e-4) / 3
    assert steps(Broyden(20), 1e-12) - steps(Broyden(20), 1e-6) <= 5  # the second six digits cost less than the first
    assert steps(Broyden(20), 1e-6) > 8


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["rows", "batch"])
def test_one_evaluation_a_step_and_one_to_start(reduce):
    F = tanh_map(W, CTX)
    watched = Watched(F.f)
    s = solve(FixedPoint(watched), torch.zeros_like(CTX), solver=Broyden(4),
              stop=Residual(1e-8, max_steps=100), reduce=reduce)  # fmt: skip
    assert s.stats.nfe.tolist() == [k + 1 for k in s.stats.steps.tolist()]
    assert watched.calls == s.stats.calls == int(s.stats.nfe.max())
    assert s.status.tolist() == [Status.CONVERGED] * 3


def test_a_step_reads_the_stack_twice():
    """The price of a step is two passes over the steps in memory: one product for the dots, one for the sum."""

    class Products(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                self.numbers += max(a.numel() for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    B, D, k = 2, 1000, 8
    F, solver = FixedPoint(lambda z, t: torch.cos(z)), Broyden(20)
    state = solver.init(F, torch.rand(B, D), torch.inf, PER_SAMPLE)
    for _ in range(k):
        state = solver.step(F, state, PER_SAMPLE)
    with Products() as read:
        solver.step(F, state, PER_SAMPLE)
    assert read.numbers <= 2 * k * B * D + 2 * B * k * k


def test_a_step_never_asks_the_device():
    for variant in ("correct", "paper", "paper_v1"):
        with Reads() as seen:
            iterates(Broyden(3, variant), tanh_map(W, CTX), torch.zeros_like(CTX), 8)
        assert seen.reads == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(1, 5), st.sampled_from([1, 3, 12]), st.sampled_from(["float32", "float64"]))
def test_a_row_depends_on_itself_alone(sick, D, window, dtype):
    """Bit for bit, beside a row that goes NaN, one that overflows and one that stands at its root."""
    dtype = getattr(torch, dtype)
    rates = f64([[0.5], [-0.7], [0.9], [1.3]]).to(dtype)

    def run(bad):
        broken = torch.zeros(4, 1, dtype=torch.bool)
        broken[sick] = bad is not None
        f = lambda z, t: torch.where(broken, (z + 1) * (bad or 0), torch.tanh(rates * z) + 0.5)  # noqa: E731
        return solve(FixedPoint(f), torch.full((4, D), 0.3, dtype=dtype), solver=Broyden(window),
                     stop=Residual(1e-5, max_steps=40), reduce=PER_SAMPLE)  # fmt: skip

    well, others = run(None), [i for i in range(4) if i != sick]
    for bad in (float("nan"), 1e30):
        s = run(bad)
        assert s.status[sick] == Status.NONFINITE or bad == 1e30
        for part in ("value", "field", "status"):
            assert torch.equal(getattr(s, part)[others], getattr(well, part)[others])
        assert torch.equal(s.stats.nfe[others], well.stats.nfe[others])


def test_rows_that_have_ended_stay_finite_for_long():
    """One row at its root from the start, one there after a step: their steps are zero, and so are all numbers made of
    them. The third goes on through many restarts."""
    r = f64([[0.5], [0.0], [0.999]])
    F = FixedPoint(lambda z, t: torch.where(r > 0.99, torch.cos(z), r * z))
    z0 = f64([[0.0, 0.0], [1.0, 1.0], [0.1, 3.0]])
    state = Broyden(3).init(F, z0, torch.inf, PER_SAMPLE)
    for _ in range(60):
        state = Broyden(3).step(F, state, PER_SAMPLE)
        assert bool(state.finite().all())
        assert all(bool(part.isfinite().all()) for part in state.mem[1:])
    close(state.z, f64([[0.0, 0.0], [0.0, 0.0], [0.7390851332151607] * 2]), 1e-12)


def test_a_singular_jacobian_skips_the_update_of_that_row_alone():
    """f(z) = z + c moves F nowhere: s^T H y = 0 exactly, no step is possible but Picard's."""
    rate, c = f64([[0.5], [1.0], [-0.8]]), f64([[0.5], [0.25], [1.8]])
    F = FixedPoint(lambda z, t: rate * z + c)
    z = iterates(Broyden(40), F, f64([[2.0, 3.0]] * 3), 12)
    close(z[:, 1], f64([[2.0 + 0.25 * k, 3.0 + 0.25 * k] for k in range(13)]), 0)
    close(z[2:, [0, 2]], f64([[[1.0, 1.0]] * 2] * 11), 1e-14)  # one rate in all directions: two steps


@pytest.mark.parametrize("rate", [0.99, 0.998, 1.002, -30.0])
def test_float32_near_a_singular_jacobian(rate):
    """The second step divides by 1 - rate: that is no update to skip, as long as the change of F is not rounding."""
    s = solve(affine((rate, 0.5)), torch.full((2, 5), 2.0), solver=Broyden(),
              stop=Residual(1e-6, max_steps=8), reduce=PER_SAMPLE)  # fmt: skip
    assert s.status.tolist() == [Status.CONVERGED] * 2
    close(s.value, torch.ones(2, 5), 2e-3)  # the residual is (1 - rate) times the error


def test_float32_does_not_leap_where_the_change_of_F_is_rounding():
    """f(z) = z + c: F is c, and y is rounding, a ten thousandth of it. A step divided by that leads anywhere."""
    z0 = torch.linspace(1.5, 3.0, 64).unsqueeze(1)
    F, c = FixedPoint(lambda z, t: (3 * z + 6e-3) / 3), 2e-3 * torch.arange(9).view(9, 1, 1)
    assert float((iterates(Broyden(), F, z0, 8) - (z0 + c)).abs().max()) < 1e-5
    assert not torch.equal(F(z0, None), F(z0 + F(z0, None), None))


@pytest.mark.parametrize(("rho", "window", "n"), [(0.9, 40, 40), (0.99, 12, 200)])
def test_float32_takes_the_steps_of_float64(rho, window, n):
    """The Gram matrix comes from recurrences: were they unstable, float32 would lose its way."""
    A, b = with_spectrum(torch.linspace(-rho, rho, n).tolist()), random(4, n, seed=3)

    def steps(dtype):
        F = FixedPoint(lambda z, t: z @ A.to(dtype) + b.to(dtype))
        s = solve(F, torch.zeros(4, n, dtype=dtype), solver=Broyden(window),
                  stop=Residual(1e-4, max_steps=80), reduce=PER_SAMPLE)  # fmt: skip
        assert s.status.tolist() == [Status.CONVERGED] * 4
        return s.stats.steps

    assert int((steps(torch.float32) - steps(torch.float64)).abs().max()) <= 2


def test_the_solution_does_not_depend_on_the_scale():
    def run(c):
        F = FixedPoint(lambda z, t: c * torch.tanh(z / c @ W + CTX))
        return iterates(Broyden(), F, torch.zeros_like(CTX), 8) / c

    close(run(2.0**-20), run(1.0), 1e-12)
    close(run(2.0**20), run(1.0), 1e-12)


def test_half_precision_states_are_steered_in_float32():
    F = tanh_map(W.bfloat16(), CTX.bfloat16())
    s = solve(F, torch.zeros_like(F.f(CTX.bfloat16(), None)), solver=Broyden(),
              stop=Residual(2e-2, max_steps=30), reduce=PER_SAMPLE)  # fmt: skip
    assert s.value.dtype == torch.bfloat16
    assert s.status.tolist() == [Status.CONVERGED] * 3


@pytest.mark.parametrize("window", [2, 12])
def test_the_unrolled_gradient_is_that_of_the_steps(window):
    """adjoint=unroll must see every entry of the memory as it was, a restart in between included."""

    def run(ctx):
        return solve(tanh_map(W, ctx), torch.zeros_like(ctx), solver=Broyden(window),
                     stop=FixedSteps(7), reduce=PER_SAMPLE).fixed_point  # fmt: skip

    assert torch.autograd.gradcheck(run, (CTX.clone().requires_grad_(),))
    with torch.no_grad():
        quick = run(CTX)
    close(run(CTX.clone().requires_grad_()).detach(), quick, 1e-14)


def paper_code(f, z, steps, window, summed=True):
    """arXiv 2201.12240's code: `H x = -x + sum v (u.x)` where u and v should change places, v.y over all samples, or as
    in version 1's over each."""
    U, V, out = [], [], [z]

    def H(x):
        return -x + sum((v * (u * x).sum(1, keepdim=True) for u, v in zip(U, V)), torch.zeros_like(x))

    def HT(x):
        return -x + sum((u * (v * x).sum(1, keepdim=True) for u, v in zip(U, V)), torch.zeros_like(x))

    F = f(z) - z
    update = F
    for n in range(steps):
        new = z + update
        Fn = f(new) - new
        s, y = new - z, Fn - F
        v = HT(s)
        vy = (v * y).sum() if summed else (v * y).sum(1, keepdim=True)
        u = (s - H(y)) / (vy + torch.finfo(z.dtype).eps)
        if n < window:
            U.append(u)
            V.append(v)
        else:
            U[n % window], V[n % window] = u, v
        z, F, update = new, Fn, -H(Fn)
        out.append(z)
    return torch.stack(out)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["rows", "batch"])
@pytest.mark.parametrize("window", [3, 27])
@pytest.mark.parametrize("variant", ["paper", "paper_v1"])
def test_the_papers_variants_are_the_papers_code(variant, window, reduce):
    F, z0 = tanh_map(W, 0.3 * CTX), torch.zeros_like(CTX)
    ours = iterates(Broyden(window, variant), F, z0, 12, reduce)
    theirs = paper_code(lambda z: F.f(z, None), z0, 12, window, summed=variant == "paper")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert float((ours - iterates(Broyden(window), F, z0, 12, reduce)).abs().max()) > 1e-3


@pytest.mark.parametrize("rho", [0.5, 0.9, 1.2])
def test_at_a_batch_of_128_the_papers_variant_is_picard(rho):
    """Iterations to 5 % (3, 6, 11 in the audit of the paper's code); the correct one beats both where they are slow."""
    A, x = with_spectrum(torch.linspace(-rho, rho, 64).tolist()), random(128, 64, seed=1)
    F, z0 = tanh_map(A, x), torch.zeros(128, 64).double()

    def steps(solver, tol, reduce):
        return int(solve(F, z0, solver=solver, stop=Residual(tol, max_steps=99), reduce=reduce).stats.steps.max())

    picard, paper = (steps(s, 5e-2, BATCH) for s in (Picard(), Broyden(variant="paper")))
    assert abs(paper - picard) <= 1
    assert steps(Broyden(), 1e-3, PER_SAMPLE) <= steps(Picard(), 1e-3, PER_SAMPLE) - (rho > 0.5)


@pytest.mark.parametrize(("variant", "couples"), [("paper", True), ("paper_v1", False)])
def test_the_papers_variant_couples_rows_whatever_is_asked_and_version_1s_does_not(variant, couples):
    x = random(3, 6, seed=5)
    sick = x.clone()
    sick[1] = torch.nan
    run = lambda ctx: iterates(Broyden(variant=variant), tanh_map(W, ctx), torch.zeros_like(x), 4, Reduce(True))[-1]  # noqa: E731
    assert bool(run(x).isfinite().all())
    assert bool(run(sick)[[0, 2]].isfinite().any()) is not couples
    assert Broyden(variant=variant).couples is couples


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Broyden(0), "solver.window=0 must be at least 1, or null for the variant's own"),
        (lambda: Broyden(variant="bad"), "solver.variant='bad' must be correct, paper or paper_v1"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_the_window_is_the_variants_own_unless_given():
    assert [Broyden().window, Broyden(variant="paper_v1").window, Broyden(5, "paper").window] == [12, 27, 5]
