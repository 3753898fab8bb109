"""What `mlx-mtp bench` does: prompts, configurations, the run, statistics, and what comes out of it.

    prompts.py     the built-in set and files of others
    arms.py        which engines take part, and why one does not
    run.py         the run itself: acceptance, timed turns
    report.py      figures from the runs; summary.py, plots.py: the same for people
    energy.py      joules, where the machine tells

The fair turns themselves are in mlx_mtp/benchmark.py, which the demo uses too.
"""
