"""The scripts that start a run on other machines: what they would run, and what they do when a preemption comes."""

import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib

import pytest
from scripts import EXPERIMENT, LAUNCH, ROOT, TPU, launch, lines_of, stand_in, wait_for

FINAL = ["python", "-m", "rar_jax", "run", *EXPERIMENT]
GKE = ["--cluster", "c", "--zone", "here", "--project", "p", "--name", "w", "--type", "v5litepod-16", "--image", "i"]
# Script: its arguments before the experiment's.
STARTS = {
    "local.sh": ["--dry-run", "2"],
    "tpu_pod.sh": ["run", "--dry-run", *TPU, "--spot", "--nfs", "10.0.0.2:/share"],
    "tpu_multislice.sh": ["run", "--dry-run", *TPU, "--slices", "2"],
    "gke_xpk.sh": ["--dry-run", *GKE],
    "slurm.sbatch": ["--dry-run"],
}


def words(line: str) -> list[str]:
    """The words of a command; those of what it runs elsewhere, if it does."""
    found = shlex.split(line)
    remote = [word.removeprefix("--command=") for word in found if word.startswith("--command=")]
    return shlex.split(remote[0]) if remote else found


@pytest.mark.parametrize("script", STARTS)
def test_ends_in_the_run(script: str, tmp_path: pathlib.Path) -> None:
    """Every word arrives as it was given, the blank in the folder's name too; and nothing is run."""
    trap = dict.fromkeys(("gcloud", "xpk", "docker", "srun", "scontrol", "python"), f"touch {tmp_path}/ran")
    done = launch(script, *STARTS[script], *EXPERIMENT, **stand_in(tmp_path, **trap))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "rar_jax run" in line]
    assert told and all(words(line)[-len(FINAL) :] == FINAL for line in told)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", STARTS)
def test_a_script_s_option_is_not_passed_on_to_the_run(script: str, tmp_path: pathlib.Path) -> None:
    """`... --config rar_b --dry-run` made machines, once."""
    trap = dict.fromkeys(("gcloud", "git", "xpk", "docker", "srun", "scontrol", "python"), f"touch {tmp_path}/ran")
    start = [word for word in STARTS[script] if word != "--dry-run"]
    done = launch(script, *start, *EXPERIMENT, "--dry-run", **stand_in(tmp_path, **trap))
    assert done.returncode == 2 and "--dry-run must stand before --config" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["--devices", "--port"])
def test_local_s_options_have_values(option: str) -> None:
    done = launch("local.sh", option)
    assert done.returncode == 2 and f"{option} needs a value" in done.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_multislice.sh"])
def test_a_dry_run_shows_what_watching_would_do(script: str) -> None:
    """What is asked each minute, and what a preemption, a lost run and a failure would bring."""
    watched = [
        "describe",
        "--status",
        "delete",
        "describe",
        "create",
        "scp",
        "uv venv",
        "rar_jax run",
        "rar_jax run",
        "--status",
        "tail",
    ]
    for action, before in (("watch", []), ("run", ["describe", "create", "scp", "uv venv", "rar_jax run"])):
        slices = ["--slices", "2"] if "slice" in script else []
        lines = launch(script, action, "--dry-run", *TPU, *slices, *EXPERIMENT).stdout.splitlines()
        commands = [line for line in lines if line.startswith("gcloud")]
        expected = before + watched
        assert len(commands) == len(expected), lines
        assert all(word in line for word, line in zip(expected, commands, strict=True)), lines


def test_a_dry_run_shows_that_slurm_is_asked_to_requeue() -> None:
    lines = launch("slurm.sbatch", "--dry-run", *EXPERIMENT).stdout.splitlines()
    assert (
        lines[0].startswith("srun ") and " --cpus-per-task=8 " in lines[0] and lines[-1].startswith("scontrol requeue ")
    )


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
    given = [line for line in lines if any(word in line for word in (" scp ", "uv venv", "rar_jax run"))]
    assert given and all("--node=all --worker=all" in line for line in given)
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


