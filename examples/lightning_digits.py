"""Lightning with automatic optimization: the training step returns a loss, Lightning does the rest.

    python examples/lightning_digits.py

Lightning passes its closure (forward and backward) to `optimizer.step`.
"""

from __future__ import annotations

import argparse
import warnings

import lightning
from digits import loaders
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from singd_ext import SINGD

warnings.filterwarnings("ignore", message=".*does not have many workers.*")


class Classifier(lightning.LightningModule):
    """A small convolutional network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        optimizer = SINGD(
            self,
            lr=3e-3,
            lr_cov=0.05,
            damping=0.03,
            weight_decay=0.05,
            T=5,
            structures=("hierarchical:8,8", "hierarchical:8,8"),
            kfac_approx="reduce",
            normalize_lr_cov=True,
            fallback="adamw",
        )
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 epochs")
    args = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    training, test = loaders(batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=2 if args.quick else args.epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, training)
    (result,) = trainer.test(model, test, verbose=False)
    print(f"test accuracy {100 * result['accuracy']:.1f} %")


if __name__ == "__main__":
    main()
