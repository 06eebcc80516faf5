"""Data sets as tensors on the device: ``ImageData(...).load(root, device)``; fetching and checking their files."""

from .files import KNOWN, describe, verify
from .images import Data, ImageData, Split
from .readers import DataCorrupt, DataError, DataMissing
from .sources import fetch
from .torchvision_shim import ensure_torchvision

__all__ = [
    "KNOWN",
    "Data",
    "DataCorrupt",
    "DataError",
    "DataMissing",
    "ImageData",
    "Split",
    "describe",
    "ensure_torchvision",
    "fetch",
    "verify",
]
