"""Which keys and values are kept, and for whom.

A query attends to positions of two kinds: those *shared* by all rosters, stored once, and those of its *own* roster.
Both caches hand a layer's attention these two, and differ only in what they keep:

                  shared by all rosters                 each roster's own
    shared        the clean history (row 0's)           the current token, not kept
    branching     the prompt                            its continuation so far, kept

Shapes: n rows, Hk key-value heads of size D, T new positions. All memory is allocated when the first keys come, whose
dtype and device it takes.
"""

from torch import Tensor


class SharedCache:
    """The paper's Clean Cache (section 2.3): the keys and values of the clean path, and of nothing else.

    Every roster attends to the one deterministic history and to its own current token, so that the memory is that of
    ordinary inference with one sequence, whatever the number of rosters.

    Args:
        config: the model's `Config`.
        max_len: the most positions to be stored.
    """

    def __init__(self, config, max_len: int):
        self.shape = config.num_hidden_layers, 1, config.num_key_value_heads, max_len, config.head_dim
        self.max_len = max_len
        self.length = 0  # positions stored so far; the model advances it after its last layer
        self.k = self.v = None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stores row 0 of k and v [n, Hk, T, D]; returns what the n * T queries of this layer attend to.

        Returns:
            shared_k, shared_v [1, Hk, S, D]: the last query sees all S positions, each earlier one sees one fewer.
            own_k, own_v [n, Hk, T, 1, D]: each query's own position. Empty, [1, Hk, T, 0, D], for one row, whose own
                positions are among the shared ones.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the cache is full: it has room for {self.max_len} positions, not {end}")
        if self.k is None:
            self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
        self.k[layer, :, :, self.length : end] = k[:1]
        self.v[layer, :, :, self.length : end] = v[:1]
        if len(k) == 1:
            return self.k[layer, :, :, :end], self.v[layer, :, :, :end], *k.new_empty(2, *k.shape[:3], 0, k.shape[3])
        # Rows other than 0 must not see row 0's version of their own position: the shared part ends before it.
        return self.k[layer, :, :, : end - 1], self.v[layer, :, :, : end - 1], k.unsqueeze(3), v.unsqueeze(3)


class BranchingCache:
    """The standard cache that the paper compares with: every roster keeps a history of its own (section 2.3).

    The prompt is clean and therefore still shared. Rosters are identical up to the router of the first noisy layer, so
    that up to and including that layer one row holds the whole sequence.

    Args:
        config: the model's `Config`.
        max_len: the most positions to be stored.
        rosters: n, the rows to be kept.
        prompt_len: positions at the start that are shared by all rosters.
        first_noisy: index of the first layer with tau > 0; later layers hold `rosters` rows. None: no layer does.
    """

    def __init__(self, config, max_len: int, rosters: int, prompt_len: int, first_noisy: int | None):
        layers = config.num_hidden_layers
        joint = layers if rosters == 1 or first_noisy is None else first_noisy + 1  # layers in which one row suffices
        row = lambda length: (config.num_key_value_heads, length, config.head_dim)
        self.shapes = [[(2, 1, *row(max_len if i < joint else prompt_len)) for i in range(layers)]]
        self.shapes += [[(2, 0 if i < joint else rosters, *row(max_len - prompt_len)) for i in range(layers)]]
        self.prompt_len = prompt_len
        self.length = 0
        self.shared = self.own = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first."""
        return sum(kv.nbytes for kv in (*self.shared, *self.own))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stores all rows of k and v [n, Hk, T, D]; returns what the queries attend to, as `SharedCache` does.

        With n > 1 rows T is 1, and own_k, own_v are [n, Hk, 1, C, D]: a roster's continuation of C positions.
        """
        if not self.shared:
            self.shared, self.own = ([k.new_empty(shape) for shape in shapes] for shapes in self.shapes)
        joint = len(k) == 1
        kv, start = (self.shared[layer], self.length) if joint else (self.own[layer], self.length - self.prompt_len)
        end, room = start + k.shape[2], kv.shape[3]
        if end > room:
            raise ValueError(f"the cache is full: layer {layer} has room for {room} positions, not {end}")
        kv[0, :, :, start:end], kv[1, :, :, start:end] = k, v
        if joint:
            return *kv[:, :, :, :end], *kv.new_empty(2, *k.shape[:3], 0, k.shape[3])
        return *self.shared[layer], *kv[:, :, :, None, :end]
