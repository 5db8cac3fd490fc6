"""The paper's tasks and its figure 5, with any mixture-of-experts model: the clean model beside n rosters.

    python study/paper.py --model allenai/OLMoE-1B-7B-0924 --output DIR

Every task is asked by lm-evaluation-harness, with its prompts and greedily: of the clean model, then of n rosters with
several seeds. Before that their temperatures are searched: those under which the right answers to other questions of
the task are likeliest. A task of texts, `wikitext`, has a perplexity instead, for 2, 4, 8 ... n rosters. DIR/table.md
gets rows as they are done, DIR/runs.jsonl a line for each run: the same command goes on where an earlier one was cut.

HumanEval runs code that the model wrote. It is asked with --confirm-run-unsafe-code and HF_ALLOW_CODE_EVAL=1 only. The
paper's SVAMP, AddSub, SingleEQ and MultiArith lm-eval does not have; tasks of your own come in by --include-path.
It needs: pip install -e ".[eval,tune]". Exit status: 0; 2 for bad input; 130 when interrupted.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import optuna
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from lm_eval_roe import RoE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from report import code, where

from roe import TAU, fail, number

# WikiText-103 and lm-eval's WikiText-2 have the same articles for validation and test.
TASKS = ["gsm8k", "arc_easy", "arc_challenge", "openbookqa", "social_iqa", "hellaswag", "wikitext"]
CODE = ["humaneval", "humaneval_plus"]
# Table 1: rosters; the highest temperature and L, layers without noise at each end, where a model writes (math, code)
# and where it chooses (commonsense). For Mixtral the two pairs are known, but not which is for what.
OLMOE = (32, (0.5, 1), (0.5, 3))  # and models that the paper does not have
SETTINGS = {"olmoe": OLMOE, "mixtral": (64, (0.25, 5), (0.3, 3)), "gpt_oss": (64, (0.2, 5), (0.2, 5))}
PAPER = {("olmoe", 32): "+50 % (OLMoE-1B-7B)"}  # figure 5: the 7B model is worth one of 10.5B
KAPLAN = 0.076  # loss falls with this power of the parameters (arXiv 2001.08361)
HEAD = "Task,Measure,Questions,Clean,Rosters,With rosters,Difference,Worth in parameters,Paper".split(",")
FIRST = 4  # questions, from which the time for all of them is estimated
FEWSHOT_SEED = 1234  # lm-eval's own


# ---- What is asked ---------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A task of lm-eval, and what of it is used for what. A text is a tuple of itself alone."""

    name: str
    task: ConfigurableTask
    asked: list  # the numbers of questions, or texts
    search: list  # other ones: tuples of context and right answer, or texts
    counts: list[int]  # of rosters
    highest: list[float]  # temperature, one per layer


