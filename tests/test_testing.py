"""The conformance kit: our own components pass it, and each fault is caught by the check that is for it."""

import dataclasses
import re
from pathlib import Path

import broken
import pytest
import torch
from torch import nn

from implicit_bench import config, testing
from implicit_bench.adjoints import IFT, Unroll
from implicit_bench.core import Solver, State
from implicit_bench.solvers import Bosh3, Picard, TorchDiffeq, Tsit5

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPE = (1, 4, 4)


def named(group):
    folder = CONFIGS / group
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def made(group, name, **given):
    return config.make(config.compose("check", [f"{group}={name}"]).config[group], group, **given)


def failed(results):
    assert results
    return {r.name: r.sentence for r in results if not r}


def sentence(results, name):
    return next(r.sentence for r in results if r.name == name)


# ------------------------------------------------------------------------------------------------------- what is sound

KNOWN = {
    "broyden_paper": {"fixed point", "nan row", "rows alone"},  # the faults of the paper's code
    "torchdiffeq/explicit_adams": {"end time"},  # unstable on z' = -3 z in its steps of 0.1
}


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")  # torchdiffeq's implicit_adams
@pytest.mark.parametrize("name", named("solver"))
def test_our_own_solvers_pass(name):
    faults = failed(testing.check_solver(made("solver", name)))
    assert faults.keys() >= KNOWN[name] if name in KNOWN else not faults


@pytest.mark.parametrize("name", named("adjoint"))
def test_our_own_adjoints_pass(name):
    assert not failed(testing.check_adjoint(made("adjoint", name)))


@pytest.mark.parametrize("name", [n for n in named("network") if not n.endswith(("large", "imagenet"))])
def test_our_own_networks_pass(name):
    assert not failed(testing.check_network(made("network", name, shape=(1, 8, 8), classes=10), (1, 8, 8), 10))


@pytest.mark.parametrize(("name", "inject"), [("homo_conv", "state"), ("homo_conv", "frozen"), ("node_conv", "state")])
def test_networks_that_see_x_in_their_start_alone_pass(name, inject):
    net = made("network", name, shape=(1, 8, 8), classes=10, inject=inject)
    results = {result.name: result for result in testing.check_network(net, (1, 8, 8), 10)}
    assert all(result.passed for result in results.values())
    assert "no predictor()" in results["shapes"].sentence
    assert "no fixed point" in results["equilibrium"].sentence


def test_a_solver_is_asked_for_what_it_says_it_can_do():
    path = type("Path", (Picard,), {"has_time": True, "needs_map": True})  # as homotopy, whose t is no time
    adaptive = Tsit5(1e-5, 1e-6)
    made = {Picard: Picard(), path: path(), Tsit5: adaptive, TorchDiffeq: TorchDiffeq()}
    names = {kind: {r.name for r in testing.check_solver(solver)} for kind, solver in made.items()}
    assert (adaptive.rtol, adaptive.atol) == (1e-5, 1e-6)
    assert names[Tsit5] - names[Picard] == {"end time", "order"}
    assert names[Tsit5] - names[TorchDiffeq] == {"fixed point", "order", "field", "nan row", "rows alone"}
    assert names[path] == names[Picard]
    assert not failed(testing.check_solver(Picard(damping=0.1)))


def test_the_figures_are_those_of_the_theory():
    results = testing.check_solver(Bosh3())
    assert sentence(results, "order").startswith("3.0 on the whirl, 3 promised; ")
    told = sentence(testing.check_adjoint(IFT(rtol=0.5)), "gradient")
    assert "fixed point: exact to " in told
    assert " as set" in told  # and what half a linear solve is worth
    assert sentence(testing.check_adjoint(Unroll()), "gradient").count("exact to ") == 2
    lame = testing.check_network(Scaled(SHAPE, 10), SHAPE, 10)
    assert "spectral radius 0.25;" in sentence(lame, "equilibrium")


class Quarter(broken.DenseCell):
    """f = z / 4 turned by a right angle, and x."""

    def forward(self, z, ctx, t):
        a, b = z.chunk(2, 1)
        return torch.cat((b, -a), 1) / 4 + ctx + 0 * self.W(z)


class Scaled(broken.Of):
    cell_class = Quarter


