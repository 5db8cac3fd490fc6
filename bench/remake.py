"""Measures, and makes every table and figure of bench/README.md and ports/README.md.

    python bench/remake.py                               all that this Python can measure
    python bench/remake.py --mlx PYTHON --vllm PYTHON    also two ports, by interpreters that have mlx-lm and vLLM
    python bench/remake.py --only loading                one measurement, or several
    python bench/remake.py --tables                      no measurement: tables and figures from bench/results/

    pip install -e ".[test,bench,figures]"

A run that was cut goes on where it was; every line says how much is done and how long the rest will take: on two cores
25 minutes, and a quarter of an hour more for the two ports. Nothing else should run then.
"""

import argparse
import sys
from functools import partial

import loading
from drawing import BLUE, GREY, ORANGE, plt, save
from report import ROOT, fill, latest, markdown, measure, results

import bench
import ports

RESULTS, FIGURE = ROOT / "bench" / "results", ROOT / "bench" / "figures" / "cost.svg"
SYSTEMS = "--device cpu --systems roe transformers llama.cpp --rosters 1 4 8 32 --repeats 3"


def speed() -> list:
    """What bench.py measures of random weights in OLMoE-1B-7B's shapes, and of the embedded model as it is loaded."""
    run = lambda layers, dtype: bench.measure(bench.arguments(f"--layers {layers} --dtype {dtype} {SYSTEMS}".split()))
    each = (4, "bfloat16"), (0, "float32")
    return [({"layers": layers, "dtype": dtype}, partial(run, layers, dtype)) for layers, dtype in each]


def loadings() -> list:
    """What loading.py measures, where there is room for it."""
    cells = []
    for layers, repeats in ((4, 2), (16, 1)):
        if lack := loading.lacks_room(layers):
            print(f"not measured: {lack}")
        else:
            cells.append(({"layers": layers}, partial(loading.measure, layers, repeats)))
    return cells


MEASURED = {
    "bench": lambda _: speed(),
    "loading": lambda _: loadings(),
    "ports": lambda _: ports.beside("transformers", sys.executable, ("bfloat16", "float32")),
    "mlx": lambda args: ports.beside("mlx", args.mlx, ("float32",), 2),
    "vllm": lambda args: ports.beside("vllm", args.vllm, ("bfloat16", "float32"), 2) + ports.requests(args.vllm),
}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def lines(name: str) -> list[dict]:
    return results(RESULTS / f"{name}.jsonl")


def found(name: str, **what) -> list[dict]:
    """The lines within that line of a file of results which has these values."""
    return next(line["found"] for line in lines(name) if what.items() <= line.items())


def four_layers() -> tuple[dict, list[int]]:
    """What was measured of them, by system, method, tokens and rosters; and the numbers of rosters."""
    measured = latest(found("bench", layers=4), "system", "method", "length", "n")
    return measured, sorted({n for *_, n in measured})


def table_where() -> str:
    """Machines, versions and dates."""
    rows = []
    for name in MEASURED:
        *_, line = lines(name)
        others = ", ".join(v for system, v in line.get("versions", {}).items() if system != "roe.py")
        rows.append([name, line["machine"], f"torch {line['torch']}", others, line["date"]])
    return markdown(["results", "machine", "version", "beside it", "date"], rows)


def table_decode() -> str:
    return bench.decode_table(found("bench", layers=4))


def table_prompts() -> str:
    return bench.prompts_table(found("bench", layers=4))


def table_decode_embedded() -> str:
    return bench.decode_table(found("bench", layers=0))


def table_prompts_embedded() -> str:
    return bench.prompts_table(found("bench", layers=0))


def table_cost() -> str:
    """Of table_decode what the first README shows, after 2,048 tokens."""
    line, counts = four_layers()
    rows = []
    for label, system, key in (
        ("this project", "roe", "ms"),
        ("naive RoE on transformers", "transformers", "ms"),
        ("floor", "roe", "floor_ms"),
    ):
        rows.append([label, *(bench.number(line[system, "decode", 2048, n][key]) for n in counts)])
    return markdown(["rosters", *counts], rows)


