"""The batch scripts with stand-ins for SLURM and the training: what they start and forward, when they begin again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import Config
from tests.kit.runs import run_config, write_config

ROOT = Path(__file__).resolve().parents[2]

# As srun does: a process per task, each signal to every process of the step, the worst status at the end.  What nodes
# say of themselves comes from FAKE_NODES.
SRUN = """
import json, os, re, signal, subprocess, sys, time
log, command = os.environ["FAKE_LOG"], sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
options = dict(re.fullmatch("--([a-z-]+)(?:=(.*))?", each).groups() for each in sys.argv[1:-len(command)])
nodes = options["nodelist"].split(",")
if "engine.launching.preflight" in command:
    what, told = command[command.index("engine.launching.preflight") + 1], json.loads(os.environ["FAKE_NODES"])
    for node in nodes:
        if what == "together" and "stuck" not in told[node]:
            stages = ("started", "met", "computed", "even", "odd", "ring", "all")
            for line in [{"node": node, "stage": stage} for stage in stages] * int(options["ntasks-per-node"]):
                print(json.dumps(line))
        elif what != "together" and told[node]:
            print(json.dumps({"node": node, "time": time.time(), "problems": []} | told[node]))
    sys.exit()
with open(log + "/srun.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
tasks = []
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda number, frame: [os.killpg(task.pid, number) for task in tasks])
for task in range(2):
    tasks.append(subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(task), "SLURM_STEP_NUM_NODES": "2",
                 "SLURM_PROCID": str(task)}, start_new_session=True))
sys.exit(max(task.wait() for task in tasks))
"""
# Training, and a torchrun that stands for it: does the next thing of FAKE_DOES.  A number is its exit status.
TRAINING = """
import json, os, signal, sys, time
signals = [signal.SIGUSR1, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
log, me = os.environ["FAKE_LOG"], os.environ.get("SLURM_PROCID", "0")
path = f"{log}/task{me}.jsonl"
number = len(open(path).readlines()) if os.path.exists(path) else 0
with open(path, "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")
does = os.environ["FAKE_DOES"].split(",")
does = does[min(number, len(does) - 1)]
if does == "wait":
    sys.exit(128 + signal.sigwait(signals))
if does == "done":
    open(os.environ["FAKE_RUN"] + "/DONE", "w").write("1000000")
elif does == "save":
    os.makedirs(os.environ["FAKE_RUN"] + f"/checkpoints/step-{number + 1:08d}", exist_ok=True)
    sys.exit(1)
elif does == "wrong":
    os.makedirs(os.environ["FAKE_RUN"] + "/logs", exist_ok=True)
    open(os.environ["FAKE_RUN"] + "/logs/rank-00001.error.json", "w").write(json.dumps(
        {"time": time.time() + 1, "type": "DataError", "message": "no such corpus", "exit_code": 2}))
    sys.exit(143)
else:
    sys.exit(int(does))
"""
PYTHON = f"""#!/bin/sh
if [ "$3" = train ]; then shift 3; exec "{sys.executable}" "$(dirname "$0")/training" "$@"; fi
exec "{sys.executable}" "$@"
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "node"]:
    print(f"NodeName={sys.argv[3]} NodeAddr=addr-of-{sys.argv[3]} NodeHostName=x")
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={sys.argv[3]} ReqNodeList=(null) ExcNodeList={os.environ.get('FAKE_EXCLUDED', '(null)')}\\n x=y")
else:
    open(os.environ["FAKE_LOG"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
SINFO = """
import json, os
print("\\n".join(json.loads(os.environ["FAKE_NODES"])))
"""
FIT = {"gpus": 8, "equal": {"driver": ["1"], "code": "3"}}


@dataclass
class Job:
    """A script started as SLURM does, or by hand, with stand-ins that record what they saw in `log`."""

    log: Path
    config: Config
    path: Path
    environment: dict[str, str]

    def start(self, does: str, *overrides: str, script: str = "train.sh", under_slurm: bool = True,
              nodes: dict[str, dict[str, object]] | None = None, **more: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[007-009]",
                 "SLURM_SUBMIT_DIR": str(self.log.parent / "submit")} if under_slurm else {}
        told = {"gpu007": FIT, "gpu008": FIT} if nodes is None else nodes
        words = [str(self.path), *overrides] if script == "train.sh" else [*overrides]
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / script), *words], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=self.log.parent / "submit",
            env=self.environment | slurm | {"FAKE_DOES": does, "FAKE_NODES": json.dumps(told),
                                            "GPUS_PER_NODE": "8"} | more)

    def finish(self, *arguments: str, code: int, **options: object) -> str:
        job = self.start(*arguments, **options)                                        # type: ignore[arg-type]
        output, _ = job.communicate(timeout=120)
        assert job.returncode == code, output
        return output

    def attempts(self, task: int = 0) -> list[dict[str, object]]:
        path = self.log / f"task{task}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sruns(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.log / "srun.jsonl").read_text().splitlines()]

    def requeued(self) -> str:
        path = self.log / "requeued"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    submit_dir, log, commands = (tmp_path / name for name in ("submit", "log", "bin"))
    for folder in (submit_dir, log, commands):
        folder.mkdir()
    for name in ("engine", "kernels", "configs", "launch"):
        (submit_dir / name).symlink_to(ROOT / name)
    for name, text in {"srun": SRUN, "torchrun": TRAINING, "training": TRAINING, "scontrol": SCONTROL,
                       "sinfo": SINFO}.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
    (commands / "python").write_text(PYTHON)
    for command in commands.iterdir():
        command.chmod(0o755)
    config = run_config(tmp_path, "run", steps=100, parallel={"data": 2}, batch={"global": 16})
    Path(config.run.dir).mkdir()
    path = write_config(Config.model_validate(config.to_dict() | {"parallel": {"data": "auto"}}), tmp_path / "run.yaml")
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE_LOG": str(log), "FAKE_RUN": config.run.dir,
                   "PREFLIGHT": "quick"}
    return Job(log, config, path, environment)


