"""GGUF files of tiny models, written by the gguf package from models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
LEAVES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
IDS = torch.tensor([[1, 5, 17, 80, 33, 2, 9, 64, 41, 12]])


def model_of(kind: str, **changes: Any) -> Any:
    """A random float32 model whose biases and norms are not the ones and zeros that they begin as."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def stored_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{LEAVES[rest]}.{leaf}"
    return f"{LEAVES[module]}.{leaf}"


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp: of each head, rows of both halves in turn."""
    return np.concatenate([half for head in np.split(values, heads) for half in np.stack(np.split(head, 2), 1)])


def quantized(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a matrix in a GGUF type and the float32 values that they mean. K-quants are random bytes: nobody here makes them."""
    code = GGMLQuantizationType[kind]
    try:
        data = gguf.quants.quantize(values, code)
    except NotImplementedError:
        size = gguf.GGML_QUANT_SIZES[code]
        draw = np.random.default_rng(values.shape[0])
        data = draw.integers(0, 256, (values.shape[0], values.shape[1] // size[0], size[1]), dtype=np.uint8)
        factors = {"Q4_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "IQ4_XS": (0,), "IQ2_XS": (0,)}[kind]
        for start in factors:
            halves = (draw.random(data.shape[:2]) * 1e-4).astype(np.float16)
            data[..., start : start + 2] = halves[..., None].view(np.uint8)
        data = data.reshape(values.shape[0], -1)
    return data, gguf.quants.dequantize(data, code)


def write(
    path: Path,
    model: Any,
    types: dict[str, str] | str = "Q8_0",
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    leave: tuple[str, ...] = (),
    vocabulary: Callable[[gguf.GGUFWriter, int], None] | None = None,
    **options: Any,
) -> Any:
    """Write ``model`` as llama.cpp's converter does, and give it the values that the file means.

    ``types``: GGUF type by the end of a module's name, or one for every matrix. ``extra``: keys after the architecture's prefix,
    None removes one. ``leave``: stored tensors that are not written. ``options``: of ``gguf.GGUFWriter``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch, **options)
    keys = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.hidden_size // config.num_attention_heads if arch == "qwen2" else config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]), "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }  # fmt: skip
    for key, value in {**keys, **(extra or {})}.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    (vocabulary or add_vocabulary)(writer, config.vocab_size)
    state = dict(model.state_dict())
    meant = {}
    for name, tensor in state.items():
        stored = stored_name(name)
        if stored in leave:
            continue
        module = name.removesuffix(".weight")
        kind = types if isinstance(types, str) else next((t for end, t in types.items() if module.endswith(end)), "F32")
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        rows = permuted(values, heads) if heads and arch == "llama" else values
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(stored, rows)
            continue
        if kind in ("F16", "BF16"):
            dtype = torch.float16 if kind == "F16" else torch.bfloat16
            half = torch.from_numpy(rows).to(dtype)
            data = half.numpy() if kind == "F16" else half.view(torch.uint8).numpy()
            writer.add_tensor(stored, data, raw_dtype=GGMLQuantizationType[kind])
            meant[name] = torch.from_numpy(values).to(dtype).float()
            continue
        data, expected = quantized(rows, kind)
        writer.add_tensor(stored, data, raw_dtype=GGMLQuantizationType[kind])
        back = np.argsort(permuted(np.arange(len(rows)), heads)) if heads and arch == "llama" else np.arange(len(rows))
        meant[name] = torch.from_numpy(expected[back])
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict({**state, **meant})
    return model


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A sentencepiece vocabulary: control tokens, then letters."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *(chr(33 + i) for i in range(size - 4))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(size)])
    writer.add_token_types([2, 3, 3, *([1] * (size - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
