#!/usr/bin/env python3
"""A real Slurm cluster on this machine alone, for the tests: no systemd, no accounting database.

    python scripts/slurm_cluster.py install
    python scripts/slurm_cluster.py up --nodes 3 --grace 20
    source /tmp/forgelm-slurm/env.sh
    sbatch -p low job.sh
    python scripts/slurm_cluster.py down

Partition `low` is preempted and requeued when jobs in `high` want its nodes, after a grace time;
`main`, the default one, is left alone. All state is in one folder; /etc/hosts gets a line for each
node until `down`. A second `up` changes the grace time and the signal of a running cluster.
Needs root. Exit codes: 0 done, 1 it failed, 69 this machine lacks what a cluster needs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

PACKAGES = {  # Debian's name, the program it brings
    "munge": "munged",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurm-client": "sbatch",
}
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
FREE = range(20000, 30000)  # below the ports that the system gives to outgoing connections
HOSTS = Path("/etc/hosts")


class Failed(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Options:
    """What `up` was asked for; `ports` is chosen once: the controller's, then one a node."""

    nodes: int = 3
    cpus: int = 4
    gpus: int = 2
    grace: int = 20
    kill_wait: int = 10
    user_signal: bool = False
    ports: list[int] = field(default_factory=list)


class Cluster:
    """The cluster whose state is in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.conf = self.folder / "slurm.conf"
        self.saved = self.folder / "options.json"
        self.options: Options | None = None
        if self.saved.exists():
            self.options = Options(**json.loads(self.saved.read_text()))

    def names(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.options.nodes)] if self.options else []

    def up(self, asked: dict[str, Any]) -> None:
        """Start what doesn't run yet, with the options of the last time where none is asked for.

        Raises: Failed, also where a running cluster would need other nodes.
        """
        if os.geteuid() != 0:
            raise Failed("the Slurm cluster needs root: its daemons start jobs", UNAVAILABLE)
        if lacking := missing():
            raise Failed(
                f"the Slurm cluster needs the Debian packages {' '.join(lacking)}: "
                f"run `{sys.argv[0]} install`",
                UNAVAILABLE,
            )
        options = replace(self.options or Options(), **asked)
        running = self.pid("slurmctld")
        if running and self.options and shape(options) != shape(self.options):
            raise Failed(f"the cluster in {self.folder} runs with other nodes: run `down` first")
        if len(options.ports) != options.nodes + 1:
            options = replace(options, ports=free_ports(options.nodes + 1))
        self.options = options
        for part in ("log", "run", "dev", "state", *(f"spool/{name}" for name in self.names())):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        self.saved.write_text(json.dumps(asdict(options)))
        self.configure()
        with hosts() as lines:
            lines[:] = [line for line in lines if not line.endswith(self.mark())]
            lines += [f"127.0.0.1 {name} {self.mark()}" for name in self.names()]
        self.start_munge()
        if running:
            self.run("scontrol", "reconfigure")
        else:
            # -c: the jobs of the time before `down` are no more.
            self.run("slurmctld", "-c", "-f", str(self.conf))
        for name in self.names():
            self.start_node(name)
        for name in self.names():
            self.wait_for_node(name)

    def down(self) -> None:
        """End all daemons and whatever their jobs still run."""
        for name in self.names():
            self.end(f"slurmd.{name}", signal.SIGKILL)
            self.signal_jobs(name, signal.SIGKILL)
        self.end("slurmctld", signal.SIGTERM)
        self.end("munged", signal.SIGTERM)
        with hosts() as lines:
            lines[:] = [line for line in lines if not line.endswith(self.mark())]

    def kill_node(self, name: str) -> None:
        """Take a node away without a warning; its jobs end with NODE_FAIL and are requeued."""
        self.check_name(name)
        self.end(f"slurmd.{name}", signal.SIGKILL)
        # Still before they die: a dead node says nothing to the others, not even that it ends.
        self.signal_jobs(name, signal.SIGSTOP)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")
        self.signal_jobs(name, signal.SIGKILL)

    def revive(self, name: str) -> None:
        """Bring a killed node back."""
        self.check_name(name)
        self.start_node(name)
        self.wait_for_node(name)

    def status(self) -> str:
        if not self.pid("slurmctld"):
            raise Failed(f"no cluster runs in {self.folder}")
        return self.run("sinfo", "-o", "%P %a %l %D %T %N") + self.run("squeue")

    def check_name(self, name: str) -> None:
        if name not in self.names():
            raise Failed(f"no node {name!r}; the cluster has {', '.join(self.names()) or 'none'}")

    def mark(self) -> str:
        return f"# slurm_cluster.py {self.folder}"

    def configure(self) -> None:
        assert self.options
        host, here, options = socket.gethostname(), self.folder, self.options
        names = f"node[1-{options.nodes}]"
        gpus = f"Gres=gpu:{options.gpus}" if options.gpus else ""
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={options.cpus} RealMemory=64000 {gpus}"
            for name, port in zip(self.names(), options.ports[1:], strict=True)
        )
        warning = "SlurmctldParameters=preempt_send_user_signal" if options.user_signal else ""
        for i in range(options.gpus):
            device = here / f"dev/gpu{i}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        (here / "gres.conf").write_text(
            f"NodeName={names} Name=gpu File={here}/dev/gpu[0-{options.gpus - 1}]\n"
            if options.gpus
            else ""
        )
        (here / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (here / "env.sh").write_text(f"export SLURM_CONF={self.conf}\n")
        self.conf.write_text(f"""\
