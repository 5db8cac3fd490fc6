"""Tests of perplexities: the table against `score` and against separate runs of transformers; and what is refused.

Tolerances are those of test_roe.py.
"""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import perplexity
import pytest
import torch

import roe
import test_roe
from load import load, read_tokenizer
from test_roe import BAD_ARGUMENTS, INDEX, NOT_OF_SCORES, ROOT, SETTINGS, SINGLE, rewrite, save, separate_scores

torch.set_num_threads(1)
NAME = "perplexity.py"
program = partial(test_roe.program, file="study/perplexity.py")
refused = partial(test_roe.refused, name=NAME)


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs the program in this process, on the CPU; returns exit status, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [NAME, "--device=cpu", *map(str, arguments)])
        try:
            perplexity.main()
        except SystemExit as error:
            return error.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run


@pytest.fixture
def small(tmp_path):
    """A directory with a small random model."""
    path = tmp_path / "small"
    path.mkdir()
    save(path, changes={"num_key_value_heads": 2})
    return path


@pytest.fixture
def text(tmp_path):
    """A file with a short text."""
    file = tmp_path / "text"
    file.write_text("some text")
    return file


def rows(out):
    """The table: counts of rosters, perplexities, changes."""
    header, *lines = out.splitlines()
    assert header == "rosters  perplexity  change"
    return [(int(n), float(value), change) for n, value, change in map(str.split, lines)]


# ---- The table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ({}, {"seed": 3}, {"weights": "clean"}))
def test_table(cli, tmp_path, settings):
    model, tokenizer = load(device="cpu", dtype="float32")
    text, tau = "import os\n\n\ndef join(*paths):\n    return os.path.join(*paths)\n", [0, 0.1, 0.2, 0.3, 0.4, 0]
    (tmp_path / "text.py").write_text(text)
    (tmp_path / "tau.json").write_text(json.dumps(tau))
    scores = roe.score(model, tokenizer.encode(text).ids, 8, tau, **settings)
    options = [f"--{name}={value}" for name, value in settings.items()]
    options += ["--tau", tmp_path / "tau.json", "--dtype=float32", "--rosters", 2, 8, 1]
    status, out, err = cli(tmp_path / "text.py", *options)
    assert (status, err) == (0, "") and [n for n, *_ in rows(out)] == [2, 8, 1]
    one = math.exp(-scores[0].mean())
    for n, value, change in rows(out):
        expected = math.exp(-scores[n - 1].mean())
        assert value == pytest.approx(expected, abs=1e-4)  # as it is printed
        assert change[0] in "+-" and float(change[:-1]) == pytest.approx(100 * (expected / one - 1), abs=0.01)


def test_settings_against_separate_runs(cli, small, tmp_path, monkeypatch):
    """Those of test_roe.py that concern scores."""
    monkeypatch.chdir(tmp_path)
    Path("tau.json").write_text("[0.5, 0.0, 1.5, 0.25]")
    Path("text").write_text(text := "class Stack:")
    hf, ids = test_roe.OlmoeForCausalLM.from_pretrained(small), read_tokenizer(small).encode(text).ids
    tables = set()
    for name, (options, arguments) in SETTINGS.items():
        if NOT_OF_SCORES & arguments.keys():
            continue
        scores = separate_scores(hf, ids, **{"rosters": 4, "tau": [0.0, 0.2, 0.2, 0.0]} | arguments)
        status, out, _ = cli("text", "--model", small, *options)
        n, value, _ = rows(out)[-1]
        assert (status, n) == (0, len(scores)), name
        expected = math.exp(-scores[-1].mean())  # off by 1e-4 of itself, as scores may be, and 5e-5 as printed
        assert value == pytest.approx(expected, rel=1e-4, abs=5e-5), name
        tables.add(value)
    assert len(tables) == 8  # no two are alike: every setting did matter


def test_more_rosters_than_a_chunk_has_rows(cli, small, text):
    """Position by position: the first three of 600 are those of three."""
    text.write_text("some")
    run = lambda *rosters: [
        value for _, value, _ in rows(cli(text, "--model", small, "--tau=1", "--rosters", *rosters)[1])
    ]
    few, many = run(2, 3), run(2, 600, 3)
    assert few == pytest.approx([many[0], many[2]], rel=1e-5)  # sums of other shapes