@dataclasses.dataclass(frozen=True)
class Frozen(Solver):
    """Euler as a record: settings that cannot be set."""

    dt: float = 0.0625  # a power of two, so that the times are exact
    has_time = True
    order = 1

    def init(self, F, z0, t1, reduce):
        return super().init(F, z0, t1, reduce)._replace(mem=t1)

    def step(self, F, state, reduce):
        dt = (state.mem - state.t).clamp_max(self.dt)
        z, t = state.z + dt.unsqueeze(1) * state.F, state.t + dt
        return State(z, F(z, t), t, state.mem)


def test_a_frozen_record_is_refined_like_any_other():
    assert not failed(results := testing.check_solver(Frozen()))
    assert "1 promised" in sentence(results, "order")


# ------------------------------------------------------------------------------------------------------ what is broken

SOLVERS = {  # the checks that fail, and what they say
    broken.WrongOrder: {"order": "on the whirl, 5 promised: error "},
    broken.Uncounted: {"nfe": "but the map was called "},
    broken.TwoCalls: {"nfe": "one_call promises "},
    broken.Lying: {"fixed point": " times further from z* than a residual of 1e-06 allows",
                   "status": ": CONVERGED at a residual of ", "field": "State.F is off F(State.z, State.t) by "},
    broken.Leaking: {"nan row": "NaN leaks: the value of the rows beside"},
    broken.Stuck: {"fixed point": "MAX_STEPS after 3000 steps", "nan row": "ends as MAX_STEPS",
                   "dtype": "MAX_STEPS in float32"},
    broken.Early: {"end time": "decay: off by ", "order": "5 promised", "status": ", where the end is 0.97",
                   "field": "State.F is off"},
    broken.Quitting: {"fixed point": "STEP_TOO_SMALL after ", "end time": "STEP_TOO_SMALL on the way to t = 2",
                      "order": "STEP_TOO_SMALL on the whirl", "status": "STEP_TOO_SMALL within 50 steps",
                      "dtype": "STEP_TOO_SMALL in float32"},
    broken.Lax: {"order": "at tolerance 1e-03"},
    broken.Deaf: {"end time": "rotation: off by ", "order": "the whirl takes 48 steps whatever the tolerance",
                  "status": "REACHED_END at t = 1.000, where the end is 0.97"},
    broken.Wide: {"dtype": "a float32 start comes back with a float64 value"},
    broken.Overwriting: {"repeat": "the start is written over"},
    broken.Remembering: {"nan row": "", "rows alone": "", "repeat": "another answer the second time"},
    broken.Healing: {"nan row": "the row that starts with NaN ends as CONVERGED"},
    broken.Crowded: {"rows alone": "from the same row in a batch"},
    broken.Hiding: {"nan row": "the row that runs into NaN ends as CONVERGED"},
}  # fmt: skip
ADJOINTS = {
    broken.Detached: {"gradient": "the gradient of the parameters is zero: the output is detached"},
    broken.Zero: {"gradient": "the gradient of the parameters is zero"},
    broken.Backwards: {"gradient": "it points away from the exact gradient, cosine -0.9"},
    broken.Exploding: {"gradient": "the gradient of the parameters is not finite"},
    broken.Meddling: {"value": "the solve differs from one without it"},
    broken.Boasting: {"gradient": "it says that it is exact, but is off by 2e-01"},
    broken.Miscounting: {"counts": "the log has 44 calls, but there were 43"},
    broken.Hoarding: {"memory": "a step without backward leaves its output, solution, graph behind"},
    broken.Changing: {"value": "off the answer by "},
    broken.WideGradient: {"dtype": "the output of a float32 problem is torch.float64"},
}
NETWORKS = {
    broken.NETWORKS["Restless"]: {"fixed in a solve": "two calls with one context differ"},
    broken.NETWORKS["Coupled"]: {"independence": "batch_independent is True"},
    broken.NETWORKS["CoupledInBegin"]: {"independence": "batch_independent is True"},
    broken.NETWORKS["Cut"]: {"gradient": "none reaches layer.cell.U.weight", "derivative": ""},
    broken.NETWORKS["Normed"]: {"finite": "f is not finite at z = 0"},
    broken.NETWORKS["Bent"]: {"derivative": "disagrees with finite differences"},
    broken.NETWORKS["Rooted"]: {"gradient": "it is not finite", "derivative": ""},
    broken.NETWORKS["Narrow"]: {"shapes": "the cell of a float64 network puts out torch.float32", "derivative": ""},
    broken.NETWORKS["InPlace"]: {"fixed in a solve": "the cell writes over its state", "derivative": ""},
    broken.WrongHead: {"shapes": "the head puts out (4, 11), not (4, 10)"},
    broken.WrongGuess: {"shapes": "the predictor puts out (4, 3), not (4, 16)", "gradient": "it raised ValueError"},
}


