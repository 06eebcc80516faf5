"""Cells, networks, starts, penalties, the implicit layer, the classifier."""

from .cells import Cell, DenseCell, UntiedCell
from .classifier import Classifier, Output
from .inits import FZero, SkipNet, Zero
from .layer import ImplicitLayer, Iterate, LayerOutput
from .mdeq import Mdeq
from .networks import Dense, Network
from .penalties import Correction, InitFit, Jacobian, LocalError, Penalty, Skip, prepare

__all__ = ["Cell", "Classifier", "Correction", "Dense", "DenseCell", "FZero", "ImplicitLayer", "InitFit", "Iterate",
           "Jacobian", "LayerOutput", "LocalError", "Mdeq", "Network", "Output", "Penalty", "Skip", "SkipNet",
           "UntiedCell", "Zero", "prepare"]  # fmt: skip
