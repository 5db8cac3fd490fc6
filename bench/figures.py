"""Draws README's figures, bench/figures/*.svg, from bench/results/*.jsonl.

    pip install -e ".[figures]" && python bench/figures.py

Transparent and in colours of medium brightness, so that they can be read on light pages and on dark ones.
"""

import io
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.text import Text
from tables import SETTINGS, latest, results

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from load import load
from roe import aggregate, generate, temperatures

FIGURES = ROOT / "bench" / "figures"
GREY, BLUE, ORANGE, GREEN = "#808890", "#3f8cff", "#e8762c", "#2ea05a"
READINGS = {"clean": ("weights softmax(R)", BLUE), "perturbed": ("weights softmax(R + τG)", ORANGE)}
COLOURS = {"clean": BLUE, "perturbed": GREEN, "default": ORANGE, "perturbed, 0.5": GREEN}  # of tables.SETTINGS

plt.rcParams.update(
    {
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GREY),
        **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "savefig.transparent": True,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "roe",  # the same file from the same data
        "font.size": 10,
        "figure.constrained_layout.use": True,
    }
)


def curves(lines: list[dict], key: str, x: str) -> dict[str, list[tuple[float, float, float]]]:
    """For every value of `key`: x, change and error in percent, sorted; of two measurements the later one."""
    found = defaultdict(dict)
    for line in lines:
        found[line[key]][line[x]] = (line[x], 100 * line["change"], 100 * line["error"])
    return {value: [points[x] for x in sorted(points)] for value, points in found.items()}


def save(figure, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def overruled(prompt: str, rosters: int = 4) -> tuple[str, list, list[float], list[tuple[str, list[float]]]]:
    """The first token of greedy text, default settings, on which the average overrules row 0: how it came about.

    Returns the text before it; for every layer the experts that each row chose, [rows, k], and its temperature; and the
    three likeliest tokens, each with its probability in every row and, at last, on average.
    """
    model, tokenizer = load(device="cpu", dtype="float32")
    tokens, chosen, found = tokenizer.encode(prompt).ids, [], []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[2][:, -1].tolist()))

    def watch(logits, log_probs, *_):
        if log_probs.argmax() != logits[0].argmax():
            found.append((logits[:, 0].softmax(-1), aggregate(logits[:, 0]).exp()))

    for token in generate(model, tokens, rosters, watch=watch):
        if found:
            break
        tokens.append(token)
    ((rows, average),) = found
    likeliest = average.topk(3).indices.tolist()
    candidates = [(tokenizer.decode([i]), [*rows[:, i].tolist(), average[i].item()]) for i in likeliest]
    return tokenizer.decode(tokens), chosen[-model.config.num_hidden_layers :], temperatures(model.config), candidates


