"""Which keys and values are kept, and for whom.

A query attends to positions of two kinds: those *shared* by all rosters, stored once, and those of its *own* roster.
Both caches hand a layer's attention these two, and differ only in what they keep:

                  shared by all rosters                 each roster's own
    shared        the clean history (row 0's)           the current token; row 0's becomes history
    branching     the prompt but its last token         its continuation so far, kept (after the first noisy layer)

`length` is the number of positions stored so far, which the last layer advances. Lower it to forget those beyond. The
first keys say in which dtype and on which device memory is allocated.
Shapes: n rows, Hk key-value heads of size D, T new positions.
"""

from torch import Tensor


class SharedCache:
    """The paper's Clean Cache (section 2.3): the keys and values of the clean path, and of nothing else.

    Every roster attends to the one deterministic history and to its own current token, so that the memory is that of
    ordinary inference with one sequence, whatever the number of rosters: `max_len` positions.
    """

    def __init__(self, config, max_len: int):
        self.shape = config.num_hidden_layers, 1, config.num_key_value_heads, max_len, config.head_dim
        self.length = 0
        self.nbytes = 0  # of all keys and values

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stores row 0 of k and v [n, Hk, T, D]; returns what the n * T queries of this layer attend to.

        That is shared_k, shared_v [1, Hk, S, D] and own_k, own_v [n, Hk, T, C, D], see `model.attend`. With n > 1 rows
        C is 1, the query's own position. With a single row C is 0: its positions are among the shared.

        Raises ValueError: the cache is full.
        """
        layers, _, _, max_len, _ = self.shape
        end = self.length + k.shape[2]
        if end > max_len:
            raise ValueError(f"the cache is full: it has room for {max_len} positions, not {end}")
        if self.nbytes == 0:
            self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            self.nbytes = 2 * self.k.nbytes
        self.k[layer, :, :, self.length : end] = k[:1]
        self.v[layer, :, :, self.length : end] = v[:1]
        if layer == layers - 1:
            self.length = end
        C = 1 if len(k) > 1 else 0  # 1: a query's own position is in own_k, so none needs the last shared one, end - 1
        own_k, own_v = k.unsqueeze(3)[:, :, :, :C], v.unsqueeze(3)[:, :, :, :C]
        return self.k[layer, :, :, : end - C], self.v[layer, :, :, : end - C], own_k, own_v


class BranchingCache:
    """The standard cache that the paper compares with: every roster keeps a history of its own (section 2.3).

    Until a layer's router has noise all rosters are the same, and one row holds the whole sequence. So it does in the
    first noisy layer itself: its attention comes before its router.

    Args:
        config, max_len: the model's `Config`, and the most positions to be stored.
        rosters: n, the rows to be kept in the layers after the first noisy one.
        prompt_len: positions shared by all rosters: the prompt but its last token, the first that they predict from.
        first_noisy: index of the first layer with tau > 0; None: there is none.
    """

    def __init__(self, config, max_len: int, rosters: int, prompt_len: int, first_noisy: int | None):
        layers, Hk, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        one_row = layers if rosters == 1 or first_noisy is None else first_noisy + 1  # how many layers keep one row
        shared = [max_len if layer < one_row else prompt_len for layer in range(layers)]
        self.shapes = [((1, Hk, length, D), (rosters, Hk, max_len - length, D)) for length in shared]
        self.prompt_len = prompt_len
        self.length = 0
        self.nbytes = 0
        self.layers = []  # of each: shared_k, shared_v, own_k, own_v

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stores all rows of k and v [n, Hk, T, D]; returns what the queries attend to, as `SharedCache` does.

        With n > 1 rows T is 1, and own_k, own_v are [n, Hk, 1, C, D]: a roster's continuation of C positions.

        Raises ValueError: the cache is full; n > 1 rows before the prompt is complete, or with T > 1.
        """
        if not self.layers:
            self.layers = [[t.new_empty(shape) for shape in shapes for t in (k, v)] for shapes in self.shapes]
            self.nbytes = sum(tensor.nbytes for tensors in self.layers for tensor in tensors)
        shared_k, shared_v, own_k, own_v = self.layers[layer]
        alone = len(k) == 1  # the prompt, or a layer that is not after the first noisy one
        kept_k, kept_v = (shared_k, shared_v) if alone else (own_k, own_v)
        start = self.length if alone else self.length - self.prompt_len
        end, room = start + k.shape[2], kept_k.shape[2]
        if start < 0 or not alone and k.shape[2] > 1:
            raise ValueError(f"rosters branch token by token, after {self.prompt_len} positions of the prompt")
        if end > room:
            raise ValueError(f"the cache is full, or its part for the prompt: {room} positions have room, not {end}")
        kept_k[:, :, start:end] = k
        kept_v[:, :, start:end] = v
        if layer == len(self.layers) - 1:
            self.length += k.shape[2]
        if alone:
            nothing = k.unsqueeze(3)[:, :, :, :0]
            return shared_k[:, :, :end], shared_v[:, :, :end], nothing, nothing
        return shared_k, shared_v, own_k[:, :, None, :end], own_v[:, :, None, :end]
