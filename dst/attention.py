"""Multi-head attention whose projections are layers of their own, so that they can be sparse.

``nn.MultiheadAttention`` keeps its in-projection as a bare parameter and never calls its
out-projection as a module: neither could be replaced, recorded or counted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import skip_init

from dst.layers import SparseLinear
from growth import InputError

# Names of the layer that makes queries, keys and values of all heads at once: here, and in timm.
JOINT_PROJECTIONS = ("in_proj", "qkv")


class SparseAttention(nn.Module):
    """``nn.MultiheadAttention`` over ``in_proj`` (E -> 3E) and ``out_proj`` (E -> E).

    Each is a :class:`SparseLinear` or, kept dense, an ``nn.Linear``. The rows of in_proj are the
    queries of every head, then the keys, then the values. Input, output and errors in use are those
    of ``nn.MultiheadAttention``, without its kdim, vdim, bias_k, bias_v and add_zero_attn.

    Where query, key and value are not one tensor, in_proj runs on each of them and most of what it
    gives is left aside: with cross-attention this costs more than the dense module does.
    """

    # nn.TransformerEncoderLayer reads these two, and then leaves its fused inference path, which
    # would take the weights of the projections by itself.
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        in_proj: nn.Linear | SparseLinear,
        out_proj: nn.Linear | SparseLinear,
        num_heads: int,
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        """dropout: of attention weights. Raises InputError where sizes do not belong together."""
        super().__init__()
        self.embed_dim = in_proj.in_features
        if (in_proj.out_features, out_proj.in_features) != (3 * self.embed_dim, self.embed_dim):
            raise InputError(
                f"in_proj and out_proj must be {self.embed_dim} -> {3 * self.embed_dim} and "
                f"{self.embed_dim} -> {self.embed_dim}, not to {in_proj.out_features} and from "
                f"{out_proj.in_features}"
            )
        if num_heads < 1 or self.embed_dim % num_heads:
            raise InputError(f"num_heads {num_heads} must divide the width {self.embed_dim}")
        self.in_proj, self.out_proj = in_proj, out_proj
        self.num_heads, self.head_dim = num_heads, self.embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query: (L, E), (L, N, E), or (N, L, E) with batch_first; key, value: the same with S.

        key_padding_mask: (N, S) or (S,); attn_mask: (L, S) or (N * num_heads, L, S); True, or minus
        infinity, keeps away. is_causal says that attn_mask is causal. Returns the output, shaped
        like query, and the weights (N, L, S), or (N, num_heads, L, S) without the average, or None.
        Raises InputError where the shapes do not belong together.
        """
        self._check(query, key, value, attn_mask, is_causal)
        q, k, v = (self._heads(x) for x in self._projections(query, key, value))
        mask = None
        # Alone, the hint lets the product choose a kernel that never looks at a mask.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if not is_causal:
            mask = _merged_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights[0]
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        joined = heads.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            joined = joined[0]
        elif not self.batch_first:
            joined = joined.transpose(0, 1)
        return self.out_proj(joined), weights

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.in_proj(query).chunk(3, -1)
        if key is not query:
            _, k, v = self.in_proj(key).chunk(3, -1)
        if value is not key:
            _, _, v = self.in_proj(value).chunk(3, -1)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """A projection -> (N, num_heads, length, head_dim)."""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        batch = 0 if self.batch_first else 1
        if (
            query.dim() not in (2, 3)
            or key.dim() != query.dim()
            or key.shape != value.shape
            or not query.shape[-1] == key.shape[-1] == self.embed_dim
            or (query.dim() == 3 and query.shape[batch] != key.shape[batch])
        ):
            raise InputError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)} and value "
                f"{tuple(value.shape)} must be (length, {self.embed_dim}) or have a batch "
                f"dimension {'first' if self.batch_first else 'second'}, key and value alike"
            )
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask: pass the causal mask as well")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as one that is added to the scores (N, num_heads, L, S), or broadcast to them."""
    (batch, heads, length, _), sources = q.shape, k.shape[2]
    merged = None
    if attn_mask is not None:
        if tuple(attn_mask.shape) not in ((length, sources), (batch * heads, length, sources)):
            raise InputError(
                f"attn_mask {tuple(attn_mask.shape)} must be {(length, sources)} or "
                f"{(batch * heads, length, sources)}"
            )
        merged = _additive(attn_mask, q.dtype)
        if attn_mask.dim() == 3:
            merged = merged.view(batch, heads, length, sources)
    if key_padding_mask is not None:
        shape = tuple(key_padding_mask.shape)
        if shape != (batch, sources) and (batch > 1 or shape != (sources,)):
            raise InputError(
                f"key_padding_mask {shape} must be {(batch, sources)}, or {(sources,)} without a "
                "batch"
            )
        padding = _additive(key_padding_mask, q.dtype).view(batch, 1, 1, sources)
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, True where nothing may be seen -> one to add."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise InputError(f"a mask must be boolean or floating point, not {mask.dtype}")
    return mask.to(dtype)


