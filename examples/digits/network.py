"""scikit-learn's digits, 8 by 8 pixels, and a network that reads them.

Digits    the LightningModule: layers, losses, optimizer, data
Block     a layer of it, which FSDP shards by itself
evaluate  loss and accuracy of a plain module on the validation images, without Lightning
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_VALIDATION = 360  # of 1797 images; a multiple of 2, 3 and 4: ranks have equally many, and none is counted twice
LEARNING_RATE = 3e-3  # constant: with a decaying one there would be less noise to average out
WIDTH, NUM_BLOCKS = 64, 3


class Block(nn.Module):
    """What is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Digits(L.LightningModule):
    """Layers are made in `configure_model`, as large models' are: the strategy says where they come to be."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.layers is not None:
            return
        self.layers = nn.Sequential(
            nn.Linear(64, WIDTH), *(Block() for _ in range(NUM_BLOCKS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        )
        if self.device_mesh is not None:  # ModelParallelStrategy leaves the cutting to the module
            shard(self.layers, self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return nn.functional.cross_entropy(self(images), digits)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        scores = self(images)
        self.log("val_loss", nn.functional.cross_entropy(scores, digits), sync_dist=True)
        self.log("val_accuracy", accuracy(scores, digits), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)

    def train_dataloader(self) -> Any:
        return DataLoader(images_of("train"), batch_size=32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(images_of("validation"), batch_size=NUM_VALIDATION)


def shard(layers: nn.Sequential, mesh: Any) -> None:
    """FSDP2: each block by itself, and what is left."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        if isinstance(layer, Block):
            fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)


def images_of(part: str) -> TensorDataset:
    """The images for training, or those for validation, always the same ones."""
    images, digits = load_digits(return_X_y=True)
    train_x, val_x, train_y, val_y = train_test_split(
        images / 16, digits, test_size=NUM_VALIDATION, random_state=0, stratify=digits
    )
    x, y = (train_x, train_y) if part == "train" else (val_x, val_y)
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def accuracy(scores: Tensor, digits: Tensor) -> Tensor:
    """The share of images that are read right."""
    return (scores.argmax(dim=1) == digits).float().mean()


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the validation images, all on this process."""
    images, digits = images_of("validation").tensors
    scores = model.eval()(images)
    return float(nn.functional.cross_entropy(scores, digits)), float(accuracy(scores, digits))
