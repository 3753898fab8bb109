"""`python -m mlx_mtp`: the command line `mlx-mtp`."""

from mlx_mtp.cli.app import main

main()
