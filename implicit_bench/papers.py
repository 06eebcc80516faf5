"""What configs/table/ says: the rows of a paper's table, as words to run, and the published cells beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .schema import UsageError, files, nearest

KEYS = ("title", "source", "inherits", "words", "on_cpu", "claims", "rows", "kind", "seeds", "columns", "target",
        "lines")  # fmt: skip
ROW_KEYS = ("words", "published", "more")
LINES = {"cells": (), "claims": ("id", "says"), "bars": ("of", "row", "measure", "ratio", "table", "bar"),
         "board": ("model",)}  # fmt: skip
KINDS = tuple(LINES)  # what `table` makes of it; bench takes the first alone
SEEDS = {"sound": [0, 1, 2], "faithful": [0]}


@dataclass(frozen=True)
class Row:
    """`published` cells are numbers or [mean, sd]; an absent one is not known. `more`: only when it is asked for. `of`:
    the table whose words it runs with, this one or one that it inherits from."""

    words: list[str] = field(default_factory=list)
    published: dict[str, Any] = field(default_factory=dict)
    more: bool = False
    of: str = ""

    def cell(self, *names: str) -> float | None:
        """The first of the cells that is published, its mean."""
        for name in names:
            if (value := self.published.get(name)) is not None:
                return float(value[0] if isinstance(value, (list, tuple)) else value)
        return None


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    source: str
    words: list[str]  # of every row
    on_cpu: list[str]  # of every row where there is no GPU
    claims: list[str]  # ids of bench/claims.py
    rows: dict[str, Row]
    kind: str = "cells"
    seeds: dict[str, list[int]] = field(default_factory=lambda: SEEDS)  # by protocol
    columns: list[str] = field(default_factory=lambda: ["params", "test_acc", "nfe", "train_min"])  # of table.COLUMNS
    target: float | None = None  # the accuracy, a share, of the column target_s
    lines: list[dict[str, Any]] = field(default_factory=list)  # of the kinds that have no cells

    def chosen(self, names: Sequence[str] | None) -> dict[str, Row]:
        """The rows named, or all but those that are to be asked for; [all] is really all. Raises UsageError."""
        if self.kind != "cells":
            raise UsageError(f"table={self.name} has no rows to run; implicit-bench table table={self.name} shows it")
        if not names:
            return {name: row for name, row in self.rows.items() if not row.more}
        if list(names) == ["all"]:
            return dict(self.rows)
        for name in names:
            if name not in self.rows:
                raise UsageError(f"table={self.name} has no row {name!r}{nearest(name, [*self.rows, 'all'])}")
        return {name: self.rows[name] for name in names}

    def jobs(self, names: Sequence[str] | None, own: Sequence[str], cpu: bool) -> dict[str, list[str]]:
        """The words of each row, those of the command line last; a key that it sets is taken out of the table's.
        Raises UsageError where it would make the rows alike."""
        said = {_key(word) for word in own}
        common = [*self.words, *(self.on_cpu if cpu else [])]
        found = {}
        for name, row in self.chosen(names).items():
            if taken := [word for word in row.words if _key(word) in said]:
                raise UsageError(f"table={self.name} says {taken[0]} for its row {name}; choose among its rows with "
                                 f"rows={','.join([*self.rows][:2])} or leave table= out")  # fmt: skip
            found[name] = [*(word for word in common if _key(word) not in said), *row.words, *own]
        return found


def rows(words: Sequence[str], search: Sequence[str] = ()) -> tuple[Table, dict[str, list[str]]] | None:
    """The table= among a command line's words, and the words of each of its rows; None without one. Raises UsageError.

    Hydra sees neither table= nor rows=: they say which jobs there are, and nothing of any one.
    """
    asked = _asked(words, search)
    if asked is None:
        return None
    found, chosen, own = asked
    if lists := [o.input_line for o in own.values() if o.is_sweep_override()]:
        raise UsageError(f"{lists[0]!r} lists values, but a table has its rows already; give one value, or leave "
                         f"table={found.name} out")  # fmt: skip
    gpu = own.get("gpu")
    return found, found.jobs(chosen, [o.input_line for o in own.values()], _on_cpu(gpu and str(gpu.value())))


def sweep(words: Sequence[str], search: Sequence[str] = ()) -> list[list[str]] | None:
    """The words of each training of a multirun over a table's rows, once for all that other words list; None without
    a table. Raises UsageError."""
    from . import config

    asked = _asked(words, search)
    if asked is None:
        return None
    found, chosen, own = asked
    lists = [o.input_line for key, o in own.items() if not key.startswith("hydra")]
    return [job for each in config.expand(lists, search) for job in found.jobs(chosen, each, cpu=False).values()]


def _asked(words: Sequence[str], search: Sequence[str]) -> tuple[Table, list[str], dict[str, Any]] | None:
    """The table of a command line, the rows chosen and its other words, parsed, by their keys."""
    from . import config

    said = {o.key_or_group: o for o in config.parse(words)}
    if "table" not in said:
        if "rows" in said:
            raise UsageError("rows= chooses among the rows of a table; add table=cdeq_cifar10_small or the like")
        return None
    chosen = said.pop("rows").value() if "rows" in said else []
    return table(str(said.pop("table").value()), tuple(search)), [str(name) for name in chosen], said


def _on_cpu(gpu: str | None) -> bool:
    if gpu in ("cpu", "cuda"):
        return gpu == "cpu"
    import torch

    return not torch.cuda.is_available()


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


@cache
def table(name: str, search: tuple[str, ...] = (), above: tuple[str, ...] = ()) -> Table:
    """Read configs/table/NAME.yaml, or a file of --config-dir; `above` are those that inherit it. Raises UsageError."""
    found = files("table", search)
    if name not in found:
        raise UsageError(f"no table {name!r}{nearest(name, list(found))}")
    if name in above:
        raise UsageError(f"{found[name]}: inherits: goes round in a circle, {' → '.join([*above, name])}")
    said = _read(found[name])
    rows: dict[str, Any] = said.get("rows") or {}
    inherited = said.get("inherits")
    base = table(inherited, search, (*above, name)) if inherited else Table(name, name, "", [], [], [], {})
    other = {"of": name} if {"words", "on_cpu"} & said.keys() else {}
    merged = {label: {**vars(row), **other} for label, row in base.rows.items()}
    for label, row in rows.items():
        before = merged.get(label, {})
        merged[label] = {**before, **row, "of": before["of"] if before and "words" not in row else name}
    own = {key: value for key, value in said.items() if key not in ("inherits", "rows")}
    return replace(base, name=name, rows={label: Row(**row) for label, row in merged.items()},
                   **{"title": base.title if inherited else name, **own})  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """A table's file, if it says nothing that a table has no use for. Raises UsageError."""
    from .config import alone

    def wrong(text: str) -> UsageError:
        return UsageError(f"{path}: {text}")

    said = alone(path)
    for key in said:
        if key not in KEYS:
            raise wrong(f"no key {key!r}{nearest(str(key), KEYS)}")
    if (kind := said.get("kind", "cells")) not in KINDS:
        raise wrong(f"no kind {kind!r}{nearest(kind, KINDS)}")
    rows = said.get("rows") or {}
    if not isinstance(rows, dict):
        raise wrong(f"rows: {rows!r} has no labels; write rows: {{deq: {{words: [model=deq]}}}}")
    for label, row in rows.items():
        if bad := [sign for sign in ",[]'\"" if sign in str(label)]:
            raise wrong(f"row {label}: a label with {bad[0]} in it cannot be asked for; leave it out")
        for key in row if isinstance(row, dict) else [str(row)]:
            if key not in ROW_KEYS:
                raise wrong(f"row {label} has no key {key!r}{nearest(key, ROW_KEYS)}")
        published = row.get("published") or {}
        if not isinstance(published, dict):
            raise wrong(f"row {label}, published: {published!r} names no column; write {{test_acc: {published!r}}}")
        for column, cell in published.items():
            numbers = cell if isinstance(cell, list) and len(cell) == 2 else [cell]
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise wrong(f"row {label}, published {column}={cell!r} is neither a number nor [mean, sd]")
    lists = [(key, said.get(key)) for key in ("words", "on_cpu", "columns", "claims", "lines")]
    for key, value in [*lists, *((f"row {label}, words", row.get("words")) for label, row in rows.items())]:
        if value is not None and not isinstance(value, list):
            raise wrong(f"{key}: {value!r} is no list; write [{value}]")
        if key.endswith(("words", "on_cpu")) and (bad := [word for word in value or () if not isinstance(word, str)]):
            raise wrong(f"{key}: {bad[0]!r} is no word; write key=value")
        if seed := [word for word in value or () if str(word).startswith("seed=")]:
            raise wrong(f"{key} has {seed[0]}, but a table's seeds are its seeds:, such as {{sound: [0, 1]}}")
    seeds = said.get("seeds", {})
    each = [*seeds.values()] if isinstance(seeds, dict) else [None]
    if not all(isinstance(some, list) and some and all(isinstance(n, int) for n in some) for some in each):
        raise wrong(f"seeds: {seeds!r} is not a list of whole numbers by protocol; write {{sound: [0, 1]}}")
    for line in said.get("lines") or ():
        if lacks := [key for key in LINES[kind] if key not in line]:
            raise wrong(f"a line lacks {', '.join(lacks)}: {line}")
    return said
