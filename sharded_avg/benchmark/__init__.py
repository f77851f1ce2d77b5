"""What an update costs, beside what a user would pick instead: `python -m sharded_avg.benchmark`.

    timing    Contender, Case: calls timed in turns, so that drift of the machine cancels; Timing: medians and ratios
    weights   the models that are averaged
    rivals    what a user would pick instead: torch, ema-pytorch, Lightning, gathering first
    local     cases on one process
    ranks     cases on processes of their own, with a process group: FSDP1, FSDP2, DDP, DeepSpeed
    growth    what each of many small parameters costs, by their number
    report    the table, as text, Markdown or JSON

Nothing here is asserted: a ratio that misses its target is printed with its target.
"""
