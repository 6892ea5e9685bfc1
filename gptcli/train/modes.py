"""How a step is computed: precision, compile and attention, chosen from what the machine and the model have. Pure.

Each choice is a value and the reason that is printed with it. What the recipe asks for by name and cannot be had here
is an error with what is missing (code 7), never another value in silence.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from gptcli.errors import MissingError

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.train.decisions import Hardware
    from gptcli.train.plan import Plan

VOLTA, AMPERE, ADA, HOPPER = (7, 0), (8, 0), (8, 9), (9, 0)
MI300 = (9, 4)
# Compiling takes about a minute, and a compiled step of a GPU is a seventh (torchtitan's Llama 8B) to nearly a half
# (nanoGPT's 124M) shorter: at the usual tenths of a second a step, that is repaid within as many.
COMPILE_STEPS = 500
# Causal attention in blocks (model/attention.py): in bf16 on a CPU, up to this length of a row, faster than torch's
# kernel (benchmarks/attention.py).
BLOCKS = "blocks"
BLOCKS_LONGEST = 512
FLASH_2, FLASH_3, FLEX = "flash_attention_2", "flash_attention_3", "flex_attention"
FLASH = (FLASH_2, FLASH_3)
# The installed package behind each, as `Hardware.packages` names it, and how to get it.
PACKAGES = {
    FLASH_2: ("flash_attn", "pip install flash-attn --no-build-isolation"),
    FLASH_3: (
        "flash_attn_interface",
        "pip install 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
    FLEX: ("triton", "pip install triton (part of PyTorch's build for GPUs)"),
    "fp8": ("torchao", "pip install 'gptcli[gpu]'"),
}
_INSTEAD = "Or leave it to auto: {key}=auto."


def auto_precision(hardware: Hardware) -> tuple[str, str]:
    """bf16 where the model trains faster in it, fp16 with loss scaling on GPUs of before Ampere, else fp32."""
    if hardware.fast_bf16:
        return "bf16", hardware.bf16_reason
    if hardware.capability is not None and VOLTA <= hardware.capability < AMPERE:
        return "fp16", "this GPU multiplies fp16 fast and bf16 not; the loss is scaled"
    return "fp32", hardware.bf16_reason


def auto_tf32(hardware: Hardware) -> bool:
    """Whether fp32 products may be rounded to TF32 (10 bits of mantissa) where they are summed in fp32."""
    return hardware.capability is not None and hardware.capability >= AMPERE and not hardware.rocm


# Those that do not go with every division of rows over processes.
OF_ROWS = ("train.compile", "train.attention")


def auto_compile(hardware: Hardware, *, precision: str, steps: int, misfit: str = "") -> tuple[bool, str]:
    """torch.compile where it is known to pay within the planned steps; `misfit`: what it does not go with."""
    if hardware.kind == "cpu":
        return False, "a CPU gains 0 to 2% from 20 s of compiling (benchmarks/compile.py)"
    if misfit:
        return False, misfit
    if hardware.kind != "cuda":
        return False, f"not known to pay on {hardware.kind}"
    if "triton" not in hardware.packages:
        return False, "triton is not installed"
    if not hardware.compiler:
        return False, "there is no C compiler here"
    if precision == "fp8":
        return True, "what fp8 saves, its conversions cost unless they are compiled"
    if steps < COMPILE_STEPS:
        return False, f"{steps:,} steps do not repay the minute that compiling takes"
    return True, f"{steps:,} steps repay the minute that compiling takes"


def auto_attention(
    hardware: Hardware,
    *,
    usable: Set[str],
    precision: str,
    length: int,
    packing: str,
    compiled: bool,
    divided_rows: bool = False,
) -> tuple[str, str]:
    """The fastest attention that is right for these rows.

    Args:
        hardware: the machine.
        usable: the names that the model's own code can use (see `model.kernels.usable_attention`).
        precision: of the products.
        length: of a row.
        packing: concat and none: every token sees all before it in its row. isolated: only those of its document, so a
            kernel is needed that is told where documents begin.
        compiled: whether the model is compiled, which our blocks are not made for.
        divided_rows: whether a row is divided over processes, as `model.context_parallel` does.
    """
    if "sdpa" not in usable:
        return "auto", "this model has its own attention"
    if divided_rows:
        return "sdpa", "over keys and values of all processes of a row"
    half = precision != "fp32"
    # FlashAttention 3 can be built for Ampere too, but it is made for Hopper.
    made_for = (FLASH_3, FLASH_2) if hardware.capability == HOPPER else (FLASH_2,)
    flash = [name for name in made_for if half and name in usable and lacks(name, hardware) is None]
    if packing == "isolated":
        if flash:
            return flash[0], "it takes where documents begin, so that none sees another"
        if FLEX in usable and lacks(FLEX, hardware) is None:
            return FLEX, "it skips what lies in another document"
        return "sdpa", "with a mask of documents: exact, though not the fastest"
    if hardware.kind == "cpu" and precision == "bf16" and length <= BLOCKS_LONGEST and not compiled:
        return BLOCKS, f"bf16 on a CPU, rows of at most {BLOCKS_LONGEST}: faster than torch's kernel"
    if FLASH_3 in flash:
        return FLASH_3, "made for this GPU"
    # On rows without a mask torch's own kernel is FlashAttention 2, without the package and its break in the graph.
    return "sdpa", "torch's fused kernel, causal without a mask"


def block_kernel(hardware: Hardware, *, compiled: bool, smoothed: bool = False) -> str:
    """What makes a loss whose logits are not whole: our blocks, or Liger's kernel where it is installed on a GPU.

    Compiled blocks are fused as Liger's kernel is, keep the head's gradient in fp32, and do not stall: Liger's counts
    the labels with `.item()` in every call (liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5). With smoothed
    labels it does not tell the cross entropy itself.
    """
    liger = hardware.kind == "cuda" and "liger_kernel" in hardware.packages
    return "liger" if liger and not compiled and not smoothed else "blocks"


def lacks(value: str, hardware: Hardware) -> tuple[str, str] | None:
    """What this machine lacks for a precision or an attention, and the remedy; None: nothing."""
    card = _card_for(value, hardware)
    if card is not None:
        return card
    package, command = PACKAGES.get(value, (None, ""))
    if package is None or package in hardware.packages:
        return None
    return f"{value} needs the package {package}, which is not installed", command


def _card_for(value: str, hardware: Hardware) -> tuple[str, str] | None:
    if value not in ("fp16", "fp8", FLASH_2, FLASH_3, FLEX):
        return None
    have = hardware.capability
    if have is None:
        # On a CPU accelerate takes fp16 for fp32 without a word: it has no autocast and no loss scaling there.
        return f"{value} needs a GPU with CUDA or ROCm, and there is none here", ""
    if value == "fp8":
        fits, needed = have >= (MI300 if hardware.rocm else ADA), "Ada, Hopper or later (8.9), or MI300"
    elif value == FLASH_3:
        fits, needed = AMPERE <= have < (10, 0) and not hardware.rocm, "Ampere to Hopper (8.0 to 9.0)"
    elif value == FLASH_2:
        fits, needed = have >= AMPERE, "Ampere or later (8.0)"
    else:
        fits, needed = have >= VOLTA, "Volta or later (7.0)"
    if fits:
        return None
    return f"{value} needs a GPU of the generation {needed}; this one is {have[0]}.{have[1]}", ""


def check_modes(loaded: LoadedRecipe, plan: Plan, hardware: Hardware, usable: Set[str]) -> None:
    """Refuse what the plan would compute with and this machine or this model does not have.

    Raises:
        MissingError: with what is missing and how to get it, or what to take instead.
    """
    for key, value in (("train.precision", plan.precision), ("train.attention", plan.attention)):
        found = lacks(value, hardware)
        if found is None and value in FLASH:
            found = _misfit(value, plan.precision, usable)
        if found is None and value == FLEX and usable and FLEX not in usable:
            found = f"this model cannot use {value}", ""
        if found is not None:
            what, command = found
            remedy = [command, _INSTEAD.format(key=key)]
            raise MissingError(f"{key}: {what}", where=loaded.where(key), remedy="\n".join(filter(None, remedy)))


def _misfit(value: str, precision: str, usable: Set[str]) -> tuple[str, str] | None:
    if precision == "fp32":
        return f"{value} has no fp32", "train.precision=bf16 has it."
    if usable and value not in usable:
        return f"this model, or the size of its heads, does not go with {value}", ""
    return None
