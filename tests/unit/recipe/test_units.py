from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.recipe import units


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (64, 64),
        ("20M", 20_000_000),
        ("16K", 16_000),
        ("64Ki", 65_536),
        ("2Mi", 2_097_152),
        ("1.5K", 1_500),
        ("1_000", 1_000),
        ("3B", 3_000_000_000),
        (1e3, 1_000),
    ],
)
def test_counts_have_decimal_and_binary_units(text: object, value: int) -> None:
    assert units.count(text) == value


@pytest.mark.parametrize(
    "text", ["", "M", "20 X", "1.5", "20MB", "-", "0x10", True, None, [1], 1.5, "9" * 40, "٣", "1e400"]
)
def test_what_is_no_count_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match=r"expected a whole number such as|larger than"):
        units.count(text)


@pytest.mark.parametrize(
    ("text", "value"), [("2%", 0.02), ("0.5%", 0.005), (0.1, 0.1), (0, 0.0), ("100%", 1.0), (1, 1.0)]
)
def test_shares_are_percentages_or_parts_of_one(text: object, value: float) -> None:
    assert units.share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "%", "-1%", "101%", 1.01, -0.1, True, None, "two%", float("nan"), float("inf")])
def test_what_is_no_share_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a share"):
        units.share(text)


@pytest.mark.parametrize(("text", "value"), [(1, 1), (500, 500), ("1K", 1000), (1.0, 1)])
def test_a_whole_warmup_is_steps(text: object, value: int) -> None:
    result = units.steps_or_share(text)
    assert result == value
    assert isinstance(result, int)


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), (0.3, 0.3), (0, 0.0)])
def test_a_warmup_below_one_is_a_share(text: object, value: float) -> None:
    result = units.steps_or_share(text)
    assert result == pytest.approx(value)
    assert isinstance(result, float)


@pytest.mark.parametrize("text", [1.5, -1, "100%", "soon", True, None, "-3"])
def test_what_is_neither_steps_nor_a_share_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        units.steps_or_share(text)


@pytest.mark.parametrize(
    ("text", "value"), [("11h30m", 41_400), ("90s", 90), ("2d", 172_800), ("1d2h3m4s", 93_784), (60, 60)]
)
def test_durations_are_seconds(text: object, value: int) -> None:
    assert units.duration(text) == value


@pytest.mark.parametrize("text", ["", "30", "m", "1h30", "30m1h", 0, -5, 1.5, None, "0s", True])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a time such as 11h30m"):
        units.duration(text)


@given(st.integers(min_value=0, max_value=10**9), st.sampled_from(sorted(set(units.MULTIPLES) - {"T", "G", "B", "Gi"})))
def test_a_number_with_a_unit_is_the_number_times_the_unit(number: int, unit: str) -> None:
    assert units.count(f"{number}{unit}") == number * units.MULTIPLES[unit]


@given(st.text(max_size=12))
def test_any_text_is_a_count_or_a_value_error(text: str) -> None:
    try:
        assert units.count(text) >= 0
    except ValueError as error:
        assert "\n" not in str(error)


@given(st.integers(min_value=0, max_value=99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total:
        assert units.duration(f"{days}d{hours}h{minutes}m{seconds}s") == total
