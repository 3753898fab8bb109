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
from mlx_mtp.errors import CheckpointError, UnsupportedModel, explaining

Loaded = TypeVar("Loaded")
Loader = Callable[[Checkpoint], Loaded]
Accepts = Callable[[Mapping[str, Any]], bool]


class Registry(Generic[Loaded]):
    """Maps model types to loaders; imports the sibling files of its package on first use, so no list is edited.

    group: of entry points, whose names are the model types that other distributions load.
    """

    def __init__(self, what: str, package: str, path: Iterable[str], group: str) -> None:
        self._what, self._package, self._path, self.group = what, package, path, group
        self._loaders: dict[str, Loader[Loaded]] = {}
        # For every config.json that no family claims: whether it takes it, its loader, and what it takes, in words.
        self.fallback: tuple[Accepts, Loader[Loaded], str] | None = None

    def register(self, *model_types: str) -> Callable[[Loader[Loaded]], Loader[Loaded]]:
        """Decorator for a loader. Two loaders for one model type are a programming error."""

        def add(loader: Loader[Loaded]) -> Loader[Loaded]:
            if twice := self._loaders.keys() & set(model_types):
                raise ValueError(f"two {self._what} families claim model_type {', '.join(twice)}")
            self._loaders |= dict.fromkeys(model_types, loader)
            return loader

        return add

    @property
    def model_types(self) -> list[str]:
        """All that have a loader of their own, plug-ins' too."""
        for module in pkgutil.iter_modules(self._path):
            importlib.import_module(f"{self._package}.{module.name}")
        return sorted({*self._loaders, *importlib.metadata.entry_points(group=self.group).names})

    def loader(self, config: Mapping[str, Any], where: str) -> Loader[Loaded]:
        """The loader for a config.json; UnsupportedModel names what there is instead, CheckpointError a plug-in that
        cannot be imported."""
        model_type = config["model_type"]
        if model_type in (known_types := self.model_types):
            if model_type not in self._loaders:
                entry = importlib.metadata.entry_points(group=self.group)[model_type]
                what = f"The plug-in '{entry.value}' for {self._what}s of model_type '{model_type}' cannot be loaded"
                with explaining(what, "install it again, or remove it", ImportError, AttributeError):
                    self._loaders[model_type] = entry.load()
            return self._loaders[model_type]
        known = f"known are {', '.join(known_types)}"
        if self.fallback is not None:
            accepts, loader, names = self.fallback
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
