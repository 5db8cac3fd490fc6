"""Roster of Experts as a model of EleutherAI's lm-evaluation-harness.

    python study/lm_eval_roe.py --model roe --model_args pretrained=DIRECTORY_OR_HUB_ID,rosters=32 --tasks arc_easy

This is lm-eval's own command line, to which the model `roe` has been added. Models other than OLMoE run on
transformers, by ports/roe_transformers.py, with the same arguments.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "ports")]
import roe_transformers

import roe
from cache import SharedCache
from load import fetch, load, pick_device, read_json, read_tau

EMBEDDED = Path(roe.__file__).parent / "tiny"
# What lm-eval's `hf` takes that has to do with texts, and values of gen_kwargs that change nothing.
TEXTS = {"revision", "tokenizer", "add_bos_token", "prefix_token_id"}
TEXTS |= {"chat_template_args", "enable_thinking", "think_end_token"}
WITHOUT_EFFECT = {"num_beams": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


def crop(context: list[int], continuation: list[int], limit: int) -> list[int]:
    """A context without the beginning that a model of `limit` tokens has no room for, as lm-eval cuts it.

    Raises ValueError: a continuation that is empty or alone longer than the limit.
    """
    if not 0 < len(continuation) <= limit:
        raise ValueError(f"a continuation must have 1 to {limit} tokens, not {len(continuation)}")
    return context[-(limit + 1 - len(continuation)) :]  # one more: the last token is predicted, but not read


@register_model("roe")
class RoE(HFLM):
    """lm-eval's own `hf` model, whose texts, tokens and templates these are, with an OLMoE of roe.py and n rosters.

    Args:
        pretrained: a directory or a hub id, by default the embedded model.
        rosters, tau, skip, weights, cache, dtype, device, seed: as in `roe.py`; tau is a number or a JSON file.
            cache=branching is for tasks that generate text; log-likelihoods are those of the shared cache.
        batch_size, max_batch_size: lm-eval passes them to every model. Not used: rows are rosters of one sequence.
        options: those of `TEXTS`, as for `hf`.
    """

    def __init__(
        self,
        pretrained: str | Path = EMBEDDED,
        rosters: int = 4,
        tau: float | str | None = None,
        skip: int = 1,
        weights: str = "perturbed",
        cache: str = "shared",
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options,
    ):
        self.check(cache, options)
        super().__init__(str(pretrained), device=str(pick_device(device)), dtype=dtype, batch_size=1, **options)
        if self.prefix_token_id is None:
            raise ValueError("the tokenizer names neither a bos nor an eos token; give one: prefix_token_id=ID")
        self.weights, self.branching = weights, cache == "branching"
        self.add_rosters(rosters, read_tau(tau if tau is None else str(tau)), skip, seed)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "RoE":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "RoE":
        """What --model_args say, before lm-eval's other options; `pretrained` may have an @ and a revision."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == "cuda:0":  # what lm-eval passes without --device, whether there is a GPU or not
            del options["device"]
        options |= arg_dict
        name = os.path.expanduser(options.pop("pretrained", None) or EMBEDDED)
        if "@" in name and not os.path.isdir(name):
            name, options["revision"] = name.split("@", 1)
        source = f"{name}@{options['revision']}" if "revision" in options else name
        config = read_json(fetch(source, ["config.json"])[1] / "config.json")
        return (cls if config.get("model_type") == "olmoe" else RoETransformers)(name, **options)

    # ---- The model: what RoETransformers does otherwise ----

    def check(self, cache: str, options: dict) -> None:
        """Raises ValueError for arguments that the model does not have."""
        if unknown := options.keys() - TEXTS:
            raise ValueError(f"an OLMoE has no argument {', '.join(sorted(unknown))}; leave it out")
        if cache not in ("shared", "branching"):
            raise ValueError(f"cache must be shared or branching, not {cache}")

    def _create_model(self, pretrained: str, revision: str, dtype: str, **_) -> None:
        source = pretrained if os.path.isdir(pretrained) else f"{pretrained}@{revision}"
        self._model, _ = load(source, self.device, dtype)
        self._model.tie_weights = lambda: None  # `HFLM` calls it

    def add_rosters(self, rosters: int, tau: float | list[float] | None = None, skip: int = 1, seed: int = 0) -> None:
        """Runs from now on with these: at the beginning, and again between evaluations. Sets `tau`, one per layer."""
        self.rosters, self.seed = rosters, seed
        self.tau = roe.temperatures(self.model.config, tau, skip)

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihoods of continuations of contexts, and whether they are what greedy decoding would have written.

        Of a continuation it is what `roe.score` gives to its tokens in the whole text. A context that is equal to that
        of the pair before is not read again.
        """
        if self.branching:
            raise ValueError("log-likelihoods are those of the shared cache only; leave out cache=branching")
        limit = self.model.config.max_position_embeddings
        cache, read = SharedCache(self.model.config, limit), None
        for context, continuation in pairs:
            context = crop(context, continuation, limit)
            if context != read:
                cache.length, read = 0, context
                if len(context) > 1:  # its last token, the first to be stochastic, is read with the continuation
                    self.model.hidden(torch.tensor([context[:-1]], device=self.device), cache)
            cache.length = len(context) - 1
            greedy = []

            def watch(logits, log_probs, targets, cache):
                greedy.append((log_probs.argmax(-1) == targets).all())

            tokens, settings = [context[-1], *continuation], (self.rosters, self.tau, self.seed, self.weights)
            yield roe.score(self.model, tokens, *settings, cache, watch)[-1].sum().item(), all(greedy)

    def write(self, prompt: list[int], most: int, stop: list[str], seed: int, temperature=0.0, top_p=1.0, **others):
        """Yields up to `most` tokens; ends after one that completes a text of `stop`."""
        for name, value in others.items():
            if value != WITHOUT_EFFECT.get(name):
                raise ValueError(f"gen_kwargs: {name}={value} is not implemented for OLMoE in roe.py; leave it out")
        stops, text = stop_sequences_criteria(self.tokenizer, stop, len(prompt), 1), list(prompt)
        options = {"temperature": temperature, "top_p": top_p, "seed": seed, "weights": self.weights}
        for token in roe.generate(self.model, prompt, self.rosters, self.tau, self.branching, most, **options):
            text.append(token)
            yield token
            if stops(torch.tensor([text]), None).any():
                return

    # ---- What lm-eval asks for ----

    def tok_decode(self, tokens: list[int] | int | None, skip_special_tokens: bool = True) -> str:
        """As `HFLM`; "" for the end-of-text token, None, of a tokenizer without one."""
        return "" if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        # lm-eval sends the choices of a question one after the other, so that its context is read once.
        scores = self.score((context or [self.prefix_token_id], continuation) for _, context, continuation in requests)
        progress, answers = tqdm(requests, disable=disable_tqdm or override_bs is not None), []
        for (texts, _, _), answer in zip(progress, scores):
            answers.append(answer)
            if texts is not None:  # windows have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self.repeats = Counter()
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context, max_length: int, stop: list[str], attention_mask=None, **options):
        """Continues one text, ids [1, T]: [1, T + new ones]. `hf` cannot take T = 0; the prefix is read then."""
        given = context[0].tolist()
        prompt = given or [self.prefix_token_id]
        if options.pop("do_sample") and not options.get("temperature"):
            raise ValueError("gen_kwargs: do_sample=True samples at a temperature; give temperature=1.0, say")
        seed = self.seed + self.repeats[tuple(prompt)]  # a task may repeat a request to get several samples
        self.repeats[tuple(prompt)] += 1
        stop = [text for text in stop if text]
        return torch.tensor([[*given, *self.write(prompt, max_length - len(given), stop, seed, **options)]])


class RoETransformers(RoE):
    """lm-eval's own `hf` model with n rosters: whatever ports/roe_transformers.py takes.

    Args: as for `RoE`, and `options` as for lm-eval's `hf`; a JSON file for tau has one per mixture layer.
    """

    def check(self, cache: str, options: dict) -> None:
        if cache != "shared":
            raise ValueError(f"models on transformers have the shared cache only; leave out cache={cache}")

    def _create_model(self, *args, **options) -> None:
        HFLM._create_model(self, *args, **options)

    def add_rosters(self, rosters: int, tau: float | list[float] | None = None, skip: int = 1, seed: int = 0) -> None:
        roe_transformers.add_roe(self.model, rosters, tau, skip, seed, self.weights)
        self.rosters, self.seed, self.tau = rosters, seed, self.model.roe.tau

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """As `RoE.score`: token by token, each predicted by the rosters from the clean history."""
        model, name = self.model, self.model.roe.cache_name
        for context, continuation in pairs:
            cache, total, greedy = {name: roe_transformers.CleanCache(config=model.config)}, 0.0, True
            context = crop(context, continuation, self.max_length)
            if context[:-1]:
                model.base_model(input_ids=torch.tensor([context[:-1]], device=self.device), use_cache=True, **cache)
            for token, target in zip([context[-1], *continuation], continuation):
                rows = torch.full((self.rosters, 1), token, device=self.device)
                log_probs = roe.aggregate(model(input_ids=rows, use_cache=True, **cache).logits[:, -1])
                total, greedy = total + log_probs[target].item(), greedy and log_probs.argmax().item() == target
            yield total, greedy

    def _loglikelihood_tokens(self, requests, *args, **options) -> list[tuple[float, bool]]:
        kind = HFLM if self.rosters == 1 else RoE  # the tokens of one roster need not be read one by one
        return kind._loglikelihood_tokens(self, requests, *args, **options)

    def write(self, prompt: list[int], most: int, stop: list[str], seed: int, temperature: float = 0.0, **options):
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        options["stopping_criteria"] = stop_sequences_criteria(self.tokenizer, stop, len(prompt), self.rosters)
        options |= {"max_length": len(prompt) + most, "pad_token_id": self.tokenizer.pad_token_id}
        self.model.roe.seed = seed
        text = roe_transformers.generate(self.model, torch.tensor([prompt], device=self.device), **options)
        self.model.roe.seed = self.seed
        return text[0, len(prompt) :].tolist()


if __name__ == "__main__":
    try:
        cli_evaluate()
    except (AssertionError, ValueError, OSError) as error:
        roe.fail(error)
