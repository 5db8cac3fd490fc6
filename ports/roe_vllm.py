"""Roster of Experts (arXiv 2509.17238) as a plugin of vLLM, for its engine, its server, and whatever uses them.

    ROE_ROSTERS=8 ROE_TAU=0.3 vllm serve allenai/OLMoE-1B-7B-0125

    ROE_ROSTERS  n; without it vLLM stays as it is
    ROE_TAU      temperature of the noise, or a JSON list, one for each mixture layer [tau.json beside the model; 0.2]
    ROE_SKIP     mixture layers at each end that route without noise, if ROE_TAU is one number [1]
    ROE_SEED     of the noise, any whole number [0]

They mean what the options of roe.py mean, and in float32 greedy text is that of roe.py.
In a step's one pass the last token of each request, the one that predicts, is n rows: that of vLLM, which stays clean,
and n - 1 noisy ones behind the step's tokens. Noise is added to a router's logits (equation 1), which also changes the
weights of the chosen experts. Noisy rows attend to the clean history, which they read from vLLM's cache, and to
themselves, and write nothing: the paper's Clean Cache (section 2.3), in the memory of plain vLLM.
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
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import GateLinear

MODELS = {}  # the models by name of architecture, as vLLM registers them
logger = init_logger("vllm.roe")  # vLLM prints what loggers of its name are told
READABLE = "CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"  # attention backends whose cache `read` knows


def gumbel(seed: int, position: int, *shape: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1) of any shape, [n, L, E] for rosters; float32, on the CPU.

    Every 4 bytes of the endless SHAKE-128 stream of the seed and the token's position in its text make a value. Fewer
    rosters read less of it, so that the noise of m rosters is that of the first m of n. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * math.prod(shape))
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(shape)


def average(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability (section 3.1), logits [n, requests, V] -> [requests, V] in float32.

    To it the clean row's log-normaliser is added, which changes no probability. So these are logits as vLLM's own, on
    the scale that `repetition_penalty` is made for, which multiplies the negative and divides the positive ones; and
    those of one roster, or of equal ones, are vLLM's.
    """
    normaliser = logits.float().logsumexp(-1, keepdim=True)
    return (logits - (normaliser - normaliser[0])).logsumexp(0) - math.log(len(logits))


