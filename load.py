"""From files to a model: config.json, safetensors weights and tokenizer.json, as Hugging Face writes them.

They come from a directory, from the hub, or from `tiny/`, the model embedded in this repository. What can be checked is
checked before weights are fetched or read. What would be silently wrong is refused by name; for all else see `using`.
"""

import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short

import huggingface_hub  # comes with tokenizers, and itself imports nothing before it is used
import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer
from tqdm import tqdm

from model import Config, OLMoE

ROOT = Path(__file__).parent
speed_up = lambda model: model
if (ROOT / "fast").is_dir():
    from fast import speed_up  # which puts faster parts in the place of model.py's

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DESCRIPTION = ["config.json", "generation_config.json", "adapter_config.json", "tau.json"]
DESCRIPTION += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HINT = "download or save the model again, as save_pretrained writes it: whole, adapters merged, with tokenizer.json"
SMALL, MOST_BYTES = 2**26, 2**24  # bytes of a small model; of a text
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# By a field's type in `Config`: within these bounds no product of sizes, no power of rope_theta, no float16 overflows.
BOUNDS = {int: (1, 2**30), bool: (False, True), float: (1e-30, 1e18), float | None: (1e-30, 65504)}
IMPLEMENTED = {"model_type": "olmoe", "hidden_act": "silu", "attention_bias": False, "quantization_config": None}
ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


def load(source=None, device="auto", dtype="auto", fast: bool = True) -> tuple[OLMoE, Tokenizer]:
    """Loads a model (`OLMoE`, without gradients) and its tokenizer (`tokenizers.Tokenizer`).

    Args:
        source: a directory; a hub id, "allenai/OLMoE-1B-7B-0125", also with "@revision"; None: the embedded model.
        device: "cpu", "cuda", "cuda:1" ...; "auto": a GPU if there is one.
        dtype: "bfloat16", "float16", "float32"; "auto": as stored; on a CPU float32 below 64 MB, which is faster.
        fast: with what fast/ does, if it is there; then for inference only, and not to be moved, converted or copied.

    Raises FileNotFoundError: a file, a directory or a hub id that is not there or cannot be read; ValueError: a file
    that is broken or asks for what is not implemented, tensors that do not fit, an unknown device or dtype.
    """
    source, folder, config, tokenizer = describe(source)
    return load_weights(source, config, device, dtype, fast), tokenizer


def describe(source=None) -> tuple[str | Path | None, Path, Config, Tokenizer]:
    """All of a model but its weights: its source, of the hub with the commit, its folder, `Config` and tokenizer."""
    source, folder = fetch(source, DESCRIPTION)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter; merge it into its model first (merge_and_unload), and save that")
    config = read_config(folder)
    if (folder / "tau.json").exists():
        config.tau = read_tau(str(folder / "tau.json"))
    return source, folder, config, read_tokenizer(folder)


def fetch(source: str | Path | None, names: list[str]) -> tuple[str | Path | None, Path]:
    """The source of a model and its folder. If `source` is a hub id, its files of these names are fetched first."""
    folder = ROOT / "tiny" if source is None else os.path.expanduser(source)
    if not os.path.isdir(folder):
        hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))
        if hub_id is None:
            raise FileNotFoundError(f"there is no directory {source}, and it is not a hub id (organisation/name)")
        with using(source, "it is not a directory, and the hub does not deliver it"):
            folder = huggingface_hub.snapshot_download(hub_id[1], revision=hub_id[2], allow_patterns=names)
        source = f"{hub_id[1]}@{os.path.basename(folder)}"  # a snapshot's folder is named by its commit
    for file in (Path(folder, name) for name in names):
        if file.exists() and not file.is_file():  # reading from a pipe or a device may never end
            raise ValueError(f"{file} is not a regular file")
    return source, Path(folder)


