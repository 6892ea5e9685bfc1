"""Adapters of tiny models, made by peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def save_adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """A LoRA of random weights for the model in `base`; returns peft's own model of both. Skips where peft is not."""
    peft = pytest.importorskip("peft", reason="needs the package peft: pip install 'gptcli[adapters]'")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base))
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    state = torch.get_rng_state()
    torch.manual_seed(1)
    both = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if parameter.requires_grad:  # a new adapter changes nothing: one of its two matrices is zero
                parameter.add_(torch.randn_like(parameter) * (0.1 if "magnitude" not in name else 0.01))
    torch.set_rng_state(state)
    both.save_pretrained(str(folder), save_embedding_layers=False)
    return both.eval()
