"""A registry of model families under config.json's `model_type`: files of a package that register themselves, and
entry points of other distributions."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.errors import CheckpointError, UnsupportedModel

Loaded = TypeVar("Loaded")
Loader = Callable[[Checkpoint], Loaded]
Accepts = Callable[[Mapping[str, Any]], bool]


class Registry(Generic[Loaded]):
    """Maps model types to loaders; imports the sibling files of its package on first use, so no list is edited.

    group: of entry points. A model type that no file claims is looked for among their names; one of that name is a
    loader, in whatever distribution is installed.
    """

    def __init__(self, what: str, package: str, path: Iterable[str], group: str) -> None:
        self._what, self._package, self._path, self.group = what, package, path, group
        self._loaders: dict[str, Loader[Loaded]] = {}
        self._imported = False
        self._fallback: tuple[Accepts, Loader[Loaded], str] | None = None

    def register(self, *model_types: str) -> Callable[[Loader[Loaded]], Loader[Loaded]]:
        """Decorator for a loader. Two loaders for one model type are a programming error."""

        def add(loader: Loader[Loaded]) -> Loader[Loaded]:
            for model_type in model_types:
                if model_type in self._loaders:
                    raise ValueError(f"two {self._what} families claim model_type '{model_type}'")
                self._loaders[model_type] = loader
            return loader

        return add

    def register_fallback(self, accepts: Accepts, names: str) -> Callable[[Loader[Loaded]], Loader[Loaded]]:
        """Decorator for the loader of every config.json that no family claims and `accepts` takes.

        names: what it takes, in words. There can be one: a second is a programming error.
        """

        def add(loader: Loader[Loaded]) -> Loader[Loaded]:
            if self._fallback is not None:
                raise ValueError(f"two fallbacks for {self._what} families")
            self._fallback = accepts, loader, names
            return loader

        return add

    def _import_siblings(self) -> None:
        if not self._imported:
            self._imported = True
            for module in pkgutil.iter_modules(self._path):
                importlib.import_module(f"{self._package}.{module.name}")

    @property
    def model_types(self) -> list[str]:
        """All that have a loader of their own, those of plug-ins among them."""
        self._import_siblings()
        return sorted({*self._loaders, *self._plugins().names})

    def knows(self, model_type: str) -> bool:
        """Whether some file or plug-in implements this very model type."""
        self._import_siblings()
        return model_type in self._loaders or model_type in self._plugins().names

    def _plugins(self) -> importlib.metadata.EntryPoints:
        return importlib.metadata.entry_points(group=self.group)

    def _plugged_in(self, model_type: str) -> Loader[Loaded]:
        """The loader of the first plug-in that names this model type; CheckpointError where it cannot be imported."""
        entry = self._plugins()[model_type]
        try:
            loader: Loader[Loaded] = entry.load()
        except (ImportError, AttributeError) as error:
            raise CheckpointError(
                f"The plug-in '{entry.value}' for {self._what}s of model_type '{model_type}' cannot be loaded: "
                f"{error}; install it again, or remove it."
            ) from error
        return self._loaders.setdefault(model_type, loader)

    def loader(self, checkpoint: Checkpoint) -> Loader[Loaded]:
        """The loader for a checkpoint; UnsupportedModel names what there is instead."""
        model_type = checkpoint.config["model_type"]
        if self.knows(model_type):
            return self._loaders.get(model_type) or self._plugged_in(model_type)
        expected = f"expected one of {', '.join(self.model_types)}"
        if self._fallback is not None:
            accepts, loader, names = self._fallback
            if accepts(checkpoint.config):
                return loader
            expected += f", or {names}"
        raise UnsupportedModel(
            f"{checkpoint.path}: no {self._what} family for model_type {reprlib.repr(model_type)}; {expected}."
        )

    def load(self, checkpoint: Checkpoint) -> Loaded:
        """The loaded model; a complaint about config.json says which one."""
        loader = self.loader(checkpoint)
        try:
            return loader(checkpoint)
        except CheckpointError as error:
            if str(error).startswith("config.json:"):
                raise CheckpointError(f"{checkpoint.path}/{error}") from error
            raise
