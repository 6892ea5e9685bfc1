"""Weights of 8 or 4 bits by torchao: a loaded model takes less memory, and gives nearly the same numbers.

Only the matrices of linear layers become small ones. Embeddings and the output layer stay as they are (they are often
one matrix, and errors in them cost most), and so do the experts of mixtures, which are no linear layers in
transformers. int8 has a scale for each row. int4 has a scale and a zero for each 32 weights of a row, 5 bits a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from gptcli.errors import MissingError, UsageError, first_line, not_installed
from gptcli.reporting import mebibytes, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["int8", "int4"]
KINDS: tuple[str, ...] = get_args(Kind)
GROUP = 32
# What torch's kernel of int4 for CPUs takes: rows in blocks of 16. On a GPU torchao pads.
CPU_ROWS = 16


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did: how many matrices became small, how many linear layers stayed, the model's bytes."""

    kind: str
    matrices: int
    left: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        left = f", {self.left} stay as they are" if self.left else ""
        sizes = f"the model from {mebibytes(self.bytes_before)} to {mebibytes(self.bytes_after)}"
        return f"{self.kind}: {self.matrices} matrices of linear layers{left}; {sizes}"


def check_kind(kind: str) -> Kind:
    """The way to quantize that a user named. Raises `UsageError`."""
    if kind not in KINDS:
        raise UsageError(f"--quantize {kind} is not one of {', '.join(KINDS)}")
    return kind  # type: ignore[return-value]


def quantize(model: PreTrainedModel, kind: str, *, to_save: bool = False) -> Quantized:
    """Make the weights of a model's linear layers small, in place. On a CPU int4 makes all else bf16, as its kernel is.

    Args:
        model: in evaluation mode, on the device where it is used.
        kind: "int8" or "int4".
        to_save: it is for `save_pretrained`, so that every layer stays of its class and the configuration says how to
            read the weights.

    Raises:
        UsageError: no such kind, or a model that is quantized already or has no matrix that can be.
        MissingError: torchao is missing, or has nothing for this device; int4 that is to be saved, on a CPU.
    """
    kind = check_kind(kind)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError(f"this model is quantized already ({_method(model)})", remedy="Leave out --quantize.")
    device = model.device.type
    if to_save:
        check_can_save(kind, device)
    before = model_bytes(model)
    with quiet(), _torchao_errors(kind, device):
        settings = _settings(kind, device)
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        kept = [name for name, module in model.named_modules() if module is output]
        linear = _linear_layers(model, kept, replace=not to_save)
        fits = {name for name, module in linear.items() if _fits(module.weight, kind, device)}
        if not fits:
            raise _nothing(model, kind, to_save)
        if kind == "int4":
            model.bfloat16()

        from torchao.quantization import quantize_

        quantize_(model, settings, filter_fn=lambda module, name: name in fits)
        if to_save:
            _say_quantized(model, settings, [*kept, *sorted(linear.keys() - fits)])
    return Quantized(kind, len(fits), len(linear) - len(fits), before, model_bytes(model))


def check_can_save(kind: str, device: str) -> None:
    """Refuse what torchao has no safetensors format for, before any work. Raises `MissingError`."""
    if kind == "int4" and device != "cuda":
        raise MissingError(
            f"int4 weights cannot be saved on a {device}: torchao has safetensors for those of a CUDA GPU only",
            remedy="Without a GPU: --quantize int8, or generate --quantize int4 (in memory), or --gguf FILE and\n"
            "llama.cpp's llama-quantize FILE OUT Q4_K_M.",
        )


def _settings(kind: str, device: str) -> Any:
    """torchao's settings. For int4 it has a layout a device, the CPU's among its prototypes."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if kind == "int8":
        return Int8WeightOnlyConfig()
    if device == "cuda":
        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    if device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    raise MissingError(f"torchao has no int4 for {device}", remedy="Take --quantize int8.")


def _linear_layers(model: PreTrainedModel, kept: list[str], *, replace: bool) -> dict[str, torch.nn.Linear]:
    """The linear layers by name, without `kept`.

    GPT-2 and its kin have transformers' Conv1D in their place, the same layer with its matrix transposed, which torchao
    does not know: `replace` puts linear ones there.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    if replace:
        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D) and name not in kept:
                inputs, outputs = module.weight.shape
                linear = torch.nn.Linear(inputs, outputs, device="meta")
                linear.weight = torch.nn.Parameter(module.weight.detach().t().contiguous())
                linear.bias = module.bias
                model.set_submodule(name, linear.train(module.training))
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, torch.nn.Linear) and name not in kept}


def _fits(weight: torch.Tensor, kind: str, device: str) -> bool:
    rows, columns = weight.shape
    if kind == "int8":
        return True
    return columns % GROUP == 0 and (device != "cpu" or rows % CPU_ROWS == 0)


def _nothing(model: PreTrainedModel, kind: str, to_save: bool) -> UsageError:
    what = model.config.model_type
    if kind == "int4":
        remedy = f"int4 takes matrices whose sides are multiples of {CPU_ROWS} and {GROUP}. Take --quantize int8."
    elif to_save:
        remedy = "generate --quantize can, in memory, for GPT-2 and its kin; --gguf FILE writes small weights, too."
    else:
        remedy = "Its layers are of no kind that torchao knows."
    return UsageError(f"{what} has no linear layer that {kind} can take", remedy=remedy)


def _say_quantized(model: PreTrainedModel, settings: Any, kept: list[str]) -> None:
    """Let `save_pretrained` write torchao's tensors as safetensors, and say in config.json how they are read."""
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    said = TorchAoConfig(settings, modules_to_not_convert=kept)
    model.config.quantization_config = said
    model.hf_quantizer = TorchAoHfQuantizer(said, pre_quantized=False)  # type: ignore[assignment]


def model_bytes(model: PreTrainedModel) -> int:
    """The bytes of a model's weights; torchao's tensors hold others inside."""
    return sum(_tensor_bytes(parameter) for parameter in model.parameters())


def _tensor_bytes(tensor: Any) -> int:
    flatten: Callable[[], tuple[list[str], Any]] | None = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return int(tensor.numel() * tensor.element_size())
    return sum(_tensor_bytes(getattr(tensor, name)) for name in flatten()[0])


def _method(model: PreTrainedModel) -> str:
    said: Any = model.config.quantization_config
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", "")
    return str(getattr(method, "value", method))


@contextmanager
def _torchao_errors(kind: str, device: str) -> Iterator[None]:
    """Turn a missing torchao, and one without a kernel for this device, into our error."""
    try:
        yield
    except ImportError as error:
        import importlib.util

        if importlib.util.find_spec("torchao") is None:
            raise not_installed(f"--quantize {kind}", "torchao", "quantize") from None
        raise MissingError(f"this torchao has no {kind} for {device}", remedy=first_line(error)) from error
    except (NotImplementedError, AssertionError) as error:
        raise MissingError(f"torchao has no {kind} for this {device}", remedy=first_line(error)[:300]) from error
