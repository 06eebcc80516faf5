"""The README is true: its snippet runs, its commands compose, its tree is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from implicit_bench import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^implicit-bench (train|bench|data) (.*?)(?:\s+#.*)?$", README, re.M)


def test_the_snippet_trains():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    torch.manual_seed(0)
    names = {}
    exec(snippet, names)
    out = names["out"]
    assert (out.solution.stats.residual <= 1e-3).all()
    assert out.backward.vjps >= 3
    assert all(p.grad is not None for p in names["network"].cell.parameters())
    assert all(p.grad is not None for p in names["layer"].init.parameters())


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_the_snippets_of_every_page_run(page, capsys):
    """And say what the page says they say: finite figures, gradients where it takes some."""
    torch.manual_seed(0)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        names = {}
        exec(snippet, names)
        assert names["solution"].stats.residual.isfinite().all() or names["solution"].status.eq(1).all()
        assert names["W"].grad.isfinite().all()
        assert names["W"].grad.any()
        assert "tensor(" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["coming-from-torchdeq", "coming-from-torchdiffeq"])
def test_the_classes_and_options_in_the_tables_exist(page):
    import inspect

    from implicit_bench import adjoints, core, solvers

    text = (ROOT / f"docs/{page}.md").read_text()
    found = 0
    for name, arguments in re.findall(r"`([A-Z]\w+)\(([^`]*)\)`", text):
        component = next((getattr(m, name) for m in (solvers, adjoints, core) if hasattr(m, name)), None)
        if component is None:  # theirs
            continue
        known = inspect.signature(component).parameters
        for argument in filter(None, re.split(r",\s*", arguments)):
            assert argument.split("=")[0] in known, f"{name}({argument})"
            found += 1
    assert found >= 8


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_every_command_composes(command, words):
    given = [w for w in shlex.split(words) if w != "-m"]
    for job in config.expand(given):
        config.compose(command, job)


def test_commands_were_found():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("target", ["demo", "test", "setup", "lint"])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_tree_is_there():
    tree = README.split("## Where things are")[1].split("```")[1]
    named = re.findall(r"(?:^|\s)((?:[a-z_]+/)|(?:[a-z_]+\.(?:py|sh|md)))(?=\s|,)", tree)
    assert len(named) > 15
    for name in named:
        assert list(ROOT.rglob(name.rstrip("/"))), name
