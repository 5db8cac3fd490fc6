"""Prints the table of model families in ports/README.md: python ports/families.py

Its rows are the names in `FAMILIES` and `REFUSED` of the ports' tests, which are read, not imported: neither vLLM nor
MLX is needed. `FAMILIES` is a dict (or list) whose keys are model types, `REFUSED` a dict of model types and reasons.
"""

import ast
from pathlib import Path

PORTS = {"transformers": "test_transformers.py", "vLLM": "test_vllm.py", "MLX": "test_mlx.py"}


def cells(path: Path) -> dict[str, str]:
    """model_type -> what the table says of it, from the test file of one port; nothing where there is none yet."""
    found = {}
    for node in ast.parse(path.read_text()).body if path.exists() else ():
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name == "FAMILIES":
            keys = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            found |= {ast.literal_eval(key): "tested" for key in keys}
        if name == "REFUSED":
            found |= {kind: f"refused: {why}" for kind, why in ast.literal_eval(node.value).items()}
    return found


def table() -> str:
    columns = [cells(Path(__file__).parent / file) for file in PORTS.values()]
    lines = [f"| family (`model_type`) | {' | '.join(PORTS)} |", f"| --- {'| --- ' * len(PORTS)}|"]
    for kind in sorted(set().union(*columns)):
        lines.append(f"| {kind} | {' | '.join(column.get(kind, 'untried') for column in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
