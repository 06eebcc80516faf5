"""Completion for bash, zsh and fish. A Tab runs `implicit-bench complete LINE`: no torch, no Hydra, under 0.4 s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .record import flat
from .schema import GROUPS, LISTED, UsageError, config_dir, files, plural
from .terminal import FORMATS, TEX

SCRIPTS = {
    "bash": r"""_implicit_bench() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} word before
    word=${line##* }
    COMPREPLY=($(implicit-bench complete "$line" 2>/dev/null))
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # bash replaces what stands after the last = only
        before=${word%"${word##*=}"}
        COMPREPLY=("${COMPREPLY[@]#"$before"}")
    fi
    [[ ${COMPREPLY[*]} == *[=.]* && ${#COMPREPLY[@]} -ge 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
complete -F _implicit_bench implicit-bench
""",
    "zsh": r"""#compdef implicit-bench
_implicit_bench() {
    local -a found
    found=("${(@f)$(implicit-bench complete "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
}
compdef _implicit_bench implicit-bench
""",
    "fish": r"""complete -c implicit-bench -f -a '(implicit-bench complete (commandline -cp) 2>/dev/null)'
""",
}
COMPOSING = ("train", "bench", "check", "eval", "data")
FLAGS = {"train": ("-m", "--config-dir", "--cfg", "--info", "--resolve"), "runs": ("-y",)}
STATES = ("done", "failed", "interrupted", "running", "stopped")
WORDS = {"plan": ("true", "false"), "format": FORMATS, "status": STATES}
TABLE = ("table", "rows", "columns", "seeds", "records", "run_missing", "time", "publish", "out", "logger")
CHOICES = {"eval.split": ("test", "val", "train")}


def script(words: Sequence[str]) -> int:
    """`completion SHELL`: what the shell is to evaluate."""
    if len(words) != 1 or words[0] not in SCRIPTS:
        such = f"no completion for {' '.join(words)!r}" if words else "completion wants a shell"
        raise UsageError(f"{such}; there are: {', '.join(SCRIPTS)}")
    print(SCRIPTS[words[0]], end="")
    return 0


def complete(line: str, commands: Iterable[str]) -> list[str]:
    """What may stand where the line ends; each candidate replaces its last word."""
    *before, word = line.split(" ")[1:] or [""]
    before = [b for b in before if b]
    if not before:
        return _starting(word, sorted(commands))
    command, given = before[0], before[1:]
    return _starting(word, _candidates(command, given, word))


def _starting(word: str, candidates: Iterable[str]) -> list[str]:
    return [c for c in candidates if c.startswith(word)]


def _candidates(command: str, given: Sequence[str], word: str) -> list[str]:
    if word.startswith("-"):
        folder = ("--config-dir",) if command in ("table", "report", "list") else ()
        return ["--help", "-q", *FLAGS.get(command, FLAGS["train"] if command in COMPOSING else folder)]
    key, equals, value = word.partition("=")
    if command == "list":
        return [plural(group) for group in LISTED] + ["format="] if not equals else _each(key, value, FORMATS)
    if command == "completion":
        return list(SCRIPTS)
    if command in COMPOSING:
        return _override(command, given, key, bool(equals), value)
    if equals:
        group = "model" if key in ("base", "against") else key
        known = files(group, _config_dirs(given)) if group in (*GROUPS, "table") else {}
        names = list(known) if command in ("compare", "table") else []
        if command == "table" and key in ("run_missing", "publish"):
            names = ["true", "false"]
        return _each(key, value, TEX if (command, key) == ("table", "format") else WORDS.get(key, names))
    if command == "report":
        return ["records=", "out=", "logger="]
    if command == "table":
        return [f"{key}=" for key in (*TABLE, "format", "protocol", "length")]
    if command == "compare":
        return [f"{key}=" for key in ("base", "against", "records", "paths.runs", "plan", "format", *GROUPS)]
    runs = _runs(given, word) if command == "sync" or given[:1] in (["diff"], ["rm"]) else []
    return [*runs, *(("diff", "rm", "status=", "records=") if command == "runs" and not given else ()), "format="]


def _each(key: str, value: str, options: Iterable[str]) -> list[str]:
    """key=a,b,OPTION: what stands before the last comma stays."""
    kept = value[: value.rfind(",") + 1]
    return [f"{key}={kept}{option}" for option in options if option not in kept.split(",")]


def _override(command: str, given: Sequence[str], key: str, equals: bool, value: str) -> list[str]:
    search = _config_dirs(given)
    if not equals:
        more = {"bench": ("table", "rows", "runs"), "train": ("table", "rows")}.get(command, ())
        keys = [*_keys(command, given, search), *more]
        whole = [k for k in keys if "." not in k] if "." not in key else keys
        heads = [f"{k.partition('.')[0]}." for k in keys if "." in k] if "." not in key else []
        return [f"{k}=" for k in whole] + list(dict.fromkeys(heads))
    if key in WORDS or key in CHOICES:
        return _each(key, value, WORDS.get(key) or CHOICES[key])
    if key == "run":
        return [f"run={name}" for name in (*_runs(given, value), "last")]
    if key in LISTED:
        bracket = "[" if value.startswith("[") else ""
        return _each(key, value, [f"{bracket}{name}" if "," not in value else name for name in files(key, search)])
    if isinstance(_keys(command, given, search).get(key), bool):
        return _each(key, value, ("true", "false"))
    return []


def _config_dirs(given: Sequence[str]) -> list[Path]:
    found = [w.partition("=")[2] for w in given if w.startswith("--config-dir=")]
    found += [b for a, b in pairwise(given) if a in ("--config-dir", "-cd")]
    return [Path(folder) for folder in found if Path(folder).is_dir()]


def _keys(command: str, given: Sequence[str], search: Sequence[Path]) -> dict[str, Any]:
    """Every key with its default value, the groups' names among them; a group's keys are those of the file chosen on
    the line, else of all its files."""
    found: dict[str, Any] = {"plan": False}
    primary = _yaml(config_dir() / f"{command}.yaml")
    groups = [g for d in primary.get("defaults", ()) if isinstance(d, dict) for g in d]
    if "train" in primary.get("defaults", ()):
        found |= _keys("train", given, search)
    found |= {k: v for k, v in flat(primary).items() if k.partition(".")[0] not in ("defaults", "hydra")}
    chosen = dict(w.split("=", 1) for w in given if "=" in w)
    for group in (g for g in groups if g in GROUPS):
        found[group] = None
        paths = files(group, search)
        for content in map(_yaml, [paths[chosen[group]]] if chosen.get(group) in paths else paths.values()):
            if "_target_" in content:
                found |= {f"{group}.{k}": v for k, v in flat(content).items() if not k.endswith("_target_")}
    return found


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text("utf-8"), loader)
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _runs(given: Sequence[str], word: str) -> list[str]:
    """Names of runs, or ids where the word begins one."""
    folders = [w.partition("=")[2] for w in given if w.startswith(("records=", "paths.runs="))] or ["runs"]
    names = [p.name for folder in folders[0].split(",") if Path(folder).is_dir() for p in sorted(Path(folder).iterdir())
             if p.is_dir() and not p.name.startswith(".")]  # fmt: skip
    ids = [name.rpartition("-")[2] for name in names]
    return [*names, *(id for id in ids if word and id.startswith(word))]