def test_progress_on_a_terminal(cli, text, monkeypatch):
    """Nothing of it stays."""
    text.write_text("some longer text")
    plain = cli(text)
    tqdm = perplexity.tqdm
    monkeypatch.setattr(perplexity, "tqdm", lambda **options: tqdm(**options | {"delay": 0, "mininterval": 0}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = cli(text)
    assert (status, out) == plain[:2] and plain[2] == "" and "scoring: 100%" in err and err[-1] == "\r"


def test_documented_defaults(monkeypatch, capsys):
    expected = {name: test_roe.DEFAULTS[name] for name in ("tau", "skip", "weights", "seed", "device", "dtype")}
    monkeypatch.setattr(sys, "argv", [NAME, "text"])
    assert vars(perplexity.parse_arguments()) == {"file": "text", "rosters": [1, 4], "model": None} | expected
    monkeypatch.setattr(sys, "argv", [NAME, "--help"])
    with pytest.raises(SystemExit):
        perplexity.parse_arguments()
    said = " ".join(capsys.readouterr().out.split())
    for option, default in (
        ("rosters", "1 4"),
        ("tau", "tau.json beside the model, else 0.2"),
        ("skip", "1"),
        ("weights", "perturbed"),
        ("seed", "0"),
    ):
        assert re.search(rf" --{option} (?:(?! --).)*\[{re.escape(default)}\]", said), option


def test_temperatures_beside_the_model(cli, small, text):
    run = partial(cli, text, "--model", small, "--rosters", 8)
    assert run() == run("--tau", 0.2) and run() != run("--tau", 0.5)
    refused(run("--tau", 0.5, "--skip", 2), "--skip must leave layers with noise")
    assert cli(text, "--tau", 0.5, "--skip", 2)[0] == 0  # of six layers
    (small / "tau.json").write_text("[0.0, 0.1, 0.9, 0.3]")
    assert run()[0] == 0 and run() == run("--tau", small / "tau.json") != run("--tau", 0.2)
    for more in ([], ["--tau", small / "tau.json"]):
        refused(
            run("--skip", 0, *more), "--skip must leave layers with noise, and needs a number as --tau, not a tau.json"
        )


def test_hub_ids(cli, small, text, tmp_path, monkeypatch):
    """Weights are of the commit that was described, wherever the model has moved on to."""
    commit, asked = "0" * 40, []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, SINGLE in allow_patterns))
        return folder

    expected = cli(text, "--model", small)
    folder = str(small.rename(tmp_path / commit))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert expected[0] == 0 and cli(text, "--model", "test/model@main") == expected
    assert asked == [("test/model", "main", False), ("test/model", commit, True)]


# ---- The text -------------------------------------------------------------------------------------------------------


