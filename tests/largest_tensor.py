"""How large a tensor a piece of code ever makes, whether it keeps it or not."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """``largest``: the most elements of any tensor that PyTorch returned inside the block.

    Expanded tensors count by what they store.
    """

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is not None and not leaf.is_sparse_csr:
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest = max(self.largest, min(leaf.numel(), stored))
        return out
