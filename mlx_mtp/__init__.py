"""mlx_mtp: language models that decode faster through Multi-Token Prediction, on Apple's MLX, distribution unchanged.

    import mlx_mtp
    engine = mlx_mtp.load()                       # the embedded pair
    for event in engine.stream("def binary_search("):
        print(event.text, end="")

A public name brings its module with it when it is first used: importing the package alone imports no MLX, which keeps
`mlx-mtp --help` quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_mtp.backend.blas import load_fast_blas

load_fast_blas()  # on Linux it must be there before MLX binds its own

from mlx_mtp.errors import without_device  # noqa: E402
from mlx_mtp.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from mlx_mtp.chat.conversation import Chat
    from mlx_mtp.engine import Engine
    from mlx_mtp.errors import CheckpointError, DataError, DoesNotFit, IncompatibleDrafter, MLXMTPError, ModelNotFound
    from mlx_mtp.errors import OptionError, PromptError, UnsupportedModel
    from mlx_mtp.loading import load
    from mlx_mtp.generation.types import Event, Result, Sampling, Stats
    from mlx_mtp.generation.prefix import Session

__all__ = [
    "Chat", "CheckpointError", "DataError", "DoesNotFit", "Engine", "Event", "IncompatibleDrafter", "MLXMTPError",
    "ModelNotFound", "OptionError", "PromptError", "Result", "Sampling", "Session", "Stats", "UnsupportedModel",
    "__version__", "load",
]  # fmt: skip
# Where a public name is, but for those in errors.py.
_MODULES = {"Chat": "chat.conversation", "Engine": "engine", "load": "loading", "Session": "generation.prefix"}
_MODULES |= dict.fromkeys(("Event", "Result", "Sampling", "Stats"), "generation.types")


def __getattr__(name: str) -> Any:
    """A public name at its first use; afterwards it is an ordinary attribute."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    except ImportError as error:
        raise without_device(error) from error
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
