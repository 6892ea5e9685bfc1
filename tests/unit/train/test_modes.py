"""What auto stands for on machines that are not here, and what is refused on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptcli.errors import MissingError
from gptcli.model.build import Counts
from gptcli.recipe.load import load_recipe
from gptcli.train.decisions import Hardware
from gptcli.train.modes import (
    COMPILE_STEPS,
    auto_attention,
    auto_compile,
    auto_precision,
    auto_tf32,
    block_kernel,
    check_modes,
    lacks,
)
from gptcli.train.plan import make_plan

CPU = Hardware("cpu", fast_bf16=False, processes=1, memory_bytes=2**34, bf16_reason="measured", compiler=True)
BF16_CPU = replace(CPU, fast_bf16=True)
PACKAGES = frozenset({"triton", "torchao", "liger_kernel", "flash_attn", "flash_attn_interface"})


def gpu(major: int, minor: int, *packages: str, rocm: bool = False) -> Hardware:
    return Hardware(
        "cuda",
        fast_bf16=(major, minor) >= (8, 0),
        processes=1,
        memory_bytes=2**36,
        capability=(major, minor),
        compiler=True,
        packages=frozenset(packages or {"triton"}),
        rocm=rocm,
    )


V100, T4, A100, L4, H100, B200 = gpu(7, 0), gpu(7, 5), gpu(8, 0), gpu(8, 9), gpu(9, 0), gpu(10, 0)
ALL = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"})


@pytest.mark.parametrize(
    "hardware, expected",
    [
        (CPU, "fp32"),
        (BF16_CPU, "bf16"),
        (gpu(6, 1), "fp32"),
        (V100, "fp16"),
        (T4, "fp16"),
        (A100, "bf16"),
        (B200, "bf16"),
    ],
)
def test_precision_is_bf16_from_ampere_on_and_scaled_fp16_before(hardware: Hardware, expected: str) -> None:
    assert auto_precision(hardware)[0] == expected


def test_tf32_is_set_where_the_gpu_has_it() -> None:
    assert [auto_tf32(each) for each in (CPU, T4, A100, H100, gpu(9, 4, rocm=True))] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_compile_is_on_where_it_is_known_to_pay() -> None:
    def on(hardware: Hardware, steps: int = COMPILE_STEPS, precision: str = "bf16") -> bool:
        return auto_compile(hardware, precision=precision, steps=steps)[0]

    assert on(A100)
    assert not on(A100, COMPILE_STEPS - 1)
    assert on(H100, 10, "fp8")
    assert not on(replace(A100, packages=frozenset()))
    assert not on(replace(A100, compiler=False))
    assert not on(CPU, 10**6)
    assert not on(replace(CPU, kind="mps"), 10**6)


def attention(hardware: Hardware, packing: str = "concat", precision: str = "bf16", **changes: object) -> str:
    given = {"usable": ALL, "length": 512, "compiled": False} | changes
    return auto_attention(hardware, packing=packing, precision=precision, **given)[0]  # type: ignore[arg-type]


def test_plain_rows_get_the_fastest_causal_kernel() -> None:
    assert attention(A100) == "sdpa"
    assert attention(gpu(8, 0, *PACKAGES)) == "sdpa"
    assert attention(gpu(9, 0, *PACKAGES)) == "flash_attention_3"
    assert attention(gpu(9, 0, *PACKAGES), precision="fp32") == "sdpa"
    assert attention(gpu(10, 0, *PACKAGES)) == "sdpa"
    assert attention(BF16_CPU) == "blocks"
    assert attention(BF16_CPU, length=513) == attention(BF16_CPU, compiled=True) == "sdpa"
    assert attention(BF16_CPU, precision="fp32") == "sdpa"
    assert attention(H100, usable=frozenset()) == attention(BF16_CPU, usable=frozenset({"eager"})) == "auto"


def test_rows_of_several_documents_get_only_what_keeps_them_apart() -> None:
    assert attention(gpu(9, 0, *PACKAGES), "isolated") == "flash_attention_3"
    assert attention(gpu(8, 0, *PACKAGES), "isolated") == "flash_attention_2"
    assert attention(A100, "isolated") == "flex_attention"
    assert attention(A100, "isolated", usable=ALL - {"flex_attention"}) == "sdpa"
    assert attention(gpu(7, 5, *PACKAGES), "isolated", "fp16") == "flex_attention"
    # Our blocks and a bare causal kernel would let one document see another.
    assert attention(BF16_CPU, "isolated") == "sdpa"


@pytest.mark.parametrize(
    "value, hardware, what",
    [
        ("fp16", CPU, "needs a GPU"),
        ("fp8", CPU, "needs a GPU"),
        ("fp8", gpu(8, 0, *PACKAGES), "8.9"),
        ("fp8", H100, "torchao"),
        ("fp8", gpu(9, 0, *PACKAGES, rocm=True), "MI300"),
        ("flash_attention_2", CPU, "needs a GPU"),
        ("flash_attention_2", gpu(7, 5, *PACKAGES), "Ampere"),
        ("flash_attention_2", A100, "flash_attn"),
        ("flash_attention_3", gpu(10, 0, *PACKAGES), "Hopper"),
        ("flash_attention_3", H100, "flash_attn_interface"),
        ("flex_attention", CPU, "needs a GPU"),
        ("flex_attention", gpu(8, 0, "torchao"), "triton"),
    ],
)
def test_what_is_missing_is_named(value: str, hardware: Hardware, what: str) -> None:
    found = lacks(value, hardware)
    assert found is not None
    assert what in found[0]


@pytest.mark.parametrize(
    "value, hardware",
    [
        ("fp32", CPU),
        ("bf16", CPU),
        ("sdpa", CPU),
        ("fp16", T4),
        ("fp8", gpu(8, 9, *PACKAGES)),
        ("fp8", gpu(9, 4, *PACKAGES, rocm=True)),
        ("flash_attention_2", gpu(8, 0, *PACKAGES)),
        ("flash_attention_3", gpu(9, 0, *PACKAGES)),
        ("flex_attention", T4),
    ],
)
def test_what_is_there_is_not_refused(value: str, hardware: Hardware) -> None:
    assert lacks(value, hardware) is None


def test_the_loss_is_ligers_on_a_gpu_that_has_it_unless_ours_is_compiled() -> None:
    with_liger = gpu(8, 0, *PACKAGES)
    assert block_kernel(with_liger, compiled=False) == "liger"
    assert block_kernel(with_liger, compiled=True) == "blocks"
    assert block_kernel(A100, compiled=False) == "blocks"
    assert block_kernel(replace(CPU, packages=PACKAGES), compiled=False) == "blocks"


COUNTS = Counts(total=1_200_000, matrix=1_000_000, hidden_matrices=800_000, head=200_000, layers=4, width=128)


def write(folder: Path) -> str:
    path = folder / "r.yaml"
    path.write_text(
        "data: {train: builtin:pydocs, sequence_length: 128}\nmodel: {type: llama, preset: 1m}\n"
        "tokenizer: {train: {algorithm: bytes}}\ntrain: {max_steps: 1000, global_batch_size: 16}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    "override, hardware, remedy",
    [
        ("train.precision=fp8", H100, "gptcli[gpu]"),
        ("train.precision=fp16", CPU, "train.precision=auto"),
        ("train.attention=flash_attention_2", A100, "pip install flash-attn"),
        ("train.attention=flash_attention_3", H100, "subdirectory=hopper"),
        ("train.attention=flex_attention", CPU, "train.attention=auto"),
    ],
)
def test_a_named_mode_that_cannot_be_had_is_code_7_with_a_remedy(
    tmp_path: Path, override: str, hardware: Hardware, remedy: str
) -> None:
    loaded = load_recipe(write(tmp_path), [override])
    plan = make_plan(loaded, COUNTS, hardware, rows_per_epoch=10, usable=ALL)
    with pytest.raises(MissingError) as caught:
        check_modes(loaded, plan, hardware, ALL)
    assert caught.value.exit_code == 7
    assert remedy in str(caught.value.remedy)
    assert caught.value.where == f"override {override}"


def test_flash_attention_is_refused_in_fp32_and_for_a_model_that_does_not_go_with_it(tmp_path: Path) -> None:
    hardware = gpu(8, 0, *PACKAGES)
    for overrides, usable in ((["train.precision=fp32"], ALL), ([], ALL - {"flash_attention_2"})):
        loaded = load_recipe(write(tmp_path), ["train.attention=flash_attention_2", *overrides])
        plan = make_plan(loaded, COUNTS, hardware, rows_per_epoch=10, usable=usable)
        with pytest.raises(MissingError, match="flash_attention_2"):
            check_modes(loaded, plan, hardware, usable)


def test_every_choice_is_written_down_and_taken_again_by_a_resume(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path))
    hardware = gpu(9, 0, *PACKAGES)
    plan = make_plan(loaded, COUNTS, hardware, rows_per_epoch=10, usable=ALL)
    decided = {decision.key: decision.value for decision in plan.decisions}
    assert decided["train.precision"] == "bf16"
    assert decided["train.compile"] == "on"
    assert decided["train.attention"] == "flash_attention_3"
    again = make_plan(loaded, COUNTS, A100, rows_per_epoch=10, usable=ALL, decided=decided)
    assert (again.precision, again.compile, again.attention) == ("bf16", True, "flash_attention_3")
    other = make_plan(loaded, COUNTS, A100, rows_per_epoch=10, usable=ALL, decided={**decided, "train.compile": "off"})
    assert other.compile is False
    # What the run began with and this machine lacks is no reason to compute something else.
    with pytest.raises(MissingError, match="flash_attn_interface"):
        check_modes(loaded, again, A100, ALL)


def test_tf32_is_said_in_fp32_and_left_to_the_recipe(tmp_path: Path) -> None:
    def keys(*overrides: str) -> set[str]:
        loaded = load_recipe(write(tmp_path), ["train.precision=fp32", *overrides])
        return {d.key for d in make_plan(loaded, COUNTS, A100, rows_per_epoch=10).decisions}

    assert "tf32" in keys()
    assert "tf32" not in keys("train.trainer_args={tf32: false}")
