"""Adds `enable_visionfuse` and `disable_visionfuse` to diffusers' pipeline classes.

If diffusers is imported already, at once; otherwise when the module that defines a class has been
executed, through a finder on `sys.meta_path` that knows two module names and leaves when both came.
diffusers itself is never imported from here.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder

CLASSES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def enable_visionfuse(self, recipe="auto", *, impl: str = "auto", **options) -> None:
    """Run this pipeline by a recipe, with compile=, linear= and fuse= beyond its attention; see
    `visionfuse.enable_visionfuse`."""
    from .patching import enable_visionfuse

    enable_visionfuse(self, recipe, impl=impl, **options)


def disable_visionfuse(self) -> None:
    """Undo `enable_visionfuse`; this pipeline is exactly as before."""
    from .patching import disable_visionfuse

    disable_visionfuse(self)


def install() -> None:
    """Add the methods now, or as soon as diffusers is imported. Idempotent."""
    waiting = [name for name in CLASSES if not _add_methods(sys.modules.get(name), name)]
    if waiting and not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(waiting))


def _add_methods(module, name: str) -> bool:
    cls = getattr(module, CLASSES[name], None)
    if cls is None:
        return False
    cls.enable_visionfuse, cls.disable_visionfuse = enable_visionfuse, disable_visionfuse
    return True


class AfterImport(MetaPathFinder):
    """Finds nothing itself: asks the other finders for the modules it waits for and wraps their loader."""

    def __init__(self, waiting: list[str]):
        self.waiting = waiting

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)  # so that the question below does not come back here
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAddMethods(spec.loader)
        return spec


class _ThenAddMethods(Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _add_methods(module, module.__name__)
