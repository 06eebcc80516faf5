"""Cells, networks, starts, penalties, the implicit layer, the classifier."""

from .cells import Cell, DenseCell, UntiedCell
from .classifier import Classifier, Output
from .homo import HomoConv, NodeConv
from .inits import Alternating, DataMean, FZero, Shared, SkipNet, Stem, StemZeros, Zero
from .layer import ImplicitLayer, LayerOutput
from .mdeq import Mdeq
from .networks import Dense, Network
from .penalties import InitFit, Penalty, Skip

__all__ = ["Alternating", "Cell", "Classifier", "DataMean", "Dense", "DenseCell", "FZero", "HomoConv", "ImplicitLayer", "InitFit",
           "LayerOutput", "Mdeq", "Network", "NodeConv", "Output", "Penalty", "Shared", "Skip", "SkipNet", "Stem",
           "StemZeros", "UntiedCell", "Zero"]  # fmt: skip
