"""What the tests of the ports to transformers and MLX set, each setting where it matters; the names are roe.py's."""

SETTINGS = {  # without the last of a line the text is another one
    "defaults": {},
    "tau": {"tau": 2.0},
    "tau and rosters": {"tau": 2.0, "rosters": 9},
    "tau and one roster": {"tau": 2.0, "rosters": 1},
    "tau and skip": {"tau": 2.0, "skip": 2},
    "tau and no skip": {"tau": 2.0, "skip": 0},
    "tau of a file": {"tau": "other.json"},
    "tau and seed": {"tau": 2.0, "seed": 2**40},
    "new tokens": {"max_new_tokens": 5},
    "temperature": {"temperature": 0.9},
    "temperature and seed": {"temperature": 0.9, "seed": 1},
    "temperature and one roster": {"tau": 2.0, "temperature": 0.9, "rosters": 1},
    "temperature and top-p": {"temperature": 0.9, "top_p": 0.5},
}


def options(settings: dict) -> list[str]:
    """Settings as options of a port's program."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
