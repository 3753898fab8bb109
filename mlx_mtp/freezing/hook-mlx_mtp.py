"""Read by PyInstaller where a program imports mlx_mtp: the embedded model, MLX's libraries and kernels, and the models
of mlx-lm, which are imported by name."""

from PyInstaller.utils.hooks import collect_all

datas: list[tuple[str, str]] = []
binaries: list[tuple[str, str]] = []
hiddenimports: list[str] = []
for package in ("mlx", "mlx_lm", "mlx_mtp"):
    files, libraries, modules = collect_all(package)
    datas += files
    binaries += libraries
    hiddenimports += modules
