"""For PyInstaller, which asks installed packages for hooks by the entry point `pyinstaller40`."""

from pathlib import Path


def hook_directories() -> list[str]:
    """Where hook-mlx_mtp.py is."""
    return [str(Path(__file__).parent)]
