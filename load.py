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
from itertools import groupby
from pathlib import Path
from reprlib import repr as short

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tqdm import tqdm

from model import Config, OLMoE, speed_up

EMBEDDED = Path(__file__).parent / "tiny"
SMALL = 2**26  # bytes
MOST_BYTES = 2**24  # of a text
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# What config.json may say, by the type that `Config` gives a field: types in JSON, lowest and highest value. Nothing
# within these bounds overflows: not the product of two sizes, not a power of rope_theta, not clip_qkv in float16.
KINDS = {
    int: ((int,), 1, 2**30),
    float: ((int, float), 1e-30, 1e18),
    float | None: ((int, float), 1e-30, 65504),
    bool: ((bool,), False, True),
}
IMPLEMENTED = {
    "model_type": "olmoe",
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "rope_type": "default",
    "partial_rotary_factor": 1,
    "quantization_config": None,
}


def load(
    source: str | Path | None = None, device: str = "auto", dtype: str = "auto", fast: bool = True
) -> tuple[OLMoE, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
        source: a directory, a hub id such as "allenai/OLMoE-1B-7B-0125-Instruct", or None for the embedded model.
        device: "cpu", "cuda", "cuda:1" ...; "auto": a GPU if there is one.
        dtype: "bfloat16", "float16" or "float32"; "auto": as the weights are stored, but on CPUs float32 for a model
            of less than 64 MB, whose small matrices they multiply faster in it.
        fast: with what `model.speed_up` does: for inference only, and where and as it is. False: the plain model, which
            can be moved, converted, copied and trained.

    Returns:
        model (`OLMoE`, without gradients) and tokenizer (`tokenizers.Tokenizer`).

    Raises:
        FileNotFoundError: a file, a directory or a hub id that is not there.
        ValueError: a file that is unreadable, broken or asks for what is not implemented, tensors that do not fit, an
            unknown device or dtype.
    """
    device, dtype = pick_device(device), pick_dtype(dtype)
    path, config, tokenizer = read_description(source, device)
    files = weight_files(find(source, "*.safetensors", commit=path.name))
    stored = [tensor for file in files for tensor in read_header(file)]
    check_sizes(path, stored, config)
    with torch.device("meta"):
        model = OLMoE(config).requires_grad_(False)
    check_tensors(path, stored, model)
    if dtype is None:
        small = device.type == "cpu" and sum(file.stat().st_size for file in files) < SMALL
        kind = next(kind for name, _, kind in stored if name == "model.embed_tokens.weight")
        dtype = torch.float32 if small else DTYPES[kind]
    # Pages of a memory-mapped file would count as resident: reading needs the model plus what is not packed yet.
    shards = [safe_open(file, "pt", backend="pread") for file in files]
    places = [(part_of(name), name, i) for i, shard in enumerate(shards) for name in shard.keys()]
    with tqdm(total=len(places), desc="loading", unit="tensor", leave=False, delay=1, disable=None) as progress:
        for part, group in groupby(sorted(places, reverse=True), key=lambda place: place[0]):
            state, module, prefix = {}, model.get_submodule(part), f"model.{part}." if part else "model."
            for _, stored_as, i in group:
                for name, tensor in one_by_one(stored_as, shards[i].get_tensor(stored_as)):
                    state[name.removeprefix(prefix)] = tensor.to(device, dtype)
                progress.update()
            module.load_state_dict(state, strict=False, assign=True)  # of the whole model it would visit every expert
            del state, tensor
    if fast:
        speed_up(model)
    return model, tokenizer


def read_description(source: str | Path | None = None, device: str = "auto") -> tuple[Path, Config, Tokenizer]:
    """All of a model but its weights: the directory that it is in, its `Config` and its tokenizer. Raises as `load`."""
    path = find(source, "*.json")
    config = read_config(path / "config.json", pick_device(device))
    if (path / "tau.json").exists():
        config.tau = read_tau(str(path / "tau.json"))
    return path, config, read_tokenizer(path / "tokenizer.json", config)


def read_text(prompt: str | None, file: str | None) -> str:
    """The text of --prompt or --ppl: as given, or from standard input or a file, which may be without end."""
    piped, name = prompt == "-", "the prompt" if file is None else file or "''"
    try:
        if piped or prompt is None:
            with open(0 if piped else file, "rb", closefd=not piped) as opened:
                data = opened.read(MOST_BYTES + 1)
        else:
            data = os.fsencode(prompt)
        if len(data) > MOST_BYTES:
            raise refusal(f"{name} has more than {MOST_BYTES:,} bytes; give a part of it")
        return data.decode().removesuffix("\n").removesuffix("\r") if piped else data.decode()  # `echo` adds these
    except OSError as error:
        raise refusal(f"{name} cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise refusal(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_tau(argument: str | None) -> float | list[float] | None:
    """What --tau stands for: a number, or else a JSON file with a list of one per layer."""
    try:
        return None if argument is None else float(argument)
    except ValueError:
        if not Path(argument).is_file():
            raise refusal(f"tau takes a number or a JSON file with a list of them, not {argument!r}") from None
    values = read_json(Path(argument), list)
    for value in values:
        if type(value) not in (int, float):
            raise refusal(f"{argument}: tau must be a number from 0 to 100, not {short(value)}")
    return values


def chat_prompt(folder: Path, message: str) -> str:
    """A message as the OLMoE Instruct models expect it, if the model's own chat template has these tags and no other."""
    template = chat_template(folder)
    tags = set(re.findall(r"<\|\w+\|>", template)) - {"<|system|>", "<|endoftext|>"}
    if tags != {"<|user|>", "<|assistant|>"}:
        what = "another chat template than OLMoE's" if template else "no chat template"
        hint = "leave out --chat, or use ports/roe_transformers.py, which renders any"
        raise refusal(f"{folder} has {what}; {hint}")
    return f"<|endoftext|><|user|>\n{message}\n<|assistant|>\n"


def chat_template(folder: Path) -> str:
    return ""


def part_of(name: str) -> str:
    """The part of the model that is made fast at once: an expert, a layer of them if fused, or "", all the rest."""
    part = re.match(r"model\.(layers\.\d+\.mlp\.experts(\.\d+)?)\.", name)
    return part[1] if part else ""


def refusal(message: str, kind: type[Exception] = ValueError) -> Exception:
    """The exception to raise."""
    return kind(printable(message))


def printable(message: str) -> str:
    """One line, not too long, in which no name from a file can steer a terminal."""
    message = message if len(message) <= 1000 else f"{message[:500]} ... {message[-500:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def find(source: str | Path | None, pattern: str | list[str], commit: str | None = None) -> Path:
    """The directory that holds the model `source`, see `load`.

    If that is a hub id, its files of that pattern are fetched first: the newest ones, or those of a commit.
    """
    if source is None:
        return EMBEDDED
    try:
        if Path(source).is_dir():
            return Path(source)
    except OSError as error:
        raise refusal(f"{source} cannot be read: {error.strerror}") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise refusal(f"there is no directory {source}, and it is not a hub id (organisation/name)", FileNotFoundError)
    from huggingface_hub import snapshot_download  # comes with tokenizers; imported here since it is slow to import
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=commit, allow_patterns=pattern))
    except GatedRepoError:
        reason = "it is gated, accept its terms on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "it has no such model, or a private one that needs `hf auth login`"
    except Exception as error:  # the network's, the disk's or the hub's: versions of the library raise different ones
        reason = str(error).split("\n")[0] or type(error).__name__
    raise refusal(f"{source} is not a directory, and the hub does not deliver it: {reason}", FileNotFoundError)


