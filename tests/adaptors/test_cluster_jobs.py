"""Job scripts of clusters: what they start, and what docs/hpc.md says, with stand-ins for the cluster's commands."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.validation.rules import check
from helpers.command_line import parse
from helpers.paths import ROOT

SCRIPTS = sorted([*ROOT.glob("examples/hpc/*.sh"), *ROOT.glob("containers/*.sh"), ROOT / ".ci" / "run"])
COMMANDS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "hpc.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
STAND_INS = {
    "sbatch": 'while [[ "$1" == --* ]]; do shift; done; SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=8 bash "$@"',
    "qsub": 'IFS=, read -ra named <<< "$2"; PBS_JOBID=7.host PBS_O_WORKDIR=. env "${named[@]}" bash "${@:3}"',
    "srun": 'echo srun "$@"; while [[ "$1" == --* ]]; do shift; done; "$@"; exit "${CODE:-0}"',
    "mpiexec": 'while [[ "$1" != fedspallm ]]; do shift; done; "$@"',
    "scontrol": 'echo scontrol "$@"',
    "apptainer": '[ "$1" = build ] && test -f "$3" || { shift 3; fedspallm "$@"; }',
    "fedspallm": 'printf "fedspallm"; printf " %q" "$@"; echo',
}


@pytest.fixture
def cluster(tmp_path):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()

    def run(command, **more):
        paths = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "VENV": str(tmp_path / "venv")}
        return subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=paths | more, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", script], check=True, timeout=60)


@pytest.mark.parametrize("command", [line for block in COMMANDS for line in block.splitlines()])
def test_a_command_of_the_page_starts_a_run_without_a_problem(command, cluster, monkeypatch):
    done = cluster(command)
    assert done.returncode == 0, done.stderr
    for line in re.findall(r"^fedspallm .*", done.stdout, re.MULTILINE):
        args = parse(shlex.join(shlex.split(line)), monkeypatch)
        config, problems = load_config(ROOT / args.config, getattr(args, "overrides", []))
        assert problems + check(config) == []
        for word in re.findall(r"[\w.]*(?:sparsity|seed)=\S+?(?=[\s\"]|$)", command):
            assert word.removeprefix("OVERRIDES=") in args.overrides
        if "seed=1" in command:
            assert config.seed == 1
        if "hpc" in command:
            assert args.resume and args.launcher == "mpi" and config.run_dir == "runs/7"
    assert ("fedspallm " in done.stdout) != command.startswith("apptainer")


@pytest.mark.parametrize("script", ["slurm", "slurm_apptainer"])
def test_a_job_that_was_cut_off_is_queued_again(script, cluster):
    command = f"sbatch examples/hpc/{script}.sh configs/demo.yaml"
    ended = {code: cluster(command, CODE=str(code)) for code in (0, 2, 143)}
    assert [done.returncode for done in ended.values()] == [0, 2, 143]
    assert [code for code, done in ended.items() if "scontrol requeue 7" in done.stdout] == [143]
