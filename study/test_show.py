"""Tests of shades: which token gets which, on a terminal only, and nothing else changes."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import show
import torch
import torch.nn.functional as F

import roe
from load import load

torch.set_num_threads(1)
OPTIONS = ["--prompt", "def f(x):\n", "--tau", "1", "--rosters", "8", "--max-new-tokens", "40"]


@pytest.fixture
def printed(monkeypatch, capfd):
    """Runs the program in this process, on the CPU; returns what it printed."""

    def run(*arguments, how=show.print_shaded):
        monkeypatch.setattr(sys, "argv", ["show.py", "--device=cpu", *arguments])
        roe.main(how)
        return capfd.readouterr().out

    return run


def test_shade():
    assert show.shade("ab", [(1.0, False)]) == "ab"
    assert (
        show.shade("a\n b", [(0.75, True), (0.5, False)])
        == "\033[4;38;5;16;48;5;215ma\033[0m\n\033[4;38;5;16;48;5;215m b\033[0m"
    )


@pytest.mark.parametrize("options", ([], ["--cache=branching"], ["--temperature=0.8", "--top-p=0.9", "--seed=3"]))
def test_shades_on_a_terminal_only(printed, monkeypatch, options):
    plain = printed(*OPTIONS, *options, how=roe.print_generation)
    assert printed(*OPTIONS, *options) == plain  # not a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shaded = printed(*OPTIONS, *options)
    assert shaded != plain and re.sub("\033\\[[0-9;]*m", "", shaded) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(*OPTIONS, *options) == plain


def test_shades_say_who_chose_what(printed, monkeypatch):
    """A text from votes, those of the average and of each roster: "x" is for its token, "." for another."""
    tokenizer = load(device="cpu")[1]
    tokens = [token for character in "a日bc" for token in tokenizer.encode(character).ids]
    # A character of three tokens: the least agreement, and overruled at the first. Then one that a clean roster alone
    # was sure of, whatever was sampled, and one that was sampled though no roster's first choice.
    votes = ("xxxxx", "x.xxx", "xx.x.", "xxxxx", "..", ".....")

    def generate(*_, watch, **options):
        for token, vote in zip(tokens, votes, strict=True):
            average, *rosters = (F.one_hot(torch.tensor([token if c == "x" else 0]), 4096).float() for c in vote)
            watch(torch.stack(rosters), average, torch.tensor([token]), SimpleNamespace(nbytes=0))
            yield token

    monkeypatch.setattr(roe, "generate", generate)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    expected = "a\033[4;38;5;16;48;5;215m日\033[0mb\033[38;5;16;48;5;203mc\033[0m\n"
    assert printed("--prompt", "x") == expected


def test_as_a_program(printed, monkeypatch):
    command = [sys.executable, Path(show.__file__)]
    done = subprocess.run([*command, "--device=cpu", *OPTIONS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed(*OPTIONS))
    done = subprocess.run([*command, "--prompt", ""], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("show.py: error: give one text of at least 1")
    monkeypatch.setattr(sys, "stdout", None)  # closed
    assert printed(*OPTIONS) == ""