def read_file(file: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a regular file, by default all."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading from a pipe or a device may never end
            raise refusal(f"{file} is not a regular file")
        with file.open("rb") as opened:
            return opened.read(size)
    except FileNotFoundError as error:
        hint = "a model is a directory with config.json, tokenizer.json and safetensors weights"
        raise refusal(f"there is no {file}; {hint}", FileNotFoundError) from error
    except OSError as error:
        raise refusal(f"{file} cannot be read: {error.strerror}") from error


def read_json(file: Path, kind: type = dict) -> dict | list:
    """A file that holds a JSON object, as a dict, or a list."""
    data = read_file(file)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{file} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise refusal(f"{file} is not a JSON {'object' if kind is dict else 'list'}")
    return value


def read_config(file: Path, device: torch.device) -> Config:
    """config.json as a `Config`. What it asks for beyond OLMoE as published is refused by name."""
    raw = {"model_type": None} | read_json(file)
    rope = {} if raw.get("rope_parameters") is None else raw["rope_parameters"]  # transformers 5 nests these fields
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", "rope_type", "partial_rotary_factor"}:
        raise refusal(f"{file}: rope_parameters {short(rope)} is not an object of rope_theta and rope_type")
    raw |= rope
    for name, value in IMPLEMENTED.items():
        if raw.get(name, value) != value:
            raise refusal(f"{file}: {name} {short(raw[name])} is not implemented, only {value!r}")
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    eos = raw.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    values = {"eos_token_id": eos}
    for field in fields(Config):
        value = raw.get(field.name)
        if field.type not in KINDS or value is None and field.default is not MISSING:
            continue
        types, low, high = KINDS[field.type]
        if type(value) not in types or not low <= value <= high:
            kind = types[-1].__name__
            raise refusal(f"{file}: {field.name} must be of type {kind}, from {low} to {high}, not {short(value)}")
        values[field.name] = value
    c = Config(**values)
    unaligned = c.hidden_size % 8 or c.intermediate_size % 8
    for wrong, sentence in (
        (c.num_experts_per_tok > c.num_experts, "num_experts_per_tok must not exceed num_experts"),
        (c.hidden_size % (2 * c.num_attention_heads), "hidden_size must be an even multiple of num_attention_heads"),
        (c.num_attention_heads % c.num_key_value_heads, "num_key_value_heads must divide num_attention_heads"),
        (raw.get("head_dim") not in (None, c.head_dim), "head_dim must be hidden_size / num_attention_heads"),
        (not all(type(i) is int and 0 <= i < c.vocab_size for i in ids), "eos_token_id must be an id below vocab_size"),
        (device.type == "cuda" and unaligned, "on GPUs 8 must divide hidden_size and intermediate_size (F.grouped_mm)"),
    ):
        if wrong:
            raise refusal(f"{file}: {sentence}")
    return c


def read_tokenizer(file: Path, config: Config) -> Tokenizer:
    """tokenizer.json as a `tokenizers.Tokenizer`."""
    data = read_file(file)
    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()  # settings that training can leave in the file
        tokenizer.no_padding()
        ids = [*tokenizer.get_vocab().values(), *tokenizer.encode("").ids]  # also those put around every text
        tokenizer.model.tokenize("\U0010ffff")  # no vocabulary has this: raises if the token for unknown ones is amiss
    except Exception as error:  # the library raises nothing more specific
        raise refusal(f"{file} is not a tokenizer: {error}") from error
    if max(ids, default=0) >= config.vocab_size:
        raise refusal(f"{file} has the token id {max(ids)}, but the model's vocab_size is only {config.vocab_size}")
    return tokenizer


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model: a single one, or the shards that its index lists."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        hint = "other weights are not opened"
        raise refusal(f"{path} has neither model.safetensors nor its index; {hint}", FileNotFoundError)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise refusal(f"{index} has no weight_map from tensors to files; download it again")
    for name in shards.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)):
            raise refusal(f"{index} lists {name}, which is not a safetensors file beside it; it is not opened")
    return [path / name for name in sorted(set(shards.values()))]


