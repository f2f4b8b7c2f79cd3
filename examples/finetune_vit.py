"""Fine-tune a pretrained vision transformer of timm as a KAT, in a plain loop built from timm's parts.

    pip install "grkan[fit,models]" torchvision
    python examples/finetune_vit.py --data FOLDER --model vit_tiny_patch16_224.augreg_in21k_ft_in1k

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import grkan


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: DataLoader, device: torch.device) -> float:
    model.eval()
    parts = [(model(images.to(device)).cpu(), labels) for images, labels in batches]
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return float(accuracy(logits, labels)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--random", action="store_true", help="start from random weights instead of pretrained ones")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("kat.safetensors"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    folders = [options.data / split for split in ("train", "val")]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        parser.error(f"--data: there is no folder {', '.join(missing)}")
    classes, tested = (sorted(f.name for f in folder.iterdir() if f.is_dir()) for folder in folders)
    if tested != classes:  # timm numbers the classes of each folder by itself
        parser.error(f"--data: train and val must have the same classes; got {classes} and {tested}")
    model = timm.create_model(
        options.model, pretrained=not options.random, num_classes=len(classes), drop_path_rate=0.1
    )
    config = resolve_model_data_config(model)
    train, test = (
        DataLoader(
            create_dataset("", folder, transform=create_transform(**config, is_training=training)),
            options.batch,
            shuffle=training,
            num_workers=options.workers,
        )
        for folder, training in zip(folders, (True, False), strict=True)
    )

    # The functions are fitted on some images of the task, so the converted model computes the same.
    images, _ = next(iter(train))
    report = grkan.convert_(model, calibration=images)
    print(f"converted {len(report.layers)} MLPs; the output is off by {report.relative_error:.2%}")

    model.to(device)
    # The functions may learn faster than the weights, which are pretrained.
    groups = grkan.param_groups(model, 0.05, lr=options.lr, coefficient_lr=10 * options.lr)
    optimiser = torch.optim.AdamW(groups)
    # Activations are large in places, where a step on the coefficient of x^5 would change much more than others do.
    grkan.scale_coefficient_steps(optimiser, model, images.to(device))
    steps = options.epochs * len(train)
    schedule = CosineLRScheduler(optimiser, steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)
    step = 0
    for epoch in range(options.epochs):
        model.train()
        for images, labels in train:
            schedule.step_update(step)
            loss = cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            # Clip the functions separately: in a norm of all gradients they would outweigh the weights.
            for group in optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimiser.step()
            step += 1
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {evaluate(model, test, device):.2f} %", flush=True)
    grkan.save_model(model, options.output)


if __name__ == "__main__":
    main()
