"""Whether a model keeps the documents of a packed row apart: tried before training, on rows of short documents.

transformers 5.23 tells them by their positions, which begin again with each (`masking_utils`): its attention does, its
convolutions and recurrences do not, nor do models that have no positions. No list of them is kept here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from gptcli.errors import RecipeError, first_line
from gptcli.model.load import evaluating
from gptcli.model.outputs import first_apart, module_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The documents of two rows; the last of a row stands for what fills it.
_ROWS = ((7, 5, 1, 8, 3), (6, 9, 9))


Inputs: TypeAlias = dict[str, torch.Tensor]


def check(model: PreTrainedModel, *, flat: bool = False, documents: tuple[Inputs, list[Inputs]] | None = None) -> None:
    """Refuse a model in which a document of a row sees another; for all processes of a run to call.

    Args:
        model: as it will be trained.
        flat: as training gives rows to kernels that want all of them as one (see `train.rows`).
        documents: rows that hold images or sounds, and each of their documents alone; None: the run has none.

    Raises:
        RecipeError: the model's code mixes them.
    """
    why = mixes(model, flat=flat)
    if why is None and documents is not None:
        why = _apart(model, *documents)
    if why is not None:
        raise RecipeError(
            f"data.packing: isolated needs a model that keeps the documents of a row apart, and "
            f"{type(model).__name__} mixes them ({why})",
            remedy="Set data.packing: none (a document a row), or concat for format text.",
        )


def mixes(model: PreTrainedModel, *, flat: bool = False) -> str | None:
    """Where documents of one row are not what they are alone; None: nowhere.

    The output of every module is compared, in the arithmetic that is on where this is called.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    length = sum(_ROWS[0])
    ids = (torch.arange(len(_ROWS) * length, device=device) * 7919 % min(997, vocabulary)).view(len(_ROWS), length)
    rows = [torch.cat([torch.arange(size, device=device) for size in sizes]) for sizes in _ROWS]
    inputs = {"input_ids": ids, "position_ids": torch.stack(rows)}
    if flat:
        inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
    alone = [
        {"input_ids": part[None], "position_ids": torch.arange(len(part), device=device)[None]}
        for row, sizes in zip(ids, _ROWS, strict=True)
        for part in row.split(list(sizes))
    ]
    return _apart(model, inputs, alone)


def _apart(model: PreTrainedModel, inputs: Inputs, documents: list[Inputs]) -> str | None:
    """The first module that makes something else of rows than of their documents one by one; None: none does."""
    device = inputs["input_ids"].device
    half = model.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    with torch.no_grad(), evaluating(model):
        try:
            found = module_outputs(model, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            return first_line(error)
        alone = [module_outputs(model, document) for document in documents]
    expected = {
        name: torch.cat([outputs[name] for outputs in alone], dim=1).reshape(found[name].shape)
        for name in found
        if all(name in outputs for outputs in alone)
        and sum(outputs[name].numel() for outputs in alone) == found[name].numel()
    }
    rounded = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"  # TF32
    return first_apart(found, expected, 0.1 if half else 1e-2 if rounded else 1e-4)