def settings(layers: int, model: str) -> tuple[int, list[float], int]:
    """Rosters, one temperature for each of the mixture layers, and the seed, from the environment (section 2.2)."""
    beside = Path(model, "tau.json")
    tau = beside.read_text() if beside.is_file() else "0.2"
    default = {"ROE_ROSTERS": "1", "ROE_TAU": tau, "ROE_SKIP": "1", "ROE_SEED": "0"}
    if unknown := [name for name in os.environ if name.startswith("ROE_") and name not in (*default, "ROE_WEIGHTS")]:
        raise ValueError(f"RoE in vLLM knows {', '.join(default)}, not {', '.join(unknown)}; unset it, or correct it")
    given = {name: os.environ.get(name, value) for name, value in default.items()}
    try:
        rosters, tau, skip, seed = map(json.loads, given.values())
    except ValueError:
        rosters = tau = skip = seed = None
    whole = all(type(number) is int for number in (rosters, skip, seed)) and 1 <= rosters <= 1024 and skip >= 0
    if whole and not isinstance(tau, list):
        if 2 * skip >= layers and rosters > 1:
            raise ValueError(f"ROE_SKIP={skip} leaves none of {layers} mixture layers with noise; give a smaller one")
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
        if self.rosters == 1:
            return
        logger.info_once(f"RoE: {self.rosters} rosters, seed {self.seed}, noise at {len(gates)} routers: {tau}")
        self.requests, self.lengths = schedule.max_num_seqs, []  # how many there can be; their histories in this step
        most = self.requests * (self.rosters - 1)  # noisy rows that a step can have
        for layer in self.modules():
            if hasattr(layer, "get_kv_cache_spec"):  # it has a cache
                add_rows(layer, self)
        # What the hooks add must be read from memory: vLLM compiles the model once, with its Python values frozen.
        # noise[layer, i] is for the i-th noisy row of a step, noise[layer, 0] = 0; row: i for that row, 0 for tokens.
        self.noise = torch.zeros(len(gates), most + 1, gates[0].output_size, dtype=torch.float32)
        self.row = torch.zeros(schedule.max_num_batched_tokens + most, dtype=torch.long)
        self.tau = torch.tensor(tau, dtype=torch.float32, device="cpu").view(-1, 1, 1)
        self.untested = any(tau)  # whether noise reaches the routers, as compiled or fused
        for gate, noise in zip(gates, self.noise):
            gate.register_buffer("noise", noise, persistent=False)
            gate.register_buffer("row", self.row, persistent=False)
            gate.register_forward_hook(add_noise)
        # vLLM keeps compiled models on disk: not to take plain ones for ours, nor ours for those of other shapes.
        vllm_config.additional_config = {**vllm_config.additional_config, "roe": tuple(self.noise.shape)}
        # It compiles for the tokens that a step can have, and takes CUDA graphs by their number: here are more rows.
        vllm_config.compilation_config.compile_ranges_endpoints[-1] += most
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

    def forward(self, input_ids: Tensor, positions: Tensor, *args, **kwargs) -> Tensor:
        """Hidden states [tokens, n * d]: at a request's last token those of the n rosters, the clean one first."""
        if self.rosters == 1:
            return super().forward(input_ids, positions, *args, **kwargs)
        tokens, metadata = len(input_ids), get_forward_context().attn_metadata
        if metadata:
            last = next(iter(metadata.values())).query_start_loc[1:] - 1  # each request's last token
        else:  # a trial run, of which vLLM measures the memory
            last = positions.new_full((self.requests,), tokens - 1)
        rows, self.lengths = last.repeat_interleave(self.rosters - 1), positions[last].tolist()
        inputs = torch.cat((input_ids, input_ids[rows])), torch.cat((positions, positions[rows])), *args
        self.row.zero_()[tokens : tokens + len(rows)] = torch.arange(1, len(rows) + 1)
        self.noise.zero_()
        plain = super().forward(*inputs, **kwargs) if metadata and self.untested else None
        # Seed and position alone decide the noise: what else is in the batch does not change a request's text.
        shape = self.rosters, len(self.noise), self.noise.shape[-1]
        noise = torch.cat([gumbel(self.seed, position, *shape)[1:] for position in self.lengths])
        self.noise[:, 1 : len(rows) + 1] = noise.transpose(0, 1) * self.tau
        hidden = super().forward(*inputs, **kwargs)
        if plain is not None:
            if torch.equal(hidden, plain):
                raise RuntimeError("noise changes nothing in this model; raise ROE_TAU, or unset ROE_ROSTERS")
            self.untested = False
        sides = hidden[:tokens, None].repeat(1, self.rosters, 1)
        sides[last, 1:] = hidden[tokens:].view_as(sides[last, 1:])
        return sides.flatten(1)

    def compute_logits(self, hidden_states: Tensor, *args, **kwargs) -> Tensor | None:
        """The rosters' average, logits [requests, V], of hidden states [requests, n * d]."""
        rows = hidden_states.unflatten(-1, (self.rosters, -1)).transpose(0, 1).flatten(0, 1)
        logits = super().compute_logits(rows, *args, **kwargs)  # None: another process has them
        return None if logits is None else average(logits.unflatten(0, (self.rosters, -1)))