@contextmanager
def using(what: object, hint: str = HINT):
    """Whatever goes wrong with a file, or what else is given by name, ends in one error that names it."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"{what} cannot be used: {error.strerror or error}; {hint}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):  # which is not the file's fault
            raise
        if type(error) is ValueError:  # our own, which says what is refused; json's is a subclass
            raise ValueError(f"{what}: {error}") from error
        raise ValueError(f"{what} cannot be used: {type(error).__name__}: {error}; {hint}") from error


def read_json(file: Path) -> dict:
    """What a file holds as a JSON object."""
    with using(file):
        return {**json.loads(file.read_bytes())}  # Python raises if it is something else


def read_config(folder: Path) -> Config:
    """config.json as a `Config`. What it asks for beyond OLMoE as published is refused by name."""
    raw = {"model_type": None} | read_json(folder / "config.json")  # None is refused below
    ends = folder / "generation_config.json"
    files = [read_json(ends), raw] if ends.exists() else [raw]  # in the order in which transformers asks them
    eos = next((file["eos_token_id"] for file in files if file.get("eos_token_id") is not None), [])
    eos = eos if isinstance(eos, list) else [eos]
    with using(folder / "config.json"):
        ropes = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)]  # transformers 4 and 5
        for part in (raw, *ropes):
            for key, value in (IMPLEMENTED | ROPE).items():
                if part.get(key, value) != value:
                    raise ValueError(f"{key} {short(part[key])} is not implemented, only {value!r}")
        for rope in ropes:
            if rope != ropes[0] or not rope.keys() <= {"rope_theta", *ROPE}:
                raise ValueError(f"{short(ropes)} is not one object of rope_theta and rope_type")
            raw |= rope
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = raw.get("num_attention_heads")
        known = {field.name: field for field in fields(Config) if field.type in BOUNDS}  # all but eos_token_id and tau
        c = Config(**{name: raw[name] for name in known if name in raw})  # where a size is missing, it raises
        for name, field in known.items():
            value = getattr(c, name)
            low, high = BOUNDS[field.type]
            kind = float if isinstance(low, float) and type(value) is int else type(value)  # 8 is a float, too
            if value is not field.default and (kind is not type(low) or not low <= value <= high):
                raise ValueError(f"{name} must be of type {type(low).__name__}, {low} to {high}, not {short(value)}")
        c.eos_token_id = [i for i in eos if type(i) is int and 0 <= i < c.vocab_size]  # others end no text
        for wrong, sentence in (
            (c.num_experts_per_tok > c.num_experts, "num_experts_per_tok must not exceed num_experts"),
            (c.hidden_size % (2 * c.num_attention_heads), "hidden_size / num_attention_heads must be an even number"),
            (c.num_attention_heads % c.num_key_value_heads, "num_key_value_heads must divide num_attention_heads"),
            (raw.get("head_dim") not in (None, c.head_dim), "head_dim must be hidden_size / num_attention_heads"),
            (any(type(i) is not int for i in eos), f"eos_token_id, or {ends.name}'s, must be an id or a list of them"),
        ):
            if wrong:
                raise ValueError(sentence)
        return c


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json as a `tokenizers.Tokenizer`, with the tokens that tokenizer_config.json adds to it."""
    file, more = folder / "tokenizer.json", folder / "tokenizer_config.json"
    with using(file):
        tokenizer = Tokenizer.from_buffer(file.read_bytes())
        tokenizer.no_truncation()  # settings that training can leave in the file
        tokenizer.no_padding()
        tokenizer.model.tokenize("\U0010ffff")  # no vocabulary has this: raises if the token for unknown ones is amiss
    settings = read_json(more) if more.exists() else {}
    with using(more):
        for index, token in settings.get("added_tokens_decoder", {}).items():
            tokenizer.add_tokens([AddedToken(**token)])  # as transformers; nothing happens if it has this one
            if tokenizer.token_to_id(token["content"]) != int(index):
                raise ValueError(f"the token {token['content']!r} cannot have the id {index}")
        if settings.get("add_prefix_space") and tokenizer.encode("x").ids != tokenizer.encode(" x").ids:
            raise ValueError("add_prefix_space is not implemented, where tokenizer.json does not say so, too")
    return tokenizer


def load_weights(source, config: Config, device="auto", dtype="auto", fast: bool = True) -> OLMoE:
    """The model of this source and `Config`, see `describe`. Arguments and errors as those of `load`."""
    with using(f"dtype {dtype}", f"use one of {', '.join(DTYPES)}"):
        kind = DTYPES[str(dtype).removeprefix("torch.")]
    device = pick_device(device)
    source, folder = fetch(source, [SINGLE, INDEX])
    shards = [SINGLE]
    if not os.path.lexists(folder / SINGLE):
        with using(folder / INDEX):
            shards = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
            for name in shards:
                if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise ValueError(f"it lists {name!r}, which is no safetensors file beside it")
        fetch(source, shards)
    files = [folder / name for name in shards]
    headers = read_parameters(files, config, "meta")
    with using(folder):  # before a weight is read: what is missing, unexpected or of the wrong shape
        if 3 * config.num_hidden_layers * config.num_experts > len(headers):  # would take ages to lay out
            raise ValueError(f"it has no weights for {config.num_hidden_layers} layers of {config.num_experts} experts")
        with torch.device("meta"):
            model = OLMoE(config).requires_grad_(False)
        model.load_state_dict(headers, assign=True)
    if kind is None:
        small = device.type == "cpu" and sum(file.stat().st_size for file in files) < SMALL
        kind = torch.float32 if small else model.dtype
    model.load_state_dict(read_parameters(files, config, device, kind), assign=True)
    return speed_up(model) if fast else model


