"""Which keys and values are kept, and for whom.

A query attends to positions of two kinds: those *shared* by all rosters, stored once, and those of its *own* roster.
Both caches hand a layer the same four tensors and differ only in what they keep:

                  shared by all rosters                 each roster's own
    shared        the clean history (row 0's)           the current token, not kept
    branching     the prompt                            its continuation so far, kept

Shapes: n rows, Hk key-value heads of size D, T new positions. All memory is allocated at the start.
"""

import torch
from torch import Tensor


class SharedCache:
    """The paper's Clean Cache (section 2.3): the keys and values of the clean path, and of nothing else.

    Every roster attends to the one deterministic history and to its own current token, so that the memory is that of
    ordinary inference with one sequence, whatever the number of rosters.

    Args:
        config: the model's `Config`.
        max_len: the most positions to be stored.
        dtype, device: those of the model.
    """

    def __init__(self, config, max_len: int, dtype: torch.dtype | None = None, device: torch.device | None = None):
        shape = config.num_hidden_layers, 1, config.num_key_value_heads, max_len, config.head_dim
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions stored so far; the model advances it after its last layer

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.k.nbytes + self.v.nbytes

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Stores row 0 of k and v [n, Hk, T, D]; returns what the n * T queries of this layer attend to.

        Returns:
            shared_k, shared_v [1, Hk, S, D]: the last query sees all S positions, each earlier one sees one fewer.
            own_k, own_v [n, Hk, T, 1, D]: each query's own position; None for one row, where it is part of the shared.
        """
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k[:1]
        self.v[layer, :, :, self.length : end] = v[:1]
        if len(k) == 1:
            return self.k[layer, :, :, :end], self.v[layer, :, :, :end], None, None
        # Rows other than 0 must not see row 0's version of their own position: the shared part ends before it.
        return self.k[layer, :, :, : end - 1], self.v[layer, :, :, : end - 1], k.unsqueeze(3), v.unsqueeze(3)


class StaticCache:
    """A `SharedCache` for decoding in steps of fixed shapes that read nothing back, as a CUDA graph must be captured.

    A step attends to all the memory there is, with what is not filled yet masked out, whatever the length.

    Args:
        cache: the `SharedCache` that holds the prompt; its memory is used from now on.
    """

    def __init__(self, cache: SharedCache):
        self.k, self.v, self.nbytes = cache.k, cache.v, cache.nbytes
        self.v[:, :, :, cache.length :] = 0  # masked out, but 0 times what memory happens to hold could be NaN
        self.length = torch.tensor([cache.length], device=cache.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `SharedCache.update`, for T = 1; also returns which shared positions are visible, [max_len]."""
        self.k[layer].index_copy_(2, self.length, k[:1])
        self.v[layer].index_copy_(2, self.length, v[:1])
        visible = torch.arange(self.k.shape[3], device=self.k.device) < self.length
        return self.k[layer], self.v[layer], k.unsqueeze(3), v.unsqueeze(3), visible


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
        dtype, device: those of the model.
    """

    def __init__(
        self,
        config,
        max_len: int,
        rosters: int,
        prompt_len: int,
        first_noisy: int | None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        def allocate(rows, length):
            return torch.empty(2, rows, config.num_key_value_heads, length, config.head_dim, dtype=dtype, device=device)

        layers = config.num_hidden_layers
        joint = layers if rosters == 1 or first_noisy is None else first_noisy + 1  # layers in which one row suffices
        self.shared = [allocate(1, max_len if i < joint else prompt_len) for i in range(layers)]
        self.own = [allocate(0 if i < joint else rosters, max_len - prompt_len) for i in range(layers)]
        self.prompt_len = prompt_len
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(kv.nbytes for kv in self.shared + self.own)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Stores all rows of k and v [n, Hk, T, D]; returns what the queries attend to, as `SharedCache` does.

        With n > 1 rows T is 1, and own_k, own_v are [n, Hk, 1, C, D]: a roster's continuation of C positions.
        """
        one_row = len(k) == 1
        kv, start = (self.shared[layer], self.length) if one_row else (self.own[layer], self.length - self.prompt_len)
        end = start + k.shape[2]
        kv[0, :, :, start:end] = k
        kv[1, :, :, start:end] = v
        if one_row:
            return *kv[:, :, :, :end], None, None
        return *self.shared[layer], *kv[:, :, :, None, :end]
