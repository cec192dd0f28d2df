"""How does a Llama in a GGUF file become a Hugging Face folder that vLLM loads?

    python gguf_to_hf.py IN.gguf OUT_FOLDER [--random]

Weights are dequantised to float32 (faster than bfloat16 on the CPUs of CI), the tokenizer and
chat template come out of the same file, and no torch is needed: numpy, gguf, safetensors and
transformers' tokenizers are enough. With `--random` the network is replaced by a random one of
four thin layers: its words mean nothing, but a step takes a fifth of the time, and tests of
scheduling ask for no more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from transformers import AutoTokenizer

Array = np.ndarray[Any, np.dtype[np.float32]]

TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
RANDOM_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """`config.json` as transformers writes it for a `LlamaForCausalLM`."""

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    if value("general.architecture") != "llama":
        raise SystemExit(f"not a Llama: {value('general.architecture')}")
    heads = value("llama.attention.head_count")
    hidden = value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
    }


def read_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in TOP_LEVEL:
            weights[TOP_LEVEL[tensor.name]] = weight
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part == "attn_q":
            weight = split_rope_halves(weight, config["num_attention_heads"])
        elif part == "attn_k":
            weight = split_rope_halves(weight, config["num_key_value_heads"])
        weights[f"model.layers.{layer}.{IN_A_LAYER[part]}.weight"] = np.ascontiguousarray(weight)
    return weights


def split_rope_halves(weight: Array, heads: int) -> Array:
    """Undo llama.cpp's row order: it keeps the two numbers of a rotary pair side by side, while
    Hugging Face keeps the first of all pairs in one half of the head, the second in the other."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def random_weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }

    def draw(shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return rng.normal(0.0, 0.02, shape).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": draw((config["vocab_size"], hidden)),
        "model.norm.weight": draw((hidden,)),
    }
    for layer in range(config["num_hidden_layers"]):
        for part, shape in shapes.items():
            weights[f"model.layers.{layer}.{IN_A_LAYER[part]}.weight"] = draw(shape)
    return weights


def write_folder(source: Path, out: Path, random: bool) -> None:
    reader = GGUFReader(source)
    config = read_config(reader)
    if random:
        config |= RANDOM_SHAPE
        weights = random_weights(config, np.random.default_rng(0))
    else:
        weights = read_weights(reader, config)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", action="store_true", help="four random layers instead")
    args = parser.parse_args()
    write_folder(args.source, args.out, args.random)