def prepare(task: ConfigurableTask, lm: RoE, rosters: int | None, limit: int | None) -> Task:
    """Divides a task: temperatures are searched on another split than what is asked, or on a fifth of its only one."""
    questions, texts = list(task.eval_docs), task.OUTPUT_TYPE == "loglikelihood_rolling"
    numbers = list(range(len(questions)))
    if task.has_test_docs() and task.has_validation_docs():
        others = list(task.validation_docs())
    elif task.has_training_docs():
        others = list(task.training_docs())
    else:
        others, numbers = questions[::5], [i for i in numbers if i % 5]
    most = min(limit or 200, 10 if texts else 200)
    others = others[:: max(1, len(others) // most)][:most]  # from all of a split, which may be sorted

    task.set_config("num_fewshot", task.config.num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    search = [context_and_answer(task, question) for question in others]
    asked = [context_and_answer(task, questions[i]) if texts else i for i in numbers[:limit]]

    default, writes, chooses = SETTINGS.get(lm.config.model_type, OLMOE)
    n = rosters or default
    highest, skip = chooses if task.OUTPUT_TYPE == "multiple_choice" else writes
    lm.add_rosters(n, highest, min(skip, (len(lm.tau) - 1) // 2))  # small models have fewer layers
    counts = [2**i for i in range(1, 10) if 2**i < n] if texts else []
    return Task(task.task_name, task, asked, search, [*counts, n], lm.tau)


def context_and_answer(task: ConfigurableTask, question: dict) -> tuple[str, ...]:
    """What a model reads before the right answer, and the answer; or a text."""
    target = task.doc_to_target(question)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return (target,)
    context = task.fewshot_context(question, task.config.num_fewshot)
    if "canonical_solution" in question:  # HumanEval's; its target is the test of it
        return context, question["canonical_solution"]
    if task.OUTPUT_TYPE == "multiple_choice":
        target = task.doc_to_choice(question)[target]
    return context, f"{task.config.target_delimiter}{target}"


# ---- Runs ------------------------------------------------------------------------------------------------------------


def likelihoods(lm: RoE, found: list[tuple[str, ...]]) -> dict[str, list[float]]:
    """The log-likelihood of every right answer, or text."""
    requests = [SimpleNamespace(args=pair) for pair in found]
    if len(found[0]) == 1:
        return {"log-likelihood": lm.loglikelihood_rolling(requests)}
    return {"log-likelihood": [answer for answer, _ in lm.loglikelihood(requests)]}


def measures(lm: RoE, task: ConfigurableTask, numbers: list[int]) -> dict[str, list[float]]:
    """All that lm-eval measures of a task, for each of the questions with these numbers."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    name, values = task.task_name, {}
    options = {"samples": {name: numbers}, "bootstrap_iters": 0, "confirm_run_unsafe_code": True}  # `named` has asked
    for sample in lm_eval.evaluate(lm, {"tasks": {name: task}}, **options)["samples"][name]:
        for metric in sample["metrics"]:
            measure = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
            values.setdefault(measure, []).append(float(sample[metric]))
    return values


class Runs:
    """The runs of a model, as lines of JSON in a file: one that is there, of the same code, is not done again."""

    def __init__(self, path: Path, lm: RoE, model: dict):
        self.path, self.lm, self.model = path, lm, model | {"code": code()}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last one may have been cut
        try:
            self.lines = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} is not what this program wrote ({error}); choose another --output") from error
        path.write_text("".join(lines))

    def run(self, task: Task, part: str, rosters=1, tau: float | list[float] = 0.0, seed=0, count=None) -> dict:
        """The line of a run of what is `asked`, or of `search`; of the first `count` of it."""
        questions = getattr(task, part)[:count]
        what = {"task": task.name, "part": part, "questions": len(questions)}
        what |= {"rosters": rosters, "seed": seed, "tau": tau} | self.model
        for line in self.lines:
            if what.items() <= line.items():
                return line
        print(f"{what['task']}: {part}, {len(questions)} questions, {rosters} rosters, seed {seed}", file=sys.stderr)
        start = time.perf_counter()
        self.lm.add_rosters(rosters, tau, seed=seed)
        if isinstance(questions[0], tuple):
            values = likelihoods(self.lm, questions)
        else:
            values = measures(self.lm, task.task, questions)
        self.lines.append(what | {"seconds": time.perf_counter() - start, "values": values} | where(self.lm.device))
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        return self.lines[-1]

    def hours(self, task: Task, trials: int, seeds: int) -> float:
        """What all runs of a task will take, by its first questions."""
        start = [min(TAU, tau) for tau in task.highest]
        noisy = [("search", trials), ("asked", seeds)]
        plan = [("asked", 1, 0.0, 1), *((part, n, start, times) for n in task.counts for part, times in noisy)]
        seconds = 0
        for part, n, tau, times in plan:
            first = self.run(task, part, n, tau, count=FIRST)
            seconds += first["seconds"] / first["questions"] * len(getattr(task, part)) * times
        return seconds / 3600

    def search(self, task: Task, rosters: int, trials: int) -> list[float]:
        """The temperatures under which the right answers are likeliest (2.2), as TPE finds them.

        What TPE tries follows from its seed and from what it was told: after a cut it tries the same again.
        """
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        study.enqueue_trial({str(i): min(TAU, tau) for i, tau in enumerate(task.highest)})
        found = []
        for _ in range(trials):
            trial = study.ask()
            tau = [trial.suggest_float(str(i), 0, high) if high else 0.0 for i, high in enumerate(task.highest)]
            total = sum(self.run(task, "search", rosters, tau)["values"]["log-likelihood"])
            study.tell(trial, total)
            found.append((total, tau))
        return max(found)[1]


# ---- The table -------------------------------------------------------------------------------------------------------


def ratio(values: list[float], weights: list[int]) -> tuple[float, float]:
    """The sum of values over that of weights, and its standard error: with weights of 1 those of a mean."""
    values, weights = torch.tensor(values, dtype=torch.double), torch.tensor(weights, dtype=torch.double)
    mean = values.sum() / weights.sum()
    error = (values - mean * weights).std() * math.sqrt(len(values)) / weights.sum()
    return mean.item(), error.item()


def percent(mean: float, error: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f} ± {100 * error:.2f}"


def rows(runs: Runs, task: Task, rosters: int, trials: int, seeds: int) -> Iterator[list]:
    """A row for each measure of a task. Errors are over questions; that of a difference is of every question's own."""
    clean = runs.run(task, "asked")["values"]
    tau = runs.search(task, rosters, trials)
    noisy = [runs.run(task, "asked", rosters, tau, 1 + seed)["values"] for seed in range(seeds)]  # the search had 0
    for measure, before in clean.items():
        after = [sum(values) / seeds for values in zip(*(run[measure] for run in noisy))]
        change = [b - a for a, b in zip(before, after)]
        texts = measure == "log-likelihood"
        weights = [len(runs.lm.tok_encode(*text)) if texts else 1 for text in task.asked]
        (a, da), (b, db), (c, dc) = (ratio(values, weights) for values in (before, after, change))
        if texts:  # from log-likelihoods of a token to perplexities
            worth, paper = (a / b) ** (1 / KAPLAN) - 1, PAPER.get((runs.lm.config.model_type, rosters), "")
            a, b, c = math.exp(-a), math.exp(-b), math.expm1(-c)
            cells = f"{a:.3f} ± {a * da:.3f}", rosters, f"{b:.3f} ± {b * db:.3f}", percent(c, dc, "+") + " %"
            yield [task.name, "perplexity", len(before), *cells, f"{100 * worth:+.1f} %", paper]
        else:
            cells = percent(a, da) + " %", rosters, percent(b, db) + " %", percent(c, dc, "+") + " points"
            yield [task.name, measure, len(before), *cells, "", ""]


# ---- The command line ------------------------------------------------------------------------------------------------


def named(args: argparse.Namespace) -> list[ConfigurableTask]:
    """The tasks to be asked. Raises ValueError: unknown ones; one that runs code, which was not allowed."""
    names = args.tasks or TASKS + CODE * args.confirm_run_unsafe_code
    allowed = args.confirm_run_unsafe_code and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
    for defaults in (False, True):  # lm-eval's own tasks take a while to read
        manager = TaskManager(include_path=args.include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_subtasks]
        if not unknown:
            break
    else:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give an --include-path")
    for name in names:
        if manager.task_index[name].cfg.get("unsafe_code") and not allowed:
            hint = "set HF_ALLOW_CODE_EVAL=1 and give --confirm-run-unsafe-code, or leave it out"
            raise ValueError(f"{name} runs code that the model wrote; {hint}")
    return list(manager.load(names)["tasks"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="directory or hub id, of OLMoE or of what ports/roe_transformers.py takes")
    add("--model-args", default="", help="more arguments of study/lm_eval_roe.py: dtype=float16,parallelize=True")
    add("--output", metavar="DIR", type=Path, required=True, help="where runs.jsonl and table.md are")
    add("--tasks", metavar="NAME", nargs="+", help=f"as lm-eval names them [{' '.join(TASKS + CODE)}]")
    add("--include-path", metavar="DIR", help="of tasks of your own, as lm-eval takes them")
    add("--limit", metavar="N", type=number(int, 1), help="ask only the first questions of each task [all]")
    add("--rosters", metavar="N", type=number(int, 2, 1024), help="[as in the paper: 32; 64 for Mixtral and GPT-OSS]")
    add("--trials", metavar="N", type=number(int, 1), default=50, help="of the search [50]")
    add("--seeds", metavar="N", type=number(int, 1), default=5, help="of n rosters [5]")
    add("--confirm-run-unsafe-code", action="store_true", help="asks HumanEval, too")
    parser.error = fail
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"{args.output} is not a directory; choose another --output")
        tasks = named(args)
        lm = RoE.create_from_arg_obj({"pretrained": args.model} | simple_parse_args_string(args.model_args))
        args.output.mkdir(parents=True, exist_ok=True)
        runs = Runs(args.output / "runs.jsonl", lm, {"model": args.model, "model_args": args.model_args})
        tasks = [prepare(task, lm, args.rosters, args.limit) for task in tasks]
        hours = [runs.hours(task, args.trials, args.seeds) for task in tasks]
        each = ", ".join(f"{task.name} {its_hours:.2f}" for task, its_hours in zip(tasks, hours))
        done = sum(line["seconds"] for line in runs.lines if runs.model.items() <= line.items()) / 3600
        print(f"about {sum(hours):.2f} hours, of which {done:.2f} are done: {each}", file=sys.stderr)
        plan = [(task, n) for task in tasks for n in task.counts]
        results = (row for task, n in plan for row in rows(runs, task, n, args.trials, args.seeds))
        with (args.output / "table.md").open("w", encoding="utf-8") as file:
            print(f"{args.model}, {args.trials} trials, {args.seeds} seeds.\n", file=file)
            for row in chain([HEAD, ["---"] * len(HEAD)], results):
                for stream in (file, sys.stdout):
                    print(f"| {' | '.join(map(str, row))} |", file=stream, flush=True)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
