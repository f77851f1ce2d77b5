"""What `sharded-avg doctor` looks at.

finding.py   Finding: one thing that was looked at
packages.py  Python, and what installers put beside it; this and the next two need no torch
op.py        what DeepSpeed compiles
trials.py    code that is tried in a process of its own
engines.py   what torch has: GPUs, engines, process groups
"""
