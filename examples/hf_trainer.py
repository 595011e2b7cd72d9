"""Hugging Face Trainer with a small vision transformer; nothing is downloaded.

    python examples/hf_trainer.py

SINGD wants the model where other optimizers want parameters: `optimizer_cls_and_kwargs` hands over
the keyword `model` in place of the Trainer's parameter groups, so that no subclass is needed.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
from digits import digits
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from singd_ext import SINGD


class ImageDicts(Dataset):
    """The digits as the dictionaries that Trainer's collator expects."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


def score(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--initializer-range", type=float, default=0.15, help="about 1/sqrt(width); ViT's is 0.02"
    )
    parser.add_argument("--quick", action="store_true", help="3 epochs")
    args = parser.parse_args()

    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=32,
            num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            initializer_range=args.initializer_range,
        )
    )  # fmt: skip
    options = {
        "lr": 1e-2,
        "lr_cov": 0.05,
        "damping": 0.03,
        "weight_decay": 0.05,
        "T": 1,
        "structures": ("block_diagonal:16", "block_diagonal:16"),
        "normalize_lr_cov": True,
        "fallback": "adamw",
    }
    training, test = map(ImageDicts, digits())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=3 if args.quick else args.epochs,
                per_device_train_batch_size=64,
                per_device_eval_batch_size=360,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=training,
            eval_dataset=test,
            compute_metrics=score,
            optimizer_cls_and_kwargs=(SINGD, {"model": model, **options}),
        )
        trainer.train()
        print(f"test accuracy {100 * trainer.evaluate()['eval_accuracy']:.1f} %")


if __name__ == "__main__":
    main()