def test_what_is_started(job: Job) -> None:
    output = job.finish("done", "log.every=7", "run.name=a b", code=0)
    [options] = job.sruns()
    assert options[-4:] == ["launch/task.sh", str(job.path), "log.every=7", "run.name=a b"]
    assert {"--nodes=2", "--nodelist=gpu007,gpu008", "--ntasks=16", "--ntasks-per-node=8",
            "--kill-on-bad-exit=1"} <= set(options)
    for task in (0, 1):
        [seen] = job.attempts(task)
        assert seen["argv"] == [str(job.path), "log.every=7", "run.name=a b"]
        environment = seen["env"]
        assert isinstance(environment, dict)
        assert environment["MASTER_ADDR"] == "addr-of-gpu007"
        assert environment["MASTER_PORT"] == str(20000 + 4711 * 31 % 10000)
        assert environment["OCTANT_WORLD_SIZE"] == "16" and environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "all 100 steps are done" in output and job.requeued() == ""


def test_torchrun(job: Job) -> None:
    job.finish("done", code=0, LAUNCHER="torchrun")
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(job.sruns()[0])
    for node in (0, 1):
        argv = job.attempts(node)[0]["argv"]
        assert isinstance(argv, list) and argv[argv.index("-m"):] == ["-m", "engine", "train", str(job.path)]
        options = dict(re.fullmatch("--([a-z-]+)=(.*)", option).groups()  # type: ignore[union-attr]
                       for option in argv[: argv.index("-m")])
        assert (options["nnodes"], options["nproc-per-node"], options["rdzv-id"]) == ("2", "8", "4711-0-0")
        assert options["rdzv-conf"].startswith(f"is_host={int(node == 0)},")


def test_options_are_torchruns() -> None:
    text = (ROOT / "launch" / "task.sh").read_text()
    known = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True,
                           check=True).stdout
    options = set(re.findall(r"(--[a-z-]+)=", text))
    assert options >= {"--rdzv-conf", "--shutdown-timeout"}
    assert {option for option in options if option not in known} == set()


