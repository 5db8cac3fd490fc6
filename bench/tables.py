"""Prints the tables of bench/README.md from bench/results/*.jsonl, as Markdown.

    python bench/tables.py NAME ...      all of them without a name
    python bench/tables.py --write       puts them between their markers

Of two measurements of the same thing the later one counts. Changes are of perplexity, in percent, with standard errors.
"""

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = {
    "clean": "softmax(R), searched τ",
    "perturbed": "softmax(R + τG), searched τ",
    "default": "softmax(R + τG), tiny/tau.json: the default",
    "perturbed, 0.5": "softmax(R + τG), τ = 0.5",
}
READINGS = {"clean": "softmax(R)", "perturbed": "softmax(R + τG)"}


def results(name: str) -> list[dict]:
    """The lines of one measurement, oldest first."""
    return [json.loads(line) for line in open(RESULTS / f"{name}.jsonl")]


def latest(lines: list[dict], *keys: str) -> dict:
    """{values of the keys: last line that has them}, in the order in which they were first measured."""
    return {tuple(str(line[key]) for key in keys): line for line in lines}


def markdown(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(line: dict, key: str = "change", error: str = "error") -> str:
    return f"{100 * line[key]:+.2f} ± {100 * line[error]:.2f}"


def tuned(weights: str) -> list[float]:
    """The temperatures that the longest search of `effect.py tune` found for a reading of equation 1."""
    lines = [line for line in results("tune") if line["weights"] == weights]
    return max(lines, key=lambda line: line["trials"])["tau"]


def percents(line: dict) -> str:
    """A change, and in brackets what is left of it when both sides get the softmax temperature that suits them best."""
    return f"{percent(line)} ({100 * line['softened']:+.2f})"


def table_tune() -> str:
    """The validation text, with the temperatures found and with one for all layers but the ends."""
    name = lambda line: f"{line['trials']} trials" if line["trials"] else f"τ = {line['tau']}"
    lines = results("tune")
    found = {(line["weights"], name(line), line["rosters"]): percent(line) for line in lines}
    counts = list(dict.fromkeys(line["rosters"] for line in lines))[1:]
    settings = dict.fromkeys((weights, name) for weights, name, _ in found)
    rows = [[READINGS[key], label, *(found[key, label, n] for n in counts)] for key, label in settings]
    return markdown(["weights", "temperatures", *counts], rows)


def table_tuned() -> str:
    """The temperatures found, by layer."""
    found = {weights: tuned(weights) for weights in READINGS}
    rows = [[READINGS[weights], *(f"{value:.3f}" for value in tau)] for weights, tau in found.items()]
    return markdown(["weights", *(f"layer {i}" for i in range(len(rows[0]) - 1))], rows)


def table_rosters() -> str:
    """Held-out text."""
    found = results("rosters")
    settings, counts = (list(dict.fromkeys(line[key] for line in found)) for key in ("setting", "rosters"))
    found = latest(found, "setting", "rosters")
    rows = [[SETTINGS[setting], *(percent(found[setting, str(n)]) for n in counts[1:])] for setting in settings]
    return markdown(["rosters", *counts[1:]], rows)


def table_texts() -> str:
    """Texts at growing distance, n = 32."""
    found = latest([line for line in results("texts") if "softened" in line], "text", "setting")
    rows, settings = [], list(dict.fromkeys(setting for _, setting in found))
    for (text,), line in latest(list(found.values()), "text").items():
        changes = (percents(found[text, setting]) for setting in settings)
        clean = line["perplexity"] / (1 + line["change"])
        rows.append((clean, [f"{text} ({line['source']})", f"{line['tokens']:,}", f"{clean:.1f}", *changes]))
    head = ["text", "tokens", "perplexity, n = 1", *(SETTINGS[setting] for setting in settings)]
    return markdown(head, [row for _, row in sorted(rows)])


def table_counts() -> str:
    """The same texts, 2 to 32 rosters, default settings."""
    found = [line for line in results("texts") if line["setting"] == "default"]
    counts = list(dict.fromkeys(line["rosters"] for line in found))
    found = latest(found, "text", "rosters")
    order = sorted({text for text, _ in found}, key=lambda text: found[text, "1"]["perplexity"])
    return markdown(
        ["rosters", *counts[1:]], [[text, *(percent(found[text, str(n)]) for n in counts[1:])] for text in order]
    )


def table_tau() -> str:
    """One temperature for all layers but the ends, n = 32, held-out modules."""
    found = latest(results("tau"), "weights", "tau")
    taus = list(dict.fromkeys(tau for _, tau in found))
    rows = [[label, *(percent(found[weights, tau]) for tau in taus)] for weights, label in READINGS.items()]
    return markdown(["τ", *taus], rows)


def table_controls() -> str:
    """Controls, n = 32 where there are rosters."""
    found = latest([line for line in results("controls")], "control", "text")
    texts = list(dict.fromkeys(text for _, text in found))
    rows = [
        [control, *(percents(found[control, text]) for text in texts)]
        for control in dict.fromkeys(control for control, _ in found)
    ]
    return markdown(["", *texts], rows)


def table_controls_time() -> str:
    """Milliseconds per token."""
    found = latest(results("controls_time"), "control", "layers", "rosters")
    counts = list(dict.fromkeys(n for _, _, n in found))
    models = {"0": "embedded model", "4": "four layers of OLMoE"}
    rows = [
        [f"{control}, {model}", *(f"{found[control, layers, n]['ms']:.2f}" for n in counts)]
        for layers, model in models.items()
        for control in dict.fromkeys(control for control, _, _ in found)
    ]
    return markdown(["rosters", *counts], rows)


def table_sizes() -> str:
    """Three sizes, and the middle one with rosters: loss, and the size that it is worth."""
    lines = results("sizes")
    times = latest([line for line in lines if line["what"] == "time"], "size", "rosters")
    rows = []
    for line in latest([line for line in lines if line["what"] == "model"], "size").values():
        ms = times[str(line["size"]), "1"]["ms"]
        loss = f"{line['loss']:.4f} ± {line['error']:.4f}"
        rows.append([f"experts of {line['size']}", f"{line['active'] / 1e6:.3f} M", loss, f"{ms:.2f}"])
    for line in latest([line for line in lines if line["what"] == "rosters"], "rosters").values():
        if line["rosters"] > 1:
            ms = times[str(line["size"]), str(line["rosters"])]["ms"]
            worth, low, high = (f"{line[key] / 1e6:.3f}" for key in ("worth", "low", "high"))
            name = f"experts of {line['size']}, n = {line['rosters']}"
            loss = f"{line['loss']:.4f} ± {line['error']:.4f}"
            rows.append([name, f"worth {worth} M ({low} to {high})", loss, f"{ms:.2f}"])
    return markdown(["model", "parameters read per token", "held-out loss", "milliseconds per token"], rows)


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def bench(layers: int, torch: str | None = None) -> dict:
    """{(system, method, tokens, rosters): line} of bench.py's results with so many layers, the latest of each."""
    lines = [line for line in results("bench") if line["layers"] == layers]
    torch = torch or lines[-1]["torch"]
    tokens = lambda line: line.get("history", line.get("length"))
    return {(x["system"], x["method"], tokens(x), x["n"]): x for x in lines if x["torch"] == torch}


def table_decode(layers: int = 4, torch: str | None = None) -> str:
    """Milliseconds per token; bytes of the cache and peak memory of the process after the longer history."""
    found = bench(layers, torch)
    counts = sorted({n for system, method, _, n in found if (system, method) == ("roe", "decode")})
    histories = sorted({tokens for _, method, tokens, _ in found if method == "decode"})
    systems = {"roe": "this project", "transformers": "transformers; naive RoE from 2 on", "llama.cpp": "llama.cpp"}
    rows = []

    def add(label, system, method, tokens, value):
        lines = [found.get((system, method, tokens, n)) for n in counts]
        if any(lines):
            rows.append([label, *("" if line is None else number(value(line)) for line in lines)])

    for tokens in histories:
        for system, label in systems.items():
            add(f"{label}, after {tokens:,} tokens", system, "decode", tokens, lambda line: line["ms"])
        add(f"floor, after {tokens:,} tokens", "roe", "decode", tokens, lambda line: line["floor_ms"])
    for system, label in list(systems.items())[:2]:
        add(f"cache, MB: {label}", system, "decode", histories[-1], lambda line: line.get("cache_bytes", 0) / 1e6)
        add(f"peak memory, GB: {label}", system, "peak", histories[-1], lambda line: line["bytes"] / 1e9)
    return markdown(["rosters", *counts], rows)


def table_cost() -> str:
    """The rows that README.md shows, after the longer history."""
    found = bench(4)
    counts = sorted({n for system, method, _, n in found if (system, method) == ("roe", "decode")})
    rows = [["this project", *(number(found["roe", "decode", 2048, n]["ms"]) for n in counts)]]
    rows += [
        [
            "RoE as first written on transformers",
            *(number(found["transformers", "decode", 2048, n]["ms"]) for n in counts),
        ]
    ]
    rows += [["floor", *(number(found["roe", "decode", 2048, n]["floor_ms"]) for n in counts)]]
    return markdown(["rosters", *counts], rows)


def table_prompts(layers: int = 4, torch: str | None = None) -> str:
    """Milliseconds from a prompt to the first token, one roster."""
    found = {key: line for key, line in bench(layers, torch).items() if key[1] == "prompt"}
    lengths = sorted({tokens for _, _, tokens, _ in found})
    systems = list(dict.fromkeys(system for system, *_ in found))
    rows = [
        [system.replace("roe", "this project"), *(f"{found[system, 'prompt', t, 1]['ms']:,.0f}" for t in lengths)]
        for system in systems
    ]
    return markdown(["prompt of", *(f"{t:,} tokens" for t in lengths)], rows)


def table_decode_embedded() -> str:
    """As `decode`, of the embedded model."""
    return table_decode(0)


def table_decode_avx2() -> str:
    """As `decode`, on a processor without bfloat16, where three layers were measured."""
    return table_decode(3)


def table_prompts_avx2() -> str:
    return table_prompts(3)


def table_ports() -> str:
    """Milliseconds per token of roe.py and of the ports that were measured beside it."""
    found = latest(results("ports"), "system", "history", "rosters")
    systems, histories, counts = (list(dict.fromkeys(values)) for values in zip(*found))
    rows = [
        [f"{system}, after {int(history):,} tokens", *(number(found[system, history, n]["ms"]) for n in counts)]
        for history in histories
        for system in systems
    ]
    return markdown(["rosters", *counts], rows)


def table_vllm() -> str:
    """The embedded model in vLLM: milliseconds of a decoding step."""
    found = latest([line for line in results("vllm") if line["layers"] == 0 and "beside" not in line], "n", "requests")
    counts, requests = (list(dict.fromkeys(values)) for values in zip(*found))
    rows = [[f"{r} requests", *(f"{found[n, r]['ms_per_step']:.1f}" for n in counts)] for r in requests]
    return markdown(["rosters", *counts], rows)


def filled(text: str) -> str:
    """A text with the tables between its markers as they are now."""
    table = lambda match: f"{match[1]}\n{globals()['table_' + match[2]]()}\n{match[3]}"
    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def table_margin() -> str:
    """What margins keep, in percent."""
    found = latest([line for line in results("margin") if line["what"] == "effect"], "text", "rosters", "margin")
    texts, counts, margins = (list(dict.fromkeys(values)) for values in zip(*found))
    labels = {"share": "tokens with rosters", "overruled_kept": "overruled tokens kept", "gain_kept": "gain kept"}
    rows = []
    for text in texts:
        for key, label in labels.items():
            # The gain is that of tokens which no prediction had a part in. All n run rosters on the same tokens.
            for n in () if key == "gain_kept" and text != "held-out" else counts[: 1 if key == "share" else None]:
                lines = [found[text, n, m] for m in margins]
                whole = {"share": f", of {lines[0]['tokens']:,}", "overruled_kept": f", of {lines[0]['overruled']:.0f}"}
                cells = (f"{100 * line[key]:.1f} ± {100 * line[f'{key}_error']:.1f}" for line in lines[:-1])
                rows.append([text, label + whole.get(key, ""), "any" if key == "share" else n, *cells])
    return markdown(["text", "", "n", *(f"M = {float(m):g}" for m in margins[:-1])], rows)


def table_margin_time() -> str:
    """Time of a token relative to one roster, embedded model."""
    found = latest([line for line in results("margin") if line["what"] == "time"], "text", "rosters", "margin")
    texts, counts, margins = (list(dict.fromkeys(values)) for values in zip(*found))
    margins = sorted(margins, key=float)
    rows = []
    for text in texts:
        shares = (f"{100 * found[text, counts[-1], m]['share']:.0f} %" for m in margins)
        rows.append([text, "tokens with rosters", *shares])
        rows.append(
            ["", "n = 1", *[""] * (len(margins) - 1), f"1 ({found[text, counts[0], margins[-1]]['ms']:.2f} ms)"]
        )
        for n in counts[1:]:
            rows.append(["", f"n = {n}", *(f"{found[text, n, m]['ratio']:.2f}" for m in margins)])
    return markdown(["text", "", *(f"M = {float(m):g}" for m in margins)], rows)


def table_margin_forced() -> str:
    """Time of a token relative to one roster against the share of unsure tokens, four layers of OLMoE's shapes."""
    found = [line for line in results("margin") if line["what"] == "forced"]
    always = latest([line for line in found if line["margin"] == 1], "history", "rosters")
    found = latest([line for line in found if line["margin"] < 1], "history", "rosters", "share")
    shares = list(dict.fromkeys(share for _, _, share in found))
    rows = []
    for (history, n), line in always.items():
        ratios = [found[history, n, share]["ratio"] for share in shares] if n != "1" else []
        cells = [f"{ratio:.2f}" for ratio in ratios] or [""] * len(shares)
        rows.append([history, n, f"{line['ms']:.1f}", *cells, f"{line['ratio']:.2f}"])
    heads = [f"{100 * float(share):.0f} % unsure" for share in shares]
    return markdown(["tokens before", "n", "milliseconds, M = 1", *heads, "M = 1"], rows)


def main() -> None:
    tables = {name.removeprefix("table_"): table for name, table in globals().items() if name.startswith("table_")}
    if sys.argv[1:] == ["--write"]:
        for path in (RESULTS.parent / "README.md", RESULTS.parent.parent / "README.md"):
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name in sys.argv[1:] or tables:
        if name not in tables:
            sys.exit(f"there is no table {name}; there are {', '.join(tables)}")
        print(f"{tables[name]()}\n")


if __name__ == "__main__":
    main()
