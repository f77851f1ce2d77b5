"""What only a GPU can show, in one short visit: `python -m tests.gpu` from a checkout, with whatever is installed.

    check.py      Check: one thing that is shown, by a function of a device; Result: how that went
    checks/       the checks, a file for each noun
    reference.py  the model, and averages of clones by plain formulas: nothing of the package
    devices.py    what is asked of a device: to wait, to be busy, to refuse syncs
    engines.py    a model in the hands of an engine
    proof.py      what is proved of every engine
    child.py      a process that runs some checks
    parent.py     starts children, watches the time, and goes on after a crash
    pair.py       starts two ranks that share a device, and a control where they fail
    rank.py       one of them
    report.py     the table

Checks that do not need a GPU run on the CPU too: `--device cpu`, and tests/unit/test_gpu_script.py.
"""
