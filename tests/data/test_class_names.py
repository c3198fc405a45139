"""Classes as people write them on the command line."""

import pathlib

import pytest
import tensorflow_datasets

from rar_jax.data import imagenet
from rar_jax.data.class_names import parse_classes
from rar_jax.errors import ConfigError

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
        ("3-", "no class '3-'"),
        ("-3", "no class '-3'"),
        ("1.5", "no class '1.5'."),
        ("3,8-6", "classes 8-6: a range is LOW-HIGH, as in 6-8"),  # rather than nothing for it, in silence
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


# ---------------------------------------------------------------- ImageNet's names

IMAGENET = imagenet.class_names()


def test_imagenets_names_are_in_the_order_of_the_labels() -> None:
    """Labels that everyone knows, the WNIDs of TFDS sorted, and one name for each."""
    wnids = pathlib.Path(tensorflow_datasets.__file__).parent / "datasets" / "imagenet2012" / "labels.txt"
    assert len(IMAGENET) == len(set(IMAGENET)) == 1000 == len(wnids.read_text().split())
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 360: "otter", 387: "lesser panda"}
    known |= {417: "balloon", 933: "cheeseburger", 963: "pizza", 980: "volcano", 999: "toilet tissue"}
    assert {label: IMAGENET[label].split(",")[0] for label in known} == known


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("golden retriever", [207]),
        ("207,360", [207, 360]),
        ("golden  retriever", [207]),
        ("Tinca tinca,Goldfish, OTTER", [0, 1, 360]),
        ("tabby cat,red panda,toilet paper", [281, 387, 999]),
    ],
)
def test_imagenet_classes(text: str, labels: list[int]) -> None:
    assert parse_classes(text, IMAGENET) == labels


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("crane", "no class 'crane'. There is: crane (bird) (134), crane (machine) (517)."),
        ("cardigan", "'cardigan' is 2 classes: give 264 (Cardigan, Cardigan Welsh corgi) or 474 (cardigan)"),
        (
            "retriever",
            "no class 'retriever'. There is: flat-coated retriever (205), curly-coated retriever (206), golden",
        ),
        ("golden retreiver", "no class 'golden retreiver'. Did you mean 'golden retriever'?"),
        ("xyzzy", "no class 'xyzzy'."),
        ("3-9999999999", "classes 3-9999999999 go beyond 0..999"),
    ],
)
def test_what_is_no_class_of_imagenet(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_classes(text, IMAGENET)
    assert str(caught.value).startswith(problem) and len(str(caught.value)) < 400
