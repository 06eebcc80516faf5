"""Make ``import torchvision`` work where the wheel was built for CUDA and torch was not."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

_library: Any = None  # torch forgets the operators when this object dies


def ensure_torchvision() -> bool:
    """Call before any import of torchvision; False if it is not installed. Does nothing where none is needed.

    Package registries serve only CUDA builds for Linux. Beside a CPU torch their compiled part does not load, and
    ``import torchvision`` then fails on the missing operator ``nms``: declaring it is enough. Data sets, transforms
    and models work so; ``ops.nms`` itself and ``torchvision.io`` do not.
    """
    global _library
    if "torchvision" in sys.modules:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    import torch

    library: Any = torch.library  # it has no type hints
    version = Path(spec.submodule_search_locations[0], "version.py").read_text()
    cuda_wheel = re.search(r"\+(cu|rocm)\d", version)
    if cuda_wheel and _library is None and not (torch.version.cuda or torch.version.hip):
        _library = library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
