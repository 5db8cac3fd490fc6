"""Tests of the search of temperatures: what it finds, and that nothing foreign, broken or interrupted spoils it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.importorskip("optuna")
import tune

import roe
from load import load

torch.set_num_threads(1)
EMBEDDED = Path(roe.__file__).parent / "tiny"
TEXT = (EMBEDDED / "validation.txt").read_bytes()[:400]


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path):
    """Runs the program in this process, in a folder that holds text.py; returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    Path("text.py").write_bytes(TEXT)

    def run(*options, file="text.py"):
        monkeypatch.setattr(sys, "argv", ["tune.py", file, "--rosters", "3", "--device", "cpu", *map(str, options)])
        status = 0
        try:
            tune.main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


def refused(result, sentence):
    status, out, err = result
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("tune.py: error: ") and sentence in err


def values(err):
    """The perplexities that progress lines report."""
    return [float(line.split()[5].rstrip(",")) for line in err.splitlines()]


def log():
    return [json.loads(line) for line in Path("tau.json.log").read_text().splitlines()]


def test_search(cli, monkeypatch):
    """Starts from the default, keeps the best, repeats nothing when resumed; its numbers are those of `roe.score`."""
    status, out, err = cli("--trials", 4, "--tau-max", 0.3, "--seed", 5, "--weights", "clean")
    assert status == 0 and err.startswith("trial 1 of 4: perplexity ") and err.count("\n") == 4
    trials, tau = log(), json.loads(Path("tau.json").read_text())
    best = min(trials, key=lambda trial: trial["perplexity"])
    assert len({trial["perplexity"] for trial in trials}) == 4 and trials[0]["tau"] == [0, 0.2, 0.2, 0.2, 0.2, 0]
    assert tau == best["tau"] and tau[0] == tau[5] == 0 and all(0 <= value <= 0.3 for value in tau)
    assert out == f"tau.json: perplexity {best['perplexity']:.4f} with {tau}\n"
    model, tokenizer = load(device="cpu")
    tokens = tokenizer.encode(TEXT.decode()).ids
    for trial, shown in zip(trials, values(err), strict=True):
        scores = roe.score(model, tokens, 3, trial["tau"], seed=5, weights="clean")
        assert trial["perplexity"] == pytest.approx(scores[-1].mean().neg().exp().item())
        assert shown == pytest.approx(trial["perplexity"], abs=1e-4)

    err = cli("--trials", 6, "--tau-max", 0.3, "--seed", 5, "--weights", "clean")[2]
    assert err.startswith("trial 5 of 6: perplexity ") and err.count("\n") == 2
    assert len({str(trial["tau"]) for trial in log()}) == len(log()) == 6
    replaced = []  # with no trial left, the best is only written again
    monkeypatch.setattr(tune, "replace", lambda output, tau: replaced.append(tau))
    assert cli("--trials", 2, "--tau-max", 0.3, "--seed", 5, "--weights", "clean")[::2] == (0, "")
    assert replaced == [min(log(), key=lambda trial: trial["perplexity"])["tau"]]


def test_several_counts(cli):
    """What is minimised is the mean of their log-perplexities."""
    status, out, err = cli("--trials", 2, "--rosters", 5, 2, 3, 2)
    model, tokenizer = load(device="cpu")
    tokens = tokenizer.encode(TEXT.decode()).ids
    for trial in log():
        logs = [math.log(roe.score(model, tokens, n, trial["tau"])[-1].mean().neg().exp().item()) for n in (2, 3, 5)]
        assert trial["perplexity"] == pytest.approx(math.exp(sum(logs) / 3)) and trial["rosters"] == [2, 3, 5]
    assert status == 0 and f"perplexity {min(values(err)):.4f} with" in out


