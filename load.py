"""From files to a model: config.json, safetensors weights and tokenizer.json, as Hugging Face writes them.

They come from a directory, from the Hugging Face hub, or from `tiny/`, the model embedded in this repository. All of it
is checked before the first weight is read; on the hub, what can be is checked before weights are fetched. Pickle files
are never opened.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from reprlib import repr as short

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from model import Config, OLMoE, speed_up

EMBEDDED = Path(__file__).parent / "tiny"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DESCRIPTION = ["config.json", "generation_config.json", "adapter_config.json", "tau.json"]
DESCRIPTION += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL, MOST_BYTES = 2**26, 2**24  # bytes of a small model; of a text
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# What config.json may say: type, lowest and highest value. Nothing within these bounds overflows: not the product of
# two sizes, not a power of rope_theta, not clip_qkv in float16. Sizes have no default.
SIZES = [field.name for field in fields(Config) if field.default is MISSING]
ALLOWED = dict.fromkeys(SIZES, (int, 1, 2**30)) | {
    "norm_topk_prob": (bool, False, True),
    "tie_word_embeddings": (bool, False, True),
    "rms_norm_eps": (float, 1e-30, 1e18),
    "rope_theta": (float, 1e-30, 1e18),
    "clip_qkv": (float, 1e-30, 65504),
}
IMPLEMENTED = {"model_type": "olmoe", "hidden_act": "silu", "attention_bias": False, "quantization_config": None}
ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


def load(source=None, device: str = "auto", dtype: str = "auto", fast: bool = True) -> tuple[OLMoE, Tokenizer]:
    """Loads a model (`OLMoE`, without gradients) and its tokenizer (`tokenizers.Tokenizer`).

    Args:
        source: a directory, a hub id such as "allenai/OLMoE-1B-7B-0125-Instruct", after which @ and a revision may
            stand, or None for the embedded model.
        device: "cpu", "cuda", "cuda:1" ...; "auto": a GPU if there is one.
        dtype: "bfloat16", "float16" or "float32"; "auto": as the weights are stored, but on CPUs float32 for a model
            of less than 64 MB, whose small matrices they multiply faster in it.
        fast: with what `model.speed_up` does: for inference only, and where and as it is. False: the plain model, which
            can be moved, converted, copied and trained.

    Raises FileNotFoundError: a file, a directory or a hub id that is not there or cannot be read; ValueError: a file
    that is broken or asks for what is not implemented, tensors that do not fit, an unknown device or dtype.
    """
    kind = getattr(torch, str(dtype).removeprefix("torch."), None)
    if dtype != "auto" and kind not in DTYPES.values():
        raise ValueError(f"dtype {dtype} is unknown; use auto, bfloat16, float16 or float32")
    device = pick_device(device)
    folder, config, tokenizer = read_description(source, device)
    stored = stored_tensors(source, folder)
    model, files = lay_out(folder, stored, config), {file for file, *_ in stored}
    if dtype == "auto":
        small = device.type == "cpu" and sum(file.stat().st_size for file in files) < SMALL
        stored_as = next(dtype for _, name, _, dtype in stored if name in (EMBEDDING, HEAD))
        kind = torch.float32 if small else DTYPES[stored_as]
    state, shards = {}, {file: safe_open(file, "pt", backend="pread") for file in files}  # mapped pages would stay
    for file, name, *_ in tqdm(stored, desc="loading", unit="tensor", leave=False, delay=1, disable=None):
        state |= {part: tensor.to(device, kind) for part, tensor in one_by_one(name, shards[file].get_tensor(name))}
    if config.tie_word_embeddings and HEAD in state and not state[HEAD].equal(state.setdefault(EMBEDDING, state[HEAD])):
        raise ValueError(f"{folder} has tied embeddings by its config.json, but stores another {HEAD}")
    model.load_state_dict({name: state[stored_name(name)] for name, _ in model.named_parameters()}, assign=True)
    del state  # `speed_up` frees each matrix as soon as it has arranged it anew
    return speed_up(model) if fast else model, tokenizer


def read_description(source=None, device: str = "auto") -> tuple[Path, Config, Tokenizer]:
    """All of a model but its weights: the folder that it is in, its `Config` and its tokenizer. Raises as `load`."""
    folder = fetch_files(source, DESCRIPTION)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter; merge it into its model first (merge_and_unload), and save that")
    config = read_config(folder, pick_device(device))
    if (folder / "tau.json").exists():
        config.tau = read_tau(str(folder / "tau.json"))
    return folder, config, read_tokenizer(folder / "tokenizer.json")


def fetch_files(source: str | Path | None, names: list[str], revision: str | None = None) -> Path:
    """The folder of the model `source`, see `load`. If that is a hub id, its files of these names are fetched first."""
    if source is None:
        return EMBEDDED
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        return Path(folder)
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
    if not hub_id:
        raise FileNotFoundError(f"there is no directory {source}, and it is not a hub id (organisation/name)")
    from huggingface_hub import snapshot_download  # comes with tokenizers; imported here since it is slow to import

    try:
        return Path(snapshot_download(hub_id[1], revision=revision or hub_id[2], allow_patterns=names))
    except Exception as error:  # the network's, the disk's or the hub's, which says what to do
        raise FileNotFoundError(f"{source} is not a directory, and the hub does not deliver it: {error}") from error


def read_file(file: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a regular file, by default all."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading from a pipe or a device may never end
            raise ValueError(f"{file} is not a regular file")
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        hint = "a model is a directory with config.json, tokenizer.json and model.safetensors or its index"
        raise FileNotFoundError(f"{file} cannot be read: {error.strerror}; {hint}") from error


def read_json(file: Path, kind: type = dict) -> dict | list:
    """A file that holds a JSON object, as a dict, or a list."""
    try:
        value = json.loads(read_file(file))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{file} is not a JSON {'object' if kind is dict else 'list'}")
    return value


def read_config(folder: Path, device: torch.device) -> Config:
    """config.json as a `Config`. What it asks for beyond OLMoE as published is refused by name."""
    file, ends = folder / "config.json", folder / "generation_config.json"
    raw = {"model_type": None} | read_json(file)
    ropes = {name: raw.get(name) or {} for name in ("rope_scaling", "rope_parameters")}  # of transformers 4 and 5
    for name, rope in ropes.items():
        if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", *ROPE}:
            raise ValueError(f"{file}: {name} {short(rope)} is not an object of rope_theta and rope_type")
    for part in (raw, *ropes.values()):
        for key, value in (IMPLEMENTED | ROPE).items():
            if part.get(key, value) != value:
                raise ValueError(f"{file}: {key} {short(part[key])} is not implemented, only {value!r}")
    raw |= ropes["rope_scaling"] | ropes["rope_parameters"]
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    values = {name: raw.get(name) for name in ALLOWED if name in SIZES or raw.get(name) is not None}
    for name, value in values.items():
        kind, low, high = ALLOWED[name]
        if type(value) not in ((int, float) if kind is float else (kind,)) or not low <= value <= high:
            what = f"of type {kind.__name__}, from {low} to {high}"
            raise ValueError(f"{file}: {name} must be {what}, not {short(value)}")
    eos = (read_json(ends) if ends.exists() else {}).get("eos_token_id")  # as in transformers, this one comes first
    eos = raw.get("eos_token_id") if eos is None else eos
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    c = Config(**values, eos_token_id=[i for i in eos if type(i) is int and 0 <= i < values["vocab_size"]])
    unaligned = c.hidden_size % 8 or c.intermediate_size % 8
    for wrong, sentence in (
        (c.num_experts_per_tok > c.num_experts, "num_experts_per_tok must not exceed num_experts"),
        (c.hidden_size % (2 * c.num_attention_heads), "hidden_size must be an even multiple of num_attention_heads"),
        (c.num_attention_heads % c.num_key_value_heads, "num_key_value_heads must divide num_attention_heads"),
        (raw.get("head_dim") not in (None, c.head_dim), "head_dim must be hidden_size / num_attention_heads"),
        (any(type(i) is not int for i in eos), f"eos_token_id, or {ends.name}'s, must be an id or a list of them"),
        (device.type == "cuda" and unaligned, "on GPUs 8 must divide hidden_size and intermediate_size (F.grouped_mm)"),
    ):
        if wrong:
            raise ValueError(f"{file}: {sentence}")
    return c


def read_tokenizer(file: Path) -> Tokenizer:
    """tokenizer.json as a `tokenizers.Tokenizer`."""
    data = read_file(file)
    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()  # settings that training can leave in the file
        tokenizer.no_padding()
        tokenizer.model.tokenize("\U0010ffff")  # no vocabulary has this: raises if the token for unknown ones is amiss
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    return tokenizer


def chat_prompt(folder: Path, message: str) -> str:
    """A message as the OLMoE Instruct models expect it, if the model's own template has their tags and no other."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        template = read_file(file).decode(errors="replace")
    else:  # a text, or several with names
        template = str(read_json(config).get("chat_template") or "") if config.exists() else ""
    if set(re.findall(r"<\|\w+\|>", template)) - {"<|system|>", "<|endoftext|>"} != {"<|user|>", "<|assistant|>"}:
        what = "another chat template than OLMoE's" if template else "no chat template"
        raise ValueError(f"--chat: {folder} has {what}; ports/roe_transformers.py --chat renders any")
    return f"<|endoftext|><|user|>\n{message}\n<|assistant|>\n"


