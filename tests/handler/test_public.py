"""`__all__` is what is public, in every module."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest

import batch_handler

MODULES = [module.name for module in pkgutil.walk_packages(batch_handler.__path__, "batch_handler.")]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_is_public(name):
    module = importlib.import_module(name)
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, type | types.FunctionType) and value.__module__ == name
    }
    assert list(module.__all__) == sorted(module.__all__, key=lambda key: (not key.isupper(), key[0].islower(), key))
    assert defined <= set(module.__all__)
    assert module.__doc__
    assert "Rule:" in module.__doc__ or name == "batch_handler"
