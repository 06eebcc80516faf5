"""The layout of design.md: which part may import which, who may import what from outside, how long a file may be."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "implicit_bench"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports point down this list. A part may import what is named beside it, itself, and nothing else of ours.
WORLD = {"clock", "machine", "config", "data", "device", "jsonl", "lock", "log", "mirror", "record", "sync", "terminal",
         "world"}  # fmt: skip
OURS = {
    "core": set(),
    "world": {"core", "schema"},
    "solvers": {"core"},
    "adjoints": {"core", "solvers"},
    "models": {"core", "solvers", "adjoints", "world"},
    "machine": set(),
    "clock": {"machine"},
    "limits": set(),
    "device": {"limits", "machine", "world"},
    "data": {"terminal"},
    "lock": set(),
    "record": set(),
    "jsonl": {"record"},
    "mirror": set(),
    "log": {"mirror", "record"},
    "sync": {"jsonl", "lock", "log", "mirror", "record", "terminal"},
    "doctor": {"config", "schema", "data", "limits", "machine", "mirror", "report", "terminal"},
    "report": {"record", "terminal"},
    "runs": {"config", "device", "jsonl", "lock", "log", "models", "record", "report", "schema", "terminal", "train"},
    "evaluation": {"core", "models", "report", "runs", "schema", "train", *WORLD},
    "words": {"schema"},
    "listing": {"config", "report", "schema", "terminal", "words"},
    "complete": {"config", "record", "schema", "terminal"},
    "papers": {"config", "schema"},
    "plan": {"bench", "report", "train", *WORLD},
    "match": {"bench", "schema", *WORLD},
    "schema": set(),
    "known": set(),
    "mistakes": {"schema"},
    "config": {"known", "mistakes", "schema", "models"},
    "terminal": set(),
    "help": set(),
    "compare": {"bench", "config", "jsonl", "lock", "log", "match", "mirror", "record", "report", "runs", "schema",
                "sync", "terminal", "words"},
    "table": {"__init__", "bench", "clock", "compare", "config", "jsonl", "lock", "log", "machine", "match", "papers",
              "plan", "record", "report", "runs", "schema", "sweep", "sync", "terminal", "train", "words"},
    "guard": {"help", "lock", "schema"},
    "handover": {"help", "schema", "terminal", "words"},
    "sweep": {"__init__", "compare", "config", "guard", "handover", "help", "known", "match", "papers", "report",
              "schema", "train", "words", *WORLD},
    "testing": {"core", "solvers", "adjoints", "models"},
    "check": {"config", "report", "schema", "terminal", "testing"},
    "train": {"core", "adjoints", "models", "schema", *WORLD},
    "bench": {"core", "solvers", "adjoints", "models", "papers", "train", "report", "runs", "schema", "words", *WORLD},
    "cli": {"__init__", "config", "schema", "guard", "handover", "help", "data", "terminal", "check", "train", "bench",
            "words", "match", "compare", "report", "runs", "evaluation", "plan", "complete", "papers", "sweep", "sync",
            "doctor", "listing", "table"},
    "__main__": {"cli"},
    "__init__": {"core", "models"},
}
THEIRS = {
    "core": {"torch"},
    "world": {"torch"},
    "solvers": {"torch", "torchdiffeq"},
    "adjoints": {"torch"},
    "models": {"torch"},
    "machine": {"torch"},
    "clock": {"torch"},
    "device": {"torch"},
    "data": {"torch", "numpy", "PIL", "scipy", "torchvision"},
    "log": {"wandb"},
    "report": {"matplotlib"},
    "listing": {"torch", "yaml"},
    "runs": {"pandas"},
    "complete": {"yaml"},
    "papers": {"torch"},
    "plan": {"torch"},
    "match": {"torch"},
    "evaluation": {"torch", "torchvision"},
    "schema": {"torch"},
    "doctor": {"packaging", "torch", "torchvision"},
    "mistakes": {"hydra", "omegaconf"},
    "config": {"hydra", "omegaconf", "torch", "yaml"},
    "terminal": {"rich"},
    "testing": {"torch"},
    "check": {"torch"},
    "train": {"torch"},
    "bench": {"torch", "torchdeq"},
    "table": {"jinja2"},
    "handover": {"hydra"},
    "sweep": {"hydra", "ray"},
}


class Import(NamedTuple):
    file: str  # as models/layer.py
    part: str  # the part that the file belongs to
    line: int
    ours: bool
    name: str  # the part of ours, or the package
    inside: bool  # a function, so that it costs nothing until then


def imports_of(path, package=PACKAGE):
    file = path.relative_to(package)
    parts = file.parts[:-1]

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [(0, alias.name) for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [(child.level, child.module)] if child.module else [(child.level, a.name) for a in child.names]
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
                continue
            for level, name in names:
                full = [*parts[: len(parts) - level + 1], *name.split(".")] if level else name.split(".")
                ours = level > 0 or full[0] == package.name
                first = full[1:] if ours and not level else full
                head = (first or ["__init__"])[0]
                if ours and level and not (package / head).exists() and not (package / f"{head}.py").exists():
                    head = "__init__"  # a name of the package itself
                yield Import(file.as_posix(), file.parts[0].removesuffix(".py"), child.lineno, ours, head, inside)

    return list(walk(ast.parse(path.read_text()), False))


IMPORTS = [found for path in FILES for found in imports_of(path)]


def test_the_reader_of_imports_sees_every_form(tmp_path):
    package = tmp_path / "p"
    (package / "a").mkdir(parents=True)
    (package / "b.py").touch()
    (package / "a" / "x.py").write_text(
        "import torch.nn as nn, os\nfrom ..b import c\nfrom .. import b\nfrom . import y\nfrom .y import z\n"
        "import p.b\nfrom p.b import c\nfrom .. import __version__\n"
        "class C:\n    def f(self):\n        from numpy import array\n"
    )
    found = [(i.ours, i.name, i.inside) for i in imports_of(package / "a" / "x.py", package)]
    assert found == [(False, "torch", False), (False, "os", False), (True, "b", False), (True, "b", False),
                     (True, "a", False), (True, "a", False), (True, "b", False), (True, "b", False),
                     (True, "__init__", False), (False, "numpy", True)]  # fmt: skip


def test_every_part_has_its_place():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(OURS)
    assert len(IMPORTS) > 200


def test_imports_of_our_own_point_one_way():
    wrong = [f"{i.file}:{i.line} imports {i.name}" for i in IMPORTS if i.ours and i.name not in {i.part, *OURS[i.part]}]
    assert not wrong
    order: list[str] = []
    left = dict(OURS)
    while left:  # no circle: something is always free of what is left
        free = [part for part, needs in left.items() if not needs & left.keys()]
        assert free, left
        order += free
        for part in free:
            del left[part]
    ranks = [order.index(part) for part in ("core", "adjoints", "models", "train", "bench", "cli")]
    assert ranks == sorted(ranks)


def test_imports_from_outside_are_those_of_the_design():
    outside = [i for i in IMPORTS if not i.ours and i.name not in sys.stdlib_module_names]
    wrong = [f"{i.file}:{i.line} imports {i.name}" for i in outside if i.name not in THEIRS.get(i.part, set())]
    assert not wrong
    by_name = {name: {i.part for i in outside if i.name == name} for name in ("hydra", "omegaconf", "wandb")}
    assert by_name == {"hydra": {"config", "handover", "mistakes", "sweep"}, "omegaconf": {"config", "mistakes"},
                       "wandb": {"log"}}
    assert "record" not in THEIRS  # standard library only
    assert "lock" not in THEIRS


def test_what_is_slow_to_import_is_imported_where_it_is_used():
    lazy = {"torchvision", "wandb", "hydra", "omegaconf", "matplotlib", "rich", "torchdiffeq", "PIL", "scipy"}
    wrong = [f"{i.file}:{i.line} imports {i.name}" for i in IMPORTS if not i.ours and i.name in lazy and not i.inside]
    assert not wrong
    light = {"cli", "help", "config", "mistakes", "schema", "terminal", "__init__", "__main__", "record", "lock", "log",
             "mirror", "sync", "doctor", "words", "listing", "complete"}  # fmt: skip
    heavy = {"torch", "core", "models", "testing", "check", "train", "bench", "data", "device", "clock", "machine"}
    wrong = [
        f"{i.file}:{i.line} imports {i.name}" for i in IMPORTS if i.part in light and i.name in heavy and not i.inside
    ]
    assert not wrong


def length(path):
    return len(path.read_text().splitlines())


def test_core_stays_under_500_lines():
    assert sum(length(path) for path in (PACKAGE / "core").glob("*.py")) < 500


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_stays_under_350_lines(path):
    assert length(path) <= 350
