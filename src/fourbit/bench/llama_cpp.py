"""A LLaMA of transformers as llama.cpp runs it: a GGUF file with Q4_0 layers, and its greedy loop through ctypes.

Q4_0 is blocks of 32 with a 16-bit scale: 4.5 bits a weight, where NF4 with double quantization has 4.13. Embedding and
head stay in bf16, as ours do.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

__all__ = ["load_llama", "write_gguf", "write_greedily"]

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path) -> Path:
    """Write a folder's LLaMA beside itself as GGUF; its tokens get names without meaning.

    Needs the package `gguf`.
    """
    from safetensors import safe_open

    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    target = folder / "model-q4_0.gguf"
    writer = gguf.GGUFWriter(str(target), "llama")
    _write_settings(writer, gguf, config)
    kinds = gguf.GGMLQuantizationType
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                values = tensors.get_tensor(name).float().numpy()
                theirs = _name(name)
                if values.ndim == 1:
                    writer.add_tensor(theirs, values)
                    continue
                kind = kinds.Q4_0 if theirs.startswith("blk.") else kinds.BF16
                heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(theirs.split(".")[-2])
                if heads:
                    values = _interleaved(values, config[heads])
                writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def load_llama(path: Path, context: int) -> Any:
    """The file through llama-cpp-python, with as many threads as torch has."""
    import torch

    package: Any = importlib.import_module("llama_cpp")
    threads = torch.get_num_threads()
    return package.Llama(
        model_path=str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
    )


def write_greedily(llama: Any, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after a prompt, without a look at ends."""
    import numpy as np

    llama.reset()
    vocabulary, made, given = llama.n_vocab(), list[int](), prompt
    for _ in range(tokens):
        llama.eval(given)
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), (vocabulary,))
        made.append(int(logits.argmax()))
        given = made[-1:]
    return made


def _write_settings(writer: Any, gguf: Any, config: dict[str, Any]) -> None:
    vocabulary, heads = config["vocab_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    special = ["<unk>", "<s>", "</s>"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"token{number}" for number in range(len(names), vocabulary)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (vocabulary - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names[:vocabulary])
    writer.add_token_scores([-float(number) for number in range(vocabulary)])
    writer.add_token_types(kinds[:vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}.weight"


def _interleaved(weight: Any, heads: int) -> Any:
    """[N, K] with the two halves of each head in turns: llama.cpp rotates neighbours."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)
