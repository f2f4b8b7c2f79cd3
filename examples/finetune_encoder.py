"""Fine-tune a pretrained encoder as a KAT with transformers' Trainer: all of it, LoRA and the functions, or only these.

    pip install "grkan[fit]" transformers accelerate peft
    python examples/finetune_encoder.py --model sentence-transformers/all-MiniLM-L6-v2 \
        --train train.tsv --test test.tsv --trainable lora

Each line of the files has a sentence, a tab and a label. `--trainable functions` trains only the coefficients of the
functions and the head, and writes them to `functions.safetensors`, a file of a few kilobytes.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import grkan


def read(path: Path) -> tuple[list[str], list[str]]:
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    for number, line in enumerate(lines, 1):
        if len(line) != 2:
            raise SystemExit(f"{path}: entry {number} has no tab between sentence and label: {line[0]!r}")
    return [text for text, _ in lines], [label for _, label in lines]


def encode(tokenizer, texts: list[str], labels: list[str], classes: list[str]) -> list[dict]:
    return [
        {**tokenizer(text, truncation=True, max_length=128), "labels": classes.index(label)}
        for text, label in zip(texts, labels, strict=True)
    ]


def choose_parameters(model: torch.nn.Module, trainable: str) -> torch.nn.Module:
    """Freeze the parameters that `trainable` excludes; the head is always trained."""
    functions = grkan.no_weight_decay(model)
    if trainable == "functions":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in functions or name.startswith("classifier")
    elif trainable == "lora":
        attention = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        model = get_peft_model(model, attention)
        for name, parameter in model.named_parameters():
            if name in grkan.no_weight_decay(model):
                parameter.requires_grad = True
    return model


def clip_each_group(optimiser: torch.optim.Optimizer, *_: object) -> None:
    """Clip the gradients of the functions separately: in a norm of all gradients they would outweigh the others."""
    for group in optimiser.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name on the hub, or a folder")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--trainable", choices=("all", "lora", "functions"), default="lora")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--lr", type=float, help="default: 5e-5 for all, 1e-3 otherwise")
    parser.add_argument("--function-lr", type=float, default=3e-3, help="learning rate of the functions (3e-3)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_encoder"))
    options = parser.parse_args()

    for option in ("train", "test"):
        if not getattr(options, option).is_file():
            parser.error(f"--{option}: there is no file {getattr(options, option)}")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = read(options.train), read(options.test)
    classes = sorted(set(train[1]))
    if unknown := sorted(set(test[1]) - set(classes)):
        parser.error(f"--test has labels that --train does not have: {', '.join(unknown)}")
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes))

    # The functions are fitted to the inputs that reach them, so calibrate with some of the training text.
    batch = tokenizer(train[0][:64], padding=True, truncation=True, max_length=128, return_tensors="pt")
    report = grkan.convert_(model, calibration=[batch])
    print(f"converted {len(report.layers)} MLPs; the output is off by {report.relative_error:.2%}")

    model = choose_parameters(model, options.trainable)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    print(f"trains {sum(p.numel() for p in trained.values()):,} of {sum(p.numel() for p in model.parameters()):,}")
    arguments = TrainingArguments(
        str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        learning_rate=options.lr or (5e-5 if options.trainable == "all" else 1e-3),
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,  # clip_each_group does it
        save_strategy="no",
        report_to=[],
    )
    groups = grkan.param_groups(model, 0.01, lr=arguments.learning_rate, coefficient_lr=options.function_lr)
    optimiser = torch.optim.AdamW(groups)
    optimiser.register_step_pre_hook(clip_each_group)
    # Activations are large in places, where a step on the coefficient of x^5 would change much more than others do.
    grkan.scale_coefficient_steps(optimiser, model, [batch])
    trainer = Trainer(
        model,
        arguments,
        optimizers=(optimiser, None),
        train_dataset=encode(tokenizer, *train, classes),
        eval_dataset=encode(tokenizer, *test, classes),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")

    if options.trainable == "functions":
        options.output.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in trained.items()},
            options.output / "functions.safetensors",
        )
    else:
        if options.trainable == "lora":
            model = model.merge_and_unload()
        model.save_pretrained(options.output / "model")
        tokenizer.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
