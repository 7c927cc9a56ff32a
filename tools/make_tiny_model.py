#!/usr/bin/env python3
"""Train a tiny LLaMA on plain text files, so that fast tests have a model that has learnt.

No registry package was found with a causal language model under 100 million parameters. This has
about 0.9 million (4 layers, width 128, a 1024-token byte-level BPE vocabulary) and is written
as a Hugging Face model folder of a few megabytes.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of ids, each document closed by the end token."""
    stream: list[int] = []
    for text in texts:
        for document in text.split("\n\n"):
            ids = tokenizer.backend_tokenizer.encode(document.strip()).ids
            stream += ids + [tokenizer.eos_token_id]
    return torch.tensor(stream)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, length: int, windows: int) -> float:
    model.eval()
    windows = min(windows, len(stream) // length)
    batches = torch.split(stream[: windows * length].view(windows, length), 16)
    loss = sum(model(batch, labels=batch).loss.item() * len(batch) for batch in batches) / windows
    model.train()
    return math.exp(loss)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--valid", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_texts = [path.read_text(encoding="utf-8") for path in args.train]
    valid_texts = [path.read_text(encoding="utf-8") for path in args.valid]
    tokenizer = train_tokenizer(train_texts, vocab_size=1024)
    train, valid = encode(tokenizer, train_texts), encode(tokenizer, valid_texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(train)} training tokens")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.05
    )
    started, offsets = time.time(), torch.arange(args.length)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train) - args.length, (args.batch, 1))
        batch = train[starts + offsets]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == args.steps:
            held_out = perplexity(model, valid, args.length, windows=64)
            print(
                f"step {step} loss {loss.item():.3f} valid perplexity {held_out:.2f}"
                f" {time.time() - started:.0f} s",
                flush=True,
            )
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
