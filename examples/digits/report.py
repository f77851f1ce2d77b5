"""What the examples print.

Table   a callback: losses and accuracies of raw and averaged weights, after each epoch
verify  whether deployed weights measure what the training measured
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from .network import evaluate

TOLERANCE = 1e-5  # of the loss: ranks add it up in another order than one process. Raw weights are off by far more


@dataclass(frozen=True)
class Row:
    """One validation."""

    epoch: int
    raw_loss: float
    raw_accuracy: float
    loss: float
    accuracy: float


class Table(L.Callback):
    """Collects what `EMAWeightAveraging(evaluate_with="both")` has measured."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        names = ("raw/val_loss", "raw/val_accuracy", "val_loss", "val_accuracy")
        self.rows.append(Row(trainer.current_epoch, *(float(trainer.callback_metrics[name]) for name in names)))

    def best(self) -> Row:
        """What ModelCheckpoint(monitor="val_loss") has kept."""
        return min(self.rows, key=lambda row: row.loss)

    def __str__(self) -> str:
        lines = ["          raw weights           averaged weights", "epoch     loss   accuracy       loss   accuracy"]
        for row in self.rows:
            raw = f"{row.raw_loss:9.4f}{row.raw_accuracy:11.4f}"
            lines.append(f"{row.epoch:5}{raw}{row.loss:11.4f}{row.accuracy:11.4f}")
        return "\n".join(lines)


def verify(model: nn.Module, table: Table) -> None:
    """Print the table and what the deployed model measures; exit with 1 if training measured something else."""
    loss, accuracy = evaluate(model)
    best, last = table.best(), table.rows[-1]
    print(f"\n{table}\n\nthe last averaged loss is {'below' if last.loss < last.raw_loss else 'NOT BELOW'} the raw one")
    print(f"measured in training, epoch {best.epoch}: averaged loss {best.loss:.6f}, accuracy {best.accuracy:.4f}")
    print(f"deployed, one plain process:   averaged loss {loss:.6f}, accuracy {accuracy:.4f}")
    if abs(loss - best.loss) > TOLERANCE or abs(accuracy - best.accuracy) > TOLERANCE:
        sys.exit("NOT THE SAME: other weights were deployed than measured")
    print("the same")