def draw_token() -> None:
    """One token's way: layers across, rosters down, then what each predicts, and their average."""
    text, layers, tau, candidates = overruled("def test_parse(self):")
    rosters, middle, end = len(layers[-1]), len(layers[-1]) / 2 - 0.5, len(layers) - 0.35
    by_clean = max(candidates, key=lambda candidate: candidate[1][0])[0]
    colours = {token: BLUE if token == by_clean else GREY for token, _ in candidates} | {candidates[0][0]: ORANGE}
    figure, ax = plt.subplots(figsize=(8.5, 4.4))
    line = lambda *points: ax.plot(*zip(*points), color=GREY, lw=0.8, zorder=0)
    heights = lambda chosen: range(rosters) if len(chosen) > 1 else [middle]

    def bars(x, y, row):
        best = max(probs[row] for _, probs in candidates)
        for i, (token, probs) in enumerate(candidates, -1):
            style = {"family": "monospace", "fontsize": 8, "va": "center", "color": colours[token]}
            style["weight"] = "bold" if probs[row] == best else "normal"
            place, length = y + 0.26 * i, 1.4 * probs[row]
            ax.barh(place, length, 0.18, left=x + 0.62, color=colours[token])
            ax.text(x + 0.57, place, repr(token)[1:-1].replace(" ", "␣"), ha="right", **style)
            ax.text(x + 0.67 + length, place, f"{probs[row]:.2f}", **style)

    for x, chosen in enumerate(layers):
        ax.text(x, -0.75, f"layer {x}", ha="center", weight="bold")
        ax.text(x, -0.55, f"τ = {tau[x]:.2f}" if tau[x] else "no noise", ha="center", fontsize=8)
        for y, experts in zip(heights(chosen), chosen):
            for e in range(16):
                colour = GREY if e not in experts else BLUE if e in chosen[0] else ORANGE
                corner = x + 0.19 * (e % 4 - 2), y + 0.19 * (e // 4 - 2)
                ax.add_patch(plt.Rectangle(corner, 0.15, 0.15, color=colour, alpha=1 if e in experts else 0.2, lw=0))
            before = heights(layers[x - 1]) if x and len(layers[x - 1]) < len(chosen) else [y]
            line((x - 0.57, before[0]), (x - 0.43, y))
    for y in range(rosters):
        line((end - 0.22, y), (end - 0.08, y))
        line((end + 1.75, y), (end + 2.05, middle))
        bars(end, y, y)
        ax.text(-0.75, y, "row 0\nclean" if y == 0 else f"row {y}", ha="right", va="center", weight="bold")
    bars(end + 2.15, middle, -1)
    ax.text(end + 0.9, -0.75, "predictions", ha="center", weight="bold")
    ax.text(end + 3, -0.75, "their average", ha="center", weight="bold")
    ax.text(-1.4, -1.15, " ".join(text.split()) + " ▁", family="monospace")
    notes = {
        "experts that row 0 chose, and its token": BLUE,
        "experts that noise brought, and the average's token": ORANGE,
    }
    for x, (note, colour) in zip((-0.4, 4.1), notes.items()):
        ax.add_patch(plt.Rectangle((x, rosters - 0.37), 0.15, 0.15, color=colour, lw=0))
        ax.text(x + 0.25, rosters - 0.22, note, fontsize=9)
    ax.set(xlim=(-1.4, end + 4), ylim=(rosters - 0.1, -1.4))
    ax.axis("off")
    save(figure, "token")


def draw_gains() -> None:
    """Default settings on every text: one bar each, from home to far, and what a softmax temperature does alone."""
    clean = lambda line: line["perplexity"] / (1 + line["change"])
    lines = latest([line for line in results("texts") if line["setting"] == "default"], "text").values()
    lines = sorted(lines, key=clean, reverse=True)
    lowered, errors = [-100 * line["change"] for line in lines], [100 * line["error"] for line in lines]
    alone = [100 * (1 - line["clean_softened"] / clean(line)) for line in lines]
    figure, ax = plt.subplots(figsize=(8.5, 3.4))
    y = range(len(lines))
    ax.barh(y, lowered, 0.6, xerr=errors, color=ORANGE, ecolor=GREY, capsize=3, label="32 rosters")
    ax.plot(alone, y, "D", color=BLUE, ms=6, label="a softmax temperature alone, which costs nothing")
    ax.axvline(0, color=GREY, lw=1)
    ax.set_yticks(y, [line["text"] for line in lines])
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="perplexity lowered by, %", ylabel="far from home  ←  →  near")
    ax.legend(loc="upper right")
    save(figure, "gains")


def draw_rosters() -> None:
    """Held-out text against the number of rosters, and the temperatures of each setting by layer."""
    tau = {line["setting"]: line["tau"] for line in results("rosters")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), width_ratios=(3, 2))
    for setting, points in curves(results("rosters"), "setting", "rosters").items():
        style = {"color": COLOURS[setting], "marker": "o", "ms": 4}
        left.errorbar(*zip(*points, strict=True), label=SETTINGS[setting], capsize=2, **style)
        right.plot(tau[setting], **style)
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
    left.set(xlabel="rosters n", ylabel="change of perplexity, %", title="held-out modules")
    left.legend(fontsize=8)
    right.set(xlabel="layer", ylabel="τ", ylim=(0, 0.55))
    save(figure, "rosters")


