"""An example of building on roe.py: text on colours that say where rosters matter, on a terminal. Not the paper's.

    python study/show.py --prompt "class Error(Exception):" --rosters 32     # with all options of roe.py

The fewer rosters chose a token, the redder it is; it is underlined where the average overruled the clean path.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import roe


def shade(text: str, seen: list[tuple[float, bool]]) -> str:
    """Text on a background, from none over yellow to red; `seen` is each token's agreement, and if it was overruled."""
    agreement = min((agreement for agreement, _ in seen), default=1)
    if agreement == 1 or not text:
        return text
    background = (203, 209, 215, 222, 229)[min(4, int(agreement * 5))]  # of the 256 colours that terminals have
    style = f"\033[{'4;' * any(overruled for _, overruled in seen)}38;5;16;48;5;{background}m"
    return style + text.replace("\n", f"\033[0m\n{style}") + "\033[0m"


def print_shaded(args, model, tokenizer, tokens: list[int], tau: list[float]) -> None:
    """In the place of `roe.print_generation`, and without its line of statistics."""
    colours = sys.stdout and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    ids = []
    text = ""
    seen = []  # of the tokens not printed yet

    def watch(logits, log_probs, tokens, cache):
        agreement = (logits.argmax(-1) == tokens).float().mean().item() if len(logits) > 1 else 1
        seen.append((agreement, (log_probs.argmax() != logits[0].argmax()).item()))

    names = ("max_new_tokens", "temperature", "top_p", "seed", "weights")
    options = {name: getattr(args, name) for name in names} | {"branching": args.cache == "branching"}
    for token in roe.generate(model, tokens, args.rosters, tau, watch=watch, **options):
        ids.append(token)
        piece = tokenizer.decode(ids)[len(text) :]
        if not piece.endswith("\ufffd"):  # as within a character of several tokens
            print(shade(piece, seen) if colours else piece, end="", flush=True)
            text += piece
            seen.clear()
    print(tokenizer.decode(ids)[len(text) :], flush=True)


if __name__ == "__main__":
    roe.main(print_shaded)
