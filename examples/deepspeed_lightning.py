"""The twin of deepspeed_text.py under Lightning: DeepSpeed's own JSON in the strategy, and one callback.

    python examples/deepspeed_lightning.py                                                     # two processes
    python examples/deepspeed_lightning.py runs/hpz examples/deepspeed/stage3_hpz.json

The optimizer is the module's, whatever the JSON says. `gradient_accumulation_steps` belongs into the Trainer there
(`accumulate_grad_batches=`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
from digits import machine, network, report
from lightning.pytorch.callbacks import ModelCheckpoint

import sharded_avg
from sharded_avg.lightning import EMAWeightAveraging
from sharded_avg.ranks import leave

CONFIGURATION = Path(__file__).with_name("deepspeed") / "stage2_bf16.json"


def main() -> None:
    """Train in bf16; the average with the lowest loss, as one process loads it, has the loss that was measured."""
    L.seed_everything(0)
    strategy = machine.strategies.DeepSpeedStrategy(config=sys.argv[2] if len(sys.argv) > 2 else str(CONFIGURATION))

    average = EMAWeightAveraging(decay=0.98, evaluate_with="both")
    best = ModelCheckpoint(machine.out_folder(__file__), "best", monitor="val_loss")
    callbacks = [average, best, report.Table()]
    trainer = L.Trainer(
        strategy=strategy, devices=2, precision="bf16-mixed", max_epochs=8, callbacks=callbacks, **machine.QUIET
    )
    trainer.fit(network.Digits())

    if trainer.is_global_zero:
        model = network.Digits()
        model.configure_model()
        model.load_state_dict(sharded_avg.load_averaged_state_dict(best.best_model_path))
        loss, accuracy = network.evaluate(model)
        print(f"measured in bf16: averaged loss {float(best.best_model_score):.4f}")
        print(f"deployed in fp32: averaged loss {loss:.4f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
    leave()