def draw_texts() -> None:
    """Change against the clean path's perplexity; what is about one text stands close together, below its name."""
    lines = latest([line for line in results("texts") if "softened" in line], "text", "setting").values()
    clean = lambda line: line["perplexity"] / (1 + line["change"])
    figure, ax = plt.subplots(figsize=(8.5, 4.2))
    for place, setting in enumerate(dict.fromkeys(line["setting"] for line in lines)):
        label, colour = SETTINGS[setting], COLOURS[setting]
        chosen = sorted((line for line in lines if line["setting"] == setting), key=clean)
        x = [clean(line) * 1.008 ** (place - 1) for line in chosen]
        y, errors, softened = ([100 * line[key] for line in chosen] for key in ("change", "error", "softened"))
        ax.errorbar(x, y, errors, color=colour, ls="none", marker="o", ms=5, capsize=2, label=label)
        ax.plot(x, softened, "o", ms=5, mec=colour, mfc="none", label=label + ", beyond softmax temperature")
    for i, line in enumerate(chosen):
        place = {"xytext": (0, 4 + 11 * (i % 3)), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        ax.annotate(line["text"], (clean(line), 0.7), **place)
    ax.axhline(0, color=GREY, lw=1)
    ax.set_xscale("log")
    ax.set_xticks(*2 * [[15, 20, 30, 40, 50, 60, 80]])
    ax.minorticks_off()
    ax.margins(0.08, 0.1)
    ax.set(xlabel="perplexity of the clean path", ylabel="change of perplexity, %")
    ax.legend(fontsize=8)
    save(figure, "texts")


def draw_tau() -> None:
    figure, ax = plt.subplots(figsize=(5, 3.2))
    for weights, points in curves(results("tau"), "weights", "tau").items():
        label, colour = READINGS[weights]
        ax.errorbar(*zip(*points, strict=True), color=colour, label=label, marker="o", ms=4, capsize=2)
    ax.axhline(0, color=GREY, lw=1)
    ax.set(xlabel="τ of all layers but the first and the last", ylabel="change of perplexity, %", title="n = 32")
    ax.set(xlim=(0, 0.75), ylim=(-2, 2))  # beyond, it only gets worse
    ax.legend()
    save(figure, "tau")


def draw_disagreement() -> None:
    *_, line = results("disagreement")
    confidence, agreement, gain = line["confidence"], line["agreement"], line["gain"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    left.scatter(confidence, agreement, s=5, color=BLUE, alpha=0.35, lw=0, rasterized=True)
    left.set(xlabel="clean path's probability of its first choice", ylabel="rosters that agree with the average")
    bins = [[g for c, g in zip(confidence, gain, strict=True) if i <= 10 * c < i + 1] for i in range(10)]
    means = [sum(bin) / len(bin) for bin in bins]
    errors = [(sum((g - m) ** 2 for g in bin) / len(bin) ** 2) ** 0.5 for bin, m in zip(bins, means, strict=True)]
    right.bar([i / 10 + 0.05 for i in range(10)], means, 0.09, yerr=errors, color=BLUE, ecolor=GREY)
    right.axhline(0, color=GREY, lw=1)
    right.set(xlabel="clean path's probability of its first choice", ylabel="mean gain of the true token, nats")
    save(figure, "disagreement")


def draw_checkpoints() -> None:
    lines = results("checkpoints")
    steps = sorted({line["step"] for line in lines})
    one = {line["step"]: line for line in lines}  # what is the same for all settings of a checkpoint
    gaps = [one[step]["held_out_loss"] - one[step]["train_loss"] for step in steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), width_ratios=(2, 3))
    for key, style, label in (("train_loss", "--", "training text"), ("held_out_loss", "-", "held-out text")):
        left.plot(
            [one[s]["epochs"] for s in steps],
            [one[s][key] for s in steps],
            style,
            color=GREY,
            marker="o",
            ms=4,
            label=label,
        )
    left.set(xlabel="epochs", ylabel="loss, nats per token")
    left.legend()
    for weights, (label, colour) in READINGS.items():
        for key, style, note in (("change", "-", ""), ("softened", ":", ", beyond softmax temperature")):
            best = [min(line[key] for line in lines if (line["step"], line["weights"]) == (s, weights)) for s in steps]
            right.plot(gaps, [100 * value for value in best], style, color=colour, marker="o", ms=4, label=label + note)
    softened = [100 * (one[s]["clean_softened"] / math.exp(one[s]["held_out_loss"]) - 1) for s in steps]
    right.plot(gaps, softened, "--", color=GREY, marker="o", ms=4, label="softmax temperature alone, no rosters")
    right.axhline(0, color=GREY, lw=1)
    right.set(xlabel="held-out loss - training loss, nats", ylabel="change of perplexity, %", title="n = 32, best τ")
    right.legend(fontsize=8)
    save(figure, "checkpoints")


def draw_sizes() -> None:
    lines = results("sizes")
    models = list(latest([line for line in lines if line["what"] == "model"], "size").values())
    rosters = list(latest([line for line in lines if line["what"] == "rosters"], "rosters").values())
    *_, fit = (line for line in lines if line["what"] == "line")
    figure, ax = plt.subplots(figsize=(6, 3.6))
    x = [line["active"] / 1e6 for line in models]
    ax.errorbar(x, [line["loss"] for line in models], [line["error"] for line in models], fmt="o", ms=5, color=GREY)
    ax.plot(x, [fit["a"] + fit["b"] * math.log(1e6 * p) for p in x], "--", color=GREY, label="one roster, three sizes")
    (middle,) = (line["active"] / 1e6 for line in models if line["size"] == rosters[0]["size"])
    losses, last = [line["loss"] for line in rosters], rosters[-1]
    ax.plot([middle] * len(losses), losses, color=ORANGE, marker="o", ms=4, label="rosters of the middle one")
    worth, low, high = (last[key] / 1e6 for key in ("worth", "low", "high"))
    ax.errorbar(
        worth, last["loss"], xerr=[[worth - low], [high - worth]], color=ORANGE, capsize=3, marker="x", ls="none"
    )
    ax.plot([middle, worth], [last["loss"]] * 2, ":", color=ORANGE)
    ax.annotate(f"n = {last['rosters']}", (middle, last["loss"]), (-6, 0), textcoords="offset points", ha="right")
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{p:.2f} M" for p in x])
    ax.minorticks_off()
    ax.set(xlabel="parameters read per token", ylabel="held-out loss, nats per token")
    ax.legend()
    save(figure, "sizes")


def draw_cost() -> None:
    """Four layers and the head; of several measurements the latest counts."""
    found = defaultdict(dict)  # {(system, method, tokens before): {rosters: line}}
    for line in results("bench"):
        if line["layers"] == 4 and line["method"] != "prompt":
            found[line["system"], line["method"], line["history"]][line["n"]] = line
    systems = ("roe", "this project", BLUE), ("transformers", "naive RoE on transformers", ORANGE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), width_ratios=(3, 2))
    for history, style in ((32, "-"), (2048, "--")):
        after = f" after {history:,} tokens"
        for system, label, colour in systems:
            lines = found[system, "decode", history]
            times = [line["ms"] for line in lines.values()]
            left.plot(lines.keys(), times, style, color=colour, marker="o", ms=4, label=label + after)
        lines = found["roe", "decode", history]
        left.plot(lines.keys(), [line["floor_ms"] for line in lines.values()], style, color=GREY, label="floor" + after)
    for system, label, colour in systems:
        lines = found[system, "peak", 2048]
        peaks = [line["bytes"] / 1e9 for line in lines.values()]
        right.plot(lines.keys(), peaks, color=colour, marker="o", ms=4, label=label)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
        ax.set(xlabel="rosters n")
    left.set_yscale("log")
    left.set_yticks(*2 * [[20, 50, 100, 200, 500, 1000, 2000]])
    left.minorticks_off()
    left.set(ylabel="milliseconds per token", ylim=(None, 6000))
    left.legend(fontsize=8)
    right.set(ylabel="peak memory of the process, GB", ylim=(0, None))
    save(figure, "cost")


