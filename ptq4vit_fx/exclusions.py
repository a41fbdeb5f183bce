"""Parts of a model that the user wants to leave float: `leaf_modules` and `skip` of `prepare_fx`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.qconfig import QConfigMapping


def module_paths(model: nn.Module, leaf_modules: Sequence[str | type[nn.Module]]) -> tuple[str, ...]:
    """Return the paths of the modules that a type or a path names. Raises PTQError (near names) if it names none."""
    modules = {name: module for name, module in model.named_modules() if name}
    paths: list[str] = []
    for leaf in leaf_modules:
        if isinstance(leaf, str):
            found, known = [leaf] if leaf in modules else [], list(modules)
        else:
            found = [name for name, module in modules.items() if isinstance(module, leaf)]
            known = sorted({type(module).__name__ for module in modules.values()})
        if not found:
            name = leaf if isinstance(leaf, str) else leaf.__name__
            do = f"near names: {near_names(name, known)}"
            raise failure("prepare_fx", "leaf_modules", expected="a module of the model", got=repr(name), do=do)
        paths += found
    return tuple(dict.fromkeys(paths))


def skipping(mapping: QConfigMapping, skip: Sequence[str]) -> QConfigMapping:
    """Return a copy of the mapping that leaves these modules or products float; a name without a match is its error."""
    mapping = copy.copy(mapping)
    mapping.module_names = dict(mapping.module_names) | dict.fromkeys(skip)
    return mapping
