"""One file a way of training. Drop/grow methods, and the dense and static networks that they are
compared with, share one."""

from __future__ import annotations

from collections.abc import Callable

from dst.methods import METHODS
from dst.recipes.mam import mam
from dst.recipes.session import Session
from dst.recipes.sparse import sparse
from dst.report import Summary

RECIPES: dict[str, Callable[[Session], Summary]] = {
    **dict.fromkeys(METHODS, sparse),
    "mam": mam,
}
