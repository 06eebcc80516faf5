"""hydra/launcher=ray: the cluster that a sweep goes to, looked over before anything runs there."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, config
from ..schema import UsageError, first_line
from ..terminal import QUIET, progress
from ..words import of_hydra

ANSWER_S = 120.0  # a worker imports torch before it answers, on a node that may be busy
PASSED = (QUIET, "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL")  # and no key
STORE = 78_643_200  # bytes, Ray's least: nothing goes through its store, of which it would take a third of the memory


@contextlib.contextmanager
def connected(overrides: Sequence[str], search: Sequence[str], runs: Path) -> Iterator[list[str]]:
    """Within, this process drives the cluster. Gives the words for Hydra that follow from what the cluster has.
    Raises UsageError where there is none, no node has what a job asks for, or some node is unlike this one."""
    asked = config.launcher(of_hydra(overrides), search)["ray"]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns that this will be its default
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or lines that differ in their numbers alone are left out
    os.environ.setdefault("RAY_COLOR_PREFIX", str(int(sys.stderr.isatty())))
    import ray

    address = asked["init"].get("address") or "local"  # whatever else runs on this machine
    init: dict[str, Any] = {"logging_level": "warning", **asked["init"], "address": address}
    if address == "local":
        init.setdefault("object_store_memory", STORE)
        progress("sweep", "starting Ray on this machine")
    else:
        env = {name: os.environ[name] for name in PASSED if name in os.environ}
        init |= {"runtime_env": {"env_vars": env}} if env and "runtime_env" not in init else {}
        progress("sweep", f"connecting to the Ray cluster at {address}")
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        ray.init(**init)
    except Exception as problem:  # OSError, RuntimeError, ValueError, and more by its client
        where = "Ray does not start here" if address == "local" else f"no Ray cluster at {address} takes this process"
        raise UsageError(f"{where} ({first_line(problem)}); `ray start --head` starts one, at port 6379 of its node, "
                         "with the same Python and ray as here") from None  # fmt: skip
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        words = _needs(asked["remote"], [node["Resources"] for node in nodes], overrides)
        _alike(ray, nodes, runs.absolute(), [str(Path.cwd()), *(str(Path(folder).absolute()) for folder in search)])
        yield words
    finally:
        ray.shutdown()


def _needs(remote: dict[str, Any], nodes: Sequence[dict[str, float]], overrides: Sequence[str]) -> list[str]:
    """What a job takes of a node. Asked for more than any has, Ray would wait for a node that never comes."""
    gpus = remote.get("num_gpus")
    if gpus is None:
        chosen = {value for o in overrides if o.startswith("gpu=") for value in o.partition("=")[2].split(",")}
        some = "cuda" in chosen or any(node.get("GPU") for node in nodes)
        gpus = 1 if some and chosen != {"cpu"} else 0
    need = {"CPU": remote.get("num_cpus") or 1, "GPU": gpus}
    if not any(all(node.get(kind, 0) >= n for kind, n in need.items()) for node in nodes):
        most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        has = " and ".join(f"{most.get(kind, 0):g} {kind}" for kind in need)
        raise UsageError(f"a job asks for {need['CPU']} CPU and {gpus} GPU, and no node of the cluster has both: the "
                         f"largest has {has}; change hydra.launcher.ray.remote.num_cpus, num_gpus or gpu")  # fmt: skip
    return [f"++hydra.launcher.ray.remote.num_gpus={gpus}"]


def look(token: str, folders: Sequence[str]) -> dict[str, Any]:
    """What a node has, and which of the folders it does not see, that of the token first."""
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("torch", "hydra-core", "numpy")}
    unseen = [] if Path(token).is_file() else [str(Path(token).parent)]
    return {"unseen": [*unseen, *(folder for folder in folders if not Path(folder).is_dir())],
            "versions": {"implicit-bench": __version__, "Python": platform.python_version(), **libraries}}  # fmt: skip


def _alike(ray: Any, nodes: Sequence[dict[str, Any]], runs: Path, folders: Sequence[str]) -> None:
    """Every node has what this one has, and sees the folder of the runs and what else a job reads."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = runs / f".seen-{secrets.token_hex(8)}"
    token.touch()
    try:
        here = look(str(token), ())["versions"]
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        asked = [(node["NodeManagerAddress"], task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(token), folders))
            for node in nodes]  # fmt: skip
        for node, answer in asked:
            try:
                found = ray.get(answer, timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:
                raise UsageError(f"the node {node} has not answered for {ANSWER_S:.0f} s; is it overloaded, or gone? "
                                 "`ray status` says") from None  # fmt: skip
            except Exception as problem:  # whatever its import there raised
                cause = str(problem).strip().splitlines()[-1]
                raise UsageError(f"the node {node} cannot run implicit-bench ({cause}); install implicit-bench "
                                 f"{__version__} there, for the Python that its Ray runs") from None  # fmt: skip
            for name, version in here.items():
                if found["versions"][name] != version:
                    raise UsageError(f"the node {node} has {name} {found['versions'][name]} and this one {version}; "
                                     "install the same on all")  # fmt: skip
            for folder in found["unseen"]:
                raise UsageError(f"the node {node} does not see {folder}; give the command, and paths.runs, where all "
                                 "nodes see it")  # fmt: skip
    finally:
        token.unlink(missing_ok=True)
