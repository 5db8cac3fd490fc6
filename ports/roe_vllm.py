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
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import GateLinear

MODELS = {}  # the models by name of architecture, as vLLM registers them
READABLE = "CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"  # attention backends whose cache `read` knows


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
    """Goes before the class of a vLLM model: gives its `forward` more rows than vLLM does, and averages its logits."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs):
        name, model = type(self).__name__, vllm_config.model_config
        parallel, schedule = vllm_config.parallel_config, vllm_config.scheduler_config
        for obstacle, what in (
            (model.has_inner_state, "a recurrent state, which every roster would move on"),
            (model.is_multimodal_model, "a multimodal model"),
            (model.enable_prompt_embeds, "prompts that are no tokens"),
            (model.runner_type != "generate", "a model that generates no text"),
            (vllm_config.speculative_config, "speculative decoding"),
            (vllm_config.lora_config, "LoRA"),
            (vllm_config.kv_transfer_config, "a transfer of the cache between servers"),
            (parallel.world_size_across_dp > parallel.tensor_parallel_size, "pipeline or data parallelism"),
        ):
            if obstacle:
                raise ValueError(f"{name}: RoE in vLLM does not work with {what}")
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        gates = [module for module in self.modules() if isinstance(module, GateLinear)]
        if not gates:
            raise ValueError(f"{name} has no router that RoE in vLLM knows (GateLinear); unset ROE_ROSTERS to run it")
        self.rosters, tau, self.seed = settings(len(gates), model.model)
        self.most = schedule.max_num_seqs * (self.rosters - 1)  # noisy rows in a step
        self.lengths, self.groups = [], []  # of the histories of a step's requests, and requests of similar lengths
        if self.rosters > 1:
            for layer in self.modules():
                if isinstance(layer, AttentionLayerBase):
                    add_rows(layer, self)
        # What the hooks add must be read from memory: vLLM compiles the model once, with its Python values frozen.
        # noise[layer, i] is for the i-th noisy row of a step, noise[layer, 0] = 0; row: i for that row, 0 for tokens.
        self.noise = torch.zeros(len(gates), self.most + 1, gates[0].output_size, dtype=torch.float32)
        self.row = torch.zeros(schedule.max_num_batched_tokens + self.most, dtype=torch.long)
        self.tau = torch.tensor(tau, dtype=torch.float32, device="cpu").view(-1, 1, 1)
        self.untested = any(tau)  # whether noise reaches the routers, compiled or fused as they may be
        for gate, noise in zip(gates, self.noise):
            gate.register_buffer("noise", noise, persistent=False)
            gate.register_buffer("row", self.row, persistent=False)
            gate.register_forward_hook(add_noise)
        # vLLM keeps compiled models on disk: not to take plain ones for ours, nor ours for those of other shapes.
        vllm_config.additional_config = {**vllm_config.additional_config, "roe": tuple(self.noise.shape)}
        # It compiles for as many rows as a step has tokens, and would take graphs that it captured for those.
        vllm_config.compilation_config.compile_ranges_endpoints[-1] += self.most
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

    def forward(self, input_ids: Tensor, positions: Tensor, *args, **kwargs) -> Tensor:
        """Hidden states [tokens, n * d]: side by side the n rosters of a request's last token, the clean one first."""
        metadata, tokens = get_forward_context().attn_metadata, len(input_ids)
        if self.rosters == 1:
            return super().forward(input_ids, positions, *args, **kwargs)
        if metadata:
            metadata = next(iter(metadata.values()))
            if not hasattr(metadata, "query_start_loc") or not hasattr(metadata, "block_table"):
                raise ValueError("this attention backend hides its requests; choose one by --attention-backend")
            last = metadata.query_start_loc[1:] - 1  # each request's last token
            repeated = last.repeat_interleave(self.rosters - 1)
        else:  # a trial run, of which vLLM measures the memory
            last, repeated = [], torch.full((self.most,), tokens - 1, device=positions.device)
        input_ids = torch.cat((input_ids, input_ids[repeated]))
        positions = torch.cat((positions, positions[repeated]))
        self.noise.zero_()
        self.row.zero_()
        if len(last):
            self.lengths = positions[last].tolist()
            self.groups = similar(self.lengths)
            if self.untested:
                same = super().forward(input_ids, positions, *args, **kwargs)[tokens:]
            # Seed and position alone decide the noise: what else is in the batch does not change a request's text.
            sizes = self.rosters, len(self.noise), self.noise.shape[2]
            noise = torch.cat([gumbel(self.seed, position, *sizes) for position in self.lengths])
            self.noise[:, 1 : len(noise) + 1] = noise.transpose(0, 1) * self.tau
            self.row[tokens : tokens + len(noise)] = torch.arange(1, len(noise) + 1)
        hidden = super().forward(input_ids, positions, *args, **kwargs)
        if self.untested and len(last):
            if torch.equal(hidden[tokens:], same):
                raise RuntimeError("noise changes nothing in this model; raise ROE_TAU, or unset ROE_ROSTERS")
            self.untested = False
        rows = hidden[:tokens, None].repeat(1, self.rosters, 1)
        if len(last):
            rows[last, 1:] = hidden[tokens:].unflatten(0, (len(last), -1))
        return rows.flatten(1)

    def compute_logits(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | None:
        """Log-probabilities [requests, V], the rosters' average, of hidden states [requests, n * d]."""
        rows = hidden_states.unflatten(-1, (self.rosters, -1)).transpose(0, 1).flatten(0, 1)
        logits = super().compute_logits(rows, *args, **kwargs)  # None: another process has them
        return None if logits is None else average(logits.unflatten(0, (self.rosters, -1)))


def add_noise(gate: GateLinear, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """A forward hook: adds every row's noise to its router logits [rows, E]."""
    logits = output[0] if isinstance(output, tuple) else output
    noisy = (logits + gate.noise[gate.row[: len(logits)]]).to(logits.dtype)
    return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def similar(lengths: list[int]) -> list[list[int]]:
    """Groups the requests, by index, so that little is padded and little memory is needed to attend for a group."""
    groups = {}
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        groups.setdefault((lengths[i] // 128).bit_length(), []).append(i)
    parts = []
    for group in groups.values():
        size = max(1, 2**13 // (lengths[group[-1]] + 1))
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return parts


def add_rows(layer: AttentionLayerBase, rosters: Rosters):
    """Lets vLLM's attention have the tokens of a step, and gives the noisy rows after them to `attend`."""
    backend = layer.get_attn_backend().get_name()
    for obstacle, what in (
        (type(layer) is not Attention or layer.attn_type != "decoder", f"{type(layer).__name__} layers"),
        (backend not in READABLE, f"{backend}; --attention-backend chooses another"),
        (layer.kv_cache_torch_dtype.itemsize < 2, "a quantised cache"),
        (layer.kv_sharing_target_layer_name, "layers that share a cache"),
        (getattr(layer.impl, "alibi_slopes", None) is not None, "ALiBi"),
        (layer.head_size_v != layer.head_size, "values of another size than keys"),
    ):
        if obstacle:
            raise ValueError(f"RoE in vLLM cannot read the cache of {what}")
    impl, plain, write = layer.impl, layer.impl.forward, layer.impl.do_kv_cache_update

    def update(layer, key, value, cache, slots):
        write(layer, key[: len(slots)], value[: len(slots)], cache, slots)

    def forward(layer, query, key, value, cache, metadata, output, output_scale=None, **kwargs):
        if metadata is None:  # a trial run
            return plain(layer, query, key, value, cache, metadata, output=output)
        if output_scale is not None:
            raise ValueError("RoE in vLLM does not work with attention that quantises its output")
        requests = len(rosters.lengths)
        end = len(query) - requests * (rosters.rosters - 1)
        plain(layer, query[:end], key[:end], value[:end], cache, metadata, output=output[:end], **kwargs)
        for group in rosters.groups:
            ids = torch.tensor(group, device=query.device)
            rows = [x[end:].unflatten(0, (requests, -1))[ids] for x in (query, key, value)]
            out = attend(layer, *rows, cache, metadata.block_table[ids], [rosters.lengths[i] for i in group])
            output[end:].unflatten(0, (requests, -1))[ids] = out.to(output.dtype)
        return output

    impl.forward, impl.do_kv_cache_update = forward, update


def attend(layer, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, blocks: Tensor, lengths: list[int]) -> Tensor:
    """Noisy rows see the clean history before their token, and themselves (section 2.3), under one softmax.

    q [requests, rows, H, D], k and v [requests, rows, Hk, D], blocks [requests, blocks] of the cache -> as q, float32.
    """
    longest, (requests, rows, _, D), heads = max(lengths), q.shape, k.shape[2]
    q, own_k, own_v = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [.., Hk, rows, g, D]
    keys, values = read(layer, cache, blocks, longest)
    scores = (q.flatten(2, 3) @ keys.mT).unflatten(2, (rows, -1))  # [requests, Hk, rows, g, longest]
    scores = torch.cat((scores, (q * own_k).sum(-1, keepdim=True)), -1) * layer.impl.scale
    cap = getattr(layer.impl, "logits_soft_cap", None)
    if cap:
        scores = cap * (scores / cap).tanh()
    lengths, position = torch.tensor(lengths, device=q.device)[:, None], torch.arange(longest, device=q.device)
    hidden = position >= lengths
    if layer.sliding_window:
        hidden |= position <= lengths - layer.sliding_window
    scores[..., :-1].masked_fill_(hidden[:, None, None, None], -torch.inf)
    sinks = getattr(layer.impl, "sinks", None)
    if sinks is not None:
        sinks = sinks.float().view(heads, 1, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)
    out = (weights[..., :longest].flatten(2, 3) @ values).unflatten(2, (rows, -1))
    out += weights[..., longest, None] * own_v
    return out.transpose(1, 2).flatten(2, 3)


def read(layer: Attention, cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [requests, Hk, length, D], in float32, of requests that have these blocks of a cache."""
    size, D = cache.shape[2], layer.head_size
    blocks = blocks[:, : -(-length // size)]
    if layer.get_attn_backend().get_name() == "CPU_ATTN":  # [.., 2 * size * D]: for each head keys^T, then values
        if layer.isa not in ("vec", "vec16"):
            raise ValueError(f"RoE in vLLM cannot read the cache of {layer.isa} kernels; try --dtype float32")
        keys, values = cache.flatten(2).chunk(2, -1)
        keys, values = keys.unflatten(2, (D, size)).mT, values.unflatten(2, (size, D))
    else:
        keys, values = cache.split(D, -1)
    keys, values = (x[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length].float() for x in (keys, values))
    return keys, values


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
