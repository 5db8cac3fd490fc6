"""Writes a page on which every token of a text shows its way through the model: experts, predictions, their average.

    python study/page.py --prompt "def test_parse(self):" --rosters 8 --output page.html

One HTML file that needs nothing else; page.html beside this file is its template. The text is greedy, with the paper's
Clean Cache.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import re
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load import chat_prompt, describe, load_weights, read_tau, read_text
from model import OLMoE
from roe import TAU, aggregate, fail, generate, number, temperatures

TEMPLATE = Path(__file__).with_suffix(".html")
LIKELIEST = 5  # tokens that are kept of every row's prediction, and of the average of the first m rows for every m


def record(model: OLMoE, tokenizer: Tokenizer, tokens: list[int], rosters: int, tau: list[float], **options) -> list:
    """Generates greedy text after `tokens`, and returns each token's way, as the page reads it.

    Args:
        options: max_new_tokens, seed and weights, as `roe.generate` takes them.

    Returns:
        for every token a dict: `text`; `experts` [L][rows][k], with 1 row in the layers before the first noise;
        `kinds`, see `kinds_of`; `ids` and `names` of the candidates, which are the likeliest tokens; `chosen`, the
        index among them of the token; `probs` [n][candidates].

    Raises as `roe.generate`.
    """
    routers, experts, way = [], [], []  # logits [rows, E] and indices [rows, k], of the last token that was read
    layers, hooks, written, text = model.model.layers, [], [], ""
    for layer in layers:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda _, args, logits: routers.append(logits[:, -1])))
        hooks.append(layer.mlp.experts.register_forward_pre_hook(lambda _, args: experts.append(args[2][:, -1])))

    def watch(logits, log_probs, token, cache):
        nonlocal text
        logits, token = logits[:, 0].float(), token.item()
        written.append(token)
        piece = tokenizer.decode(written, skip_special_tokens=False)[len(text) :]
        piece = "" if piece.endswith("\ufffd") else piece  # within a character of several tokens
        text += piece
        chosen = experts[-len(layers) :]
        ids = candidates(logits, token)
        way.append(
            {
                "text": visible(piece),
                "experts": [indices.tolist() for indices in chosen],
                "kinds": [kinds_of(*pair) for pair in zip(routers[-len(layers) :], chosen)],
                "ids": ids,
                "names": [name(tokenizer.decode([i], skip_special_tokens=False)) for i in ids],
                "chosen": ids.index(token),
                "probs": [[float(f"{p:.7g}") for p in row] for row in logits.softmax(-1)[:, ids].tolist()],
            }
        )
        routers.clear()
        experts.clear()

    try:
        for _ in generate(model, tokens, rosters, tau, watch=watch, **options):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return way


def kinds_of(logits: Tensor, chosen: Tensor) -> list[list[str]]:
    """Why each row runs each of its experts, [rows][k]: "clean", as row 0 chose it, too; else "noise" or "input".

    It is noise if the row's router by itself would prefer k others. Else the row's input differs from row 0's, because
    other experts ran before.

    Args:
        logits: R [rows, E], or [1, E] where one row becomes n.
        chosen: indices [rows, k].
    """
    logits = logits.float().expand(len(chosen), -1)
    noisy = logits.gather(-1, chosen) < logits.topk(chosen.shape[-1]).values[:, -1:]
    clean = chosen[0].tolist()
    kind = lambda e, by_noise: "clean" if e in clean else "noise" if by_noise else "input"
    return [[kind(*pair) for pair in zip(*row)] for row in zip(chosen.tolist(), noisy.tolist())]


def visible(text: str) -> str:
    """A text in which nothing is invisible, or steers how it is shown, but spaces, tabs and ends of lines."""
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text).replace("\n", "↵\n") or "▯"


def name(text: str) -> str:
    """A token in one line, with visible spaces."""
    text = visible(text).replace("\n", "").replace("\t", "⇥")
    return re.sub(" {3,}", lambda spaces: f"␣×{len(spaces[0])}", text).replace(" ", "␣")


def candidates(logits: Tensor, token: int) -> list[int]:
    """Ids of the likeliest tokens of every row of logits [n, V] and of the average of every m rows; and of `token`."""
    averages = torch.stack([aggregate(logits[: m + 1]) for m in range(len(logits))])
    likeliest = torch.cat((logits, averages)).topk(min(LIKELIEST, logits.shape[-1])).indices
    return sorted({token, *likeliest.flatten().tolist()})


def fill(data: dict, about: str) -> str:
    """The page: the template with its data. Nothing in them can run as script: only the template's own is allowed."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    values = {
        "CHECKSUM": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "LAYERS": len(data["tau"]),
        "EXPERTS": data["experts"],
        "COLUMNS": math.ceil(math.sqrt(data["experts"])),
        "CHOSEN": data["chosen"],
        "ROSTERS": data["rosters"],
        "ROWS": f"{data['rosters']} row{'s' if data['rosters'] > 1 else ''}",
        "BRANCH": f"here in layer {data['branch']}"
        if data["branch"] < len(data["tau"])
        else "here no router has noise",
        "ABOUT": html.escape(about),
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),  # no tag begins
    }
    return re.sub("{([A-Z]+)}", lambda key: str(values[key[1]]), template)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Defaults are in brackets.")
    parser.error = fail
    add = parser.add_argument
    add("--prompt", metavar="TEXT", required=True, help="continue this text; - reads it from standard input")
    add("--output", metavar="FILE", type=Path, default="page.html", help="where the page goes [page.html]")
    add("--rosters", metavar="N", type=number(int, 1, 1024), default=4, help="per token; 1 is plain decoding [4]")
    add("--tau", help=f"noise temperature, or a JSON file of one per layer [tau.json beside the model, else {TAU}]")
    add("--skip", metavar="L", type=number(int, 0), default=1, help="layers without noise at each end [1]")
    add("--weights", choices=["perturbed", "clean"], default="perturbed", help="softmax(R + tau G), or softmax(R)")
    add("--seed", metavar="N", type=int, default=0, help="of the noise; any whole number [0]")
    add("--max-new-tokens", metavar="N", type=number(int, 1), default=60, help="stop after this many tokens [60]")
    add("--chat", action="store_true", help="wrap the prompt as the OLMoE Instruct models expect it")
    add("--model", help="directory, or hub id such as allenai/OLMoE-1B-7B-0125 [the one that comes with RoE]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="[as stored, or float32]")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:  # all that can be refused is refused before weights are read
        if args.output.is_dir() or not args.output.parent.is_dir():
            raise ValueError(f"{args.output} cannot be written; give --output a file in a folder that is there")
        text, tau = read_text(args.prompt), read_tau(args.tau)
        source, folder, config, tokenizer = describe(args.model)
        tau = config.tau if tau is None else tau
        if args.skip != 1 and (isinstance(tau, list) or 2 * args.skip >= config.num_hidden_layers):
            raise ValueError("--skip must leave layers with noise, and needs a number as --tau, not a tau.json")
        tau, text = temperatures(config, tau, args.skip), chat_prompt(folder, text) if args.chat else text
        tokens = tokenizer.encode(text, add_special_tokens=not args.chat).ids
        if max(tokens, default=0) >= config.vocab_size:
            raise ValueError(f"the text has the token id {max(tokens)}, but vocab_size is only {config.vocab_size}")
        model = load_weights(source, config, args.device, args.dtype)
        options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "weights": args.weights}
        way = record(model, tokenizer, tokens, args.rosters, tau, **options)
        if not way:
            raise ValueError("the model ends this text at once, and there is nothing to show; give another prompt")
        data = {"prompt": visible(text), "rosters": args.rosters, "tau": tau, "tokens": way}
        data["branch"] = sum(len(rows) == 1 for rows in way[0]["experts"])
        data |= {"experts": config.num_experts, "chosen": config.num_experts_per_tok}
        logits = {"perturbed": "noisy logits", "clean": "logits without noise"}[args.weights]
        about = (
            f"Model: {args.model or 'the small demo model of this project'}. Mixing weights: softmax of the {logits} "
        )
        about += f"(“{args.weights}”). Seed of the noise: {args.seed}."
        args.output.write_text(fill(data, about), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
