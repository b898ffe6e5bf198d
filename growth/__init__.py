"""Finding new connections for sparse networks by similarity search.

Usable alone, in anybody's training code: needs torch and NumPy, and faiss only where asked for.
"""

from growth.columns import from_unfold_order, to_unfold_order
from growth.connections import Connections, Grid
from growth.errors import InputError, MissingLibraryError
from growth.exact import Exact
from growth.faiss_search import Faiss
from growth.momentum import Momentum
from growth.pairs import (
    ConvPairs,
    JoinedPairs,
    LinearPairs,
    NoVectors,
    Pairs,
    RowPairs,
    StoredGradient,
)
from growth.recorder import Recorder, record
from growth.strategy import METRICS, Observer, Strategy
from growth.uniform import Random

# One line a strategy: it then appears in --help and in the tests that every strategy must pass.
STRATEGIES = {
    "exact": Exact,
    "faiss": Faiss,
    "momentum": Momentum,
    "random": Random,
}

__all__ = [
    "METRICS",
    "STRATEGIES",
    "Connections",
    "ConvPairs",
    "Exact",
    "Faiss",
    "Grid",
    "InputError",
    "JoinedPairs",
    "LinearPairs",
    "MissingLibraryError",
    "Momentum",
    "NoVectors",
    "Observer",
    "Pairs",
    "Random",
    "Recorder",
    "RowPairs",
    "StoredGradient",
    "Strategy",
    "from_unfold_order",
    "record",
    "to_unfold_order",
]
