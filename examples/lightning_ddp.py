"""Learn digits under DDP, keep an average of the weights, half of it on each rank, and deploy the best one.

    python examples/lightning_ddp.py

It takes seconds on two processes, which Lightning starts; torchrun can start them, too.
The examples lightning_*.py differ in one line, the strategy. All that makes the average is one callback: after an
import from sharded_avg instead of Lightning it runs under every strategy.
"""

from __future__ import annotations

import lightning as L
from digits import machine, network, report
from lightning.pytorch.callbacks import ModelCheckpoint

import sharded_avg
from sharded_avg.lightning import EMAWeightAveraging  # it was: from lightning.pytorch.callbacks import ...
from sharded_avg.ranks import leave


def main() -> None:
    """Train, and deploy the average with the lowest validation loss."""
    L.seed_everything(0)
    strategy, devices = "ddp", 2

    average = EMAWeightAveraging(decay=0.98, evaluate_with="both")
    best = ModelCheckpoint(machine.out_folder(__file__), "best", monitor="val_loss")
    callbacks = [average, best, table := report.Table()]
    trainer = L.Trainer(strategy=strategy, devices=devices, max_epochs=8, callbacks=callbacks, **machine.QUIET)
    trainer.fit(network.Digits())

    if trainer.is_global_zero:
        weights = sharded_avg.load_averaged_state_dict(best.best_model_path)
        model = network.Digits()
        model.configure_model()
        model.load_state_dict(weights)
        report.verify(model, table)


if __name__ == "__main__":
    main()
    leave()
