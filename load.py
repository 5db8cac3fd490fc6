"""From files to a model: config.json, safetensors weights and tokenizer.json, as Hugging Face writes them.

They come from a directory, from the Hugging Face hub, or from `tiny/`, the model embedded in this repository. All of it
is checked before the first weight is read. Pickle files are never opened.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tqdm import tqdm

from model import Config, OLMoE, pack

EMBEDDED = Path(__file__).parent / "tiny"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def load(source: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> tuple[OLMoE, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
        source: a directory, a hub id such as "allenai/OLMoE-1B-7B-0125-Instruct", or None for the embedded model.
        device: "cpu", "cuda", "cuda:1" ...; "auto": a GPU if there is one.
        dtype: "bfloat16", "float16" or "float32"; "auto": as the weights are stored.

    Returns:
        model (`OLMoE`, without gradients; in bfloat16 on a CPU its large matrices are packed, see `model.pack`) and
        tokenizer (`tokenizers.Tokenizer`).

    Raises:
        FileNotFoundError: a file, a directory or a hub id that is not there.
        ValueError: a file that is broken or asks for what is not implemented, tensors that do not fit, an unknown
            device or dtype.
    """
    path = find(source)
    config = read_config(path / "config.json")
    tokenizer = read_tokenizer(path / "tokenizer.json", config)
    files = weight_files(path)
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    with torch.device("meta"):
        model = OLMoE(config).requires_grad_(False)
    check_tensors(path, stored, model)
    dtype, device = pick_dtype(dtype, stored), pick_device(device)
    state = {}
    with tqdm(total=len(stored), desc="loading", unit="tensor", leave=False, delay=1, disable=None) as progress:
        for file in files:
            # Pages of a memory-mapped file would count as resident: reading needs the model plus one tensor.
            with safe_open(file, "pt", backend="pread") as shard:
                for key in shard.keys():
                    for name, tensor in one_by_one(key, shard.get_tensor(key)):
                        tensor = tensor.to(device, dtype)
                        state[name.removeprefix("model.")] = tensor if "embed" in name else pack(tensor)
                    progress.update()
    model.load_state_dict(state, assign=True)
    if device.type == "cuda":
        model.stack_experts()
    return model, tokenizer


def find(source: str | Path | None) -> Path:
    """The directory that holds the model `source`, see `load`; fetched first if it is a hub id."""
    if source is None or Path(source).is_dir():
        return Path(source or EMBEDDED)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"there is no directory {source}, and it is not a hub id (organisation/name)")
    from huggingface_hub import snapshot_download  # comes with tokenizers; imported here since it is slow to import
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except GatedRepoError:
        reason = "it is gated, accept its terms on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "it has no such model, or a private one that needs `hf auth login`"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
    raise FileNotFoundError(f"{source} is not a directory, and the hub does not deliver it: {reason}")


def read_config(file: Path) -> Config:
    """config.json as a `Config`. What it asks for beyond OLMoE as published is refused by name."""
    raw = read_json(file)
    rope = raw.get("rope_parameters") or {}  # written by transformers 5; before, rope_theta stood at the top level
    for name, value, implemented in (
        ("model_type", raw.get("model_type"), "olmoe"),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("rope_scaling", raw.get("rope_scaling"), None),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1),
        ("quantization_config", raw.get("quantization_config"), None),
    ):
        if value != implemented:
            raise ValueError(f"{file}: {name} {value!r} is not implemented, only {implemented!r}")
    raw["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta")
    raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw.get("num_attention_heads")
    values = {field.name: raw[field.name] for field in fields(Config) if raw.get(field.name) is not None}
    missing = [field.name for field in fields(Config) if field.default is MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    config = Config(**values)
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{file}: head_dim {raw['head_dim']} is not implemented, only {config.head_dim}")
    if config.hidden_size % 8 or config.intermediate_size % 8:
        raise ValueError(f"{file}: hidden_size and intermediate_size must be multiples of 8, as F.grouped_mm needs")
    return config


def read_tokenizer(file: Path, config: Config) -> Tokenizer:
    """tokenizer.json as a `tokenizers.Tokenizer`."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; a model needs its tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()  # a setting that training can leave in the file
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(f"{file} has {tokenizer.get_vocab_size()} tokens, more than the model's {config.vocab_size}")
    return tokenizer


def read_json(file: Path) -> dict:
    """A file that holds a JSON object, as a dict."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {file}; a model is a directory as Hugging Face writes it") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return value


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model: a single one, or the shards that its index lists."""
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        raise FileNotFoundError(f"{path} has neither model.safetensors nor its index; other weights are not opened")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} lists {name}, which is not a safetensors file beside it; it is not opened")
        if not (path / name).exists():
            raise FileNotFoundError(f"there is no {path / name}, which {index.name} lists; download it again")
    return [path / name for name in names]


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{tensor name: (shape, dtype name)} of a safetensors file."""
    try:
        with safe_open(file, "pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file, download it again: {error}") from error


def pick_dtype(name: str, stored: dict) -> torch.dtype:
    """A torch.dtype from its name; "auto": the one that the weights are stored in."""
    for tensor, (_, dtype) in stored.items():
        if dtype not in DTYPES:
            raise ValueError(f"{tensor} is stored as {dtype}; only {', '.join(DTYPES)} are implemented")
    if name == "auto":
        return DTYPES[stored["model.embed_tokens.weight"][1]]
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {name} is unknown; use auto, bfloat16, float16 or float32")
    return dtype


def pick_device(name: str) -> torch.device:
    """A torch.device from its name; "auto": a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device {name} cannot be used, try cpu: {reason}") from error


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


def check_tensors(path: Path, stored: dict, model: OLMoE) -> None:
    """Raises ValueError unless the tensors stored, {name: (shape, dtype)}, are exactly those that the model needs."""
    want = {stored_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    meta = (one_by_one(name, torch.empty(shape, device="meta")) for name, (shape, _) in stored.items())
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
            raise ValueError(f"{path} does not fit its config.json; tensors {problem}: {', '.join(names[:3])}{more}")
