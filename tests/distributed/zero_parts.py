"""What a process of a group holds of a small model that DeepSpeed divides: run by torchrun, one file a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptcli.launch import rank
from gptcli.recipe.schema import Train
from gptcli.train import group
from gptcli.train.zero import Zero


def main(stage: int, folder: Path) -> None:
    """Divide, and write the sizes: all values, those of the weights here, those of the optimizer's state here."""
    group.join()
    # A vocabulary that two processes cannot halve evenly with its width.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259, hidden_size=31 * 2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=63
        )
    )
    every = sum(parameter.numel() for parameter in model.parameters())
    zero = Zero(
        model,
        Train(max_steps=1),
        {
            "train_batch_size": 2,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 0},
        },
    )
    ids = torch.arange(16)[None]
    zero.backward(zero.engine(input_ids=ids).logits.square().sum(), last=True)
    gradient = sum(part.numel() for part in zero._gradient())
    zero.step()
    found = {
        "every": every,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "parts": sum(parameter.ds_tensor.numel() for parameter in model.parameters()) if stage == 3 else every,
        "gradient": gradient,
        "state": sum(state["exp_avg"].numel() for state in zero.inner.state.values()),
    }
    (folder / f"{rank()}.json").write_text(json.dumps(found))
    group.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
