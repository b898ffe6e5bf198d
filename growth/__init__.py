"""Finding new connections for sparse networks by similarity search.

Usable alone, in anybody's training code: needs torch and NumPy; faiss, nmslib and numba only where
asked for.
"""

from growth.auto import Auto
from growth.average import Averaged
from growth.block_search import Blocks
from growth.columns import from_unfold_order, to_unfold_order
from growth.connections import Connections, Grid
from growth.conv_pairs import ConvPairs
from growth.dense import Dense
from growth.errors import InputError, MissingLibraryError
from growth.evaluate import Quality, evaluate
from growth.exact import Exact
from growth.faiss_search import Faiss
from growth.gse import Gse
from growth.lowrank import LowRank
from growth.momentum import Momentum
from growth.nmslib_search import Nmslib
from growth.pairs import (
    JoinedPairs,
    LinearPairs,
    NoVectors,
    Pairs,
    RowPairs,
    StoredGradient,
)
from growth.pool import Pooled
from growth.recorder import Recorder, record
from growth.strategy import METRICS, Observer, Strategy
from growth.subblock import Subblock
from growth.uniform import Random

# One line a strategy: it then appears in --help and in the tests that every strategy must pass.
STRATEGIES = {
    "auto": Auto,
    "averaged": Averaged,
    "blocks": Blocks,
    "dense": Dense,
    "exact": Exact,
    "faiss": Faiss,
    "gse": Gse,
    "lowrank": LowRank,
    "momentum": Momentum,
    "nmslib": Nmslib,
    "pool": Pooled,
    "random": Random,
    "subblock": Subblock,
}

__all__ = [
    "METRICS",
    "STRATEGIES",
    "Auto",
    "Averaged",
    "Blocks",
    "Connections",
    "ConvPairs",
    "Dense",
    "Exact",
    "Faiss",
    "Grid",
    "Gse",
    "InputError",
    "JoinedPairs",
    "LinearPairs",
    "LowRank",
    "MissingLibraryError",
    "Momentum",
    "Nmslib",
    "NoVectors",
    "Observer",
    "Pairs",
    "Pooled",
    "Quality",
    "Random",
    "Recorder",
    "RowPairs",
    "StoredGradient",
    "Strategy",
    "Subblock",
    "evaluate",
    "from_unfold_order",
    "record",
    "to_unfold_order",
]
