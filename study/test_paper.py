"""Tests of the paper's tables: on tasks that are files, with the embedded model and a small random Mixtral."""

import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("optuna", reason="needs the extra tune")
import paper
from lm_eval.tasks import TaskManager
from lm_eval_roe import RoE
from test_lm_eval import mixtral  # noqa: F401

import roe
from load import load

torch.set_num_threads(1)
EMBEDDED = Path(roe.__file__).parent / "tiny"
SMALL = ["--trials", 2, "--seeds", 2, "--rosters", 3, "--limit", 16]
TASKS = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "validation_split": "others",
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "training_split": "others",
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
        "validation_split": "others",
    },
}


def write_tasks(path: Path, tasks: dict, rows: dict) -> Path:
    """A directory of task files and their questions: rows {split: [...]}, or for each task."""
    for name, task in tasks.items():
        files = {}
        for split, documents in rows.get(name, rows).items():
            files[split] = str(path / f"{name}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(document) + "\n" for document in documents))
        data = {"data_files": files, "cache_dir": str(path / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
        (path / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The ends of lines of code, half of them as the model itself would write them, so that some are right."""
    text = (EMBEDDED / "validation.txt").read_text()
    lines = [line for line in text.splitlines() if len(line.split()) > 3][:60]
    model, tokenizer = load(EMBEDDED, "cpu")
    documents = []
    for i, line in enumerate(lines):
        middle = line.rindex(" ")
        tokens = tokenizer.encode(line[:middle]).ids
        written = tokenizer.decode(list(roe.generate(model, tokens, 1, max_new_tokens=3))).split("\n")[0]
        answers = [(i % 2 and written) or line[middle:], " " + lines[i - 1].split()[-1], " " + lines[i - 2].split()[-1]]
        documents.append({"question": line[:middle], "answer": answers[0], "choices": answers, "label": 0})
    rows = {"asked": documents[:40], "others": documents[40:]}
    tasks = {name: {"test_split": "asked"} | task for name, task in TASKS.items()}
    return write_tasks(tmp_path_factory.mktemp("tasks"), tasks, rows)


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path, tasks):
    """Runs the program in this process; returns status, standard output and error."""

    def run(*options, model=EMBEDDED, include_path=tasks, output=tmp_path / "out"):
        places = ["--model", model, "--include-path", include_path, "--output", output]
        options = [*places, "--model-args", "device=cpu,dtype=float32", *options]
        monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, options)])
        status = 0
        try:
            paper.main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


def runs(output: Path, **what) -> list[dict]:
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    return [line for line in lines if what.items() <= line.items()]


def table(output: Path) -> list[list[str]]:
    lines = (output / "table.md").read_text().splitlines()[4:]
    return [line[2:-2].split(" | ") for line in lines]


def test_the_table(cli, tasks, tmp_path):
    """Its numbers are those of the runs, by hand; the temperatures are those of the best trial."""
    status, out, err = cli(*SMALL, "--tasks", *TASKS)
    output = tmp_path / "out"
    assert status == 0, err
    assert out == (output / "table.md").read_text().split("\n\n")[1]
    assert [row[:2] + row[4:5] for row in table(output)] == [
        ["choosing", "acc", "3"],
        ["choosing", "acc_norm", "3"],
        ["writing", "exact_match", "3"],
        ["reading", "perplexity", "2"],
        ["reading", "perplexity", "3"],
    ]
    for task, measure, questions, clean, rosters, noisy, difference, worth, *_ in table(output):
        n = int(rosters)
        (before,) = runs(output, task=task, part="asked", questions=16, rosters=1)
        trials = runs(output, task=task, part="search", rosters=n)
        best = max((t for t in trials if t["questions"] > 4), key=lambda t: sum(t["values"]["log-likelihood"]))
        seeds = runs(output, task=task, part="asked", questions=16, rosters=n, tau=best["tau"])
        assert questions == "16" and len(trials) == 3 and [line["seed"] for line in seeds] == [1, 2]
        # L is 3 where a model chooses, which of 6 layers leaves none, so that it is 2; else 1.
        inner = task != "choosing"
        assert [0 < tau <= 0.5 for tau in best["tau"]] == [False, inner, True, True, inner, False]
        if task != "reading":
            one = before["values"][measure]
            several = [(a + b) / 2 for a, b in zip(*(line["values"][measure] for line in seeds))]
            change = [b - a for a, b in zip(one, several)]
            error = lambda x: statistics.stdev(x) / math.sqrt(16)
            shown = lambda x: f"{100 * statistics.mean(x):.2f} ± {100 * error(x):.2f} %"
            assert (clean, noisy) == (shown(one), shown(several)) and 0 < statistics.mean(one) < 1
            assert difference == f"{100 * statistics.mean(change):+.2f} ± {100 * error(change):.2f} points"
        else:
            model, tokenizer = load(EMBEDDED, "cpu")
            questions = [json.loads(line)["question"] for line in (tasks / "reading-asked.jsonl").open()][:16]
            ids = [tokenizer.encode(question).ids for question in questions]
            tokens = sum(map(len, ids))
            total = lambda line: sum(line["values"]["log-likelihood"])
            assert total(before) == pytest.approx(sum(roe.score(model, [0, *text], 1).sum().item() for text in ids))
            for line in seeds:
                scores = [roe.score(model, [0, *text], n, line["tau"], line["seed"])[-1].sum().item() for text in ids]
                assert line["values"]["log-likelihood"] == pytest.approx(scores, rel=1e-5)  # in other chunks
            one, several = -total(before) / tokens, -statistics.mean(map(total, seeds)) / tokens
            assert float(clean.split()[0]) == pytest.approx(math.exp(one), abs=1e-3)
            assert float(noisy.split()[0]) == pytest.approx(math.exp(several), abs=1e-3)
            assert difference.split()[0] == f"{100 * (math.exp(several - one) - 1):+.2f}"
            assert worth == f"{100 * ((one / several) ** (1 / 0.076) - 1):+.1f} %"


def test_clean_runs_equal_the_hf_model(cli, mixtral, monkeypatch, tasks, tmp_path):  # noqa: F811
    """Those of the embedded model and of one on transformers, with lm-eval's own accuracies and log-likelihoods."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda found: None)  # takes seconds
    for model in (EMBEDDED, mixtral.path):
        output = tmp_path / model.name
        status, _, err = cli(*SMALL, "--tasks", *TASKS, model=model, output=output)
        assert status == 0, err
        arguments = {"pretrained": str(model), "dtype": "float32", "device": "cpu"}
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        options = {"model": "hf", "model_args": arguments, "tasks": list(TASKS), "limit": 16, "task_manager": manager}
        expected = lm_eval.simple_evaluate(**options, bootstrap_iters=0, log_samples=True)
        for task, metrics in {"choosing": ["acc", "acc_norm"], "writing": ["exact_match"]}.items():
            (clean,) = runs(output, task=task, rosters=1, questions=16)
            for metric in metrics:
                assert statistics.mean(clean["values"][metric]) == expected["results"][task][f"{metric},none"]
        (clean,) = runs(output, task="reading", rosters=1, questions=16)
        found = [sample["resps"][0][0] for sample in expected["samples"]["reading"]]
        assert clean["values"]["log-likelihood"] == pytest.approx(found, rel=1e-4)  # sums in another order
        assert len(runs(output, rosters=3, questions=16, part="asked")) == 6
    (tau,) = {str(line["tau"]) for line in runs(output, task="choosing", rosters=3, seed=1)}
    first, *middle, last = json.loads(tau)
    assert first == last == 0 and all(0 < value <= 0.3 for value in middle)  # Mixtral's highest


def test_a_run_that_was_cut_goes_on(cli, monkeypatch, tmp_path):
    """Nothing is run twice, and the table is that of a run in one go."""
    whole, cut, left = tmp_path / "whole", tmp_path / "cut", 10**6
    options = ["--tasks", "choosing", "reading", "--seeds", 2, "--rosters", 2, "--limit", 6]  # 12 trials: 10 are random

    def passes(function, *arguments):  # `left` runs, and the next one is interrupted
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return function(*arguments)

    monkeypatch.setattr(paper, "likelihoods", partial(passes, paper.likelihoods))
    monkeypatch.setattr(paper, "measures", partial(passes, paper.measures))
    values = lambda output: [(line["task"], line["tau"], line["seed"], line["values"]) for line in runs(output)]
    assert cli(*options, "--trials", 12, output=whole)[0] == 0
    for done in (2, 12, 33):  # among the first questions, in a search, and before the last trial
        left = done - (len(values(cut)) if cut.exists() else 0)
        assert cli(*options, "--trials", 12, output=cut)[0] == 130
        assert values(cut) == values(whole)[:done]
        with (cut / "runs.jsonl").open("a") as file:
            file.write('{"task": "choo')  # what had been written when the power went
        left = 0  # it is dropped, which must not wait for the next run
        assert cli(*options, "--trials", 12, output=cut)[0] == 130
    left = 3
    assert cli(*options, "--trials", 12, output=cut)[0] == 0
    assert values(cut) == values(whole) and left == 0
    assert (cut / "table.md").read_text() == (whole / "table.md").read_text()
    assert cli(*options, "--trials", 12, output=cut)[0] == 0  # all is there
    assert cli(*options, "--trials", 13, output=cut)[0] == 130  # but one more trial is not


def test_hours(cli, monkeypatch, tmp_path):
    """Four questions of each kind of run say how long all will take; what is done is told apart."""
    clock = iter(range(10**6))
    monkeypatch.setattr(paper, "time", SimpleNamespace(perf_counter=lambda: 3600 * next(clock)))  # a run takes an hour
    said = "about {0:.2f} hours, of which {1:.2f} are done: writing {0:.2f}"
    whole = 40 / 4 + 2 * 20 / 4 + 3 * 40 / 4  # 40 questions; 2 trials with the 20 of the other split; 3 seeds
    options = ["--tasks", "writing", "--trials", 2, "--seeds", 3, "--rosters", 2]
    assert said.format(whole, 3) in cli(*options)[2]
    assert said.format(whole, 3 + 1 + 2 + 3) in cli(*options)[2]


# ---- lm-eval's own tasks, with a few made-up questions ---------------------------------------------------------------

ARC = {"question": "What is {i}?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
QUESTIONS = {
    "gsm8k/gsm8k": {"question": "What is {i} + 1?", "answer": "It is {i} + 1.\n#### {i}1"},
    "arc/arc_easy": ARC,
    "arc/arc_challenge": ARC,
    "openbookqa/openbookqa": ARC | {"question_stem": "Number {i} is"},
    "siqa/siqa": {"context": "{i}.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    "hellaswag/hellaswag": {
        "activity_label": "Counting",
        "ctx_a": "{i} is.",
        "ctx_b": "then",
        "endings": ["it ends.", "two.", "three.", "four."],
        "label": "1",
    },
    "wikitext/wikitext": {"page": "A page , the {i} th @-@ one ."},
    "humaneval/humaneval": {
        "prompt": "def f{i}():\n",
        "canonical_solution": "    return {i}\n",
        "test": "def check(f):\n    assert f() == {i}",
        "entry_point": "f{i}",
    },
    "humaneval/humaneval_plus": {},
}
QUESTIONS["humaneval/humaneval_plus"] = QUESTIONS["humaneval/humaneval"]
SEARCHED = {  # the first question that temperatures are searched on
    "gsm8k": ("Question: What is 10 + 1?\nAnswer:", " It is 10 + 1.\n#### 101"),
    "arc_easy": ("Question: What is 20?\nAnswer:", " two"),
    "arc_challenge": ("Question: What is 20?\nAnswer:", " two"),
    "openbookqa": ("Number 20 is", " two"),
    "social_iqa": ("Q: 10. Why?\nA:", " b"),
    "hellaswag": ("Counting: 10 is. Then", " two."),
    "wikitext": ("A page, the 20 th-one .",),
    "humaneval": ("def f0():\n", "    return 0\n"),
    "humaneval_plus": ("def f0():\n", "    return 0\n"),
}


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """lm-eval's tasks with questions of ours: splits train, validation and test begin with number 10, 20 and 0."""
    judge = SimpleNamespace(compute=lambda references, predictions, k: ({"pass@1": float("1" in references[0])}, None))
    monkeypatch.setattr("evaluate.load", lambda name: judge)  # what runs the code is on the hub
    filled = lambda value, i: json.loads(json.dumps(value).replace("{i}", str(i)))
    tasks, rows = {}, {}
    for path, question in QUESTIONS.items():
        file = Path(lm_eval.__file__).parent / "tasks" / f"{path}.yaml"
        name = "social_iqa" if "siqa" in path else file.stem
        tasks[name] = {"task": name, "include": str(file)}
        if name in ("gsm8k", *paper.CODE):
            tasks[name]["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
        starts = {"test": 0} if name in paper.CODE else {"train": 10, "validation": 20, "test": 0}
        rows[name] = {split: [filled(question, start + i) for i in range(7)] for split, start in starts.items()}
    return write_tasks(tmp_path, tasks, rows)


def test_lm_evals_own_tasks(cli, monkeypatch, own_tasks, tmp_path):
    """All are asked; temperatures are searched on right answers of the validation split, of the training split where
    validation is asked or not there, of a fifth of HumanEval."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    names = paper.TASKS + paper.CODE
    options = ["--trials", 1, "--seeds", 1, "--rosters", 2, "--confirm-run-unsafe-code"]
    status, _, err = cli(*options, include_path=own_tasks)
    assert status == 0, err
    chosen = [(name, measure, "7") for name in paper.TASKS[1:4] for measure in ("acc", "acc_norm")]
    assert [tuple(row[:3]) for row in table(tmp_path / "out")] == [
        ("gsm8k", "exact_match, strict-match", "7"),
        ("gsm8k", "exact_match, flexible-extract", "7"),
        *chosen,
        ("social_iqa", "acc", "7"),
        ("hellaswag", "acc", "7"),
        ("hellaswag", "acc_norm", "7"),
        ("wikitext", "perplexity", "7"),
        ("humaneval", "pass@1, create_test", "5"),
        ("humaneval_plus", "pass@1, create_test", "5"),
    ]
    for line in runs(tmp_path / "out", task="humaneval", part="asked", questions=5):
        assert line["values"] == {"pass@1, create_test": [1, 0, 0, 0, 0]}  # questions 1, 2, 3, 4, 6; see `judge`
    manager, lm = TaskManager(include_path=str(own_tasks), include_defaults=False), RoE(EMBEDDED, device="cpu")
    for name, task in manager.load(names)["tasks"].items():
        divided = paper.prepare(task, lm, None, None)
        *context, answer = divided.search[0]
        *expected, right = SEARCHED[name]
        assert answer == right and all(text.endswith(end) for text, end in zip(context, expected, strict=True))
        assert str(context).count("Question") == {"gsm8k": 6, "arc_easy": 1, "arc_challenge": 1}.get(name, 0)
        assert divided.counts == ([2, 4, 8, 16, 32] if name == "wikitext" else [32])


def test_bad_input(cli, monkeypatch, own_tasks, tmp_path):
    """One line that says what to do, and status 2."""
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "runs.jsonl").write_text("steps: 3\n")
    code = {"include_path": own_tasks}
    allow = "--confirm-run-unsafe-code"
    refused = [
        (cli("--tasks", "writing", "reeding"), "no task reeding; see `lm-eval ls tasks`, or give an --include-path"),
        (cli("--tasks", "writing", model=tmp_path / "nothing"), "there is no directory"),
        (cli("--tasks", "writing", output=tmp_path / "file"), "is not a directory; choose another --output"),
        (cli("--tasks", "writing", output=tmp_path / "foreign"), "is not what this program wrote"),
        (cli("--tasks", "writing", "--rosters", 1), "must be from 2 to 1024, not 1"),
        (cli("--tasks", "writing", "--model-args", "margin=0.5"), "an OLMoE has no argument margin; leave it out"),
        (cli("--tasks", "humaneval", **code), "set HF_ALLOW_CODE_EVAL=1 and give --confirm-run-unsafe-code"),
        (cli(allow, **code), "humaneval runs code that the model wrote; set HF_ALLOW_CODE_EVAL=1"),
    ]
    for (status, out, err), sentence in refused:
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("paper.py: error: ") and sentence in err
