"""The scripts that start a run on other machines: what they would run, and what they do when a preemption comes."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
EXPERIMENT = ["--config", "rar_b", "--workdir", "/mnt/shared/a run", "--config.seed=3"]
FINAL = ["python", "-m", "rar_jax", "run", *EXPERIMENT]
TPU = ["--name", "mine", "--zone", "here", "--type", "v5litepod-16", "--runtime", "base"]
GKE = ["--cluster", "c", "--zone", "here", "--project", "p", "--name", "w", "--type", "v5litepod-16", "--image", "i"]
# Script: its arguments before the experiment's.
STARTS = {
    "local.sh": ["--dry-run", "2"],
    "tpu_pod.sh": ["run", "--dry-run", *TPU, "--spot", "--nfs", "10.0.0.2:/share"],
    "tpu_multislice.sh": ["run", "--dry-run", *TPU, "--slices", "2"],
    "gke_xpk.sh": ["--dry-run", *GKE],
    "slurm.sbatch": ["--dry-run"],
}


def launch(script: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environ)


def words(line: str) -> list[str]:
    """The words of a command; those of what it runs elsewhere, if it does."""
    found = shlex.split(line)
    remote = [word.removeprefix("--command=") for word in found if word.startswith("--command=")]
    return shlex.split(remote[0]) if remote else found


@pytest.mark.parametrize("script", STARTS)
def test_ends_in_the_run(script: str, tmp_path: pathlib.Path) -> None:
    """Every word arrives as it was given, the blank in the folder's name too; and nothing is run."""
    trap = tmp_path / "bin"
    trap.mkdir()
    for name in ("gcloud", "xpk", "docker", "srun", "scontrol", "python"):
        (trap / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (trap / name).chmod(0o755)
    done = launch(script, *STARTS[script], *EXPERIMENT, PATH=f"{trap}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert words(done.stdout.splitlines()[-1])[-len(FINAL) :] == FINAL
    assert not (tmp_path / "ran").exists()


def test_local_gives_each_process_its_place() -> None:
    done = launch("local.sh", "--dry-run", "--devices", "4", "--port", "99", "3", "evaluate", *EXPERIMENT)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for k, line in enumerate(lines):
        settings = {"RAR_JAX_PROCESS_COUNT=3", f"RAR_JAX_PROCESS_INDEX={k}", "RAR_JAX_COORDINATOR_ADDRESS=127.0.0.1:99"}
        assert settings <= set(line) and "XLA_FLAGS=--xla_force_host_platform_device_count=4" in line
        assert line[-len(EXPERIMENT) - 4 :] == ["python", "-m", "rar_jax", "evaluate", *EXPERIMENT]


def test_gcloud_is_asked_for_what_was_given() -> None:
    lines = launch("tpu_multislice.sh", *STARTS["tpu_multislice.sh"], *EXPERIMENT).stdout.splitlines()
    create = next(shlex.split(line) for line in lines if " create " in line)
    assert {"--node-count=2", "--accelerator-type=v5litepod-16", "--runtime-version=base", "--zone=here"} <= set(create)
    assert "--spot" not in create
    assert all("--node=all --worker=all" in line for line in lines if " ssh " in line or " scp " in line)
    lines = launch("tpu_pod.sh", *STARTS["tpu_pod.sh"], *EXPERIMENT).stdout.splitlines()
    assert [line for line in lines if " create " in line and "--spot" in line and "--version=base" in line]
    assert [line for line in lines if "mount -t nfs 10.0.0.2:/share /mnt/rar_jax" in line]


@pytest.mark.parametrize("action", ["up", "copy", "logs", "stop", "down"])
@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_multislice.sh"])
def test_each_action(script: str, action: str) -> None:
    word = {"up": "create", "copy": "scp", "logs": "tail", "stop": "--stop", "down": "delete"}[action]
    slices = ["--slices", "2"] if "slice" in script else []
    done = launch(script, action, "--dry-run", *TPU, *slices)
    assert done.returncode == 0 and word in done.stdout


@pytest.mark.parametrize("script", STARTS)
def test_help_and_wrong_commands(script: str) -> None:
    helped = launch(script, "--help")
    assert helped.returncode == 0 and "--dry-run" in helped.stdout and script in helped.stdout
    assert all(line.startswith("#") is False for line in helped.stdout.splitlines())
    refused = launch(script, *STARTS[script], "--config", "rar_b")
    assert refused.returncode == 2 and "give --config and --workdir" in refused.stderr and not refused.stdout


def test_shellcheck() -> None:
    scripts = sorted(map(str, [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]))
    assert len(scripts) == 8
    tool = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([tool, "-x", "-P", str(ROOT), *scripts], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- preemption, with a gcloud that only says what it is told to


GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/asked"
next() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case $* in
    *describe*)
        state=$(next states)
        case $state in NOT_FOUND | BROKEN) echo "ERROR: $state" >&2; exit 1 ;; esac
        echo "$state" ;;
    *rar_jax.exit*) next codes ;;
