"""torchdiffeq through our interface is torchdiffeq."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from problems import BATCH, Watched, contraction, f64, random
from torchdiffeq import odeint, odeint_adjoint

from implicit_bench.core import EndTime, Status, solve
from implicit_bench.solvers import TorchDiffeq

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "solver" / "torchdiffeq"
W, Z0 = contraction(4, 3.0), random(3, 4, seed=1)


def field(z, t):
    return torch.tanh(z @ W) * torch.cos(3 * t)[:, None]


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "euler", "rk4"])
def test_equals_stock_torchdiffeq_to_the_bit_at_the_same_cost(method):
    stock, ours = Watched(field), Watched(field)
    z = odeint(lambda t, z: stock(z, t.expand(len(z))), Z0, f64([0.0, 2.0]), method=method, rtol=1e-5, atol=1e-6)[-1]
    stop = EndTime(2.0, max_steps=10_000)
    s = solve(ours, Z0, solver=TorchDiffeq(method, rtol=1e-5, atol=1e-6), stop=stop, reduce=BATCH)
    assert torch.equal(s.value, z)
    assert ours.calls == stock.calls == s.stats.calls
    assert s.stats.nfe.tolist() == [stock.calls] * 3
    assert [t.tolist() for t in ours.times] == [t.tolist() for t in stock.times]
    assert s.status.tolist() == [Status.REACHED_END] * 3
    assert bool(s.stats.residual.isnan().all())  # |F| has no such meaning for an ODE


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"])
def test_fixed_steps_are_stocks_with_the_option(method):
    """One step over all of it without `step_size`, as stock has it."""
    whole, stepped = Watched(field), Watched(field)
    z = odeint(lambda t, z: stepped(z, t.expand(len(z))), Z0, f64([0.0, 2.0]), method=method, rtol=1e-3, atol=1e-3,
               options={"step_size": 0.1})[-1]  # fmt: skip
    s = solve(field, Z0, solver=TorchDiffeq(method, step_size=0.1), stop=EndTime(2.0))
    assert torch.equal(s.value, z)
    assert s.stats.calls == stepped.calls >= 20
    solve(whole, Z0, solver=TorchDiffeq(method), stop=EndTime(2.0))
    assert whole.calls < 6


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_ours_integrates(path):
    """z' = -z, to 10 tol or an error that its order explains. (fehlberg2 is .14 off at tol 1e-3: it has no file.)"""
    settings = yaml.safe_load(re.sub(r"\$\{protocol.step_[ra]tol.\$\{field\}\}", "0.001", path.read_text()))
    assert settings.pop("_target_") == "implicit_bench.solvers.TorchDiffeq"
    assert settings["method"] == path.stem
    s = solve(lambda z, t: -z, Z0, solver=TorchDiffeq(**settings), stop=EndTime(1.0))
    worst = {"euler": 0.05, "midpoint": 2e-3}.get(path.stem, 1e-2)
    torch.testing.assert_close(s.value, Z0 * math.exp(-1), rtol=worst, atol=worst)
    assert s.stats.calls >= 10


def test_a_step_size_for_an_adaptive_method_is_refused():
    with pytest.raises(ValueError, match=r"solver\.step_size=0\.1 is for fixed steps, but dopri5 chooses its own"):
        TorchDiffeq("dopri5", step_size=0.1)
    with pytest.raises(ValueError, match=r"solver\.step_size=-1 must be positive"):
        TorchDiffeq("euler", step_size=-1)


def test_its_adjoint_equals_stock_to_the_bit():
    w = W.clone().requires_grad_()

    def F(z, t):
        return torch.tanh(z @ w) * torch.cos(3 * t)[:, None]

    settings = dict(method="dopri5", rtol=1e-5, atol=1e-6, adjoint_params=(w,))
    stock = odeint_adjoint(lambda t, z: F(z, t.expand(len(z))), Z0, f64([0.0, 2.0]), **settings)[-1]
    ours, _ = TorchDiffeq("dopri5", 1e-5, 1e-6).integrate(F, Z0, EndTime(2.0), wrt=(w,))
    assert torch.equal(ours, stock)
    a, b = (torch.autograd.grad(z.square().sum(), w)[0] for z in (ours, stock))
    assert torch.equal(a, b)
    assert float(a.abs().max()) > 0.1


def brink(z, t):
    return torch.where(t[:, None] > 0.5, torch.nan, torch.ones_like(z))


@pytest.mark.parametrize(
    ("F", "t1", "status"), [(brink, 1.0, Status.STEP_TOO_SMALL), (field, 100.0, Status.MAX_STEPS)]
)
def test_a_failed_solve_comes_back_as_nan_with_its_reason(F, t1, status):
    s = solve(F, Z0, solver=TorchDiffeq(), stop=EndTime(t1, max_steps=20))
    assert s.status.tolist() == [status] * 3
    assert bool(s.value.isnan().all())
    assert s.stats.calls > 8  # what it cost until it failed


def test_a_failed_solve_can_still_be_differentiated():
    """The loss is NaN and so is its gradient, which the training step notices; backward() itself must not raise."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    z, _ = TorchDiffeq().integrate(lambda z, t: w * brink(z, t), Z0, EndTime(1.0), wrt=(w,))
    z.sum().backward()
    assert bool(w.grad.isnan())


def test_an_assertion_of_the_fields_own_is_not_swallowed():
    def wrong(z, t):
        assert z.shape[1] == 5, "a cell for five features"
        return z

    with pytest.raises(AssertionError, match="a cell for five features"):
        solve(wrong, Z0, solver=TorchDiffeq(), stop=EndTime(1.0))


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"solver\.method='dopri6' is not one of torchdiffeq's: dopri8, dopri5"):
        TorchDiffeq("dopri6")
