"""A registry of model families: files of a package that register themselves under config.json's `model_type`."""

from __future__ import annotations

import importlib
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
    """Maps model types to loaders; imports the sibling files of its package on first use, so no list is edited."""

    def __init__(self, what: str, package: str, path: Iterable[str]) -> None:
        self._what, self._package, self._path = what, package, path
        self._loaders: dict[str, Loader[Loaded]] = {}
        self._fallback: tuple[Accepts, Loader[Loaded], str] | None = None

    def register(self, *model_types: str) -> Callable[[Loader[Loaded]], Loader[Loaded]]:
        """Decorator for the loader of these model types."""

        def add(loader: Loader[Loaded]) -> Loader[Loaded]:
            self._loaders |= dict.fromkeys(model_types, loader)
            return loader

        return add

    def register_fallback(self, accepts: Accepts, names: str) -> Callable[[Loader[Loaded]], Loader[Loaded]]:
        """Decorator for the loader of every config.json that no family claims and `accepts` takes.

        names: what it takes, in words.
        """

        def add(loader: Loader[Loaded]) -> Loader[Loaded]:
            self._fallback = accepts, loader, names
            return loader

        return add

    def knows(self, model_type: str) -> bool:
        """Whether some file implements this very model type."""
        for module in pkgutil.iter_modules(self._path):
            importlib.import_module(f"{self._package}.{module.name}")
        return model_type in self._loaders

    def loader(self, config: Mapping[str, Any], where: str) -> Loader[Loaded]:
        """The loader for a config.json; UnsupportedModel names what there is instead."""
        model_type = config["model_type"]
        if self.knows(model_type):
            return self._loaders[model_type]
        known = f"known are {', '.join(sorted(self._loaders))}"
        if self._fallback is not None:
            accepts, loader, names = self._fallback
            if accepts(config):
                return loader
            known += f", and {names}"
        raise UnsupportedModel(f"{where}: no {self._what} family for model_type {reprlib.repr(model_type)}; {known}.")

    def load(self, checkpoint: Checkpoint) -> Loaded:
        """The loaded model; a complaint about config.json says which one."""
        loader = self.loader(checkpoint.config, checkpoint.name)
        try:
            return loader(checkpoint)
        except CheckpointError as error:
            if str(error).startswith("config.json:"):
                raise CheckpointError(f"{checkpoint.path}/{error}") from error
            raise
