"""Tests of the paper's tables: on tasks that are files, with the embedded model and a small random Mixtral."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("optuna", reason="needs the extra tune")
import lm_eval
import paper
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_lm_eval import mixtral  # noqa: F401

import roe

torch.set_num_threads(1)
EMBEDDED = Path(roe.__file__).parent / "tiny"
LINES = [line for line in (EMBEDDED / "validation.txt").read_text().splitlines() if len(line.split()) > 3][:90]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "validation_split": "others",
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", " "], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "num_fewshot": 1,
        "fewshot_split": "others",
        "training_split": "others",
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files: the last word of a line, chosen and written, and lines as texts."""
    path = tmp_path_factory.mktemp("tasks")
    documents = []
    for i, line in enumerate(LINES):
        question, answer = line.rsplit(" ", 1)
        choices = [answer, *(other.split()[-1] for other in (LINES[i - 1], LINES[i - 2]))]
        documents.append({"question": question, "answer": answer, "choices": choices, "label": 0})
    files = {"asked": documents[:60], "others": documents[60:]}
    for name, part in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))
    for name, task in TASKS.items():
        data = {"data_files": {part: str(path / f"{part}.jsonl") for part in files}, "cache_dir": str(path / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "asked"}
        (path / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return path


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path, tasks):
    """Runs the program in this process; returns status, standard output and error."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def run(*options, model=EMBEDDED, output=tmp_path / "out"):
        options = ["--model", model, "--include-path", tasks, "--output", output, *options]
        monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, options)])
        status = 0
        try:
            paper.main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


SMALL = ["--trials", 2, "--seeds", 2, "--rosters", 3, "--limit", 12]


def test_try(cli, tmp_path):
    status, out, err = cli(*SMALL, "--tasks", *TASKS)
    print(out, err)
    print((tmp_path / "out" / "table.md").read_text())
    for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines(): print(line[:600])
    assert 0
