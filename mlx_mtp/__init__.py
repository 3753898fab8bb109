"""mlx_mtp: language models that decode faster on Apple's MLX through Multi-Token Prediction, output law unchanged.

    import mlx_mtp
    engine = mlx_mtp.load()                       # the embedded pair
    for event in engine.stream("def binary_search("):
        print(event.text, end="")
"""

from mlx_mtp.blas import load_fast_blas

load_fast_blas()  # on Linux it must be there before MLX binds its own

from mlx_mtp.chat import Chat  # noqa: E402
from mlx_mtp.engine import Engine  # noqa: E402
from mlx_mtp.errors import (  # noqa: E402
    CheckpointError,
    DataError,
    DoesNotFit,
    IncompatibleDrafter,
    MLXMTPError,
    ModelNotFound,
    OptionError,
    PromptError,
    UnsupportedModel,
)
from mlx_mtp.loading import load  # noqa: E402
from mlx_mtp.results import Event, Result, Sampling, Stats  # noqa: E402
from mlx_mtp.session import Session  # noqa: E402
from mlx_mtp.version import __version__  # noqa: E402

__all__ = [
    "Chat",
    "CheckpointError",
    "DataError",
    "DoesNotFit",
    "Engine",
    "Event",
    "IncompatibleDrafter",
    "MLXMTPError",
    "ModelNotFound",
    "OptionError",
    "PromptError",
    "Result",
    "Sampling",
    "Session",
    "Stats",
    "UnsupportedModel",
    "__version__",
    "load",
]
