"""Ctrl-C at the end of a handover: whoever passed `undo` has the raw weights, or else the call has returned."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from sharded_avg import SWA, ShardedAverage
from sharded_avg.exchange import handover


@pytest.mark.own_processes
def test_ctrl_c_when_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is only noted inside of the method, and raised where it can still be undone."""
    model = nn.Linear(3, 5)
    average = ShardedAverage(model, SWA())
    average.update()
    with torch.no_grad():
        model.weight.add_(1)
    raw, undo = model.weight.detach().clone(), average.raw_weights()
    sent = iter([True])  # once: undoing spreads weights, too
    monkeypatch.setattr(handover, "publish_all", lambda _: next(sent, False) and signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            average.copy_to_model(undo=undo)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(model.weight, raw)
    average.copy_to_model(undo=undo)
    assert not torch.equal(model.weight, raw)