def draw_margin() -> None:
    """What a margin keeps against what a token costs, both on the same kind of text."""
    keys = "text", "rosters", "margin"
    effect, times = (
        latest([line for line in results("margin") if line["what"] == w], *keys) for w in ("effect", "time")
    )
    margins = sorted({margin for _, _, margin in effect}, key=float)
    panels = (
        ("held-out", "gain_kept", "held-out text", "gain in log-likelihood kept, %"),
        ("greedy", "overruled_kept", "greedy text of its own", "overruled tokens kept, %"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.8))
    for ax, (text, key, title, label) in zip(axes, panels, strict=True):
        for n, colour in {"4": GREEN, "8": BLUE, "32": ORANGE}.items():
            lines = [effect[text, n, margin] for margin in margins]
            y, errors = ([100 * line[name] for line in lines] for name in (key, f"{key}_error"))
            x = [times[text, n, margin]["ratio"] for margin in margins]
            ax.errorbar(x, y, errors, color=colour, label=f"n = {n}", marker="o", ms=4, elinewidth=0.6, capsize=2)
            for margin, *place in zip(margins, x, y, strict=True):
                style = {"xytext": (3, -9), "textcoords": "offset points", "fontsize": 7, "color": colour}
                ax.annotate(f"{float(margin):g}", place, **style)
        ax.set(xlabel="time per token, relative to one roster", ylabel=label, title=title, xlim=(0.9, None))
        ax.legend(loc="lower right", title="numbers are M", title_fontsize=8, fontsize=8)
    save(figure, "margin")


def draw_show() -> None:
    """What a terminal shows, as a picture of that terminal."""
    import pty  # here, because Windows has none

    command = ["roe.py", "--prompt", "class Error(Exception):", "--rosters", "32", "--max-new-tokens", "55", "--show"]
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


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in list(globals().items()):
        if name.startswith("draw_") and (not sys.argv[1:] or name.removeprefix("draw_") in sys.argv[1:]):
            draw()
            print(f"bench/figures/{name.removeprefix('draw_')}.svg")


if __name__ == "__main__":
    main()
