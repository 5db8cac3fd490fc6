"""Commands in READMEs are those that the programs take; README's run, and print what README says that they print."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.startswith("python ")]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/README.md"))]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def run(command, **options):
    """Runs a shell command of README's, with this Python; returns what it printed."""
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_first_command_prints_what_follows():
    command = re.search(r"&& (python roe.py .*)", README)[1]
    (printed,) = [block for kind, block in BLOCKS if kind == "" and "def __init__" in block]
    assert run(command).startswith("\n" + printed.rstrip("\n"))


def named(text):
    """The command lines of a text that run a program of ours, in blocks and between backticks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]
    return [found[0] for line in lines if (found := re.search(r"python \S+\.py.*", line))]


class Parsed(Exception):
    """A program has parsed its command line."""


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_every_command_line_parses(path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*args):
        parse(*args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.chdir(ROOT)
    commands = named(path.read_text(encoding="utf-8"))
    assert commands or path.parent.name == "tiny"
    for command in commands:
        _, program, *arguments = shlex.split(re.sub(r" < \w+| > \w+| \.\.\.$", "", command), comments=True)
        if "argparse" not in Path(program).read_text(encoding="utf-8"):
            continue
        monkeypatch.setattr("sys.argv", [program, *arguments])
        monkeypatch.syspath_prepend(str(Path(program).parent))
        try:
            runpy.run_path(program, run_name="__main__")
        except Parsed:
            pass
        except ImportError as error:
            assert error.name.split(".")[0] in ("mlx", "mlx_lm", "vllm", "lm_eval", "optuna"), command
        else:
            pytest.fail(f"not parsed: {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path):
    (tmp_path / "text").write_text((ROOT / "tiny" / "validation.txt").read_text(encoding="utf-8")[:1500])
    text, more = shlex.quote(str(tmp_path / "text")), ""
    for name, real in (("< file", f"< {text}"), ("FILE", text), ("DIRECTORY", "tiny"), ("tiny/heldout.txt", text)):
        command = command.replace(name, real)
    if "tune.py" in command:
        command, more = command.replace("tau.json ", f"{tmp_path}/tau.json --trials 2 ", 1), "rosters"
    assert run(command) or more


def test_python_lines(capsys):
    """Those that are whole: two loops print one text, since the second is the first by hand."""
    names = {}
    for block in PYTHON:
        compile(block, "README.md", "exec")
        if "AutoModelForCausalLM" not in block and "predictions" not in block:
            exec(block, names)
    written = capsys.readouterr().out
    assert written[: len(written) // 2] == written[len(written) // 2 :] != ""
    assert names["log_probs"].shape == (8, len(names["tokens"]) - 1)


def test_five_lines():
    """They compute what `roe.py` does, for a layer and a token."""
    import torch

    import roe

    E, L, n, k, seed, position, layer = 16, 6, 4, 2, 3, 7, 2
    tau = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.0])
    names = {name: value for name, value in locals().items() if name != "roe"} | {"gumbel": roe.gumbel}
    names["logits"], names["predictions"] = torch.randn(1, 1, E), torch.randn(n, 10)
    (block,) = [block for block in PYTHON if "predictions" in block]
    exec(block, names)
    weights, indices = roe.stochastic_route(names["logits"], names["noise"][:, None, layer], k)
    assert torch.equal(names["indices"], indices) and torch.equal(names["weights"], weights)
    torch.testing.assert_close(names["p"].log(), roe.aggregate(names["predictions"]))
