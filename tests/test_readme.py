"""The README is true: its snippet runs, its commands compose, its tree is there."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from implicit_bench import cli, config, papers, record, testing
from implicit_bench.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^implicit-bench (train|bench|data|eval) (.*?)(?:\s+#.*)?$", README, re.M)


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


@pytest.mark.parametrize("page", ["coming-from-torchdeq", "coming-from-torchdiffeq"])
def test_the_snippets_for_those_who_come_from_elsewhere_run(page, capsys):
    """And say what the page says they say: finite figures, gradients where it takes some."""
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
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


def compose(command, words):
    given = [w for w in words if w not in ("-m", "plan=true")]
    rows = papers.sweep(given) if command == "train" else None
    config.compose_all(command, rows or [*cli._rows(command, cli.split(given))[1].values()])


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_every_command_composes(command, words):
    compose(command, shlex.split(words))


def test_the_refusal_that_is_shown_is_that_of_the_committed_records(monkeypatch, capsys):
    command, _, said = re.search(r"\n\$ (implicit-bench compare [^\n]*)(\n)(.*?)\n```", README, re.S).groups()
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 2
    assert capsys.readouterr().err.split() == said.split()


# What a fenced block of a page may be: Python and YAML, each below the name of its file, and lines for a shell.
BLOCK = re.compile(r"([^\n]*)\n\n```(\w*)\n(.*?)\n```", re.S)
ADD = sorted(ROOT.glob("docs/add-*.md"))


def blocks(page):
    """(file that the line before names, or None; language; text) of each block, of which none is overlooked."""
    text = page.read_text()
    found = [(re.findall(r"`([\w./-]+\.(?:py|yaml))`", before), language, body)
             for before, language, body in BLOCK.findall(text)]  # fmt: skip
    assert len(found) == text.count("\n```") / 2
    return [(names[0] if names else None, language, body) for names, language, body in found]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory from which modules may be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize("page", ADD, ids=lambda page: page.stem)
def test_what_a_page_adds_works(page, workplace, capsys):
    """Files are written where the page says, its checks pass, all else composes and can be made."""
    ran, names = [], {"testing": testing}
    for file, language, body in blocks(page):
        if language:
            assert file.endswith({"python": ".py", "yaml": ".yaml"}[language])
            (workplace / file).parent.mkdir(parents=True, exist_ok=True)
            (workplace / file).write_text(body + "\n")
            if language == "python":
                exec(body, names)
            continue
        for line in body.splitlines():
            program, command, *words = shlex.split(line)
            assert program == "implicit-bench"
            ran.append(command)
            if command in ("check", "list", "data"):
                assert main([command, *words]) == 0, capsys.readouterr().out
                continue
            at = words.index("--config-dir")
            search, given = [words[at + 1]], words[:at] + words[at + 2 :]
            for job in config.compose_all(command, config.expand(given, search), search):
                config.build(job.config)
    assert len(ran) >= 2
    assert len(page.read_text().splitlines()) < 60
    for call in re.findall(r"`(testing\.check_\w+\(.*?\))`", page.read_text()):
        assert all(eval(call, names)), call


def test_a_model_of_ones_own_is_only_a_name(workplace):
    """As its page says: the same parts spelled out are the same run, and a file named like one of ours is refused."""
    for file, language, body in blocks(ROOT / "docs/add-a-model.md"):
        if language == "yaml":
            (workplace / file).parent.mkdir(parents=True)
            (workplace / file).write_text(body)
    (named,) = (path.stem for path in workplace.rglob("model/*.yaml"))
    parts = ["init=f_zero", "solver=anderson", "adjoint=phantom", "adjoint.steps=3", "penalty=[skip]"]
    jobs = config.compose_all("train", [[f"model={named}"], parts], ["my-configs"])
    assert len({record.run_id(job.config) for job in jobs}) == 1
    text = next(workplace.rglob("model/*.yaml")).read_text()
    for line, said in (("field: equilibrium", "says no field"), (f"model: {{name: {named}}}", "has no name")):
        (workplace / "my-configs/model/partial.yaml").write_text(text.replace(line, ""))
        with pytest.raises(config.UsageError, match=f"^the model {said}; its file wants a line "):
            config.compose("train", ["model=partial"], ["my-configs"])
    (workplace / "my-configs/model/partial.yaml").unlink()
    next(workplace.rglob("model/*.yaml")).rename(workplace / "my-configs/model/deq.yaml")
    with pytest.raises(config.UsageError, match="has the name of one of implicit-bench's own"):
        config.compose("train", [], ["my-configs"])


def test_every_other_block_is_looked_at():
    """Shell lines of all pages compose; other languages stand only where a test runs them."""
    run_elsewhere = {("coming-from-torchdeq", "python"), ("coming-from-torchdiffeq", "python"), ("tables", "yaml")}
    for page in set(ROOT.glob("docs/*.md")) - set(ADD):
        for _, language, body in blocks(page):
            if language:
                assert (page.stem, language) in run_elsewhere, page
                continue
            for line in body.splitlines():
                program, command, *words = shlex.split(line, comments=True)
                if program == "make":
                    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M), line
                elif program == "python":
                    assert (ROOT / command).is_file(), line
                elif program == "pip":
                    extra = words[0].partition("[")[2].rstrip("]")
                    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), line
                elif program == "torchrun":
                    compose("train", words[words.index("train") + 1 :])
                elif program == "ray":
                    assert command == "start", line  # which test_ray does by Ray's own library
                else:
                    assert program == "implicit-bench", line
                    compose(command, words)


def test_commands_were_found():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("target", ["demo", "test", "setup", "lint"])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_tree_is_there():
    tree = README.split("## Where things are")[1].split("```")[1]
    named = re.findall(r"(?:^|\s)((?:[a-z_]+/)|(?:[a-z_]+\.(?:py|sh|md)))(?=\s|,)", tree)
    assert len(named) > 15
    tops = [path for path in ROOT.iterdir() if path.name not in (".venv", ".git", "runs", "data")]
    found = {path.name for top in tops for path in (top, *top.rglob("*"))}
    assert {name.rstrip("/") for name in named} <= found
