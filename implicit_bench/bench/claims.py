"""Which ratio speaks to which claim of the papers (R: arXiv 2201.12240, H: arXiv 2310.09583).

What they published follows from the cells of configs/table/. The first abstract has 1.11-3.19x and 2.8-5.9x, bars of
its Figure 1 that its tables do not bear out. R7 is R4 of the MNIST table, and the same of predictions; R8 is a mean
over four experiments, no ratio of one table.
"""

from __future__ import annotations

from typing import NamedTuple

from ..papers import Table, table
from ..schema import UsageError

PAPERS = ("cdeq_cifar10_small", "cdeq_cifar10_large", "cdeq_imagenet_small")  # the tables with cells to divide


class Claim(NamedTuple):
    id: str
    slower: str  # the row in the numerator
    faster: str
    measure: str  # train, backward, predict: times; nfe: evaluations a forward; memory; errors and their spread; logits

    def published(self, of: Table) -> float | None:
        """The ratio of the table's cells."""
        rows = of.rows.get(self.slower), of.rows.get(self.faster)
        a, b = (row and row.cell(f"{self.measure}_s", f"{self.measure}_min") for row in rows)
        return a / b if a and b else None

    def paper(self, of: Table | None) -> str:
        """Of one table; with none the lowest and the highest of the tables that have it."""
        values = [v for t in ([of] if of else map(table, PAPERS)) if (v := self.published(t))]
        if not values:
            return ""
        low, high = min(values), max(values)
        return f"{low:.2f}×" if len(values) == 1 else f"{low:.2f}–{high:.2f}×"


SKIPS, KINDS = ("skip", "skip_reg"), ("", "skip_", "skip_reg_")
STARTS = ("alternating", "zero", "data_mean", "f_zero")
MATCHED = ("neural_ode", "anode", "deq")  # between the stem and the head that homo_ode has
NATIVE = ("neural_ode native", "anode native", "mdeq_small")  # on networks of their own
CLAIMS = (
    Claim("R1", "neural_ode", "cdeq", "train"),
    *(Claim("R1b", "neural_ode", f"{skip}_cdeq", "train") for skip in SKIPS),
    Claim("R2", "neural_ode", "cdeq", "backward"),
    *(Claim("R2b", "neural_ode", f"{skip}_cdeq", "backward") for skip in SKIPS),
    *(Claim("R3", "cdeq", f"{skip}_cdeq", "backward") for skip in SKIPS),
    *(Claim("R4", "cdeq", f"{skip}_cdeq", "train") for skip in SKIPS),
    *(Claim("R5", f"{kind}deq", f"{kind}cdeq", "predict") for kind in KINDS),
    *(Claim("R6", "neural_ode", f"{kind}cdeq", "predict") for kind in KINDS),
    *(Claim("R7", "cdeq", f"{skip}_cdeq", measure) for measure in ("train", "predict") for skip in SKIPS),
    Claim("R9", "cdeq", "deq", "train"),
    *(Claim("H1", row, "homo_ode", "errors") for row in (*MATCHED, *NATIVE)),
    Claim("–", "explicit", "homo_ode", "errors"),  # a control, no implicit model
    *(Claim("H2", row, "homo_ode", "memory") for row in ("neural_ode", "anode", "deq", "mdeq_small")),
    *(Claim("H3", f"homo_ode {start}", "homo_ode", "nfe") for start in STARTS),
    *(Claim("H4", row, "homo_ode", "spread") for row in ("neural_ode", "anode")),
    Claim("H5", "anode frozen", "homo_ode zero rk4", "logits"),
    Claim("–", "cdeq", "explicit", "train"),  # the price of being implicit
)
OF_TESTS = ("errors", "spread")  # measures of whole trainings, which are `compare`'s
FREE = ("R1", "R2", "R3", "R4", "R5", "R6", "R9")  # those asked of a free list of models


def asked(of: Table | None) -> list[Claim]:
    """Those of a table, or of a free list of models. Raises UsageError for an id that no claim has."""
    ids = (*of.claims, "–") if of else (*FREE, "–")
    if of and (unknown := next((id for id in of.claims if id not in {claim.id for claim in CLAIMS}), None)):
        raise UsageError(f"table={of.name}: no claim {unknown!r}; there are R1 to R7, R9 and H1 to H5")
    return [claim for claim in CLAIMS if claim.id in ids]