def test_resumed_search_learns_from_earlier_trials(cli, monkeypatch):
    """The sampler is given every earlier trial, failed ones as failed."""
    perplexities = iter((3.0, float("nan"), 2.0, 4.0))
    monkeypatch.setattr(tune, "score", lambda *_: -torch.tensor(3 * [[next(perplexities)]]).log())
    _, out, err = cli("--trials", 3)
    assert [line.split(": ", 1)[1] for line in err.splitlines()] == [
        "perplexity 3.0000, best 3.0000 (trial 1)",
        "perplexity nan, which is not finite: a failed trial",
        "perplexity 2.0000, best 2.0000 (trial 3)",
    ]
    assert out.startswith("tau.json: perplexity 2.0000 with") and [t["perplexity"] for t in log()] == [3.0, None, 2.0]
    import optuna

    studies, create = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **how: studies.append(create(**how)) or studies[-1])
    assert cli("--trials", 4)[2] == "trial 4 of 4: perplexity 4.0000, best 2.0000 (trial 3)\n"
    assert [(trial.value, trial.params) for trial in studies[0].trials] == [
        (trial["perplexity"], {str(i): trial["tau"][i] for i in range(1, 5)}) for trial in log()
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_all_trials_fail(cli, monkeypatch, bad):
    monkeypatch.setattr(tune, "score", lambda *_: torch.tensor(3 * [[-bad]]))
    status, out, err = cli("--trials", 2)
    assert (status, out) == (2, "") and err.count("a failed trial\n") == 2 and "every trial failed" in err
    assert not Path("tau.json").exists()


def test_trials_belong_to_contents(cli, monkeypatch, tmp_path):
    """Another text, model, dtype or option is another search; another name for the same contents is not."""
    for name in ("model", "copy"):
        shutil.copytree(EMBEDDED, tmp_path / name)
    weights = tmp_path / "model" / "model.safetensors"
    monkeypatch.setattr(tune, "score", lambda *_: torch.tensor(3 * [[-1.0]]))
    assert cli("--trials", 1)[2].count("\n") == 1
    Path("same.py").write_bytes(TEXT)
    for options in (["--model", "copy"], ["--dtype", "float32"], ["--weights", "perturbed"]):
        assert cli("--trials", 1, *options, file="same.py")[::2] == (0, ""), options
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    Path("same.py").write_bytes(TEXT + b"x")
    for file, options in (
        ("same.py", []),
        ("text.py", ["--model", "model"]),
        ("text.py", ["--dtype", "bfloat16"]),
        ("text.py", ["--rosters", 2]),
        ("text.py", ["--rosters", 2, 3]),
        ("text.py", ["--tau-max", 0.4]),
        ("text.py", ["--skip", 2]),
        ("text.py", ["--weights", "clean"]),
        ("text.py", ["--seed", 1]),
    ):
        assert cli("--trials", 1, *options, file=file)[2].startswith("trial 1 of 1: "), options
    assert len(log()) == 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_search_that_is_done_but_cannot_be_printed(tmp_path):
    """Its temperatures are written all the same; and a terminal that lacks the characters of a name gets others."""
    (tmp_path / "text.py").write_bytes(TEXT)
    command = [sys.executable, tune.__file__, "text.py", "--trials", "1", "--rosters", "2", "--output"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = lambda name, out: subprocess.run([*command, name], cwd=tmp_path, env=environment, stdout=out, stderr=-1)
    with open("/dev/full", "w") as full:
        result = run("tau.json", full)
    assert result.returncode == 0 and b"the result is in 'tau.json', but cannot be printed" in result.stderr
    assert len(json.loads((tmp_path / "tau.json").read_text())) == 6
    result = run("τ.json", -1)
    assert result.returncode == 0 and result.stdout.startswith(b"\\u03c4.json: perplexity")


def test_full_disk(cli):
    """The log's last record is cut short: it is dropped, which is said once, and the next runs go on."""
    resource = pytest.importorskip("resource")  # Windows has none
    cli("--trials", 2)
    before, trials, (_, hard) = Path("tau.json").read_bytes(), log(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path("tau.json.log").stat().st_size + 40, hard))
    try:
        refused(cli("--trials", 3), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not Path("tau.json.log").read_bytes().endswith(b"\n") and Path("tau.json").read_bytes() == before
    status, _, err = cli("--trials", 3)
    assert status == 0 and err.startswith("tau.json.log: dropped the last line, which was cut short\ntrial 3 of 3: ")
    assert log()[:2] == trials and len(log()) == 3
    assert cli("--trials", 3)[::2] == (0, "")
    for cut in range(1, len(tune.START) + 2):  # wherever it is cut
        with open("tau.json.log", "ab") as file:
            file.write((tune.START + b"0")[:cut])
        assert "dropped" in cli("--trials", 3)[2] and len(log()) == 3


def test_the_output_is_old_or_new(cli, monkeypatch):
    cli("--trials", 1)
    before = Path("tau.json").read_bytes()
    for name in ("write_bytes", "replace"):

        def full(path, *_):
            path.touch()
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, full)
            refused(cli("--trials", 1), "No space left")
        assert Path("tau.json").read_bytes() == before
        assert sorted(os.listdir()) == ["tau.json", "tau.json.log", "tau.json.log.lock", "text.py"]
    Path("tau.json").unlink()
    assert cli("--trials", 1)[::2] == (0, "") and Path("tau.json").read_bytes() == before


def link(name, target):
    Path(target).touch()
    Path(name).symlink_to(target)


def line_of_a_log():
    return dict.fromkeys(tune.SEARCH, "x") | {"tau": [0, 0.1], "perplexity": 3.5}


def test_a_line_of_a_log():
    assert tune.is_trial(line_of_a_log()) and tune.is_trial(line_of_a_log() | {"perplexity": None})


FOREIGN = {
    "the text": (["--output", "text.py"], lambda: None, "holds no temperatures from text.py.log"),
    "the text is the log": (["--output", "x"], lambda: Path("text.py").rename("x.log"), "x.log is not the log of"),
    "log of something else": ([], lambda: Path("tau.json.log").write_text("{}\n"), "is not the log of a search"),
    "log of one line": ([], lambda: Path("tau.json.log").write_text("notes"), "is not the log of a search"),
    **{
        f"log with {key} {value!r}": (
            [],
            lambda key=key, value=value: Path("tau.json.log").write_text(
                json.dumps(line_of_a_log() | {key: value}) + "\n"
            ),
            "is not the log of a search",
        )
        for key, value in (("tau", None), ("tau", {}), ("tau", ["x"]), ("perplexity", "low"), ("perplexity", []))
    },
    "log of nested JSON": ([], lambda: Path("tau.json.log").write_text("[" * 10**5 + "\n"), "is not the log of"),
    "temperatures from elsewhere": ([], lambda: Path("tau.json").write_text("[0, 1, 1, 1, 1, 0]\n"), "holds no"),
    "directory": ([], lambda: Path("tau.json").mkdir(), "tau.json is not a regular file"),
    "link": ([], lambda: link("tau.json", "other"), "tau.json is not a regular file"),
    "dangling link": ([], lambda: Path("tau.json").symlink_to("nothing"), "tau.json is not a regular file"),
    "the log is a link": ([], lambda: link("tau.json.log", "other"), "tau.json.log is not a regular file"),
    "the log is a pipe": ([], lambda: os.mkfifo("tau.json.log"), "tau.json.log is not a regular file"),
    "device": (["--output", "/dev/null"], lambda: None, "/dev/null is not a regular file"),
    "no such folder": (["--output", "no/tau.json"], lambda: None, "No such file or directory: 'no/tau.json.log'"),
    "empty text": ([], lambda: Path("text.py").write_bytes(b""), "give one text of at least 2 token ids"),
    "no UTF-8": ([], lambda: Path("text.py").write_bytes(b"caf\xe9"), "'text.py' cannot be used: UnicodeDecodeError"),
    "no text": ([], lambda: Path("text.py").unlink(), "text.py"),
    "no model": (["--model", "no/such/model"], lambda: None, "there is no directory no/such/model"),
    "trials 0": (["--trials", 0], lambda: None, "--trials: must be from 1 to"),
    "one roster": (["--rosters", 1], lambda: None, "--rosters: must be from 2 to"),
    "skip -1": (["--skip", -1], lambda: None, "--skip: must be from 0 to"),
    "skip all layers": (["--skip", 3], lambda: None, "no layer is left to tune"),
    "tau-max 0": (["--tau-max", 0], lambda: None, "--tau-max: must be from 0.001 to 100, not 0"),
    "tau-max nan": (["--tau-max", "nan"], lambda: None, "--tau-max: must be from 0.001 to 100, not nan"),
    "seed": (["--seed", 2**70], lambda: None, "--seed: must be from 0 to"),
    "unknown option": (["--trails", 3], lambda: None, "unrecognized arguments"),
    "Optuna is missing": ([], lambda: None, 'needs Optuna; install it with: pip install -e ".[tune]"'),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_bad_input(cli, monkeypatch, tmp_path, name):
    options, prepare, sentence = FOREIGN[name]
    prepare()
    if name == "Optuna is missing":
        monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(tune, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    contents = lambda: {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file() and f.stat().st_size}
    before = contents()
    refused(cli(*options, file="x.log" if name == "the text is the log" else "text.py"), sentence)
    assert contents() == before


def test_a_second_search_is_refused(cli):
    with FileLock("tau.json.log.lock"):
        refused(cli("--trials", 1), "tau.json.log is in use by another search")
    assert cli("--trials", 1)[0] == 0


def test_interrupted_amid_its_imports():
    command = [sys.executable, "-X", "importtime", tune.__file__, "text.py"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "hashlib" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and all(line.startswith("import time:") for line in err.splitlines())


@pytest.mark.parametrize("how, status", ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)))
def test_interrupted(cli, how, status):
    """Stopped amid its trials: what it has found stands and is gone on from."""
    command = [sys.executable, tune.__file__, "text.py", "--rosters", "3", "--device", "cpu", "--trials", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(how)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (status, b"") and lines[2].startswith(b"trial 3 of 10000: ")
    assert b"Traceback" not in err and b"error" not in err
    trials = [json.loads(line) for line in Path("tau.json.log").read_bytes().split(b"\n")[:-1]]
    assert json.loads(Path("tau.json").read_text()) in [trial["tau"] for trial in trials]
    status, _, err = cli("--trials", len(trials) + 1)
    assert status == 0 and f"trial {len(trials) + 1} of {len(trials) + 1}: " in err
