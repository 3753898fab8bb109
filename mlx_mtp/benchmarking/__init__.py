"""What `mlx-mtp bench` does: prompts, arms, the run, statistics, predictions, and what comes out of it.

    prompts.py     the built-in set and files of others
    arms.py        which engines take part, and why one does not
    run.py         the run itself: pieces, acceptance, timed turns
    cost_model.py  what the measured pieces predict; published.py: what other people's pieces predict
    report.py      figures from the runs; markdown.py, plots.py: the same for people
    energy.py      joules, where the machine tells

The arms' fair turns themselves are in mlx_mtp/benchmark.py, which the demo uses too.
"""