def read_text(prompt: str | None, file: str | None) -> str:
    """The text of --prompt or --ppl: as given, or from standard input or a file, which may be without end."""
    piped, name = prompt == "-", "the prompt" if file is None else file or "''"
    try:
        if prompt is not None and not piped:
            return os.fsencode(prompt).decode()
        with open(0 if piped else file, "rb", closefd=not piped) as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes; give a part of it")
        return data.decode().removesuffix("\n").removesuffix("\r") if piped else data.decode()  # `echo` adds these
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_tau(argument: str | None) -> float | list[float] | None:
    """What --tau stands for: a number, or else a JSON file with a list of one per layer."""
    try:
        return None if argument is None else float(argument)
    except ValueError:
        if not Path(argument).is_file():
            raise ValueError(f"tau takes a number or a JSON file with a list of them, not {argument!r}") from None
    values = read_json(Path(argument), list)
    for value in values:
        if type(value) not in (int, float):
            raise ValueError(f"{argument}: tau must be a number from 0 to 100, not {short(value)}")
    return values


def stored_tensors(source: str | Path | None, folder: Path) -> list[tuple[Path, str, tuple[int, ...], str]]:
    """(file, name, shape, dtype name) of each tensor in a model's safetensors: one file, or the shards of an index."""
    fetch_files(source, [SINGLE, INDEX], folder.name)  # the same revision: a snapshot's folder is named by its commit
    shards = [SINGLE]
    if not os.path.lexists(folder / SINGLE):
        weight_map = read_json(folder / INDEX).get("weight_map")
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for name in shards:
            if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
                raise ValueError(f"{folder / INDEX} lists {name!r}, which is no safetensors file beside it")
        fetch_files(source, shards, folder.name)
    stored = []
    for file in (folder / name for name in sorted(set(shards))):
        read_file(file, 0)  # says what is wrong with it as a file
        try:
            with safe_open(file, "pt") as opened:
                tensors = [(name, opened.get_slice(name)) for name in opened.keys()]
                stored += [(file, name, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in tensors]
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file, download it again: {error}") from error
    return [tensor for tensor in stored if not tensor[1].endswith("rotary_emb.inv_freq")]  # which old versions kept


def pick_device(name: str) -> torch.device:
    """A torch.device from its name; "auto": a GPU if there is one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        zero = torch.zeros(1, device=name)
        zero.item()  # "meta" has devices, but no data
        return zero.device
    except Exception as error:  # each kind of device has its own way to say that it is not there
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"device {name} cannot be used, try cpu: {reason}") from error


def stored_name(name: str) -> str:
    """A parameter's name in a checkpoint."""
    return name if name == HEAD else f"model.{name}"


def one_by_one(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a checkpoint as it is or, if it holds all experts of a layer fused as [E, ...], those of each."""
    prefix, _, fused = name.rpartition(".")
    if not prefix.endswith(".experts") or tensor.dim() != 3:
        yield name, tensor
        return
    parts = fused.removesuffix("_proj").split("_")  # gate and up share a tensor, down has its own
    for e, expert in enumerate(tensor):
        for part, weight in zip(parts, expert.chunk(len(parts))):
            yield f"{prefix}.{e}.{part}_proj.weight", weight


def lay_out(folder: Path, stored: list, config: Config) -> OLMoE:
    """The model without its weights. ValueError unless it needs what is stored: (file, name, shape, dtype) each."""
    L, E, misfit, parts = config.num_hidden_layers, config.num_experts, f"{folder} does not fit its config.json; ", []
    for _, name, shape, dtype in stored:
        if dtype not in DTYPES:
            raise ValueError(f"{folder}: {name} is stored as {dtype}; only {', '.join(DTYPES)} are implemented")
        if 0 in shape or len(shape) > 3 or len(shape) == 3 and shape[0] != E:  # only E fused experts have 3 dimensions
            raise ValueError(f"{misfit}tensors of the wrong shape: {name} {shape}")
        parts += [(part, tuple(t.shape)) for part, t in one_by_one(name, torch.empty(shape, device="meta"))]
    if 3 * L * E > len(parts):  # which would take long to lay out
        raise ValueError(f"{misfit}it has no weights for {L} layers of {E} experts")
    with torch.device("meta"):
        model = OLMoE(config).requires_grad_(False)
    want, have = {stored_name(name): tuple(p.shape) for name, p in model.named_parameters()}, dict(parts)
    if config.tie_word_embeddings and HEAD in have:  # either of the two may stand for both
        have.setdefault(EMBEDDING, have.pop(HEAD))
    problems = {
        "stored twice": [name for name, count in Counter(name for name, _ in parts).items() if count > 1],
        "missing": [name for name in want if name not in have],
        "unexpected": [name for name in have if name not in want],
        "of the wrong shape": [f"{n} {have[n]} not {want[n]}" for n in want if have.get(n, want[n]) != want[n]],
    }
    found = [f"{what}: {', '.join(names[:3])} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        hint = "save the whole OlmoeForCausalLM, adapters merged and not compiled, with save_pretrained"
        raise ValueError(f"{misfit}tensors {'; '.join(found)}; {hint}")
    return model


def printable(message: str) -> str:
    """One line, not too long, in which no name from a file can steer a terminal."""
    message = message if len(message) <= 1000 else f"{message[:500]} ... {message[-500:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
