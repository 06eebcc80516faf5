from ..solvers.gmres import LinearSolution, gmres

__all__ = ["LinearSolution", "gmres"]
