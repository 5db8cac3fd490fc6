"""What all measurements here and in study/ share: where they ran, results as lines of JSON, tables in Markdown."""

import ast
import functools
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "tiny"
sys.path.insert(0, str(ROOT))  # for whoever imports this file


def what_runs(source: str) -> str:
    """Python source without what changes nothing: comments, docstrings, layout."""
    tree = ast.parse(source)
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


@functools.cache
def code() -> str:
    """Which version of the code runs: a hash of what runs in the four files at the top and in fast/."""
    digest = hashlib.sha256()
    for name in ("roe.py", "model.py", "cache.py", "load.py", "fast/__init__.py", "fast/cpu.py", "fast/gpu.py"):
        digest.update(what_runs((ROOT / name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:8]


def where(device: torch.device | None = None) -> dict:
    """What a figure's caption must say: machine, versions and date."""
    if device and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
        machine = f"{torch.get_num_threads()} threads of {(names or [platform.processor()])[0]}"
    return {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "code": code()}


def results(path: Path) -> list[dict]:
    """The lines of one measurement, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(path: Path, cells: Iterable[tuple[dict, Callable[[], dict]]]) -> None:
    """Measures what is not in a file of results yet, cell by cell, and appends a line for each as it is done.

    So a run that was cut goes on where it was. Lines that another version of the code or another machine has measured
    are dropped first; how long they took says how long all of it will take.

    Args:
        cells: what is measured, as a dict that JSON can write, and a function that measures it.
    """
    lines, machine = results(path), where()["machine"]
    current = [line for line in lines if (line["code"], line["machine"]) == (code(), machine)]
    cells = [(json.loads(json.dumps(what)), run) for what, run in cells]
    find = lambda what, lines: [line for line in lines if what.items() <= line.items()]
    seconds = lambda what: [line["seconds"] for line in find(what, lines)[-1:]]
    known = [value for what, _ in cells for value in seconds(what)]
    usual = sum(known) / len(known) if known else 1
    open_cells = [(what, run) for what, run in cells if not find(what, current)]
    expected = [value for what, _ in open_cells for value in seconds(what) or [usual]]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in current))
    took = []
    for i, (what, run) in enumerate(open_cells):
        pace = (sum(took) + 1) / (sum(expected[:i]) + 1)  # against the lines before; a second more, since they say 0.0
        minutes = pace * sum(expected[i:]) / 60
        left = f"about {minutes:.0f} minutes left" if known or took else "time unknown yet"
        print(f"{path.stem}, {i + 1} of {len(open_cells)}, {left}: {json.dumps(what)[:150]}", flush=True)
        start = time.perf_counter()
        found = run()
        took.append(time.perf_counter() - start)
        with open(path, "a") as file:
            file.write(json.dumps(what | found | {"seconds": round(took[-1], 1)} | where()) + "\n")


def latest(lines: Iterable[dict], *keys: str) -> dict:
    """{values of the keys: last line that has them}, in the order in which they were first measured."""
    return {tuple(line[key] for key in keys): line for line in lines}


def markdown(head: list, rows: list[list]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A text with its tables as they are now: each between <!-- table NAME --> and <!-- end -->."""

    def table(match: re.Match) -> str:
        name = match[2]
        return f"{match[1]}\n{tables[name]()}\n{match[3]}" if name in tables else match[0]

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", table, text, flags=re.DOTALL)


def fill(path: Path, tables: dict[str, Callable[[], str]]) -> None:
    """Puts tables into a file."""
    text = path.read_text(encoding="utf-8")
    path.write_text(filled(text, tables), encoding="utf-8")
