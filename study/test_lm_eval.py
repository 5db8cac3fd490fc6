"""Tests of what runs evaluations: against lm-eval's own `hf` model, on tasks that are files, without a network."""

import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import roe
from load import load

torch.set_num_threads(1)  # as in test_roe.py

COMMIT = "0123456789abcdef" * 2 + "01234567"
CONTEXT = 64  # of the small model: short, so that prompts and texts are longer
PROSE = "The quick brown fox jumps over the lazy dog. "
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generating": {
        "output_type": "generate_until",
        "doc_to_text": "# {{question}}",  # `hf` cannot take an empty prompt
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n", "er"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
QUESTIONS = [
    ("def read(self, size=-1):", ["return self", "import os", "raise ValueError(size)"]),
    ("", ["An empty context", "x"]),
    ("Trailing spaces   ", ["belong", "to the continuation"]),
    (PROSE * 8, ["It is too long for the context.", "Again."]),
    ("class Queue:\n    ", ["def put(self, item):\n        self.items.append(item)", "pass", "'''Text.'''"]),
    ("na\u00efve \U0001f600", ["\U0001f600", "caf\u00e9"]),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model with the embedded model's tokenizer, as transformers writes it. To be read only."""
    path = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # large enough that attention, routing and experts all matter
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=0,
    )
    hf = OlmoeForCausalLM(config).eval()
    hf.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tiny" / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    return SimpleNamespace(path=path, model=load(path, "cpu")[0], tokenizer=load(path, "cpu")[1])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Another architecture, as `small`."""
    path = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tiny" / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    return SimpleNamespace(path=path, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, small):
    """A directory of task files."""
    path = tmp_path_factory.mktemp("tasks")
    documents = []
    for question, choices in QUESTIONS:
        # What the model itself would write, so that greedy answers occur.
        tokens = small.tokenizer.encode(question.rstrip()).ids[-40:] or [0]
        written = small.tokenizer.decode(list(roe.generate(small.model, tokens, 1, max_new_tokens=1)))
        choices = [choice for choice in (*choices, written) if choice]
        documents.append({"question": question, "choices": choices, "label": 0, "text": question + PROSE})
    documents[0]["text"] = PROSE * 20  # several windows
    (path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(path / "documents.jsonl")}, "cache_dir": str(path / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        delimiter = {"target_delimiter": ""} if name == "choices" else {}
        (path / f"{name}.yaml").write_text(json.dumps(common | task | delimiter))  # JSON is YAML
    return path


@pytest.fixture
def evaluate(tasks):
    """Runs one task; returns the model's answers to its requests."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(model, task, **options):
        options |= {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
        result = lm_eval.simple_evaluate(model=model, tasks=[task], **options)
        samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
        return [answer for sample in samples for (answer,) in sample["resps"]]

    return run


@pytest.fixture
def ours(small):
    """Our model for lm-eval, from its arguments."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval_roe import RoE

    return partial(RoE, small.path, dtype="float32", device="cpu")


# ---- The model of lm-eval, against its own ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_one_roster_equals_the_hf_model(evaluate, ours, small, task):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    hf = {"pretrained": str(small.path), "dtype": "float32", "device": "cpu", "max_length": CONTEXT}
    expected = evaluate("hf", task, model_args=hf)
    got = evaluate(ours(rosters=1), task)
    assert len(got) == len(expected) >= len(QUESTIONS)
    if task == "generating":
        assert got == expected and len(set(got)) > 1
    elif task == "rolling":
        assert got == pytest.approx(expected, rel=1e-4)
    else:
        assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        assert {greedy for _, greedy in got} == {True, False}


TOKENIZERS = {
    "bos": {"bos_token": "<|endoftext|>"},
    "eos": {"eos_token": "<|endoftext|>"},
    "bos and eos": {"bos_token": "<|endoftext|>", "eos_token": "\u0120There"},
    "bos added": {"bos_token": "<|endoftext|>", "eos_token": "\u0120There"},
}
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


# The config's eos: none, a token, an id outside of the vocabulary.
@pytest.mark.parametrize("name, eos_token_id", list(zip(TOKENIZERS, (None, None, 4095, 5000))))
def test_other_tokenizers_equal_the_hf_model(evaluate, small, tmp_path, name, eos_token_id):
    """What is read before empty contexts and windows, a bos that the tokenizer adds, chat templates."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval_roe import RoE

    backend = Tokenizer.from_file(str(ROOT / "tiny" / "tokenizer.json"))
    if name == "bos added":
        backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **TOKENIZERS[name])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": eos_token_id}))

    hf = HFLM(str(tmp_path), device="cpu", dtype="float32")
    ours = RoE(tmp_path, rosters=1, device="cpu", dtype="float32")
    texts = ["<|endoftext|>import os", "import os", " os", ""]
    assert [ours.tok_encode(text) for text in texts] == [hf.tok_encode(text) for text in texts]
    pairs = requests(*itertools.product(texts, (" os", "<|endoftext|>import os")))
    approx = lambda answers: [(pytest.approx(score, rel=1e-4), greedy) for score, greedy in answers]
    assert ours.loglikelihood(pairs) == approx(hf.loglikelihood(pairs))
    if name == "bos":
        hf.tokenizer.eos_token = "\u0120There"  # `hf` generates with an eos only; this one does not occur
    for task in TASKS:
        expected, got = (evaluate(model, task, apply_chat_template=True) for model in (hf, ours))
        if task == "generating":
            assert got == expected and len(set(got)) > 1
        else:
            assert got == (approx(expected) if task == "choices" else pytest.approx(expected, rel=1e-4))


def test_a_tokenizer_without_bos_and_eos(small, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval_roe import RoE

    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tiny" / "tokenizer.json")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a bos nor an eos token; give one: prefix_token_id=ID"):
        RoE(tmp_path)
    pair, options = requests(("", " os")), {"rosters": 1, "device": "cpu", "dtype": "float32"}
    expected = RoE(small.path, **options).loglikelihood(pair)
    assert RoE(tmp_path, prefix_token_id=0, **options).loglikelihood(pair) == expected


def test_the_embedded_model(tmp_path):
    """Its tokens are those of roe.py: transformers would give a folder without a tokenizer_config.json other ones."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval_roe import RoE

    ours, text = RoE.create_from_arg_string("rosters=1,device=cpu"), "na\u00efve, cafe\u0301"
    model, tokenizer = load(device="cpu")
    assert ours.tok_encode(text) == tokenizer.encode(text).ids
    expected = roe.score(model, [0, *tokenizer.encode(text).ids], 1).sum().item()
    assert ours.loglikelihood_rolling(requests((text,))) == pytest.approx([expected], rel=1e-5)


def requests(*arguments):
    return [SimpleNamespace(args=pair) for pair in arguments]


def test_a_shared_context_is_read_once(evaluate, ours, monkeypatch):
    model, read = ours(rosters=2), []
    hidden = model.model.hidden
    monkeypatch.setattr(
        model.model, "hidden", lambda tokens, *rest: read.append(tokens.numel()) or hidden(tokens, *rest)
    )
    contexts, choices = ("def read(self, size=-1):", "class Queue:"), (" pass", " return self.items", " import os")
    model.loglikelihood(requests(*itertools.product(contexts, choices)))
    expected = []
    for context in contexts:
        length = len(model.tok_encode(context))
        # The last token of the context is read with the continuation, whose own last token is not read.
        expected += [length - 1, *(len(model.tok_encode(context + choice)) - length for choice in choices)]
    assert read == expected

    read.clear()  # lm-eval does send the choices of a question one after the other
    answers = evaluate(model, "choices", limit=3)
    assert len(read) == len(answers) + 2  # the second context is empty: one token, read with the choices


def test_rosters_equal_score(ours, small, tmp_path):
    context, continuation = PROSE.strip(), " return self.items"
    tokens, start = small.tokenizer.encode(context + continuation).ids, len(small.tokenizer.encode(context).ids)

    def log_likelihood(**arguments):
        ((log_prob, _),) = ours(**arguments).loglikelihood(requests((context, continuation)))
        return log_prob

    tau = [0.0, 0.5, 1.0, 0.0]
    (tmp_path / "tau.json").write_text(json.dumps(tau))
    for weights in ("clean", "perturbed"):
        expected = roe.score(small.model, tokens, 4, tau, 7, weights)[-1, start - 1 :].sum().item()
        got = log_likelihood(rosters=4, tau=str(tmp_path / "tau.json"), weights=weights, seed=7)
        assert got == pytest.approx(expected, rel=1e-5)

    several = {seed: log_likelihood(rosters=4, tau=1.0, seed=seed) for seed in (0, 1)}
    assert log_likelihood(rosters=4, tau=1.0) == several[0] != several[1]
    assert log_likelihood(rosters=4, tau=1.0, skip=2) == pytest.approx(log_likelihood(rosters=1), rel=1e-5)


def test_generated_text(ours, small):
    """Repeats of a sampled request are other samples; both caches; a stop is not part of the text."""
    tokens = small.tokenizer.encode("import os").ids
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.8}
    for cache in ("shared", "branching"):
        model = ours(rosters=3, tau=0.5, cache=cache, seed=5)
        texts = model.generate_until(requests(*[("import os", options)] * 2))
        for seed, text in zip((5, 6), texts):
            generated = roe.generate(small.model, tokens, 3, 0.5, cache == "branching", 12, 0.9, 0.8, seed)
            assert text == small.tokenizer.decode(list(generated))
        assert texts[0] != texts[1] and model.generate_until(requests(("import os", options))) == texts[:1]
        stop = texts[0][3:6]
        (text,) = model.generate_until(requests(("import os", options | {"until": [stop, ""]})))
        assert text == texts[0].split(stop)[0] != texts[0]
        assert len(list(model.write(tokens, 12, [stop], 5, 0.9, 0.8))) < 12  # it ends there


