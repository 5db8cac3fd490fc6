"""Trains the tiny OLMoE of this folder on the source code of Python's standard library.

    python tiny/train.py                  the recipe of the published weights
    python tiny/train.py --minutes 30     as much as fits into half an hour

Writes config.json, tokenizer.json, heldout.txt, validation.txt, log.txt, and, after every evaluation that is the best
so far, model.safetensors; Ctrl-C keeps that one. About 6000 tokens a second on two cores; a GPU is used if found.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as olmoe

config = olmoe.Config(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=512,  # also the length of the training sequences
    eos_token_id=[0],
)
batch_size = 8  # sequences per step
learning_rate = 3e-3  # at its peak
final_rate = 0.05  # what the cosine leaves of it at the end
warmup_steps = 100
weight_decay = 0.1  # of matrices; norms have none
balance_weight = 0.01  # of the load-balancing loss, as in OLMoE
z_weight = 0.001  # of the router z-loss, as in OLMoE
seed = 0

# Never trained on, and neither are their tests: modules that stand alone, of varied style. 230 kB to test on, and 40 kB
# to choose the routing temperatures on.
HELD_OUT = """calendar cmd colorsys configparser fnmatch fractions graphlib heapq netrc queue quopri sched shlex
textwrap""".split()
VALIDATION = "csv getopt glob zipapp".split()
# Tables more than code, most of them generated: they cost many tokens and teach nothing about Python.
SKIPPED = """encodings/ pydoc_data/ html/entities.py stringprep.py this.py re/_casefix.py curses/ascii.py _sysconfigdata
config- lib2to3/tests/data/ test/re_tests.py test/test_int_literal.py test/test_strtod.py test/test_lzma.py
test/test_sunau.py test/test_wave.py test/test_aifc.py test/test_gettext.py test/test_plistlib.py test/test_uuid.py
test/test_codecencodings test/encoded_modules/""".split()


def read_sources() -> tuple[list[str], str, str]:
    """The texts to train on, in a fixed order; the text held out; the one for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, validation = {}, {}, {}  # keyed by content, which drops duplicates
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "-packages/" in name or name.startswith(tuple(SKIPPED)):
            continue
        try:
            text = path.read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a few tests are about such files
        if name.removesuffix(".py") in HELD_OUT:
            held_out[text] = name
        elif name.removesuffix(".py") in VALIDATION:
            validation[text] = name
        elif path.stem.removeprefix("test_") not in HELD_OUT + VALIDATION and text.strip():
            train[text] = name
    return list(train), "\n".join(held_out), "\n".join(validation)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<|endoftext|>"],  # first, hence id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sequences(documents: list[torch.Tensor]) -> torch.Tensor:
    """Cuts the joined documents into rows of T + 1 tokens; a row begins with the last token of the row before."""
    T = config.max_position_embeddings
    return torch.cat(documents).unfold(0, T + 1, T)


