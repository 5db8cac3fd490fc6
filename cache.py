"""Which keys and values are kept, and for whom.

A query attends to positions of two kinds: those *shared* by all rosters, stored once, and those of its *own* roster.
Both caches hand a layer's attention these two, and differ only in what they keep:

                  shared by all rosters                 each roster's own
    shared        the clean history (row 0's)           the current token, not kept
    branching     the prompt but its last token         its continuation so far, kept

`length` is the number of positions stored so far. Each layer writes at it, and the model (`OLMoE.hidden`) advances it
after its last layer; setting it back forgets. A loop of your own that calls `update` must advance it, too.

Shapes: n rows, Hk key-value heads of size D, T new positions. All memory is allocated when the first keys come, whose
dtype and device it takes.
"""

from torch import Tensor


class SharedCache:
    """The paper's Clean Cache (section 2.3): the keys and values of the clean path, and of nothing else.

    Every roster attends to the one deterministic history and to its own current token, so that the memory is that of
    ordinary inference with one sequence, whatever the number of rosters: `max_len` positions.
    """

    def __init__(self, config, max_len: int):
        self.shape = config.num_hidden_layers, 1, config.num_key_value_heads, max_len, config.head_dim
        self.max_len = max_len
        self.length = 0
        self.k = self.v = None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stores row 0 of k and v [n, Hk, T, D]; returns what the n * T queries of this layer attend to.

        Returns:
            shared_k, shared_v [1, Hk, S, D] and own_k, own_v [n, Hk, T, C, D], as `model.attend` draws them: for n rows
            C is 1, each query's own position; for one row 0, since its own are among the shared.

        Raises ValueError: the cache is full.
        """
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"the cache is full: it has room for {self.max_len} positions, not {end}")
        if self.k is None:
            self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
        self.k[layer, :, :, self.length : end] = k[:1]
        self.v[layer, :, :, self.length : end] = v[:1]
        own_k, own_v = k.unsqueeze(3), v.unsqueeze(3)
        if len(k) == 1:
            return self.k[layer, :, :, :end], self.v[layer, :, :, :end], own_k[:, :, :, :0], own_v[:, :, :, :0]
        # S = length + T - 1: query i sees the length + i positions before its own (see attend), and its row's own one.
        return self.k[layer, :, :, : end - 1], self.v[layer, :, :, : end - 1], own_k, own_v


class BranchingCache:
    """The standard cache that the paper compares with: every roster keeps a history of its own (section 2.3).

    Until a layer's router has noise all rosters are the same, and one row holds the whole sequence. The first noisy
    layer still counts: its attention comes before its router.

    Args:
        config: the model's `Config`.
        max_len: the most positions to be stored.
        rosters: n, the rows to be kept in the layers after that.
        prompt_len: positions at the start that are shared by all rosters: the prompt but its last token, which is the
            first that rosters predict from.
        first_noisy: index of the first layer with tau > 0; None: there is none.
    """

    def __init__(self, config, max_len: int, rosters: int, prompt_len: int, first_noisy: int | None):
        layers, Hk, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        one_row = layers if rosters == 1 or first_noisy is None else first_noisy + 1  # so many layers have one row
        lengths = [max_len if layer < one_row else prompt_len for layer in range(layers)]
        self.shared_shapes = [(2, 1, Hk, length, D) for length in lengths]
        self.own_shapes = [(2, rosters, Hk, max_len - length, D) for length in lengths]
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
            self.shared = [k.new_empty(shape) for shape in self.shared_shapes]
            self.own = [k.new_empty(shape) for shape in self.own_shapes]
        alone = len(k) == 1  # the prompt, or a layer that is not after the first noisy one
        kv, start = (self.shared[layer], self.length) if alone else (self.own[layer], self.length - self.prompt_len)
        end, room = start + k.shape[2], kv.shape[3]
        if end > room:
            raise ValueError(f"the cache is full: layer {layer} has room for {room} positions, not {end}")
        kv[0, :, :, start:end], kv[1, :, :, start:end] = k, v
        if alone:
            nothing = k.unsqueeze(3)[:, :, :, :0]
            return kv[0, :, :, :end], kv[1, :, :, :end], nothing, nothing
        return *self.shared[layer], *kv[:, :, :, None, :end]  # keys and values of each
