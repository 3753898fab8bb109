"""Drafter families. Each file registers itself here, and nothing else lists them; another distribution names its
loaders as entry points of the group `mlx_mtp.drafters`.

A family is one function `load(checkpoint) -> Drafter` for some values of config.json's `model_type`.
"""

from __future__ import annotations

from mlx_mtp.checkpoints.registry import Registry
from mlx_mtp.generation.interfaces import Drafter

registry: Registry[Drafter] = Registry("drafter", __name__, __path__, "mlx_mtp.drafters")
# The loaded drafter of a checkpoint; UnsupportedModel where no family knows its model_type.
load_drafter = registry.load