def table_loading() -> str:
    """Seconds, and memory as times the files."""
    rows = []
    for line in lines("loading"):
        files = f"{line['bytes'] / 1e9:.2f} GB, {line['layers']} layers"
        seconds = (f"{line[f'{what}_seconds']:.1f} s" for what in ("read", "load"))
        rows.append([files, *seconds, *(f"{line[f'load_{x}'] / line['bytes']:.2f} times" for x in ("peak", "held"))])
    return markdown(["files", "reading them", "`load`", "peak memory", "held afterwards"], rows)


def table_ports() -> str:
    """Milliseconds per token, and in brackets as times of roe.py's in the same run."""
    rows, counts = [], (1, 8, 32)
    for line in (line for name in ("ports", "vllm", "mlx") for line in lines(name) if "system" in line):
        ms = {(x["system"], x["length"], x["n"]): x["ms"] for x in line["found"]}
        for length in (32, 2048):
            cells = []
            for n in counts:
                port = ms[line["system"], length, n]
                cells.append(f"{bench.number(port)} ({port / ms['roe.py', length, n]:.1f})")
            rows.append([line["system"], line["dtype"], f"{length:,} tokens", *cells])
    return markdown(["port", "weights", "after", *(f"n = {n}" for n in counts)], rows)


def requests(model: str) -> str:
    """Milliseconds of a decoding step of all requests together, and in brackets as times of plain vLLM's."""
    ms = {((x["length"], x["requests"]), x["n"]): x["ms"] for x in found("vllm", model=model)}
    counts, rows = list(dict.fromkeys(n for _, n in ms)), []
    for length, r in dict.fromkeys(case for case, _ in ms):
        plain, *others = (ms[(length, r), n] for n in counts)
        cells = (f"{bench.number(x)} ({x / plain:.1f})" for x in others)
        rows.append([f"{r} request{'s' * (r > 1)} after {length:,} tokens", bench.number(plain), *cells])
    return markdown(["rosters", *counts], rows)


def table_vllm() -> str:
    return requests("embedded")


def table_vllm_long() -> str:
    return requests("small")


TABLES = {name.removeprefix("table_"): table for name, table in globals().items() if name.startswith("table_")}


# ---- The figure ------------------------------------------------------------------------------------------------------


def draw_cost() -> None:
    """Time and memory against the number of rosters."""
    line, counts = four_layers()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), width_ratios=(3, 2))

    def curve(ax, label, values, colour, style="-"):
        ax.plot(counts, values, style, color=colour, marker="o", ms=4)
        ax.annotate(label, (counts[-1], values[-1]), (7, -4), textcoords="offset points", color=colour)

    for length, style in ((2048, "-"), (32, "--")):
        of = lambda system, key: [line[system, "decode", length, n][key] for n in counts]
        curve(left, "naive RoE", of("transformers", "ms"), ORANGE, style)
        curve(left, "this project" * (length > 32), of("roe", "ms"), BLUE, style)  # the pairs end close together
        curve(left, "floor" * (length > 32), of("roe", "floor_ms"), GREY, style)
    for system, label, colour in (("transformers", "naive RoE", ORANGE), ("roe", "this project", BLUE)):
        curve(right, label, [line[system, "peak", 2048, n]["bytes"] / 1e9 for n in counts], colour)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, counts)
        ax.set(xlabel="rosters n", xlim=(None, 5 * counts[-1]))  # room for the labels
    left.set_yscale("log")
    left.set_yticks(*2 * [[20, 50, 100, 200, 500, 1000, 2000]])
    left.minorticks_off()
    left.set(ylabel="milliseconds per token")
    left.set_title("after 2,048 tokens (dashed: after 32)", fontsize=10)
    right.set(ylabel="peak memory of the process, GB", ylim=(0, None))
    right.set_title("after 2,048 tokens", fontsize=10)
    save(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURED, metavar="NAME", help=f"of {', '.join(MEASURED)}")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--mlx", metavar="PYTHON", help="an interpreter with mlx-lm and torch")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vLLM")
    args = parser.parse_args()
    lacking = [name for name in ("mlx", "vllm") if not getattr(args, name)]
    for name in lacking:
        if name in (args.only or ()):
            parser.error(f"{name} is measured by an interpreter of its own: name it with --{name}")
    names = args.only or [name for name in MEASURED if name not in lacking]
    for name in () if args.tables else names:
        measure(RESULTS / f"{name}.jsonl", MEASURED[name](args))
    for folder in ("bench", "ports", "."):
        fill(ROOT / folder / "README.md", TABLES)
    draw_cost()


if __name__ == "__main__":
    main()
