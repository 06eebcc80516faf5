"""`implicit-bench list`: what can be chosen. Imports neither torch nor Hydra."""

from __future__ import annotations

from . import terminal
from .config import files, plural
from .report import tables
from .schema import GROUPS, UsageError, nearest
from .words import Words


def listing(words: Words) -> int:
    """Every file of the groups that are named, or of all, with the first line that it says of itself."""
    if words.flags or words.multirun or words.plan:
        raise UsageError("list takes no flag but --config-dir")
    names = {name: group for group in GROUPS for name in (plural(group), group)}
    for a in words.overrides:
        if a not in names:
            options = [plural(group) for group in GROUPS]
            raise UsageError(f"nothing called {a!r} to list{nearest(a, options, len(options))}")
    wanted = [names[a] for a in words.overrides] or GROUPS
    rows = []
    for group in wanted:
        for name, path in files(group, words.search).items():
            comments = [line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            rows.append((group, name, next((c for c in comments if not c.startswith("@")), "")))
    if terminal.format != "text":
        tables.show(["group", "name", "about"], rows)
        return 0
    for group in wanted:
        if len(wanted) > 1:
            print(f"{group}=")
        print(*(terminal.hanging(f"  {name:<19} ", about) for g, name, about in rows if g == group), sep="\n")
    return 0
