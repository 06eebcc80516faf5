"""`implicit-bench list`: what can be chosen. Imports no Hydra, and torch only to count parameters (list networks)."""

from __future__ import annotations

from typing import Any

from . import terminal
from .config import alone
from .report import tables
from .schema import LISTED, UsageError, files, locate, nearest, plural
from .words import Words

PAPERS = (  # network, data set, what is chosen beside them
    ("dense", "mnist", {}), ("mdeq_mnist", "mnist", {}), ("mdeq_small", "cifar10", {}), ("mdeq_large", "cifar10", {}),
    ("mdeq_imagenet", "imagenet", {}), *(("homo_conv", data, {}) for data in (
        "cifar10", "cifar100", "tiny_imagenet", "svhn", "mnist")),
    *(("node_conv", data, {"inject": inject}) for data in ("cifar10", "mnist") for inject in ("start", "state")),
)  # fmt: skip


def listing(words: Words) -> int:
    """Every file of the groups that are named, or of all, with the first line that it says of itself."""
    if words.flags or words.multirun or words.plan:
        raise UsageError("list takes no flag but --config-dir")
    names = {name: group for group in LISTED for name in (plural(group), group)}
    for a in words.overrides:
        if a not in names:
            options = [plural(group) for group in LISTED]
            raise UsageError(f"nothing called {a!r} to list{nearest(a, options, len(options))}")
    wanted = [names[a] for a in words.overrides] or LISTED
    rows = []
    for group in wanted:
        for name, path in files(group, words.search).items():
            comments = [line[1:].strip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
            rows.append((group, name, next((c for c in comments if not c.startswith("@")), "")))
    counted = counts() if wanted == ["network"] else []
    if terminal.format != "text":
        tables.show(*(COUNTED, counted) if counted else (["group", "name", "about"], rows))
        return 0
    for group in wanted:
        if len(wanted) > 1:
            print(f"{group}=")
        width = max([19, *(len(name) for g, name, _ in rows if g == group)])
        print(*(terminal.hanging(f"  {name:<{width}} ", about) for g, name, about in rows if g == group), sep="\n")
    if counted:
        print()
        tables.show(COUNTED, counted, spare=["state"])
    return 0


COUNTED = ["network", "data set", "parameters", "with skip net", "state", "FLOP of one f"]


def counts() -> list[list[Any]]:
    """Parameters, numbers of state a sample and floating-point operations of one call of f on one image (2 a
    multiply-add), of each network on its paper's data set: counted on modules of the meta device, where nothing is
    computed."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def made(group: str, name: str, **given: Any) -> Any:
        node = alone(files(group)[name]) | given
        return locate(node.pop("_target_"), group)(**node)

    rows = []
    for name, dataset, chosen in PAPERS:
        data = made("dataset", dataset)
        with torch.device("meta"), torch.no_grad():
            network = made("network", name, shape=data.shape, classes=data.classes, **chosen).eval()
            modules = [network, *([network.predictor()] if hasattr(network, "predictor") else [])]
            parts = [sum(p.numel() for p in part.parameters()) for part in modules]
            ctx = network.cell.begin(network.stem(torch.empty(1, *data.shape)))
            with FlopCounterMode(display=False) as counter:
                network.cell(torch.empty(1, network.cell.size), ctx, torch.empty(1))
        label = " ".join([name, *(f"{key}={value}" for key, value in chosen.items())])
        with_skip = sum(parts) if len(parts) > 1 else None
        rows.append([label, dataset, parts[0], with_skip, network.cell.size, counter.get_total_flops()])
    return rows
