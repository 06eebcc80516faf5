"""Data sets as tensors on the device, or streamed to it: ``ImageData(...).load(root, device)``; ``Dataset`` to derive
your own from; fetching and checking files."""

from .files import KNOWN, describe, verify
from .folder import ImageFolder
from .images import Data, Dataset, ImageData, Split
from .readers import DataCorrupt, DataError, DataMissing, Raw
from .sources import fetch
from .tiny_imagenet import TinyImageNet
from .torchvision_shim import ensure_torchvision

__all__ = [
    "KNOWN",
    "Data",
    "DataCorrupt",
    "DataError",
    "DataMissing",
    "Dataset",
    "ImageData",
    "ImageFolder",
    "Raw",
    "Split",
    "TinyImageNet",
    "describe",
    "ensure_torchvision",
    "fetch",
    "verify",
]