@pytest.mark.parametrize(("signals", "requeued", "code"), [
    ([signal.SIGUSR1], True, 0), ([signal.SIGTERM], False, 143), ([signal.SIGUSR1, signal.SIGTERM], False, 143)])
def test_signals(job: Job, signals: list[signal.Signals], requeued: bool, code: int) -> None:
    process = job.start("wait")
    deadline = time.monotonic() + 60
    while not (job.attempts(0) and job.attempts(1)):
        assert time.monotonic() < deadline, "no training"
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert job.requeued() == ("requeue 4711\n" if requeued else ""), output


def test_failures_are_bounded_without_progress_only(job: Job) -> None:
    """Six failures with another checkpoint each are none too many; then four without one end it, and its chain."""
    output = job.finish(",".join(["save"] * 6 + ["1"]), code=4)
    assert len(job.attempts()) == 6 + 3 and job.requeued() == ""
    assert "gave up: 4 failures without another checkpoint" in output and output.count("going on from step") == 8
    ports = [environment["MASTER_PORT"] for seen in job.attempts() if isinstance(environment := seen["env"], dict)]
    assert len(set(ports)) == 9
    assert "gave up: 4 failures" in job.finish("done", code=4) and len(job.attempts()) == 9
    (Path(job.config.run.dir) / "restarts.json").unlink()
    job.finish("done", code=0)


def test_what_a_restart_does_not_mend_is_not_restarted(job: Job) -> None:
    assert "rank 1 failed first: no such corpus" in job.finish("wrong", code=2)
    assert len(job.attempts()) == 1 and job.requeued() == ""
    assert "does not make world size" in job.finish("done", "parallel.data=3", code=2)
    assert len(job.attempts()) == 1


@pytest.mark.parametrize(("file", "code", "text"), [("DONE", 0, "are done"), ("STOP", 3, "STOP is there")])
def test_nothing_starts_when_it_is_done_or_stopped(job: Job, file: str, code: int, text: str) -> None:
    (Path(job.config.run.dir) / file).write_text("100")
    assert text in job.finish("done", code=code)
    assert not job.attempts() and job.requeued() == ""


def test_a_spare_node_takes_the_place_of_a_bad_one(job: Job) -> None:
    nodes = {"gpu006": {}, "gpu007": FIT, "gpu008": FIT | {"gpus": 7}, "gpu009": FIT,
             "gpu010": FIT | {"equal": {"driver": ["1"], "code": "x"}},
             "gpu011": FIT | {"stuck": True}, "gpu012": FIT}
    output = job.finish("done", code=0, nodes=nodes, NODES="2", PREFLIGHT="full")
    assert "--nodelist=gpu007,gpu009" in job.sruns()[0]
    assert {"gpu006 does not answer", "gpu008 has 7 GPUs of 8", "gpu010 code is x, most nodes have 3",
            "gpu011 did not start"} == set(re.findall("left out: (.*)", output))


def test_too_few_nodes_are_a_failure_and_requeued(job: Job) -> None:
    nodes = {"gpu007": FIT, "gpu008": ""}
    asked = "parallel.data=16"
    assert "1 of 2 nodes are fit: gpu007" in job.finish("done", asked, code=1, nodes=nodes)
    assert job.requeued() == "requeue 4711\n" and not job.attempts()     # what SLURM itself sees it leaves to SLURM
    for _ in range(2):
        job.finish("done", asked, code=1, nodes=nodes)
    job.finish("done", asked, code=4, nodes=nodes)
    assert job.requeued().count("requeue") == 3


@pytest.mark.parametrize(("changes", "options", "expected"), [
    ([], {}, "on 2 of 4 nodes, with fewer replicas and the same global batch"),      # 3 × 8 replicas do not divide 16
    ([], {"MIN_NODES": "3"}, "requeued: too few nodes are fit"),
    (["parallel.data=32", "batch.global=32"], {}, "requeued: too few nodes are fit")])
