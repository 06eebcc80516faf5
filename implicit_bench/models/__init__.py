"""Cells, networks, starts, penalties, the implicit layer, the classifier."""

from .cells import Cell, DenseCell, UntiedCell
from .classifier import Classifier, Output
from .homo import HomoConv, NodeConv
from .inits import Alternating, DataMean, FZero, Shared, SkipNet, Stem, StemZeros, Zero
from .layer import ImplicitLayer, Iterate, LayerOutput
from .mdeq import Mdeq
from .networks import Dense, Network
from .penalties import Correction, InitFit, Jacobian, LocalError, Penalty, Skip, prepare

__all__ = ["Alternating", "Cell", "Classifier", "Correction", "DataMean", "Dense", "DenseCell", "FZero", "HomoConv",
           "ImplicitLayer", "InitFit", "Iterate", "Jacobian", "LayerOutput", "LocalError", "Mdeq", "Network",
           "NodeConv", "Output", "Penalty", "Shared", "Skip", "SkipNet", "Stem", "StemZeros", "UntiedCell", "Zero",
           "prepare"]  # fmt: skip
