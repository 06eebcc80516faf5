"""The conformance kit: is a solver, an adjoint or a network what it says it is?

    from implicit_bench import testing
    assert all(results := testing.check_solver(MySolver())), results    # or check_adjoint, check_network

`implicit-bench check solver=mine` prints the same. Each check works on problems whose answers are known, in float64 on
the CPU, and returns a Result, one sentence with figures: a failed check raises nothing, and what a component raises is
a failed check. The checks go by these names: a solver with `rtol` and `atol` adapts its step, one with `dt` does not,
and `order` is what it promises; an adjoint promises the gradient of the solution itself by `exact`.
"""

from .adjoints import check_adjoint
from .kit import Result
from .networks import check_network
from .solvers import check_solver

__all__ = ["Result", "check_adjoint", "check_network", "check_solver"]