def test_other_models_run_on_transformers(evaluate, mixtral, tmp_path):
    """With one roster lm-eval's own hf model; with more, the rows of ports/roe_transformers.py, token by token."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval_roe import RoE
    from lm_eval_roe import roe_transformers as port

    arguments = {"pretrained": str(mixtral.path), "dtype": "float32", "device": "cpu"}
    for task in TASKS:
        expected = evaluate("hf", task, model_args=arguments)
        got = evaluate(RoE.create_from_arg_obj(arguments | {"rosters": 1}), task)
        assert got == expected and len(got) >= len(QUESTIONS)

    (tmp_path / "tau.json").write_text("[0, 0.5, 1, 0]")
    options = {"rosters": 4, "tau": str(tmp_path / "tau.json"), "seed": 7}
    ours = RoE.create_from_arg_obj(arguments | options)
    context = mixtral.tokenizer.encode(PROSE.strip())
    tokens, start = mixtral.tokenizer.encode(PROSE.strip() + " return self.items"), len(context)
    model = AutoModelForCausalLM.from_pretrained(mixtral.path, dtype=torch.float32)
    port.add_roe(model, 4, [0, 0.5, 1, 0], seed=7)
    cache, total = port.CleanCache(config=model.config), 0.0
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens[: start - 1]]), **{name: cache})
        for token, target in zip(tokens[start - 1 :], tokens[start:]):
            logits = model(input_ids=torch.tensor([[token]] * 4), **{name: cache}).logits[:, -1]
            total += logits.softmax(-1).mean(0)[target].log().item()
    for _ in range(2):  # every answer is that of the seed
        ((log_prob, _),) = ours.loglikelihood(requests((PROSE.strip(), " return self.items")))
        assert log_prob == pytest.approx(total, rel=1e-5)

    assert len(set(evaluate(ours, "generating"))) > 1
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9}
    several = [ours.generate_until(requests(*[("import os", options)] * 2)) for _ in range(2)]
    assert several[0] == several[1] and several[0][0] != several[0][1]
    with pytest.raises(ValueError, match="leave out cache=branching"):
        RoE.create_from_arg_obj(arguments | {"cache": "branching"})
    with pytest.raises(ValueError, match="rosters=0"):
        RoE.create_from_arg_obj(arguments | {"rosters": 0})


@pytest.mark.parametrize("task", TASKS)
def test_transformers_and_roe_py_agree(evaluate, ours, small, task):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval_roe import RoETransformers

    hf = {"pretrained": str(small.path), "dtype": "float32", "device": "cpu", "max_length": CONTEXT}
    options = {"rosters": 4, "tau": 1.0, "seed": 7}
    expected, got = evaluate(ours(**options), task), evaluate(RoETransformers(**hf | options), task)
    assert expected != evaluate(ours(rosters=1), task)
    if task == "choices":
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        expected, got = [score for score, _ in expected], [score for score, _ in got]
    assert got == (expected if task == "generating" else pytest.approx(expected, rel=1e-4))


def test_sampling_options(ours, mixtral):
    """Those of roe.py; without an effect; refused by name. Models on transformers have what transformers has."""
    from lm_eval_roe import RoE

    def text(model=None, **options):
        return (model or ours(rosters=2, tau=0.5)).generate_until(requests(("import", {"max_gen_toks": 8} | options)))

    sampled = text(temperature=5.0)
    assert sampled == text(do_sample=True, temperature=5.0, num_beams=1, top_k=0, repetition_penalty=1.0, min_p=0.0)
    greedy = text()
    assert greedy == text(do_sample=False, temperature=5.0) == text(temperature=5.0, top_p=1e-9) != sampled
    for options in ({"top_k": 1}, {"repetition_penalty": 1.2}, {"min_p": 0.1}, {"num_beams": 4}, {"typo": True}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"gen_kwargs: {name}={value} is not implemented for OLMoE in roe.py"):
            text(**options)
    with pytest.raises(ValueError, match="do_sample=True samples at a temperature"):
        text(do_sample=True)

    options = {"pretrained": mixtral.path, "rosters": 2, "tau": 0.5, "dtype": "float32", "device": "cpu"}
    model = RoE.create_from_arg_obj(options)
    assert text(model, temperature=5.0, top_k=1) == text(model) != text(model, temperature=5.0)
    with pytest.raises(ValueError, match="typo"):
        text(model, typo=True)


@pytest.mark.parametrize("kind", ["roe.py", "transformers"])
def test_what_the_hf_model_cannot_take(evaluate, ours, small, tmp_path, kind):
    """Blank contexts and empty prompts are what is read before empty contexts; windows with --use_cache."""
    from lm_eval_roe import RoETransformers

    options = {"rosters": 3, "tau": 0.5, "dtype": "float32", "device": "cpu"}
    model = ours(**options) if kind == "roe.py" else RoETransformers(small.path, **options)
    ask = lambda *pairs: [score for score, _ in model.loglikelihood(requests(*pairs))]
    expected = ask(("", "  os"), ("<|endoftext|>", "import os"))
    assert ask(("  ", "os"), ("<|endoftext|>", "import os")) == pytest.approx(expected, rel=1e-5)
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    texts = model.generate_until(requests(*[("", options), ("<|endoftext|>", options)]))
    assert len(texts[0]) > 8 and texts[0] != texts[1]  # the same prompt once more: another sample
    assert ask(("<|endoftext|>", "import os")) == expected[1:]  # with the seed of before
    assert model.generate_until(requests(("<|endoftext|>", options))) == texts[1:]  # `HFLM` begins with the longer one
    assert evaluate(model, "rolling", use_cache=str(tmp_path / "cache")) == evaluate(model, "rolling")


def test_what_cannot_be_done_is_refused(ours):
    with pytest.raises(ValueError, match="leave out cache=branching"):
        ours(cache="branching").loglikelihood(requests(("import", " os")))
    with pytest.raises(AssertionError, match="max tokens to generate"):
        ours().generate_until(requests(("import", {"max_gen_toks": CONTEXT})))
    with pytest.raises(ValueError, match="an OLMoE has no argument margin; leave it out"):
        ours(margin=0.5)
    with pytest.raises(ValueError, match="cache must be shared or branching, not clean"):
        ours(cache="clean")
    with pytest.raises(ValueError, match="must have 1 to 64 tokens, not 200"):
        next(ours().score([([0], [1] * 200)]))


def test_devices(ours, small, mixtral):
    """lm-eval's command line passes cuda:0 where no device is named."""
    create, passed = ours.func.create_from_arg_obj, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    for model in (small, mixtral):
        assert create({"pretrained": model.path}, passed).model.device == load(small.path)[0].device
    assert create({"pretrained": small.path}, passed | {"device": "cpu"}).model.device.type == "cpu"
    assert create({"pretrained": small.path, "device": "cpu"}, passed).model.device.type == "cpu"


