"""Train a decoder of transformers as a KAT, from random weights, on text files.

    pip install "grkan[fit]" transformers tokenizers accelerate
    python examples/language_model.py --text corpus/*.txt --output runs/language_model
    accelerate launch examples/language_model.py --text corpus/*.txt     # on several GPUs

It is a LLaMA or GPT-2 of transformers, except for one line with `grkan.convert_`. On a CPU, try `--width 128
--layers 4 --context 256 --steps 500`.
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import grkan

END = "<|end|>"


class Windows(Dataset):
    """Consecutive pieces of one long sequence of tokens."""

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.rows = tokens[: len(tokens) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it can encode any text, and each token stands for whole bytes."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def make_model(kind: str, vocabulary: int, width: int, layers: int, context: int, groups: int) -> torch.nn.Module:
    heads = max(1, width // 64)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=context, **ends
        )
    else:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            **ends,
        )
    model = AutoModelForCausalLM.from_config(config)
    # Every MLP gets rational functions that learn, and weights that preserve the variance.
    grkan.convert_(model, start="scratch", num_groups=groups)
    return model


@torch.no_grad()
def bits_per_byte(model, batches, bytes_per_token: float, accelerator: Accelerator) -> float:
    model.eval()
    losses = [accelerator.gather(model(input_ids=batch, labels=batch).loss.reshape(1)) for batch in batches]
    model.train()
    return float(torch.cat(losses).mean()) / math.log(2) / bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; the last tenth is held out")
    parser.add_argument("--output", type=Path, default=Path("runs/language_model"))
    parser.add_argument("--kind", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    if options.width % 64 and options.width > 64:
        parser.error(f"--width must be a multiple of 64, the width of a head; got {options.width}")
    if missing := [str(path) for path in options.text if not path.is_file()]:
        parser.error(f"--text: there is no file {', '.join(missing)}")

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    set_seed(options.seed)

    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in options.text)
    cut = len(text) * 9 // 10
    tokenizer = train_tokenizer([text[:cut]], options.vocabulary)
    tokens, held_out = (torch.tensor(tokenizer(part).input_ids) for part in (text[:cut], text[cut:]))
    bytes_per_token = len(text[cut:].encode()) / len(held_out)
    train, validation = (
        DataLoader(Windows(part, options.context), options.batch, shuffle=shuffle, drop_last=shuffle)
        for part, shuffle in ((tokens, True), (held_out, False))
    )

    if not len(train) or not len(validation):
        parser.error(
            f"--text is too short: its {len(tokens):,} tokens, and {len(held_out):,} held out, must fill a batch of "
            f"{options.batch} x {options.context} and a context of {options.context}"
        )

    model = make_model(options.kind, len(tokenizer), options.width, options.layers, options.context, options.groups)
    # Matrices are decayed; biases, norms and the coefficients of the functions are not.
    optimiser = torch.optim.AdamW(grkan.param_groups(model, 0.1), lr=options.lr, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimiser, options.steps // 20, options.steps)
    model, optimiser, train, validation = accelerator.prepare(model, optimiser, train, validation)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens")

    step = 0
    while step < options.steps:
        for batch in train:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            # Clip the functions separately: in a norm of all gradients they would outweigh the weights.
            accelerator.unscale_gradients()
            for group in optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            step += 1
            if step % max(1, options.steps // 10) == 0 or step == options.steps:
                bits = bits_per_byte(model, validation, bytes_per_token, accelerator)
                accelerator.print(f"step {step}: loss {loss.item():.3f}, held out {bits:.3f} bits per byte", flush=True)
            if step == options.steps:
                break

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        # In any program that imports grkan, `from_pretrained` loads the model with its functions.
        model = AutoModelForCausalLM.from_pretrained(options.output)
        tokenizer = AutoTokenizer.from_pretrained(options.output)
        prompt = tokenizer(text[cut : cut + 100], return_tensors="pt").input_ids
        sample = model.generate(prompt, max_length=min(options.context, 128), do_sample=True, temperature=0.8, top_k=50)
        print(tokenizer.decode(sample[0]))


if __name__ == "__main__":
    main()
