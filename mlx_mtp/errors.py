"""Every error mlx_mtp raises on purpose; the command line prints one as one sentence and exits with code 2.

A message says what was expected, what was found and what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class MLXMTPError(Exception):
    """Base of all errors that are the input's fault, not a bug's. One line of text, whatever a path or a name holds."""

    def __str__(self) -> str:
        line = " ".join(super().__str__().split())
        return "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)


class ModelNotFound(MLXMTPError):
    """No such path, and no such name on the hub."""


class CheckpointError(MLXMTPError):
    """A checkpoint's files are missing, cut short, or do not fit their config.json."""


class UnsupportedModel(MLXMTPError):
    """A model_type or an option of a config.json that no file here implements."""


class IncompatibleDrafter(MLXMTPError):
    """Target and drafter do not fit together; the message names both sides."""


class PromptError(MLXMTPError):
    """A prompt that is empty, too long, or has token ids outside the vocabulary."""


class OptionError(MLXMTPError):
    """An option with a value outside its range."""


class DoesNotFit(MLXMTPError):
    """A model larger than this machine's memory or free disk; the message names one that fits."""


class DataError(MLXMTPError):
    """A training file that cannot be used; the message names the file and the line."""


def lacking(what: str, package: object, extra: str) -> str:
    """One sentence: what needs a package that is not installed, and the extra of this project that brings it.

    The project's name is on no package index, so that its extras are installed from the checkout.
    """
    return (f"{what} needs the package '{package}', which is not installed; in the folder of the checkout, run: "
            f"pip install '.[{extra}]'.")  # fmt: skip


def without_device(error: ImportError) -> MLXMTPError:
    """What to do where MLX has no library: on Linux the wheel mlx is only the Python front. Raises any other error."""
    if "libmlx" not in str(error):
        raise error
    return MLXMTPError(lacking("MLX on Linux", "mlx-cpu", "cpu"))


@contextmanager
def explaining(
    what: str, advice: str, *kinds: type[BaseException], raised: type[MLXMTPError] = CheckpointError
) -> Iterator[None]:
    """Errors of these kinds in the block, another project's or the system's, come out as one sentence of ours."""
    try:
        yield
    except MLXMTPError:
        raise
    except kinds as error:
        raise raised(f"{what} ({brief(error)}); {advice}.") from error


def brief(error: BaseException) -> str:
    """Another project's error as a part of one sentence."""
    text = " ".join(str(error).split()).rstrip(".;")
    if missing := re.search(r"__init__\(\) missing .*?arguments?: (.*)", text):
        text = f"config.json lacks {missing[1]}"
    elif isinstance(error, (KeyError, IndexError, AttributeError, AssertionError)) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 200 else text[:196] + " ..."


def plural(count: int, what: str) -> str:
    """'1 draft', '2 drafts'."""
    return f"{count} {what}{'s' * (count != 1)}"
