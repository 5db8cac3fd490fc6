"""Roster of Experts (arXiv 2509.17238) as a plugin of vLLM, for its engine, its server, and whatever uses them.

    ROE_ROSTERS=8 ROE_TAU=0.3 vllm serve allenai/OLMoE-1B-7B-0125

    ROE_ROSTERS  n; without it vLLM stays as it is
    ROE_TAU      temperature of the noise, or a JSON list, one for each mixture layer [tau.json beside the model; 0.2]
    ROE_SKIP     mixture layers at each end that route without noise, if ROE_TAU is one number [1]
    ROE_SEED     of the noise, any whole number [0]

They mean what the options of roe.py mean, and in float32 greedy text is that of roe.py.
The model's own class runs n times a step, the n - 1 noisy rosters first and the clean one last. Every pass writes the
keys and values of the step's tokens to the same slots of vLLM's cache, so that what stays is the clean pass's: the
paper's Clean Cache (section 2.3), in the memory of plain vLLM. Noise is added to a router's logits (equation 1), which
also changes the weights of the chosen experts, and only at the last token of each request, the one that predicts.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from vllm import ModelRegistry, SamplingParams
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import GateLinear

MODELS = {}  # the models by name of architecture, as vLLM registers them


def gumbel(seed: int, position: int, rosters: int, layers: int, experts: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1), G [rosters - 1, layers, experts], float32, on the CPU.

    It is a hash of the seed and of the token's position in its text, and depends on nothing else. Rosters come first,
    so that those of m rosters are the first of n; there is none for the clean one. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * rosters * layers * experts)
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(rosters, layers, experts)[1:]


def average(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability (section 3.1): logits [n, requests, V] -> [requests, V], float32."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def settings(layers: int, model: str) -> tuple[int, list[float], int]:
    """Rosters, one temperature for each of the mixture layers, and the seed, from the environment (section 2.2)."""
    beside = Path(model, "tau.json")
    default = {
        "ROE_ROSTERS": "1",
        "ROE_TAU": beside.read_text() if beside.is_file() else "0.2",
        "ROE_SKIP": "1",
        "ROE_SEED": "0",
    }
    given = {name: os.environ.get(name, value) for name, value in default.items()}
    try:
        rosters, tau, skip, seed = map(json.loads, given.values())
    except ValueError:
        rosters = tau = skip = seed = None
    whole = all(type(number) is int for number in (rosters, skip, seed)) and 1 <= rosters <= 1024 and skip >= 0
    if whole and not isinstance(tau, list):
        tau = [tau if skip <= layer < layers - skip else 0 for layer in range(layers)]
    if not whole or len(tau) != layers or not all(type(t) in (int, float) and 0 <= t <= 100 for t in tau):
        wanted = f"ROE_TAU a number from 0 to 100 or a list of {layers}, ROE_SKIP and ROE_SEED whole numbers"
        raise ValueError(f"ROE_ROSTERS must be a whole number from 1 to 1024, {wanted}, not {given}")
    if os.environ.get("ROE_WEIGHTS", "perturbed") != "perturbed":
        raise ValueError("RoE in vLLM mixes experts by softmax(R + tau G) only; unset ROE_WEIGHTS")
    return rosters, tau, seed


class Rosters:
    """Goes before the class of a vLLM model, whose `forward` it calls n times, and whose logits it averages."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs):
        name, model = type(self).__name__, vllm_config.model_config
        parallel, schedule = vllm_config.parallel_config, vllm_config.scheduler_config
        for obstacle, what in (
            (model.has_inner_state, "a recurrent state, which every pass would move on"),
            (model.is_multimodal_model, "a multimodal model"),
            (model.runner_type != "generate", "a model that generates no text"),
            (vllm_config.speculative_config, "speculative decoding"),
            (vllm_config.lora_config, "LoRA"),
            (vllm_config.kv_transfer_config, "a transfer of the cache, which would send noisy keys and values"),
            (parallel.world_size_across_dp > parallel.tensor_parallel_size, "pipeline or data parallelism"),
        ):
            if obstacle:
                raise ValueError(f"{name}: RoE in vLLM does not work with {what}")
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        gates = [module for module in self.modules() if isinstance(module, GateLinear)]
        if not gates:
            raise ValueError(f"{name} has no router that RoE in vLLM knows (GateLinear); unset ROE_ROSTERS to run it")
        self.rosters, tau, self.seed = settings(len(gates), model.model)
        # What the hooks add must be read from memory: vLLM compiles the model once, with its Python values frozen.
        # noise[layer, i] is for the i-th request of a step, noise[layer, 0] = 0; request: i for its last token, else 0.
        self.noise = torch.zeros(len(gates), schedule.max_num_seqs + 1, gates[0].output_size, dtype=torch.float32)
        self.request = torch.zeros(schedule.max_num_batched_tokens, dtype=torch.long)
        self.tau = torch.tensor(tau, dtype=torch.float32, device="cpu").view(-1, 1, 1)
        self.untested = any(tau)  # whether noise reaches the routers, compiled or fused as they may be
        for gate, noise in zip(gates, self.noise):
            gate.register_buffer("noise", noise, persistent=False)
            gate.register_buffer("request", self.request, persistent=False)
            gate.register_forward_hook(add_noise)
        # vLLM keeps compiled models on disk: not to take plain ones for ours, nor ours for those of other shapes.
        vllm_config.additional_config = {**vllm_config.additional_config, "roe": tuple(self.noise.shape)}
        if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():  # which would freeze the loop below
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args, **kwargs) -> Tensor:
        """Hidden states [tokens, n * d]: those of the n rosters, the clean one first, side by side."""
        context, last, passes = get_forward_context(), [], []
        if self.rosters > 1 and context.attn_metadata:  # else a trial run, of which vLLM measures the memory
            metadata = next(iter(context.attn_metadata.values()))
            if not hasattr(metadata, "query_start_loc"):
                raise ValueError("this attention backend hides where requests end; choose one by --attention-backend")
            last = metadata.query_start_loc[1:] - 1  # each request's last token
            self.request.zero_()[last] = torch.arange(1, len(last) + 1, device=last.device)
            # Seed and position alone decide the noise: what else is in the batch does not change a request's text.
            sizes = self.rosters, len(self.noise), self.noise.shape[2]
            noise = torch.stack([gumbel(self.seed, position, *sizes) for position in positions[last].tolist()], dim=2)
            noise = (noise * self.tau).to(self.noise.device)  # [n - 1, layers, requests, E]
        for row in reversed(range(self.rosters)):
            self.noise.zero_()
            if row and len(last):
                self.noise[:, 1 : len(last) + 1] = noise[row - 1]
            context.moe_layer_index = 0  # where vLLM counts its mixture layers in a pass
            passes.insert(0, super().forward(input_ids, positions, *args, **kwargs).clone())  # graphs reuse outputs
        if self.untested and len(last):
            if all(torch.equal(noisy[last], passes[0][last]) for noisy in passes[1:]):
                raise RuntimeError("noise changes nothing in this model; raise ROE_TAU, or unset ROE_ROSTERS")
            self.untested = False
        return torch.cat(passes, dim=-1)

    def compute_logits(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | None:
        """Log-probabilities [requests, V], the rosters' average, of hidden states [requests, n * d]."""
        rows = hidden_states.unflatten(-1, (self.rosters, -1)).transpose(0, 1).flatten(0, 1)
        logits = super().compute_logits(rows, *args, **kwargs)  # None: another process has them
        return None if logits is None else average(logits.unflatten(0, (self.rosters, -1)))


def add_noise(gate: GateLinear, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """A forward hook: adds every token's noise to its router logits [tokens, E]."""
    logits = output[0] if isinstance(output, tuple) else output
    noisy = (logits + gate.noise[gate.request[: len(logits)]]).to(logits.dtype)
    return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def __getattr__(name: str) -> type:
    """The class of a model under its own name, made when vLLM asks for it: `register` gives it this module's names."""
    if name not in MODELS:
        raise AttributeError(name)
    return type(name, (Rosters, MODELS[name].load_model_cls()), {})


def register() -> None:
    """The entry point in `vllm.general_plugins`: vLLM calls it in each of its processes, before it makes a model."""
    if "ROE_ROSTERS" not in os.environ or MODELS:
        return
    MODELS.update(ModelRegistry.models)
    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}:{name}")

    def refuse_prompt_logprobs(params, *args, verify=SamplingParams.verify):
        if params.prompt_logprobs is not None:
            raise VLLMValidationError("RoE scores no prompts: only the last token has rosters; unset prompt_logprobs")
        verify(params, *args)

    SamplingParams.verify = refuse_prompt_logprobs