def read_parameters(files: list[Path], config: Config, device, dtype=None) -> dict[str, torch.Tensor]:
    """Tensors by the names of parameters, on "meta" without values: fused experts one by one, a tied head for both."""
    state, E = {}, config.num_experts
    for file in files:
        with using(file):
            # Where a file is mapped, the pages that are read would stay in memory; for "meta" none is.
            opened = safe_open(file, "pt", backend="mmap" if device == "meta" else "pread")
            names = [name for name in opened.keys() if not name.endswith("rotary_emb.inv_freq")]  # of old versions
            for name in tqdm(names, desc=file.name, unit="tensor", leave=False, delay=1, disable=None):
                tensor = torch.nn.Parameter(opened.get_tensor(name).to(device, dtype), requires_grad=False)
                if tensor.dtype not in DTYPES.values():
                    raise ValueError(f"{name} is stored as {tensor.dtype}, which is not implemented")
                if not (tensor.is_meta or torch.stack(tensor.aminmax()).isfinite().all()):
                    raise ValueError(f"{name} has values that are not finite, or too large for {dtype}")
                found = {name: tensor}
                prefix, _, fused = name.rpartition(".")
                if prefix.endswith(".experts") and tensor.dim() == 3 and len(tensor) == E:
                    parts = fused.removesuffix("_proj").split("_")  # gate_up_proj [E, 2I, d]: gate, up; down_proj: down
                    pieces = zip(parts, tensor.chunk(len(parts), 1))
                    found = {f"{prefix}.{e}.{part}_proj.weight": piece[e] for part, piece in pieces for e in range(E)}
                if twice := found.keys() & state.keys():
                    raise ValueError(f"{min(twice)} is stored twice")
                state |= found
    if config.tie_word_embeddings:  # either may be stored, for both; load_state_dict refuses None
        tied = [state[name] for name in (EMBEDDING, HEAD) if name in state] or [None]
        if device != "meta" and not tied[0].equal(tied[-1]):
            raise ValueError(f"config.json says that embeddings are tied, but there is another {HEAD}")
        state |= dict.fromkeys((EMBEDDING, HEAD), tied[0])  # one parameter
    return state


def pick_device(name) -> torch.device:
    """A torch.device from its name; "auto": a GPU if there is one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    with using(f"device {name}", "try cpu"):
        torch.zeros(1, device=name).item()  # "meta" has devices, but no data
        return torch.device(name)


def chat_prompt(folder: Path, message: str) -> str:
    """A message with --chat, as OLMoE Instruct expects it, if the model's own template has its tags and no other."""
    file, more = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = read_json(more) if more.exists() else {}
    template = file.read_text(errors="replace") if file.exists() else str(settings.get("chat_template"))
    if set(re.findall(r"<\|\w+\|>", template)) - {"<|system|>", "<|endoftext|>"} != {"<|user|>", "<|assistant|>"}:
        raise ValueError(f"--chat: no chat template as OLMoE's in {folder}; ports/roe_transformers.py --chat takes any")
    return f"<|endoftext|><|user|>\n{message}\n<|assistant|>\n"


def read_text(prompt: str, file: str | int = 0) -> str:
    """A prompt as given or, for "-", what a file holds, by default standard input (0). A file may be without end."""
    with using("the prompt" if file == 0 else repr(file), "give text in UTF-8"):
        data = os.fsencode(prompt)
        if prompt == "-":
            with open(file, "rb", closefd=file != 0) as opened:
                os.set_blocking(opened.fileno(), True)  # else reading ends where a pipe is empty for now
                data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes; give a part of it")
        text = data.decode("utf-8-sig")  # without the byte order mark that some editors write
    return text.removesuffix("\n").removesuffix("\r") if (prompt, file) == ("-", 0) else text  # `echo` adds these


def read_tau(argument: str | None) -> float | list[float] | None:
    """What --tau stands for: a number, or else a JSON file with a list of one per layer."""
    with suppress(ValueError):
        return None if argument is None else float(argument)
    with using(argument, "tau takes a number, or a JSON file with a list of one per layer"):
        values = json.loads(Path(argument).read_bytes())
        if not (isinstance(values, list) and all(type(value) in (int, float) for value in values)):
            raise ValueError(f"tau must be a list of numbers from 0 to 100, not {short(values)}")
        return values
