"""Sparse training: layers whose weights exist only where a topology is alive, and methods that
change the topology while the network trains."""

import triton_kernels

if not hasattr(triton_kernels, "sparse_linear"):
    raise ImportError(
        f"the package triton_kernels at {triton_kernels.__path__[0]} is another project's: "
        "pip uninstall triton_kernels, then reinstall sparsegrow"
    )

from dst.attention import SparseAttention
from dst.convert import densify, density_ramp, density_table, model_density, sparsify
from dst.layers import SparseConv2d, SparseLayer, SparseLinear, sparse_layers
from dst.mam import MAMLinear, SparseMAMLinear, mam_layers, set_beta, to_mac, to_mam
from dst.methods import METHODS, DropGrow, Unchanging
from dst.methods.rigl import rigl
from dst.methods.set import sparse_evolutionary_training
from dst.methods.similarity import similarity
from dst.methods.snfs import sparse_momentum
from dst.optimizer_state import resize
from dst.pruning import prune
from dst.ramp import DensityRamp
from dst.schedules import BetaSchedule, LearningRate, UpdateSchedule
from dst.topology import Change, Topology
from dst.updater import TopologyUpdater
from growth import InputError

__all__ = [
    "METHODS",
    "BetaSchedule",
    "Change",
    "DensityRamp",
    "DropGrow",
    "InputError",
    "LearningRate",
    "MAMLinear",
    "SparseAttention",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SparseMAMLinear",
    "Topology",
    "TopologyUpdater",
    "Unchanging",
    "UpdateSchedule",
    "densify",
    "density_ramp",
    "density_table",
    "mam_layers",
    "model_density",
    "prune",
    "resize",
    "rigl",
    "set_beta",
    "similarity",
    "sparse_evolutionary_training",
    "sparse_layers",
    "sparse_momentum",
    "sparsify",
    "to_mac",
    "to_mam",
]
