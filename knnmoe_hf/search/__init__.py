"""
Search for the nearest keys of a layer, on tensors only.

`build_engine` makes the engine that `search_backend` names. A new engine is one file with a `SearchEngine` in it and
one line of `ENGINES`; the file, and the library that it wraps, is imported only when the engine is asked for.

Names are imported when they are first used, so that the options of a search are known without torch.
"""

import importlib

_MODULES = {
    "ENGINES": "engines",
    "Neighbors": "base",
    "SearchEngine": "base",
    "SearchOptions": "options",
    "StoredKeys": "base",
    "build_engine": "engines",
    "engine_class": "engines",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
