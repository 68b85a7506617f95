"""How a LLaMA becomes a GGUF file: names and the order of rows. Whether llama.cpp reads it, the bench shows."""

from __future__ import annotations

import numpy as np

from fourbit.bench.llama_cpp import _interleaved, _name


def test_names_of_tensors() -> None:
    assert _name("model.embed_tokens.weight") == "token_embd.weight"
    assert _name("model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"
    assert _name("model.layers.0.mlp.down_proj.weight") == "blk.0.ffn_down.weight"


def test_neighbours_are_rotated_where_halves_were() -> None:
    """Element i of a head's first half and element i of its second become 2 i and 2 i + 1."""
    rows = np.arange(16)[:, None]
    assert _interleaved(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
