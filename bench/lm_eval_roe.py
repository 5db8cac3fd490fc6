"""Roster of Experts as a model of EleutherAI's lm-evaluation-harness.

    python bench/lm_eval_roe.py --model roe --model_args pretrained=DIRECTORY_OR_HUB_ID,rosters=32 --tasks arc_easy

This is lm-eval's own command line, to which the model `roe` has been added. Models other than OLMoE run on
transformers, by ports/roe_transformers.py, with the same arguments.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from continuations import score_continuations
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers.decoders import DecodeStream
from tqdm import tqdm
from transformers import AutoConfig

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "ports")]
import roe_transformers

import roe
from load import load, read_tau


@register_model("roe")
class RoE(TemplateLM):
    """An OLMoE with n rosters. How texts become tokens is lm-eval's own and that of its `hf` model.

    Args:
        pretrained: a directory or a hub id; None: the embedded model.
        rosters, tau, skip, weights, cache, margin, dtype, seed: as in `roe.py`; tau is a number or a JSON file.
            cache=branching is for tasks that generate text; log-likelihoods are those of the shared cache.
        device: as in `roe.py`; or lm-eval's --device.
        batch_size, max_batch_size: lm-eval passes them to every model. Not used: rows are rosters of one sequence.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        rosters: int = 4,
        tau: float | str | None = None,
        skip: int = 1,
        weights: str = "perturbed",
        cache: str = "shared",
        margin: float = 1.0,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer = load(pretrained, device, dtype)
        self._device = self.model.device
        self.max_length = self.model.config.max_position_embeddings
        self.seed, self.cache = seed, cache
        tau = roe.temperatures(self.model.config, read_tau(tau if tau is None else str(tau)), skip)
        self.rosters = {"rosters": rosters, "tau": tau, "weights": weights, "margin": margin}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "RoE":
        """What --model_args say, before lm-eval's other options."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == "cuda:0":  # what lm-eval passes without --device, whether there is a GPU or not
            del options["device"]
        options |= arg_dict
        name = options.get("pretrained")
        olmoe = name is None or AutoConfig.from_pretrained(name).model_type == "olmoe"
        return cls(**options) if olmoe else RoETransformers(**options)

    @property
    def eot_token_id(self) -> int:
        eos = self.model.config.eos_token_id
        return eos[0] if isinstance(eos, list) else eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids

    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihoods of continuations of contexts, and whether they are greedy."""
        if self.cache != "shared":
            raise ValueError("log-likelihoods are those of the shared cache only; leave out cache=branching")
        for log_probs, greedy in score_continuations(self.model, pairs, seed=self.seed, **self.rosters):
            yield log_probs[-1].sum().item(), greedy

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        answers = []
        # lm-eval sends the choices of a question one after the other, so that its context is read once.
        scores = self.score(pair for _, *pair in requests)
        for (texts, _, _), answer in zip(tqdm(requests, disable=disable_tqdm), scores):
            answers.append(answer)
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            totals.append(sum(log_prob for log_prob, _ in self.score(map(make_disjoint_window, windows))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts, repeats = [], Counter()
        for prompt, asked in tqdm([request.args for request in requests], disable=disable_tqdm):
            options = normalize_gen_kwargs(asked)
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"the task wants to generate {options['max_gen_toks']} tokens, but the model's context has only "
                    f"{self.max_length}; set --gen_kwargs max_gen_toks to less"
                )
            generated = roe.generate(
                self.model,
                self.tok_encode(prompt)[-room:] or [self.prefix_token_id],
                cache=self.cache,
                max_new_tokens=options["max_gen_toks"],
                temperature=options.get("temperature", 0.0),
                top_p=options.get("top_p", 1.0),
                seed=self.seed + repeats[prompt],  # a task may repeat a request to get several samples
                **self.rosters,
            )
            repeats[prompt] += 1
            text, stops = "", [stop for stop in options["until"] if stop]
            ids, decoder = [], DecodeStream(skip_special_tokens=True)
            for token in generated:
                ids.append(token)
                text += decoder.step(self.tokenizer, token) or ""  # None within a character of several tokens
                if any(stop in text for stop in stops):
                    break
            text = self.tokenizer.decode(ids)
            for stop in stops:
                text = text.split(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (prompt, asked), text)
        return texts


class RoETransformers(HFLM):
    """lm-eval's own `hf` model with n rosters: whatever ports/roe_transformers.py takes.

    Args:
        pretrained, rosters, tau, skip, weights, seed: as for `RoE`; a JSON file for tau has one per mixture layer.
        batch_size, max_batch_size: not used: rows are rosters of one sequence.
        options: as for lm-eval's `hf`.
    """

    def __init__(
        self,
        pretrained: str,
        rosters: int = 4,
        tau: float | str | None = None,
        skip: int = 1,
        weights: str = roe_transformers.WEIGHTS,
        cache: str = "shared",
        seed: int = 0,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options,
    ):
        if cache != "shared":
            raise ValueError(f"models on transformers have the shared cache only; leave out cache={cache}")
        super().__init__(pretrained, device=None if device == "auto" else device, batch_size=1, **options)
        tau = read_tau(tau if tau is None else str(tau))
        roe_transformers.add_roe(self.model, rosters, tau, skip, seed, weights)

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """As `RoE.score`: token by token, each predicted by the rosters from the clean history."""
        model, state = self.model, self.model.roe
        for context, continuation in pairs:
            tokens = torch.tensor([(context + continuation)[-(self.max_length + 1) :]], device=self.device)
            history, total, greedy = {state.cache_name: roe_transformers.CleanCache(config=model.config)}, 0.0, True
            context, *steps = tokens[:, :-1].split(
                [tokens.shape[1] - len(continuation) - 1] + [1] * len(continuation), 1
            )
            if context.shape[1]:
                model.base_model(input_ids=context, use_cache=True, **history)
            for token, target in zip(steps, continuation):
                logits = model(input_ids=token.repeat(state.rosters, 1), use_cache=True, **history).logits[:, -1]
                log_probs = roe.aggregate(logits)
                total, greedy = total + log_probs[target].item(), greedy and log_probs.argmax().item() == target
            yield total, greedy

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **options) -> list[tuple[float, bool]]:
        one = self.model.roe.rosters == 1  # whose tokens need not be read one by one
        own = super()._loglikelihood_tokens if one else partial(RoE._loglikelihood_tokens, self)
        return own(requests, disable_tqdm, **options)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self.repeats = Counter()
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context, max_length: int, stop: list[str], **options) -> torch.Tensor:
        if options.get("temperature", 0.0) == 0:
            options = {name: value for name, value in options.items() if name != "temperature"} | {"do_sample": False}
        state, prompt = self.model.roe, tuple(context[0].tolist())
        options["stopping_criteria"] = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], state.rosters)
        options |= {"max_length": max_length, "pad_token_id": self.tokenizer.pad_token_id}
        seed, state.seed = state.seed, state.seed + self.repeats[prompt]  # repeats are samples, as in `RoE`
        self.repeats[prompt] += 1
        text = roe_transformers.generate(self.model, context, **options)
        state.seed = seed
        return text


if __name__ == "__main__":
    cli_evaluate()