esac
"""


def watch(tmp_path: pathlib.Path, states: str, codes: str) -> tuple[int, list[str]]:
    """The exit code of tpu_pod.sh watch, and what it asked gcloud for besides states and codes."""
    for name, text in (("states", states.replace(" ", "\n")), ("codes", codes.replace(" ", "\n"))):
        (tmp_path / name).write_text(text + "\n")
    for name, text in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("tpu_pod.sh", "watch", *TPU, *EXPERIMENT, FAKE=str(tmp_path), PATH=path)
    asked = (tmp_path / "asked").read_text().splitlines()
    verbs = ("create", "delete", "scp", "background.sh")
    return done.returncode, [verb for line in asked for verb in verbs if verb in line and "rm -rf" not in line]


def test_a_preempted_slice_is_made_anew(tmp_path: pathlib.Path) -> None:
    states = "READY PREEMPTED PREEMPTED CREATING READY READY"
    assert watch(tmp_path, states, " 0") == (0, ["delete", "create", "scp", "background.sh"])


def test_the_exit_code_of_a_preemption_starts_again(tmp_path: pathlib.Path) -> None:
    assert watch(tmp_path, "READY READY", "75 0") == (0, ["background.sh"])


@pytest.mark.parametrize("code", [1, 2, 130])
def test_no_other_exit_code_does(tmp_path: pathlib.Path, code: int) -> None:
    assert watch(tmp_path, "READY", str(code)) == (code, [])


def test_what_cannot_be_seen_is_left_alone(tmp_path: pathlib.Path) -> None:
    """A connection that is lost is no preemption."""
    assert watch(tmp_path, "BROKEN BROKEN READY", "0") == (0, [])


@pytest.mark.parametrize(("codes", "expected", "runs"), [("75 75 0", 0, 3), ("75 1", 1, 2), ("1 0", 1, 1)])
def test_local_starts_again_after_a_preemption_only(
    tmp_path: pathlib.Path, codes: str, expected: int, runs: int
) -> None:
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    python = f'#!/bin/bash\necho >> {tmp_path}/runs\nread -r code < {tmp_path}/codes\nsed -i 1d {tmp_path}/codes\nexit "$code"\n'
    (tmp_path / "python").write_text(python)
    (tmp_path / "python").chmod(0o755)
    done = launch("local.sh", "--port", "99", "1", *EXPERIMENT, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == expected and len((tmp_path / "runs").read_text()) == runs


@pytest.mark.parametrize(("code", "asked"), [(75, "requeue 7\n"), (0, ""), (1, ""), (137, ""), (143, "")])
def test_slurm_puts_a_job_into_the_queue_again_after_a_preemption_only(
    tmp_path: pathlib.Path, code: int, asked: str
) -> None:
    for name, text in (("srun", f"exit {code}"), ("scontrol", f'echo "$*" >> {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "asked").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert launch("slurm.sbatch", *EXPERIMENT, **job).returncode == code
    assert (tmp_path / "asked").read_text() == asked


def test_background(tmp_path: pathlib.Path) -> None:
    """The log and the exit code of a command that goes on by itself; SIGTERM reaches it, and its own code is kept."""
    home = {"HOME": str(tmp_path)}
    launch("background.sh", "bash", "-c", "trap 'echo saved; exit 75' TERM; echo began; sleep 60 & wait", **home)
    wait = 'for i in $(seq 100); do [ ! -s "$1" ] || exit 0; sleep 0.1; done; exit 1'
    for file in ("rar_jax.log", "rar_jax.exit"):
        assert subprocess.run(["bash", "-c", wait, "wait", str(tmp_path / file)], timeout=30).returncode == 0
        if file == "rar_jax.log":
            assert launch("background.sh", "true", **home).stdout == "it runs already\n"
            launch("background.sh", "--stop", **home)
    assert (tmp_path / "rar_jax.exit").read_text() == "75\n"
    assert (tmp_path / "rar_jax.log").read_text() == "began\nsaved\n"
