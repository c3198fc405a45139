"""Classes as people write them on the command line."""

import pytest

from rar_jax.config import ConfigError
from rar_jax.programs.sample import parse_classes

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("3", [3]),
        ("3,sneaker,0-4", [3, 7, 0, 1, 2, 3, 4]),
        (" 3 , 7 - 9 ,ankle boot", None),
        (" 3 , 7-9 ,ankle boot", [3, 7, 8, 9, 9]),
        ("SNEAKER,t-SHIRT", [7, 0]),
        ("T-shirt", [0]),
        ("2-2", [2]),
        ("5,5", [5, 5]),
        ("007", [7]),
    ],
)
def test_numbers_ranges_and_names(text: str, labels: list[int] | None) -> None:
    if labels is None:
        with pytest.raises(ConfigError, match="no class '7 - 9'"):
            parse_classes(text, NAMES)
    else:
        assert parse_classes(text, NAMES) == labels


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sneeker", "no class 'sneeker'. Did you mean 'sneaker'?"),
        ("3,trousers", "no class 'trousers'. Did you mean 'trouser'?"),
        ("SNEEKER", "no class 'SNEEKER'. Did you mean 'sneaker'?"),
        ("²", "no class '²'."),
        ("3-", "no class '3-'."),
        ("-3", "no class '-3'."),
        ("1.5", "no class '1.5'."),
        ("3,8-6", "no class '8-6'."),  # rather than nothing for it, in silence
        ("3,,4", "no class ''."),
        ("", "no class ''."),
    ],
)
def test_what_is_no_class(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_classes(text, NAMES)
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)


def test_a_number_is_a_number_where_names_are_numbers_too() -> None:
    assert parse_classes("1,0", tuple("9876543210")) == [1, 0]