ClusterName=forgelm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={options.ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={here}/run/munge.socket,cred_expire=5
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool/%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd.%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
{"GresTypes=gpu" if options.gpus else ""}
# Nodes may claim more than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=30
BatchStartTimeout=60
MinJobAge=86400
KillWait={options.kill_wait}
JobRequeue=1
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{warning}
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO
PartitionName=main PriorityTier=1 PreemptMode=OFF Default=YES
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime={options.grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF
""")

    def start_munge(self) -> None:
        key = self.folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        if not self.pid("munged"):
            run = self.folder / "run"
            self.run(
                "munged",
                "--force",  # the temp dir, where all may write, is above it
                f"--key-file={key}",
                f"--socket={run}/munge.socket",
                f"--pid-file={run}/munged.pid",
                f"--seed-file={run}/munged.seed",
                f"--log-file={self.folder}/log/munged.log",
            )

    def start_node(self, name: str) -> None:
        if not self.pid(f"slurmd.{name}"):
            self.run("slurmd", "-N", name, "-f", str(self.conf))
        elif self.state(name) in ("down", "drained"):
            self.run("scontrol", "update", f"nodename={name}", "state=resume")

    def state(self, name: str) -> str:
        return self.run("sinfo", "-h", "-p", "main", "-n", name, "-o", "%T", check=False).strip()

    def wait_for_node(self, name: str) -> None:
        """Raises: Failed if the node is not ready within a minute."""
        ready = ("idle", "mixed", "allocated", "completing")
        if not wait(lambda: self.state(name) in ready, 60):
            log = (self.folder / f"log/slurmd.{name}.log").read_text()
            raise Failed(
                f"{name} is {self.state(name)} after 60 s, not ready; its log ends\n{log[-1000:]}"
            )

    def pid(self, daemon: str) -> int | None:
        """The id of a daemon's process, if it lives and is this cluster's."""
        try:
            pid = int((self.folder / f"run/{daemon}.pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_text()
        except (OSError, ValueError):
            return None
        return pid if str(self.folder) in words else None

    def end(self, daemon: str, how: signal.Signals) -> None:
        if pid := self.pid(daemon):
            os.kill(pid, how)
            if not wait(lambda: self.pid(daemon) is None, 20):
                os.kill(pid, signal.SIGKILL)

    def signal_jobs(self, name: str, how: signal.Signals) -> None:
        """Signal what a node's jobs run: their slurmstepd, which hold its log, and all below."""
        log = self.folder / f"log/slurmd.{name}.log"
        parents = {pid: parent(pid) for pid in processes()}
        found = {pid for pid in parents if runs_steps(pid, log) or self.started_on(pid, name)}
        while more := {pid for pid, above in parents.items() if above in found} - found:
            found |= more
        # Children first: the kernel wakes a stopped process whose parent dies.
        for pid in sorted(found, reverse=True):
            with suppress(ProcessLookupError):
                os.kill(pid, how)

    def started_on(self, pid: int, name: str) -> bool:
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return {f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={name}".encode()} <= {*words}

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            words,
            env={**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if check and done.returncode:
            raise Failed(f"{' '.join(words)}: exit {done.returncode}: {done.stdout.strip()}")
        return done.stdout


def shape(options: Options) -> tuple[int, int, int]:
    return options.nodes, options.cpus, options.gpus


def missing() -> list[str]:
    """Debian's names of the packages whose program isn't here."""
    return [name for name, program in PACKAGES.items() if not shutil.which(program, path=PATH)]


def install() -> None:
    """Install Debian's packages that are missing, without letting them start services.

    Raises: Failed
    """
    packages = missing()
    if not packages:
        return
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Failed(f"Slurm is missing, and only root on Debian can install it: {command}", 69)
    policy = Path("/usr/sbin/policy-rc.d")  # 101: no service may be started
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for words in ("apt-get -qq update", f"{command} --yes -qq"):
            done = subprocess.run(
                words.split(),
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise Failed(f"{words}: {done.stdout.strip()[-1000:]}", UNAVAILABLE)
    finally:
        if ours:
            policy.unlink()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    found: list[int] = []
    for port in random.sample(FREE, len(FREE)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise Failed(f"no {count} free ports in {FREE}")


@contextmanager
def hosts() -> Iterator[list[str]]:
    """The lines of /etc/hosts, to change; in place, for it may be mounted as a single file."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        lines = before.splitlines()
        yield lines
        after = "".join(f"{line}\n" for line in lines)
        if after != before:
            file.seek(0)
            file.write(after)
            file.truncate()


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


def runs_steps(pid: int, log: Path) -> bool:
    """Whether this is a slurmstepd that writes to a node's log."""
    try:
        if Path(f"/proc/{pid}/comm").read_text() != "slurmstepd\n":
            return False
        return any(os.readlink(file.path) == str(log) for file in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(tempfile.gettempdir()) / "forgelm-slurm"
    parser.add_argument("--dir", type=Path, default=default, help=f"its folder ({default})")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install Debian's packages that are missing")
    up = commands.add_parser(
        "up", help="start it, or change its options", argument_default=argparse.SUPPRESS
    )
    up.add_argument("--nodes", type=int, help=f"virtual nodes ({Options.nodes})")
    up.add_argument("--cpus", type=int, help=f"CPUs that a node claims ({Options.cpus})")
    up.add_argument("--gpus", type=int, help=f"GPUs that a node claims ({Options.gpus})")
    up.add_argument(
        "--grace", type=int, help=f"seconds from preemption's warning to its end ({Options.grace})"
    )
    up.add_argument(
        "--kill-wait", type=int, help=f"seconds from TERM to KILL ({Options.kill_wait})"
    )
    up.add_argument(
        "--user-signal",
        action=argparse.BooleanOptionalAction,
        help="preemption warns with the signal of --signal, not TERM (no)",
    )
    commands.add_parser("down", help="end it and its jobs")
    commands.add_parser("status", help="its nodes and jobs")
    for name in ("kill-node", "revive"):
        commands.add_parser(name).add_argument("node")
    return parser.parse_args()


def main() -> int:
    asked = vars(parse())
    command, folder = asked.pop("command"), asked.pop("dir")
    try:
        cluster = Cluster(folder)
        if command == "install":
            install()
        elif command == "up":
            cluster.up(asked)
            print(f"source {cluster.folder}/env.sh")
        elif command == "down":
            cluster.down()
        elif command == "status":
            print(cluster.status(), end="")
        elif command == "kill-node":
            cluster.kill_node(asked["node"])
        else:
            cluster.revive(asked["node"])
    except Failed as failure:
        print(f"slurm_cluster.py: {failure}", file=sys.stderr)
        return failure.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
