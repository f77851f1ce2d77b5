"""Where the examples run.

strategies  `lightning.pytorch.strategies`; without a GPU, its FSDPStrategy and DeepSpeedStrategy are those of
            `on_cpu.py`, since Lightning's own refuse CPUs, although FSDP and DeepSpeed run there
QUIET       arguments of the Trainer: the table that an example prints says it all
out_folder  where a script writes
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import strategies

if not torch.cuda.is_available():
    from . import on_cpu as strategies

__all__ = ["QUIET", "out_folder", "strategies"]

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory
warnings.filterwarnings("ignore", category=FutureWarning)  # Lightning's, DeepSpeed's and FSDP's, about torch's names
warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")  # how Lightning saves FSDP models


def out_folder(script: str) -> Path:
    """The script's first argument, or else runs/ and its name."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs") / Path(script).stem
