"""Experiment files and overrides in, frozen dataclasses out; every mistake is one clear line."""

import dataclasses
import pathlib
from typing import Any

import ml_collections
import pytest

from rar_jax import config as config_lib
from rar_jax.config import Steps, build, differences, find_experiment, load_experiment, nearest, resolve_steps, to_dict
from rar_jax.errors import ConfigError
from rar_jax.models import find_module, module_names

EXPERIMENT = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.seed = 0
    config.train = ConfigDict(dict(steps=100, warmup="5%", name="adam", ratio=0.5, sizes=(1, 2)))
    config.outer = ConfigDict(dict(width=8, inner=ConfigDict(dict(depth=2))))
    return config
"""


@dataclasses.dataclass(frozen=True)
class Section:
    steps: int
    rate: float = 0.1
    name: str = "adam"
    flag: bool = False
    warmup: Steps = 0
    limit: int | None = None
    share: float | None = None
    sizes: tuple[int, ...] = ()
    grid: tuple[tuple[float, ...], ...] = ()
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        config_lib.require(self.steps != 13, "steps is 13: choose another")


def message_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def made(**section: Any) -> Section:
    return build(Section, {"steps": 1, **section}, where="config.train", total_steps=200, steps_per_epoch=2.5)


@pytest.fixture
def experiment(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(EXPERIMENT)
    return str(path)


# ---------------------------------------------------------------- building


def test_the_values_arrive() -> None:
    everything: dict[str, Any] = {
        "steps": 7, "rate": 0.5, "name": "sgd", "flag": True, "warmup": 3, "limit": 4, "share": 0.25,
        "sizes": (1, 2), "grid": ((1.0,), (2.0, 3.0)), "names": ("a", "b"),
    }  # fmt: skip
    assert dataclasses.asdict(build(Section, everything, where="x")) == everything
    from_config_dict = build(Section, ml_collections.ConfigDict(everything), where="x")
    assert from_config_dict == build(Section, everything, where="x")


def test_defaults_and_ignored_keys() -> None:
    assert build(Section, {"steps": 2, "other": "x"}, where="x", ignore=("other",)) == Section(2)


def test_tuples_optionals_and_numbers_are_converted() -> None:
    section = made(sizes=[3, 4], grid=[[1, 2], [3.5]], names=["a"], rate=2, share=1)
    assert (section.sizes, section.grid, section.names) == ((3, 4), ((1.0, 2.0), (3.5,)), ("a",))
    assert [type(x) for x in (section.rate, section.share, section.grid[0][0])] == [float, float, float]
    none = made(limit=None, share=None, names=None)
    assert none.limit is None and none.share is None and none.names is None


@pytest.mark.parametrize(
    ("key", "hint"),
    [("stesp", " Did you mean 'steps'?"), ("warm_up", " Did you mean 'warmup'?"), ("rates", " Did you mean 'rate'?")],
)
def test_a_misspelt_key_names_the_nearest(key: str, hint: str) -> None:
    assert message_of(made, **{key: 1}) == f"config.train has no key '{key}'.{hint}"


def test_a_key_like_no_other_lists_all() -> None:
    listed = "flag, grid, limit, name, names, rate, share, sizes, steps, warmup"
    assert message_of(made, qqqqqq=1) == f"config.train has no key 'qqqqqq'. It has: {listed}."
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"steps": "7"}, "steps is '7' (str): it must be int"),
        ({"steps": 7.0}, "steps is 7.0 (float): it must be int"),
        ({"steps": True}, "steps is True (bool): it must be int"),
        ({"steps": None}, "steps is None (NoneType): it must be int"),
        ({"rate": "fast"}, "rate is 'fast' (str): it must be float"),
        ({"rate": True}, "rate is True (bool): it must be float"),
        ({"name": 5}, "name is 5 (int): it must be str"),
        ({"flag": 1}, "flag is 1 (int): it must be bool"),
        ({"flag": "no"}, "flag is 'no' (str): it must be bool"),
        ({"limit": "many"}, "limit is 'many' (str): it must be int"),
        ({"sizes": 3}, "sizes is 3 (int): it must be a list of int"),
        ({"sizes": "12"}, "sizes is '12' (str): it must be a list of int"),
        ({"sizes": (1, 2.5)}, "sizes[1] is 2.5 (float): it must be int"),
        ({"grid": ((1.0, "x"),)}, "grid[0][1] is 'x' (str): it must be float"),
        ({"names": ("a", 1)}, "names[1] is 1 (int): it must be str"),
    ],
)
def test_wrong_types_say_where_and_what(section: dict[str, Any], problem: str) -> None:
    assert message_of(made, **section) == f"config.train.{problem}"


def test_missing_keys() -> None:
    text = message_of(build, Section, {"rate": 1.0}, where="config.train")
    assert text == (
        "config.train lacks steps: set it in the experiment file, or --config.train.steps=... on the command line"
    )


def test_the_dataclass_own_checks_say_which_section() -> None:
    assert message_of(made, steps=13) == "config.train: steps is 13: choose another"


# ---------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (0, 0), (17, 17), ("50%", 100), ("0%", 0), ("12.5%", 25), ("200%", 400), ("100ep", 250), ("2.2ep", 6),
        ("0ep", 0), (" 50 % ", 100), ("1 ep", 2),
    ],
)  # fmt: skip
def test_durations(text: Any, steps: int) -> None:
    """Of 200 steps, 2.5 an epoch: 2.2 ep are 5.5 steps, and 1 ep 2.5, rounded half to even."""
    assert made(warmup=text).warmup == steps


@pytest.mark.parametrize(
    "bad", ["50", "ep", "%", "-5%", "5 epochs", "1e3", "50%%", "5e", "", 5.0, None, True, (1,), "٣٪"]
)
def test_bad_durations(bad: Any) -> None:
    expected = f"config.train.warmup is {bad!r}: write steps (1000), a share ('50%') or epochs ('200ep')"
    assert message_of(made, warmup=bad) == expected


def test_impossible_durations() -> None:
    assert message_of(made, warmup=-1) == "config.train.warmup is -1: a duration cannot be negative"
    assert message_of(resolve_steps, "50%", "config.train.steps", None, 2.0) == (
        "config.train.steps is '50%': this duration needs steps or epochs"
    )
    assert message_of(resolve_steps, "5ep", "w", 100, None) == "w is '5ep': this duration needs steps"


def test_durations_belong_to_steps_alone() -> None:
    assert message_of(made, limit="50%") == "config.train.limit is '50%' (str): it must be int"


# ---------------------------------------------------------------- files and overrides


def test_an_experiment_by_bare_name_by_path_and_by_the_path_of_the_checkout() -> None:
    shipped = pathlib.Path(__file__).parents[1] / "experiments" / "digits.py"
    for name in ("digits", "experiments/digits.py", str(shipped)):
        assert find_experiment(name).read_text() == shipped.read_text()
    assert load_experiment("digits").data.source == "digits"


def test_no_such_experiment() -> None:
    text = message_of(find_experiment, "digist")
    assert text.startswith("no experiment 'digist': give a path or one of: ") and "fashion_mnist" in text
    assert text.endswith(" Did you mean 'digits'?")


def test_a_file_without_get_config(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    assert message_of(load_experiment, str(path)) == f"{path} has no get_config(): an experiment file must define it"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=10", 10),
        ("train.ratio=1e-3", 0.001),
        ("train.sizes=(3, 4, 5)", (3, 4, 5)),
        ("train.warmup=10%", "10%"),
        ("train.warmup=200ep", "200ep"),
        ("train.warmup=7", 7),
        ("train.name=idx:/usr/share/x", "idx:/usr/share/x"),
        ("train.name='10'", "10"),
        ("train.name=a=b", "a=b"),
        ("train.name=", ""),
        ("train.name=None", None),
        ("train.name=True", True),
        ("train.name={[]: 1}", "{[]: 1}"),
        ("train.beta=0.5", 0.5),
        ("outer.inner.depth=3", 3),
        ("outer.inner.height=4", 4),
        ("outer.depth=4", 4),
        ("seed=5", 5),
    ],
)
def test_overrides(experiment: str, override: str, value: Any) -> None:
    """Literals are read as such, all else is text; a section may be given fields that the file leaves at their default."""
    node: Any = load_experiment(experiment, [override])
    *sections, last = override.partition("=")[0].split(".")
    for name in sections:
        node = node[name]
    assert node[last] == value and type(node[last]) is type(value)


def test_the_last_override_wins_and_the_rest_stays(experiment: str) -> None:
    config = load_experiment(experiment, ["train.steps=1", "train.steps=2"])
    assert config.train.to_dict() == {"steps": 2, "warmup": "5%", "name": "adam", "ratio": 0.5, "sizes": (1, 2)}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trian.steps=1", "config has no key 'trian'. Did you mean 'train'?"),
        ("sede=1", "config has no key 'sede'. Did you mean 'seed'?"),
        ("outer.iner.depth=1", "config.outer has no key 'iner'. Did you mean 'inner'?"),
        ("train.inner.depth=1", "config.train has no key 'inner'. It has: name, ratio, sizes, steps, warmup."),
        ("train.steps.x=1", "config.train.steps is a single value, so 'train.steps.x' cannot be set"),
        ("seed.x=1", "config.seed is a single value, so 'seed.x' cannot be set"),
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("=1", "override '=1' is not of the form section.key=value"),
    ],
)
def test_wrong_overrides(experiment: str, override: str, problem: str) -> None:
    assert message_of(load_experiment, experiment, [override]) == problem


def test_a_misspelt_field_of_an_override_is_found_by_build(experiment: str) -> None:
    config = load_experiment(experiment, ["train.warmpu=1"])
    section = {k: v for k, v in config.train.items() if k != "ratio"}
    assert message_of(build, Section, section, where="config.train", total_steps=100) == (
        "config.train has no key 'warmpu'. Did you mean 'warmup'?"
    )


# ---------------------------------------------------------------- comparing and naming


def test_differences() -> None:
    old = {"train": {"steps": 100, "lr": 0.1, "old": None}, "seed": 0, "sizes": [1, 2], "deep": {"a": {"b": 1}}}
    new = {"train": {"steps": 200, "lr": 0.1, "new": 3}, "seed": 0, "sizes": [1, 3], "deep": {"a": {"b": 2}}}
    assert differences(old, new) == [
        "deep.a.b: 1 -> 2",
        "sizes: [1, 2] -> [1, 3]",
        "train.new: (absent) -> 3",
        "train.old: None -> (absent)",
        "train.steps: 100 -> 200",
    ]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"a": {"b": 1}}) == ["a: 1 -> (absent)", "a.b: (absent) -> 1"]


def test_to_dict_is_what_json_holds() -> None:
    nest = ml_collections.ConfigDict({"a": Section(1, sizes=(1, 2)), "b": {"c": (3,)}})
    plain = to_dict(nest)
    assert plain["a"]["sizes"] == [1, 2] and plain["a"]["limit"] is None and plain["b"] == {"c": [3]}
    assert type(plain["b"]) is dict


def test_modules_are_found_by_listing_the_folder() -> None:
    package = pathlib.Path(config_lib.__file__).parent
    for kind in ("generators", "tokenizers"):
        assert module_names(kind) == sorted(p.stem for p in (package / kind).glob("[!_]*.py"))
    assert find_module("generators", "rar").__name__ == "rar_jax.generators.rar"
    assert message_of(find_module, "generators", "raar") == "no generator 'raar'. Did you mean 'rar'?"
    assert (
        message_of(find_module, "tokenizers", "maskgit_vg") == "no tokenizer 'maskgit_vg'. Did you mean 'maskgit_vq'?"
    )