# ---------------------------------------------------------------- preemption on this machine, and with Slurm


@pytest.mark.parametrize(("codes", "expected", "runs"), [("75 143 0", 0, 3), ("75 1", 1, 2), ("1 0", 1, 1)])
def test_local_starts_again_after_a_preemption_only(
    tmp_path: pathlib.Path, codes: str, expected: int, runs: int
) -> None:
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    python = f'echo >> {tmp_path}/runs\nread -r code < {tmp_path}/codes\nsed -i 1d {tmp_path}/codes\nexit "$code"'
    done = launch("local.sh", "--port", "99", "1", *EXPERIMENT, **stand_in(tmp_path, python=python))
    assert done.returncode == expected and len((tmp_path / "runs").read_text()) == runs


@pytest.mark.parametrize(("code", "asked"), [(75, "requeue 7\n"), (0, ""), (1, ""), (137, ""), (143, "requeue 7\n")])
def test_slurm_puts_a_job_into_the_queue_again_after_a_preemption_only(
    tmp_path: pathlib.Path, code: int, asked: str
) -> None:
    path = stand_in(tmp_path, srun=f"exit {code}", scontrol=f'echo "$*" >> {tmp_path}/asked')
    (tmp_path / "asked").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert launch("slurm.sbatch", *EXPERIMENT, **job, **path).returncode == code
    assert (tmp_path / "asked").read_text() == asked


# A training that saves for a while, and writes down each SIGTERM. Its sleep is not in the way of the trap.
TRAINING = """
trap 'echo TERM >> "$MARKS"' TERM
echo began >> "$MARKS"
until grep -q TERM "$MARKS"; do sleep 0.05; done
for i in {1..10}; do sleep 0.05; done
echo saved >> "$MARKS"
exit 75
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_local_lets_its_processes_save(tmp_path: pathlib.Path, processes: int, number: int) -> None:
    """One SIGTERM to each, as a second one would end the save; and their exit code is the script's."""
    marks = tmp_path / "marks"
    training = TRAINING.replace("$MARKS", f"{marks}.$RAR_JAX_PROCESS_INDEX")
    # Tests that run in the background ignore SIGINT, and so would bash. No preexec_fn: it forks, of which JAX warns where it has begun.
    command = [
        "env",
        "--default-signal=INT",
        "bash",
        str(LAUNCH / "local.sh"),
        "--port",
        "99",
        str(processes),
        *EXPERIMENT,
    ]
    environ = os.environ | stand_in(tmp_path, python=training)
    running = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = [tmp_path / f"marks.{k}" for k in range(processes)]
    wait_for(lambda: all(map(lines_of, told)))
    running.send_signal(number)
    code = running.wait(30)
    wait_for(lambda: all("saved" in lines_of(path) for path in told))
    assert (code, [lines_of(path) for path in told]) == (75, [["began", "TERM", "saved"]] * processes)


# ---------------------------------------------------------------- what runs on the machines


def status(home: dict[str, str]) -> str:
    return launch("background.sh", "--status", **home).stdout.strip()


def test_background(tmp_path: pathlib.Path) -> None:
    """The log and the exit code of a command that goes on by itself; SIGTERM reaches it, and its own code is kept."""
    home = {"HOME": str(tmp_path)}
    assert status(home) == "dead"
    launch("background.sh", "bash", "-c", "trap 'echo saved; exit 75' TERM; echo began; sleep 60 & wait", **home)
    wait_for(lambda: lines_of(tmp_path / "rar_jax.log") == ["began"])
    assert launch("background.sh", "true", **home).stdout == "it runs already\n"
    assert status(home) == "running"
    launch("background.sh", "--stop", **home)
    wait_for(lambda: status(home) == "stopped")
    assert lines_of(tmp_path / "rar_jax.log") == ["began", "saved"]
    for code in ("75", "0"):
        launch("background.sh", "bash", "-c", f"exit {code}", **home)
        wait_for(lambda: status(home) not in ("running", "stopped"))
        assert status(home) == code