def test_a_pipe(cli, text, tmp_path, monkeypatch):
    """It is read once, and to a bound."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(times):
        with open(pipe, "wb", buffering=0) as opened:
            for _ in range(times):
                opened.write(b"some text")

    monkeypatch.setattr("load.MOST_BYTES", 9)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write, 1)
        assert cli(pipe) == cli(text)
        written = thread.submit(write, 10**6)
        refused(cli(pipe), "pipe': it has more than 9 bytes; give a part of it")
        with pytest.raises(BrokenPipeError):
            written.result()


def test_byte_order_marks_are_dropped(cli, tmp_path):
    for name, text in (("with", "\ufeffimport os\n"), ("without", "import os\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert cli(tmp_path / "with") == cli(tmp_path / "without")


def test_carriage_returns_are_said(cli, tmp_path):
    (tmp_path / "\x1b[2J").write_bytes(b"a\r\nb")
    status, _, err = cli(tmp_path / "\x1b[2J")
    assert status == 0 and "has carriage returns" in err and err.count("\n") == 1 and err[:-1].isprintable()


@pytest.mark.parametrize(
    "content, sentence",
    (
        (b"", "give one text of at least 2 token ids, not [0]"),
        (b"x", "give one text of at least 2 token ids, not [1]"),
        (b"\xff\xfe", "text' cannot be used: UnicodeDecodeError"),
    ),
)
def test_bad_texts(cli, text, content, sentence):
    text.write_bytes(content)
    refused(cli(text), sentence)


# ---- What is refused ------------------------------------------------------------------------------------------------

OPTIONS = ("--rosters", "--tau", "--skip", "--weights", "--seed", "--model", "--device", "--dtype")
SHARED = {
    name: bad for name, bad in BAD_ARGUMENTS.items() if bad[0][:1] and bad[0][0] in OPTIONS and name != "two counts"
}


@pytest.mark.parametrize("name", SHARED)
def test_bad_settings(cli, name):
    """All that roe.py refuses, too."""
    arguments, sentence = SHARED[name]
    refused(cli(__file__, *arguments), sentence)


@pytest.mark.parametrize(
    "arguments, sentence",
    (
        ([], "the following arguments are required: FILE"),
        (["missing.txt"], "'missing.txt' cannot be used: No such file or directory; give text in UTF-8"),
        (["\x1b[2J"], r"'\x1b[2J' cannot be used: No such file or directory"),
        ([""], "'' cannot be used: No such file or directory; give text in UTF-8"),
        ([ROOT], "cannot be used: Is a directory; give text in UTF-8"),
        (["/dev/zero"], "'/dev/zero': it has more than 16,777,216 bytes"),
        ([__file__, "--rosters", "4", "0"], "--rosters: must be from 1 to 1024, not 0"),
        ([__file__, "--rosters"], "--rosters: expected at least one argument"),
        *(
            ([__file__, option], f"unrecognized arguments: {option}")
            for option in (
                "--prompt=x",
                "--cache=branching",
                "--chat",
                "--temperature=1",
                "--max-new-tokens=9",
                "--ppl",
            )
        ),
    ),
)
def test_bad_arguments(cli, arguments, sentence):
    refused(cli(*arguments), sentence)


def test_nothing_is_read_before_settings_are_checked(cli, small, text):
    """Of the model there is only what describes it: each setting is refused before the weights are missed."""
    (small / SINGLE).unlink()
    run = partial(cli, text, "--model", small)
    refused(run(), f"{INDEX} cannot be used: No such file or directory; download or save the model again")
    refused(run("--tau", "-1"), "tau must be a number from 0 to 100, not -1.0")
    refused(run("--skip", "2"), "--skip must leave layers with noise")
    (small / "tau.json").write_text("[1, 2]")
    refused(run(), "tau has 2 values, but the model has 4 layers")
    (small / "tau.json").unlink()
    text.write_text("x")
    refused(run(), "give one text of at least 2 token ids, not [1]")
    test_roe.tokenizer_with(vocab={"x": 1, "y": 304})(small)
    text.write_text("xy")
    refused(run(), "the text has the token id 304, but vocab_size is only 304")


def test_predictions_that_are_not_finite(cli, small, text):
    """Of weights that are finite: products overflow in float16."""
    rewrite(small / SINGLE, lambda tensors: tensors["model.norm.weight"].fill_(6e4))
    refused(cli(text, "--model", small, "--dtype", "float16"), "predictions are not finite")


def test_how_scoring_ends(cli, text, monkeypatch):
    def end(error):
        def score(*_, **__):
            raise error

        monkeypatch.setattr(roe, "score", score)
        return cli(text)

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):
        refused(end(error), "there is not enough memory; give fewer --rosters")
    for message in ("CUDA error: an illegal memory access was encountered", "another one"):  # faults of ours
        with pytest.raises(RuntimeError, match=message):
            end(RuntimeError(message))
    assert end(KeyboardInterrupt()) == (130, "", "")


# ---- As a program ---------------------------------------------------------------------------------------------------


def test_reader_that_leaves(cli, text, monkeypatch):
    """What `head` does: no error, and nothing that Python would fail to write at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert cli(text) == (0, "", "")
    sys.stdout.close()


def test_as_a_program(cli, text):
    """Also where streams are closed, and without asserts, docstrings and numpy, about which torch would complain."""
    status, out, _ = cli(text)
    assert status == 0 and program("--device=cpu", text) == (0, out, "")
    assert program("--device=cpu", text, closing="2>&-") == (0, out, "")
    assert program("--device=cpu", text, closing=">&-") == (0, "", "")
    assert program(text, "--rosters", "0", closing="2>&-") == (2, "", "")
    refused(program(text, "--rosters", "0", closing=">&-"), "--rosters: must be from 1 to 1024, not 0")
    (text.parent / "numpy.py").write_text("raise ModuleNotFoundError")
    environment = os.environ | {"PYTHONPATH": str(text.parent)}
    command = [sys.executable, "-OO", perplexity.__file__, "--device=cpu", text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")