def agree(found, faults):
    assert found.keys() == faults.keys()
    for name, words in faults.items():
        assert words in found[name]


@pytest.mark.parametrize(("kind", "faults"), SOLVERS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_solver_is_caught_by_the_check_for_it(kind, faults):
    agree(failed(testing.check_solver(kind())), faults)


@pytest.mark.parametrize(("kind", "faults"), ADJOINTS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_adjoint_is_caught_by_the_check_for_it(kind, faults):
    agree(failed(testing.check_adjoint(kind())), faults)


@pytest.mark.parametrize(("kind", "faults"), NETWORKS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_network_is_caught_by_the_check_for_it(kind, faults):
    torch.manual_seed(0)
    agree(failed(testing.check_network(kind(SHAPE, 10), SHAPE, 10)), faults)


COEFFICIENTS = [("a", i, j) for i, row in enumerate(Bosh3.tableau.a) for j in range(len(row))]
COEFFICIENTS += [("c", 0, 0), ("c", 1, 0)]  # the third is the time of F at the new state, t + h whatever it says


@pytest.mark.parametrize(("table", "i", "j"), COEFFICIENTS)
def test_any_coefficient_that_is_off_by_a_twentieth_costs_the_order(table, i, j):
    rows = [list(row) if table == "a" else [row] for row in getattr(Bosh3.tableau, table)]
    rows[i][j] = rows[i][j] * 1.05 or 0.02
    changed = tuple(map(tuple, rows)) if table == "a" else tuple(row[0] for row in rows)
    wrong = type("Wrong", (Bosh3,), {"tableau": Bosh3.tableau._replace(**{table: changed})})
    assert "3 promised: error" in failed([testing.solvers.order(wrong())])["order"]


# --------------------------------------------------------------------------------------------------------- its manners


def test_what_a_component_raises_is_a_failed_check():
    results = testing.check_solver(broken.Raising())
    (said,) = {r.sentence for r in results if not r}
    assert re.fullmatch(r"it raised ZeroDivisionError \(broken.py:\d+, in \w+\): of its own", said)
    assert len(failed(results)) == len(results)
    assert not all(results)
    for check, thing in ((testing.check_solver, object()), (testing.check_adjoint, 3)):
        (result,) = check(thing)
        assert not result
        assert type(thing).__name__ in result.sentence
    (result,) = testing.check_network(nn.Linear(1, 1), SHAPE, 10)
    assert result.sentence == "stem and cell and head should be a Module of Linear"
    (result,) = testing.check_network(broken.Dense(SHAPE, 10, 8, untied=3), SHAPE, 10)
    assert "network.untied=0" in result.sentence


def test_it_leaves_the_component_and_the_generator_as_they_were_and_says_the_same_again():
    network, solver, adjoint = broken.Dense(SHAPE, 10, 8), Picard(), IFT()
    before = {name: w.clone() for name, w in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def run():
        results = testing.check_solver(solver) + testing.check_adjoint(adjoint)
        return results + testing.check_network(network, SHAPE, 10)

    assert run() == run()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[name]) and w.dtype == torch.float32 for name, w in network.state_dict().items())
    assert all(w.grad is None for w in network.parameters())
    assert (solver.damping, adjoint.rtol, adjoint.max_iter) == (1.0, 1e-2, 50)


def test_a_solver_that_does_not_step_is_told_so_once():
    class Bare(Solver):
        def step(self, F, state, reduce):
            return state.z + state.F

    (result,) = testing.check_solver(Bare())
    assert result.sentence == "step returned a Tensor, not a State; end in return self.at(F, z, state.t)"
    (result,) = testing.check_solver(type("Nothing", (Solver,), {})())
    assert "NotImplementedError" in result.sentence