def dense_projections(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The weights of a dense attention that no layer inside of it holds: in_proj (3E, E), or
    q_proj, k_proj and v_proj where keys or values have a width of their own."""
    if attention._qkv_same_embed_dim:
        return {"in_proj": attention.in_proj_weight}
    names = ("q_proj", "k_proj", "v_proj")
    return {name: getattr(attention, f"{name}_weight") for name in names}


def can_open(attention: nn.MultiheadAttention) -> bool:
    """Whether :func:`open_attention` takes it: one width for queries, keys and values, no bias_k,
    bias_v or add_zero_attn, and weights that are not computed from other parameters."""
    return (
        isinstance(attention.in_proj_weight, nn.Parameter)
        and type(attention.out_proj) is NonDynamicallyQuantizableLinear
        and isinstance(attention.out_proj.weight, nn.Parameter)
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def open_attention(attention: nn.MultiheadAttention) -> SparseAttention:
    """The same attention, with the same parameters, over two ``nn.Linear``."""
    bias = attention.in_proj_bias is not None
    in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, bias, device="meta")
    in_proj.weight, in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
    out_proj = nn.Linear(attention.embed_dim, attention.embed_dim, bias, device="meta")
    out_proj.weight, out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
    return SparseAttention(
        in_proj,
        out_proj,
        attention.num_heads,
        dropout=attention.dropout,
        batch_first=attention.batch_first,
    )


def close_attention(attention: SparseAttention) -> nn.MultiheadAttention:
    """What :func:`open_attention` undoes; both projections must be ``nn.Linear``."""
    in_proj, out_proj = attention.in_proj, attention.out_proj
    assert isinstance(in_proj, nn.Linear) and isinstance(out_proj, nn.Linear)
    closed = skip_init(
        nn.MultiheadAttention,
        attention.embed_dim,
        attention.num_heads,
        attention.dropout,
        in_proj.bias is not None,
        batch_first=attention.batch_first,
        device=in_proj.weight.device,
        dtype=in_proj.weight.dtype,
    )
    closed.in_proj_weight, closed.in_proj_bias = in_proj.weight, in_proj.bias
    closed.out_proj.weight, closed.out_proj.bias = out_proj.weight, out_proj.bias
    return closed


def head_groups(name: str, parent: nn.Module, layer: nn.Module) -> int:
    """Groups of rows of ``layer``, called ``name`` inside ``parent``: where it makes the queries,
    keys and values of all of the parent's heads, 3 * num_heads; else 1."""
    heads = getattr(parent, "num_heads", None)
    if name not in JOINT_PROJECTIONS or not isinstance(layer, nn.Linear):
        return 1
    if not isinstance(heads, int) or heads < 1 or layer.in_features % heads:
        return 1
    return 3 * heads if layer.out_features == 3 * layer.in_features else 1
