"""What `tpu_pod.sh watch` does to the machines, with a gcloud that only says what it is told to."""

import pathlib

import pytest
from scripts import EXPERIMENT, TPU, launch, lines_of, stand_in

# A word in `fails` is that of a command that fails, once.
GCLOUD = """
echo "$*" >> "$FAKE/asked"
failing=$(head -n 1 "$FAKE/fails")
if [ -n "$failing" ] && [[ $* == *"$failing"* ]]; then sed -i 1d "$FAKE/fails"; exit 1; fi
next() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case $* in
    *describe*)
        state=$(next states)
        case $state in NOT_FOUND | BROKEN) echo "ERROR: $state" >&2; exit 1 ;; esac
        echo "$state" ;;
    *"echo dead"*) next told ;;
esac
"""


def watch(
    tmp_path: pathlib.Path, states: str, told: str, fails: str = "", action: str = "watch"
) -> tuple[int, list[str]]:
    """The exit code of tpu_pod.sh, and what it did to the machines."""
    for name, text in (("states", states), ("told", told), ("fails", fails)):
        (tmp_path / name).write_text(text.replace(" ", "\n") + "\n")
    # A watch that has seen all states and goes on is ended.
    path = stand_in(tmp_path, gcloud=GCLOUD, git="", sleep='[ -s "$FAKE/states" ] || exit 99')
    done = launch("tpu_pod.sh", action, *TPU, *EXPERIMENT, FAKE=str(tmp_path), **path)
    verbs = {" create ": "create", " delete ": "delete", " scp ": "scp", "rar_jax run": "start"}
    return done.returncode, [verbs[verb] for line in lines_of(tmp_path / "asked") for verb in verbs if verb in line]


def test_a_preempted_slice_is_made_anew(tmp_path: pathlib.Path) -> None:
    states = "READY PREEMPTED PREEMPTED CREATING READY READY"
    assert watch(tmp_path, states, "running 0") == (0, ["delete", "create", "scp", "start"])


@pytest.mark.parametrize("code", [75, 143])
def test_the_exit_code_of_a_preemption_starts_again(tmp_path: pathlib.Path, code: int) -> None:
    """A training saves and ends with 75, everything else is ended by SIGTERM."""
    assert watch(tmp_path, "READY READY", f"{code} 0") == (0, ["start"])


@pytest.mark.parametrize(
    ("states", "told", "fails", "expected"),
    [
        ("PREEMPTED PREEMPTED NOT_FOUND NOT_FOUND READY READY", "0", "create", "delete create create scp start"),
        (
            "PREEMPTED PREEMPTED TERMINATED TERMINATED TERMINATED READY READY",
            "0",
            "",
            "delete create delete create scp start",
        ),
        ("PREEMPTED PREEMPTED PREEMPTED PREEMPTED READY READY", "0", "delete", "delete delete create scp start"),
        ("PREEMPTED BROKEN BROKEN PREEMPTED PREEMPTED READY READY", "0", "", "delete create scp start"),
        ("PREEMPTED PREEMPTED READY READY READY READY", "0", "scp", "delete create scp scp start"),
        ("PREEMPTED PREEMPTED READY READY READY READY", "0", "venv", "delete create scp scp start"),
        ("PREEMPTED PREEMPTED READY READY READY READY", "0", "--workdir", "delete create scp start scp start"),
        ("READY READY READY", "75 0", "--workdir", "start start"),
        ("READY PREEMPTED PREEMPTED READY READY", "75 0", "--workdir", "start delete create scp start"),
    ],
    ids=["no capacity", "none given", "delete", "describe", "scp", "environment", "start", "start again", "taken away"],
)
def test_a_gcloud_that_fails_is_asked_again(
    tmp_path: pathlib.Path, states: str, told: str, fails: str, expected: str
) -> None:
    """Just after a preemption there are often no machines; each step is tried again until the run has started."""
    assert watch(tmp_path, states, told, fails) == (0, expected.split())


@pytest.mark.parametrize(
    ("states", "fails", "expected"), [("BROKEN BROKEN", "", ""), ("READY READY", "scp", "scp")], ids=["describe", "scp"]
)
def test_what_cannot_be_begun_is_not_watched(tmp_path: pathlib.Path, states: str, fails: str, expected: str) -> None:
    assert watch(tmp_path, states, "0", fails, "run") == (1, expected.split())


def test_a_run_that_was_stopped_is_left_alone(tmp_path: pathlib.Path) -> None:
    assert watch(tmp_path, "READY READY", "running stopped") == (1, [])


def test_a_run_that_is_dead_is_started_again(tmp_path: pathlib.Path) -> None:
    """A host that was rebooted has lost the process, and the mounted share too: that is part of copying."""
    assert watch(tmp_path, "READY READY READY", "dead 0") == (0, ["scp", "start"])


@pytest.mark.parametrize("code", [1, 2, 130])
def test_no_other_exit_code_does(tmp_path: pathlib.Path, code: int) -> None:
    assert watch(tmp_path, "READY READY", f"{code} {code}") == (code, [])


def test_a_host_that_is_lost_is_no_failure(tmp_path: pathlib.Path) -> None:
    """Process 0 left with a failure's code since another is gone; or was taken away, which gcloud says later."""
    assert watch(tmp_path, "READY READY READY READY", "1 dead 0") == (0, ["scp", "start"])
    taken = "READY PREEMPTED PREEMPTED PREEMPTED CREATING READY READY"
    assert watch(tmp_path, taken, "1 1 0") == (0, ["scp", "start", "delete", "create", "scp", "start"])


def test_hosts_that_do_not_answer_are_asked_again(tmp_path: pathlib.Path) -> None:
    assert watch(tmp_path, "READY READY READY", "1 1 1", "worker=all") == (1, [])


def test_what_cannot_be_seen_is_left_alone(tmp_path: pathlib.Path) -> None:
    """A connection that is lost is no preemption."""
    assert watch(tmp_path, "BROKEN BROKEN READY", "0") == (0, [])
