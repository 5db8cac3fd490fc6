"""What only makes the model faster, for inference; without this folder the model is the plain one of model.py.

Each part here takes the place of a part of the model, behind the same signature, and changes only speed and rounding.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's switch for huge pages, read when it first allocates

from .cpu import FastLinear, SortedExperts, keep_memory, malloc_trim, quick_attend
from .gpu import StackedExperts, groups_on


def speed_up(model):
    """The same `OLMoE`, with parts that are faster on its device and in its dtype. For inference only.

    On a CPU matrices in bfloat16, and large ones in float32, are packed: they can no longer be moved, converted or
    copied. Experts lose the names that they have in checkpoints.
    """
    model.lm_head = FastLinear(model.lm_head.weight)
    for layer in model.model.layers:
        grouped = groups_on(layer.mlp.experts[0].up_proj.weight)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, FastLinear(getattr(layer.self_attn, name).weight))
        layer.self_attn.attend = quick_attend
        layer.mlp.gate = FastLinear(layer.mlp.gate.weight)
        layer.mlp.experts = (StackedExperts if grouped else SortedExperts)(layer.mlp.experts)
        malloc_trim(0)  # what was freed meanwhile lies in pieces, which glibc would keep: a third of a model
    keep_memory()
    return model