def read_header(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype name) of each tensor in a safetensors file."""
    read_file(file, 0)  # says what is wrong with it as a file
    try:
        with safe_open(file, "pt") as shard:
            slices = [(name, shard.get_slice(name)) for name in shard.keys()]
            return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices]
    except SafetensorError as error:
        raise refusal(f"{file} is not a complete safetensors file, download it again: {error}") from error


def pick_dtype(name: str) -> torch.dtype | None:
    """A torch.dtype from its name; None for "auto", the one that the weights are stored in."""
    if name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in DTYPES.values():
        raise refusal(f"dtype {name} is unknown; use auto, bfloat16, float16 or float32")
    return dtype


def pick_device(name: str) -> torch.device:
    """A torch.device from its name; "auto": a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()  # "meta" has devices, but no data
        return zero.device
    except Exception as error:  # each kind of device has its own way to say that it is not there
        reason = str(error).split("\n")[0].split(". ")[0]
        raise refusal(f"device {name} cannot be used, try cpu: {reason}") from error


def stored_name(name: str) -> str:
    """A parameter's name in a checkpoint."""
    return name if name == "lm_head.weight" else f"model.{name}"


def one_by_one(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of a checkpoint as it is or, if it holds all experts of a layer fused as [E, ...], those of each."""
    prefix, _, fused = name.rpartition(".")
    if not prefix.endswith(".experts") or tensor.dim() != 3:
        yield name, tensor
        return
    parts = fused.removesuffix("_proj").split("_")  # gate and up share a tensor, down has its own
    for e, expert in enumerate(tensor):
        for part, weight in zip(parts, expert.chunk(len(parts))):
            yield f"{prefix}.{e}.{part}_proj.weight", weight


def check_sizes(path: Path, stored: list, config: Config) -> None:
    """Raises ValueError for sizes that would take long to lay out, only to find that they do not fit."""
    L, E, experts = config.num_hidden_layers, config.num_experts, 0
    for name, shape, dtype in stored:
        if dtype not in DTYPES:
            raise refusal(f"{path}: {name} is stored as {dtype}; only {', '.join(DTYPES)} are implemented")
        if 0 in shape or len(shape) > 3 or len(shape) == 3 and shape[0] != E:  # only E fused experts have 3 dimensions
            raise refusal(f"{path} does not fit its config.json; tensors of the wrong shape: {name} {shape}")
        experts += shape[0] if len(shape) == 3 else ".experts." in name
    if L * E > experts:
        raise refusal(f"{path} does not fit its config.json; it has no weights for {L} layers of {E} experts")


def check_tensors(path: Path, stored: list, model: OLMoE) -> None:
    """Raises ValueError unless the tensors stored, as (name, shape, dtype) each, are those that the model needs."""
    want = {stored_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    meta = (one_by_one(name, torch.empty(shape, device="meta")) for name, shape, _ in stored)
    parts = [(name, tuple(tensor.shape)) for tensors in meta for name, tensor in tensors]
    have = dict(parts)
    for problem, names in (
        ("stored twice", [name for name, count in Counter(name for name, _ in parts).items() if count > 1]),
        ("missing", [name for name in want if name not in have]),
        ("unexpected", [name for name in have if name not in want]),
        ("of the wrong shape", [f"{n} {have[n]} not {want[n]}" for n in want if have.get(n, want[n]) != want[n]]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise refusal(f"{path} does not fit its config.json; tensors {problem}: {', '.join(names[:3])}{more}")