def test_the_command_line(tasks, small, tmp_path):
    """lm-eval's own, with one more model, here from the hub's cache: a hub id and a revision, with a chat template."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    folder = tmp_path / "hub" / "models--organisation--name"
    shutil.copytree(small.path, folder / "snapshots" / COMMIT)
    (folder / "snapshots" / COMMIT / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "refs").mkdir()
    (folder / "refs" / "step1").write_text(COMMIT)

    def run(arguments, *options):
        command = [sys.executable, ROOT / "study" / "lm_eval_roe.py", "--model", "roe", "--include_path", tasks]
        command += ["--model_args", f"pretrained=organisation/name@step1,{arguments},device=cpu", "--limit", "2"]
        command += ["--tasks", ",".join(TASKS), "--output_path", tmp_path / "results", "--apply_chat_template"]
        environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_CACHE": tmp_path / "hub"}
        return subprocess.run(command, cwd=tasks, env=os.environ | environment, capture_output=True, text=True)

    done = run("rosters=2,tau=0.3,seed=1,dtype=float32")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(file.read_text())
    assert found["results"].keys() == TASKS.keys() and 0 <= found["results"]["choices"]["acc,none"] <= 1
    assert found["results"]["rolling"]["word_perplexity,none"] > 1 and found["chat_template"] == TEMPLATE

    done = run("margin=0.5")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "lm_eval_roe.py: error: an OLMoE has no argument margin; leave it out"
