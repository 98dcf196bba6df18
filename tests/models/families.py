"""Model families: a tiny random model of each architecture, inputs for it, and what the engines' tables tick for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 160
IMAGE = 150
"""Token that stands for a piece of an image."""


@dataclass(frozen=True)
class Tick:
    """One column of the tables: what is asked for at load, what it may change of the logits, and what is written.

    ``bound``: relative Frobenius distance of the logits from those of the 16-bit model. ``format``: of the file, None for the
    default. ``kv``: a KV cache instead of a weight scheme.
    """

    scheme: str
    bound: float
    format: str | None = None
    kv: bool = False


TICKS = {
    "NVFP4": Tick("Wnvfp4Anvfp4", 0.6),
    "MXFP4": Tick("Wmxfp4A16", 0.45),
    "FP8 tensor": Tick("Wfp8Afp8_tensor_a:tensor", 0.25),
    "FP8 block": Tick("Wfp8Afp8_b128x128", 0.25),
    "FP8 rowwise": Tick("Wfp8Afp8", 0.25),
    "FP8 KV": Tick("fp8", 0.1, kv=True),
    "W4A8 AWQ": Tick("W4Afp8_g128", 0.45),
    "W4A16 AWQ": Tick("W4A16_g128_asym", 0.45, "awq"),
    "W4A16 GPTQ": Tick("W4A16_g128", 0.45, "gptq"),
    "W8A8": Tick("W8A8", 0.06),
    "WINT8": Tick("wint8", 0.04),
    "WINT4": Tick("wint4", 0.45),
    "MixQuant": Tick("mix_quant", 0.3),
    "WINT2": Tick("wint2", 0.0),
}
"""Columns of TensorRT-LLM (the first nine), RTP-LLM (W8A8) and FastDeploy."""

NOT_DONE = {
    "WINT2": (
        "WINT2 is a convolutional code that its makers fit with calibration data: qplug reads such files and does not make them, "
        "and plugins/qplug_int8/tests/test_paddle_ernie.py loads one of this family as FastDeploy writes it"
    ),
}
"""Columns that are ticked for a family and cannot be made at load, with the reason."""


@dataclass(frozen=True)
class Family:
    """One row of the tables.

    ``config`` builds the tiny model's config; ``cls``: the name of its class in transformers. ``ticks``: columns that the tables
    tick; ``more``: columns that they do not, shown so that every family has weights quantized once. ``note``: what stands in
    for what. ``language``: where the names of the language part start. ``vision``: tokens of an image, 0 where there is none.
    ``decoder_ids``: an encoder-decoder. ``absent``:
    columns that cannot be done for this family, with the reason.
    """

    config: Callable[[], Any]
    cls: str
    ticks: tuple[str, ...]
    more: tuple[str, ...] = ()
    note: str = ""
    language: str = ""
    vision: int = 0
    decoder_ids: bool = False
    absent: dict[str, str] = field(default_factory=dict)

    def build(self, folder: Path) -> Path:
        """The model on disk: random, seeded, bf16, with values in what starts as zeros or ones."""
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)._from_config(self.config(), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.abs().amax() - parameter.abs().amin()
                if parameter.ndim < 2 or spread == 0:
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    def inputs(self) -> dict[str, Tensor]:
        """Two sequences of 14 tokens, with an image each where the family sees."""
        made: dict[str, Tensor] = {}
        ids = torch.arange(5, 5 + 28).view(2, 14)
        if self.vision:
            made["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
            ids[:, 1 : 1 + self.vision] = IMAGE
        if self.cls != "VisionEncoderDecoderModel":
            made["input_ids"] = ids
        if self.decoder_ids:
            made["decoder_input_ids"] = ids % 97
        return made


def _config(kind: str, **changes: Any) -> Callable[[], Any]:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.06,
    }  # fmt: skip
    sizes |= changes
    kept = {name: value for name, value in sizes.items() if value is not ...}
    return lambda: transformers.AutoConfig.for_model(kind, **kept)


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {**_config(kind, **changes)().to_dict(), "model_type": kind}


VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
}  # fmt: skip


def _llava(vision: str, text: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        tower = {**VISION, "model_type": vision} | ({"projection_dim": 64} if vision == "clip_vision_model" else {})
        return transformers.LlavaConfig(vision_config=tower, text_config=_text(text), image_token_index=IMAGE, **more)

    return make


def _blip2(text: dict[str, Any]) -> Callable[[], Any]:
    def make() -> Any:
        qformer = {
            "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
            "encoder_hidden_size": 64,
        }  # fmt: skip
        vision = {**VISION, "initializer_range": 0.06}
        return transformers.Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
        )

    return make


OPT = {
    "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.06,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": VOCABULARY, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


def _nougat() -> Any:
    encoder = transformers.DonutSwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, hidden_size=32
    )
    decoder = transformers.MBartConfig(
        vocab_size=VOCABULARY, d_model=128, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=256, encoder_layers=2,
        encoder_attention_heads=4, encoder_ffn_dim=256, max_position_embeddings=64, init_std=0.06,
    )  # fmt: skip
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=0
    )


DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 128, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NO_CACHE = {"FP8 KV": "an encoder keeps no keys and values; the engine refuses a KV cache for it"}
BOTH = ("W4A16 AWQ", "W4A16 GPTQ")

FAMILIES = {
    "BERT": Family(
        _config("bert", num_key_value_heads=...), "BertModel", ("FP8 KV",), ("W8A8", "W4A16 GPTQ", "FP8 rowwise"), absent=NO_CACHE
    ),
    "DeepSeek-R1": Family(_config("deepseek_v3", **DEEPSEEK), "DeepseekV3ForCausalLM", ("NVFP4", "FP8 block", "FP8 KV")),
    "EXAONE": Family(
        _config("exaone4", sliding_window=8, sliding_window_pattern=2), "Exaone4ForCausalLM",
        ("FP8 tensor", "FP8 KV", "W4A8 AWQ", "W4A16 AWQ"), note="EXAONE 4; the code of EXAONE 3 is not in transformers",
    ),
    "Gemma 3": Family(
        _config("gemma3_text", head_dim=32, sliding_window=8, tie_word_embeddings=True, query_pre_attn_scalar=32),
        "Gemma3ForCausalLM", ("FP8 tensor", "FP8 KV", "W4A8 AWQ", "W4A16 AWQ"),
    ),
    "gpt-oss": Family(
        _config("gpt_oss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, intermediate_size=128, sliding_window=8),
        "GptOssForCausalLM", ("MXFP4", "FP8 KV"),
    ),
    "LLaMA": Family(
        _config("llama", num_key_value_heads=4), "LlamaForCausalLM", ("NVFP4", "FP8 tensor", "FP8 KV", *BOTH, "W8A8"),
        note="multi-head attention",
    ),
    "LLaMA-v2": Family(
        _config("llama"), "LlamaForCausalLM", ("NVFP4", "FP8 tensor", "FP8 KV", "W4A8 AWQ", *BOTH, "W8A8"),
        note="grouped-query attention, as 70B",
    ),
    "LLaMA 3": Family(
        _config("llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True), "LlamaForCausalLM",
        ("FP8 rowwise", "FP8 KV", "W4A8 AWQ", "W8A8"), note="scaled rope and tied embeddings, as 3.2",
    ),
    "LLaMA 4": Family(
        _config("llama4_text", head_dim=32, num_local_experts=4, intermediate_size=128, intermediate_size_mlp=256,
                interleave_moe_layer_step=2, attention_chunk_size=8),
        "Llama4ForCausalLM", ("NVFP4", "FP8 tensor", "FP8 KV"),
    ),
    "Mistral": Family(
        _config("mistral", head_dim=32, sliding_window=8), "MistralForCausalLM", ("FP8 tensor", "FP8 KV", "W4A16 AWQ")
    ),
    "Mixtral": Family(
        _config("mixtral", head_dim=32, num_local_experts=4, num_experts_per_tok=2), "MixtralForCausalLM",
        ("NVFP4", "FP8 tensor", "FP8 KV"),
    ),
    "Phi": Family(_config("phi", num_key_value_heads=4), "PhiForCausalLM", ("FP8 KV", "W4A8 AWQ")),
    "Qwen": Family(
        _config("qwen2", num_key_value_heads=4), "Qwen2ForCausalLM", ("FP8 KV", "W4A8 AWQ", *BOTH, "W8A8"),
        note="Qwen 1.5; the code of Qwen 1 is not in transformers",
    ),
    "Qwen2/2.5": Family(
        _config("qwen2", tie_word_embeddings=True), "Qwen2ForCausalLM", ("NVFP4", "FP8 tensor", "FP8 KV", "W4A8 AWQ", *BOTH, "W8A8")
    ),
    "Qwen3": Family(
        _config("qwen3", head_dim=32), "Qwen3ForCausalLM", ("NVFP4", "FP8 tensor", "FP8 KV", *BOTH, "W8A8")
    ),
    "BLIP2-OPT": Family(
        _blip2(OPT), "Blip2ForConditionalGeneration", ("FP8 KV",), ("W8A8", "W4A16 GPTQ"), language="language_model.", vision=4,
    ),
    "BLIP2-T5": Family(
        _blip2(T5), "Blip2ForConditionalGeneration", ("FP8 KV",), ("W8A8", "W4A16 GPTQ"), language="language_model.", vision=4, decoder_ids=True,
    ),
    "LLaVA": Family(
        _llava("clip_vision_model", "llama"), "LlavaForConditionalGeneration", ("FP8 tensor", "FP8 KV", *BOTH),
        language="model.language_model.", vision=4,
    ),
    "VILA": Family(
        _llava("siglip_vision_model", "qwen2", vision_feature_select_strategy="full", vision_feature_layer=-1),
        "LlavaForConditionalGeneration", ("FP8 tensor", "FP8 KV", *BOTH), language="model.language_model.", vision=4,
        note="LLaVA with SigLIP and Qwen2, the nearest in transformers",
    ),
    "Nougat": Family(
        _nougat, "VisionEncoderDecoderModel", ("FP8 KV",), ("W8A8", "W4A16 GPTQ"), language="decoder.", vision=4, decoder_ids=True,
    ),
    "StarCoder": Family(
        lambda: transformers.GPTBigCodeConfig(
            vocab_size=VOCABULARY, n_positions=64, n_embd=128, n_layer=2, n_head=4, n_inner=256, bos_token_id=1, eos_token_id=2,
            initializer_range=0.06,
        ),
        "GPTBigCodeForCausalLM", ("W8A8",),
    ),
    "ERNIE-4.5": Family(
        _config("ernie4_5_moe", moe_num_experts=4, moe_intermediate_size=128, moe_k=2, moe_layer_start_index=1, tie_word_embeddings=True),
        "Ernie4_5_MoeForCausalLM", ("FP8 block", "WINT8", "WINT4", "MixQuant", "WINT2"), ("W8A8", "FP8 KV"),
    ),
    "GPT-2": Family(
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
        ),
        "GPT2LMHeadModel", (), ("W8A8", "W4A16 GPTQ", "FP8 KV"), note="in no table; its linear layers are Conv1D, stored [K, N]",
    ),
}  # fmt: skip
"""Rows of the tables, in their order; the last three are of RTP-LLM, FastDeploy and nobody."""