def batches(documents: list[torch.Tensor]):
    """Endless; every epoch joins the documents in a new order, so that they are cut at other places."""
    while True:
        random.shuffle(documents)
        rows = sequences(documents)
        rows = rows[torch.randperm(len(rows))]
        yield from rows[: len(rows) // batch_size * batch_size].split(batch_size)


def initialise(model: olmoe.OLMoE):
    """Normal weights of deviation 0.02; the norms are ones already."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            # The residual stream sums the outputs of 2 L blocks: smaller ones keep its variance near that of one.
            blocks = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            nn.init.normal_(weight, std=0.02 / blocks**0.5)


def losses(model: olmoe.OLMoE, batch: torch.Tensor):
    """Four numbers; all but the first say how the experts are used.

    Returns:
        the cross-entropy; the load-balancing loss (1 if all experts are used alike) and the z-loss, both averaged over
        the layers; the share of tokens of the busiest expert of all layers, times E: 1 at best, E / k at worst.
    """
    balance, z, busiest, E = 0, 0, [], config.num_experts

    def route(layer, logits):
        nonlocal balance, z
        weights, indices = olmoe.top_k(logits, config.num_experts_per_tok)
        used = F.one_hot(indices.flatten(), E).float().mean(0)
        balance = balance + E * (used * logits.float().softmax(-1).mean((0, 1))).sum() / config.num_hidden_layers
        z = z + logits.float().logsumexp(-1).square().mean() / config.num_hidden_layers
        busiest.append(E * used.max().item())
        return weights, indices

    logits = model(batch[:, :-1], route=route)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), balance, z, max(busiest)


@torch.no_grad()
def evaluate(model: olmoe.OLMoE, rows: torch.Tensor) -> float:
    """Nats per token; rows as cut by `sequences`."""
    total = sum(losses(model, batch)[0].item() * len(batch) for batch in rows.split(batch_size))
    return total / len(rows)


def optimizers(model: olmoe.OLMoE) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the norms, the embedding and the head."""
    inner = [p for name, p in model.named_parameters() if name.startswith("model.layers.") and p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    outer = [p for name, p in model.named_parameters() if not name.startswith("model.layers.") and p.dim() > 1]
    groups = [{"params": outer, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    muon = torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


def learn(model: olmoe.OLMoE, batch: torch.Tensor, steppers: list[torch.optim.Optimizer], step: int, progress: float):
    """Takes a step, the first of which is 1, after this share of the training is done; returns `losses`."""
    rate = learning_rate * (final_rate + (1 - final_rate) * (1 + math.cos(math.pi * progress)) / 2)
    for group in (group for stepper in steppers for group in stepper.param_groups):
        group["lr"] = rate * min(1, step / warmup_steps)
    loss, balance, z, busiest = losses(model, batch)
    (loss + balance_weight * balance + z_weight * z).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
    model.zero_grad()
    return loss, balance, z, busiest


def save(model: olmoe.OLMoE, path: Path):
    """Writes the weights in bfloat16, or leaves the old file as it was."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    save_file(tensors, path.with_suffix(".tmp"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".tmp"), path)


def save_config(folder: Path, tokenizer: Tokenizer):
    """Writes what a model's folder holds beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = dict(architectures=["OlmoeForCausalLM"], model_type="olmoe", hidden_act="silu", torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(fields | asdict(config), indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=float, default=2.4, help="passes over the training data (default: %(default)s)")
    add("--minutes", type=float, help="train for this long instead, whatever number of epochs that is")
    add("--output", type=Path, default=Path(__file__).parent, help="folder (default: this script's)")
    add("--eval-every", type=int, default=500, help="steps between evaluations (default: %(default)s)")
    add("--every", type=int, default=1, help="train on every N-th file only, to see the model overfit (default: all)")
    add("--width", type=int, default=config.hidden_size, help="hidden size (default: %(default)s)")
    add("--expert-size", type=int, help="intermediate size of an expert (default: 5/4 of the hidden size)")
    add("--keep", action="store_true", help="keep the weights of every evaluation, in folders OUTPUT/STEP")
    args = parser.parse_args()
    config.hidden_size, config.intermediate_size = args.width, args.expert_size or args.width * 5 // 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    random.seed(seed)

    texts, held_out, validation = read_sources()
    tokenizer = train_tokenizer(texts)
    texts = texts[:: args.every]
    save_config(args.output, tokenizer)
    (args.output / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")
    (args.output / "validation.txt").write_text(validation, encoding="utf-8", newline="\n")

    documents = [torch.tensor(e.ids + config.eos_token_id) for e in tokenizer.encode_batch(texts)]
    epoch_tokens = sum(map(len, documents))
    held_out_tokens = torch.tensor(tokenizer.encode(held_out).ids)
    held_out_rows = sequences([held_out_tokens]).to(device)
    bits_per_byte = len(held_out_tokens) / len(held_out.encode()) / math.log(2)  # times nats per token

    model = olmoe.OLMoE(config).to(device)
    initialise(model)
    steppers = optimizers(model)

    log = open(args.output / "log.txt", "w", buffering=1)

    def report(line):
        print(line, flush=True)
        print(line, file=log)

    count = sum(p.numel() for p in model.parameters())
    report(f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {count:,} parameters")
    report(f"trained on {len(texts)} files, {sum(len(t.encode()) for t in texts):,} bytes, {epoch_tokens:,} tokens")
    report(f"held out {len(HELD_OUT)} files, {len(held_out.encode()):,} bytes, {len(held_out_tokens):,} tokens")
    report("  step     tokens  epochs  train  held-out  bits/byte  balance  busiest  tokens/s  minutes")

    start, tokens, best, recent, progress = time.time(), 0, math.inf, [], 0.0
    for step, batch in enumerate(batches(documents), 1):
        loss, balance, z, busiest = learn(model, batch.to(device), steppers, step, progress)
        tokens += batch[:, 1:].numel()
        recent.append(loss.item())
        minutes, epochs = (time.time() - start) / 60, tokens / epoch_tokens
        progress = min(1, minutes / args.minutes if args.minutes else epochs / args.epochs)
        print(f"{step:6} {progress:6.1%}  loss {recent[-1]:.3f}", end="\r", flush=True)
        if step % args.eval_every == 0 or progress == 1:
            held_out_loss = evaluate(model, held_out_rows)
            report(
                f"{step:6} {tokens:10} {epochs:7.2f} {sum(recent) / len(recent):6.3f} {held_out_loss:9.4f}"
                f" {held_out_loss * bits_per_byte:10.4f} {balance:8.3f} {busiest:8.2f} {tokens / minutes / 60:9.0f}"
                f" {minutes:8.1f}"
            )
            recent = []
            if args.keep:
                save_config(args.output / str(step), tokenizer)
                save(model, args.output / str(step) / "model.safetensors")
            if held_out_loss < best:
                best = held_out_loss
                save(model, args.output / "model.safetensors")
        if progress == 1:
            break


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped; the best weights so far are kept.")