ENDS_AT_ONCE = 'trap "exit 75" TERM; echo began >> "$MARKS"; while :; do sleep 0.01; done'


@pytest.mark.parametrize(
    ("command", "stops", "times"), [(TRAINING, 2, 1), (ENDS_AT_ONCE, 1, 4)], ids=["twice", "at once"]
)
def test_background_keeps_the_code_of_the_command(tmp_path: pathlib.Path, command: str, stops: int, times: int) -> None:
    """However many signals there were, and if the command ends at the first one at once: then it was often lost."""
    home = {"HOME": str(tmp_path), "MARKS": str(tmp_path / "marks")}
    for _ in range(times):
        pathlib.Path(home["MARKS"]).unlink(missing_ok=True)
        launch("background.sh", "bash", "-c", command, **home)
        wait_for(lambda: bool(lines_of(tmp_path / "marks")))
        for _ in range(stops):
            launch("background.sh", "--stop", **home)
        wait_for(lambda: status(home) != "running")
        assert lines_of(tmp_path / "rar_jax.exit") == ["75"]


def test_background_tells_of_a_dead_run(tmp_path: pathlib.Path) -> None:
    """As after a reboot: no process, and no exit code."""
    home = {"HOME": str(tmp_path)}
    launch("background.sh", "sleep", "60", **home)
    assert status(home) == "running"
    os.killpg(int((tmp_path / "rar_jax.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: status(home) != "running")
    assert status(home) == "dead"


def test_a_living_run_keeps_its_files(tmp_path: pathlib.Path) -> None:
    """`run` takes a slice that is there, and then must not take the files away from what runs on it."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "rar_jax" / "launch")
    with tarfile.open(home / "rar_jax.tar.gz", "w:gz") as archive:
        archive.add(LAUNCH, "launch")
    (home / ".local" / "bin").mkdir(parents=True)
    stand_in(home / ".local" / "bin", uv=f"echo uv >> {home}/asked")
    # What is told to a machine is done in the folder that stands for its home.
    gcloud = """for word; do case $word in --command=*) cd ~ && bash -c "${word#*=}" ;; esac; done"""
    environ = stand_in(tmp_path, gcloud=gcloud, git="", python3="") | {"HOME": str(home)}
    old = home / "rar_jax" / "old"
    old.touch()
    launch("background.sh", "sleep", "60", **environ)
    assert launch("tpu_pod.sh", "copy", *TPU, **environ).returncode == 0
    assert old.exists() and not (home / "asked").exists()
    launch("background.sh", "--stop", **environ)
    wait_for(lambda: status(environ) != "running")
    assert launch("tpu_pod.sh", "copy", *TPU, **environ).returncode == 0
    assert not old.exists() and lines_of(home / "asked") == ["uv", "uv"]
    assert (home / "rar_jax" / "launch" / "background.sh").exists()


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile.gpu", "cuda12"), ("Dockerfile.tpu", "tpu")])
def test_dockerfile(name: str, extra: str) -> None:
    """The files that it copies are here, the extras that it installs are known, and it starts the package."""
    lines = [line.split(maxsplit=1) for line in lines_of(LAUNCH / name) if line[:1] not in ("", "#")]
    copied = [file for verb, rest in lines if verb == "COPY" for file in rest.split()[:-1]]
    assert {"requirements.lock", "pyproject.toml", "rar_jax", "experiments"} <= set(copied)
    assert all((ROOT / file).exists() for file in copied)
    (install,) = (shlex.split(rest) for verb, rest in lines if verb == "RUN")
    assert install[:2] == ["pip", "install"] and install[install.index("-c") + 1] == "requirements.lock"
    assert f".[{extra}]" in install
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {".": set(ours), "jax": set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))}
    wanted = [found.groups() for word in install if (found := re.fullmatch(r"(.+)\[(.+)\]", word))]
    assert all(asked in known[package] for package, asked in wanted)
    (command,) = (json.loads(rest) for verb, rest in lines if verb == "CMD")
    assert command[:3] == ["python", "-m", "rar_jax"]