def add_noise(gate: GateLinear, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """A forward hook: adds every row's noise to its router logits [rows, E]."""
    logits = output[0] if isinstance(output, tuple) else output
    noisy = (logits + gate.noise[gate.row[: len(logits)]]).to(logits.dtype)
    return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def similar(lengths: list[int]) -> list[list[int]]:
    """Requests by index, in groups: little is padded to a group's longest history, and a group takes little memory."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or lengths[i] > 2 * lengths[groups[-1][0]] + 128 or len(groups[-1]) * lengths[i] > 2**11:
            groups.append([])
        groups[-1].append(i)
    return groups


def add_rows(layer: Attention, rosters: Rosters) -> None:
    """Lets vLLM attend for the tokens of a step as ever, and `attend` for the noisy rows, which follow them."""
    if type(layer) is not Attention:
        raise ValueError(f"RoE in vLLM cannot read the cache of {type(layer).__name__} layers")
    for obstacle, what in (
        (layer.get_attn_backend().get_name() not in READABLE, f"attention backends but {', '.join(READABLE)}"),
        (layer.kv_cache_torch_dtype.itemsize < 2, "quantised keys and values"),
        (layer.kv_sharing_target_layer_name, "layers that share one"),
        (getattr(layer.impl, "alibi_slopes", None) is not None, "layers with ALiBi"),
    ):
        if obstacle:
            raise ValueError(f"RoE in vLLM cannot read the cache of {what}")
    attend_tokens, write = layer.impl.forward, layer.impl.do_kv_cache_update
    update = lambda layer, k, v, cache, slots: write(layer, k[: len(slots)], v[: len(slots)], cache, slots)

    def forward(layer, query, key, value, cache, metadata, output, output_scale=None, **kwargs):
        if getattr(layer, "isa", "vec") not in ("vec", "vec16") or output_scale is not None:
            raise ValueError("RoE in vLLM cannot use AMX, NEON or quantised attention; --dtype float32 may help")
        tokens = len(query) - len(rosters.lengths) * (rosters.rosters - 1)
        before = query[:tokens], key[:tokens], value[:tokens], cache, metadata
        attend_tokens(layer, *before, output=output[:tokens], **kwargs)
        q, k, v, out = (x[tokens:].unflatten(0, (-1, rosters.rosters - 1)) for x in (query, key, value, output))
        for group in similar(rosters.lengths) if metadata else []:
            blocks, lengths = metadata.block_table[group], [rosters.lengths[i] for i in group]
            out[group] = attend(layer, q[group], k[group], v[group], cache, blocks, lengths).to(out.dtype)
        return output

    layer.impl.forward, layer.impl.do_kv_cache_update = forward, update


def attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, blocks: Tensor, lengths: list) -> Tensor:
    """Noisy queries [requests, rows, H, D] see the clean history and their own key and value, under one softmax.

    The rows are so many queries to one history, which stays in its dtype; the softmax is in float32. In the cache the
    history is followed by the clean row's own key and value: in their column the noisy rows' own take their place.
    """
    requests, rows, heads = k.shape[:3]
    past_k, past_v = read(layer, cache, blocks[:, : max(lengths) // cache.shape[2] + 1])
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)  # [requests, Hk, rows, g, D]
    k, v = (x.transpose(1, 2).unsqueeze(3).float() for x in (k, v))
    column = torch.tensor(lengths, device=q.device).view(-1, 1, 1, 1).expand(-1, heads, q[0, 0, ..., 0].numel(), -1)
    scores = (q.flatten(2, 3) @ past_k).float()
    scores.scatter_(-1, column, (q * k).sum(-1).view(column.shape)).mul_(layer.impl.scale)
    if cap := getattr(layer.impl, "logits_soft_cap", None):
        scores = cap * (scores / cap).tanh()
    for seen, length in zip(scores, lengths):
        seen[..., length + 1 :] = -torch.inf
        seen[..., : max(0, length + 1 - (layer.sliding_window or length + 1))] = -torch.inf
    if (sinks := getattr(layer.impl, "sinks", None)) is not None:  # takes part in the softmax, and has no value
        sinks = sinks.float().view(heads, 1, -1).expand(requests, -1, rows, -1)
        scores = torch.cat((scores, sinks.reshape(column.shape)), -1)
    weights = scores.softmax(-1)[..., : past_k.shape[-1]]
    own = weights.gather(-1, column).view(*q.shape[:-1], 1)
    past = weights.scatter_(-1, column, 0).to(past_v.dtype) @ past_v
    return (past.view(q.shape) + own * v).transpose(1, 2).flatten(2, 3)


def read(layer: Attention, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """All keys [requests, Hk, D, tokens] and values [requests, Hk, tokens, D] in these blocks [requests, blocks]."""
    heads, size, width = cache.shape[1:]  # a cache is [blocks, Hk, size, 2 * D]
    head = torch.arange(heads, device=blocks.device)[:, None]
    if layer.get_attn_backend().get_name() != "CPU_ATTN":
        keys, values = cache[blocks[:, None], head].flatten(2, 3).chunk(2, -1)
        return keys.mT, values
    rows = heads * blocks[:, None] + head  # for each block and head all keys, transposed, then values
    lines = width * rows.unsqueeze(2) + torch.arange(width // 2)[:, None]  # [requests, Hk, D, blocks], of keys
    keys = cache.view(-1, size).index_select(0, lines.flatten())
    values = cache.view(-1, 2, size * width // 2)[:, 1].index_select(0, rows.flatten())
    return keys.view(*lines.shape[:3], -1), values.view(*rows.shape[:2], -1, width // 2)


def __getattr__(name: str) -> type:
    """The class of a model under its own name, made when vLLM asks for it: `register` gives it this module's names."""
    if name not in MODELS:
        raise AttributeError(name)
    return type(name, (Rosters, MODELS[name].load_model_cls()), {})


def register() -> None:
    """The entry point in `vllm.general_plugins`: vLLM calls it in each of its processes, before it makes a model."""
    if "ROE_ROSTERS" not in os.environ:
        if given := [name for name in os.environ if name.startswith("ROE_")]:
            logger.warning_once(f"ROE_ROSTERS is not set, so that there are no rosters, whatever {given} say")
        return
    if MODELS:
        return
    MODELS.update(ModelRegistry.models)
    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}:{name}")

    def refuse_prompt_logprobs(params, *args, verify=SamplingParams.verify):
        if params.prompt_logprobs is not None:
            raise VLLMValidationError("RoE scores no prompts: only the last token has rosters; unset prompt_logprobs")
        verify(params, *args)

    SamplingParams.verify = refuse_prompt_logprobs
