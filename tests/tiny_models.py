"""Real Qwen checkpoints of two layers and random weights, one per text family of the installed transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
HYBRID: dict[str, Any] = {  # one layer of linear attention (gated delta rule), one of full attention
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": EXPERTS | SHARED_EXPERT,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | SHARED_EXPERT | HYBRID,
    "qwen3_5_text": HYBRID,
}


def build_tiny(folder: Path, family: str = "qwen2", seed: int = 0) -> Path:
    """Write a causal model of the family, with the embedded tokenizer."""
    from ctxtrain.model.embedded import build_tokenizer  # not above: benchmarks read `FAMILIES` without its packages
    from ctxtrain.model.tokenizer import quiet_transformers

    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        **COMMON,
        **FAMILIES[family],
    )
    torch.manual_seed(seed)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