def test_fewer_nodes_where_the_configuration_allows_it(job: Job, changes: list[str], options: dict[str, str],
                                                       expected: str) -> None:
    nodes = {"gpu006": {}, "gpu007": FIT, "gpu008": FIT, "gpu009": FIT}
    changes = changes or ["batch.global=32"]
    output = job.finish("done", *changes, code=0 if expected.startswith("on") else 1, nodes=nodes, NODES="4", **options)
    assert expected in output
    if expected.startswith("on"):
        assert "--nodelist=gpu007,gpu008" in job.sruns()[0]
        [seen] = job.attempts()
        assert isinstance(seen["env"], dict) and seen["env"]["OCTANT_WORLD_SIZE"] == "16"


@pytest.mark.parametrize(("before", "exclude", "expected"), [
    ("(null)", "yes", "ExcNodeList=gpu008"), ("gpu001,gpu003", "yes", "ExcNodeList=gpu001,gpu003,gpu008"),
    ("(null)", "no", None)])
def test_a_bad_node_is_not_taken_again(job: Job, before: str, exclude: str, expected: str | None) -> None:
    nodes = {"gpu006": {}, "gpu007": FIT, "gpu008": FIT | {"problems": ["GPU 3: memory errors"]}}
    output = job.finish("done", "parallel.data=16", code=1, nodes=nodes, FAKE_EXCLUDED=before, EXCLUDE=exclude)
    assert "left out: gpu008 GPU 3: memory errors" in output
    assert job.requeued().splitlines() == ["requeue 4711", *([f"update JobId=4711 {expected}"] if expected else [])]


def test_what_the_ranks_run_in(job: Job, tmp_path: Path) -> None:
    """A file of the cluster's settings, a container, and where logs and the flight recorder's dumps go."""
    (tmp_path / "cluster.sh").write_text("export NCCL_IB_HCA=mlx5\n")
    job.finish("done", code=0, ENVIRONMENT=str(tmp_path / "cluster.sh"), CONTAINER="env IN_CONTAINER=yes")
    for task in (0, 1):
        environment = job.attempts(task)[0]["env"]
        assert isinstance(environment, dict)
        assert (environment["NCCL_IB_HCA"], environment["IN_CONTAINER"]) == ("mlx5", "yes")
        assert environment["OCTANT_LOGS"] == job.config.run.dir
        assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{job.config.run.dir}/logs/flight-" \
            == environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    assert "--wait=60" in job.sruns()[0]


def test_ranks_that_slurm_alone_told_to_stop_make_room_and_come_back(job: Job) -> None:
    assert "requeued: to make room" in job.finish("3", code=0) and job.requeued() == "requeue 4711\n"
    (Path(job.config.run.dir) / "STOP").touch()
    job.finish("3", code=3)
    assert job.requeued() == "requeue 4711\n"


def test_on_this_machine(job: Job) -> None:
    output = job.finish("save,1,done", code=0, under_slurm=False, GPUS_PER_NODE="2")
    assert len(job.attempts()) == 3 and "going on from step 1 (failure 2 of at most 3" in output


SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh")
                 if "source launch/train.sh" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_others_are_it_with_a_configuration(job: Job, script: str) -> None:
    output = job.finish("done", f"run.dir={job.config.run.dir}", "parallel.data=auto", code=0, script=script,
                        nodes={f"gpu{number:03d}": FIT for number in range(256)},
                        NODES="256" if "65b" in script else "16")
    assert "steps are done" in output
    argv = job.attempts()[0]["argv"]
    assert isinstance(argv, list) and (ROOT / argv[0]).is_file() and argv[0].startswith("configs/")


@pytest.mark.parametrize("script", ["train.sh", *SCRIPTS])
def test_the_header_asks_for_what_the_scripts_rely_on(script: str) -> None:
    header = set(re.findall(r"^#SBATCH --(\S+)$", (ROOT / "launch" / script).read_text(), re.MULTILINE))
    assert {"ntasks-per-node=1", "gpus-per-node=8", "signal=B:USR1@600", "requeue", "no-kill",
            "open-mode=append"} <= header


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh")])
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
