"""What a process of a group holds of a small model that DeepSpeed divides: run by torchrun, one file a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gptcli.launch import rank
from gptcli.recipe.schema import Train
from gptcli.train import group
from gptcli.train.zero import Zero


def main(stage: int, folder: Path) -> None:
    """Divide, and write the sizes: all values, those of the weights here, those of the optimizer's state here."""
    group.join()
    # Two processes cannot halve biases of 63.
    sizes = {"hidden_size": 32, "intermediate_size": 63, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, mlp_bias=True, **sizes))
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
    gradient = a_step(zero)
    found = {
        "every": every,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "parts": sum(parameter.ds_tensor.numel() for parameter in model.parameters()) if stage == 3 else every,
        "gradient": gradient,
        "state": sum(state["exp_avg"].numel() for state in zero.inner.state.values()),
    }
    found["whole"] = is_restored(zero, model, folder)
    (folder / f"{rank()}.json").write_text(json.dumps(found))
    group.leave()


def is_restored(zero: Zero, model: LlamaForCausalLM, folder: Path) -> bool:
    """Whether weights and state are the same to the last bit, after a step more, when what was saved is loaded."""
    state, weights = zero.state_dict(), zero.whole_weights()
    if rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        torch.save(state, folder / "state.pt")
    group.total([0])  # it is written
    saved = torch.load(folder / "state.pt")
    a_step(zero)
    moved = zero.state_dict()["state"]
    zero.load_state_dict(saved)
    zero.load_weights(folder)
    back, again = zero.state_dict()["state"], zero.whole_weights() or model.state_dict()
    expected = load_file(folder / "model.safetensors")
    return rank() != 0 or (
        not torch.equal(moved[0]["exp_avg"], saved["state"][0]["exp_avg"])
        and all(torch.equal(back[n][key], saved["state"][n][key]) for n in back for key in back[n])
        and all(torch.equal(again[name], expected[name]) for name in expected)
    )


def a_step(zero: Zero) -> int:
    """A step, and the values of the gradient that were here."""
    ids = torch.arange(16)[None]
    zero.backward(zero.engine(input_ids=ids).logits.square().sum(), last=True)
    gradient = sum(part.numel() for part in zero._gradient())
    zero.step()
    return gradient


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
