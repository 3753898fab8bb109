"""The one check of numbers that a user chooses."""

from __future__ import annotations

from mlx_mtp.errors import OptionError


def check_ranges(options: object, **ranges: tuple[float, float]) -> None:
    """OptionError for the first of these fields that is not from least to most, both included; None passes."""
    for name, (least, most) in ranges.items():
        value = vars(options)[name]
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
            raise OptionError(f"{name} must be {limit}, not {value}.")
