"""Putting modules in the place of others, and naming layers by patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from growth import InputError


def matching(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """Names that are given, match a pattern such as ``layer1.*``, or are the ``first`` or ``last``.

    Raises InputError for a pattern that matches nothing; what: how the error names it.
    """
    kept: set[str] = set()
    for pattern in patterns:
        word = {"first": names[:1], "last": names[-1:]}.get(pattern)
        found = word if word is not None else [n for n in names if fnmatchcase(n, pattern)]
        if not found:
            raise InputError(f"{what} {pattern!r} matches none of {', '.join(names)}")
        kept.update(found)
    return kept


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """The mode, and hooks that the user put on the module."""
    new.train(old.training)
    for hooks in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
    ):
        # The dict itself, not a copy: the user's handle removes the hook from it.
        setattr(new, hooks, getattr(old, hooks))


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put every replacement wherever its module stands, shared modules in all their places."""
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused inference path reads the weight of its layers itself.
                    parent.activation_relu_or_gelu = 0
    unlike = {module for module in replacements.values() if type(module) is not nn.Linear}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and unlike & set(module.modules()):
            module.use_nested_tensor = False
    return model
