"""Hosts with slow links on one machine: Linux network namespaces, joined by a bridge, shaped by tc.

Processes in them talk over real TCP, so the time that a smaller message saves is measured.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlib.experiment.errors import UsageError

# Names of this process, so that two runs do not meet; an interface's has 15 characters at most.
_PREFIX = f"rl{os.getpid()}h"
_BRIDGE = f"rl{os.getpid()}b"


class Host(NamedTuple):
    """A host of `slow_hosts`.

    Fields:
        name: of its network namespace.
        address: of its one interface, eth0.
    """

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        return ["ip", "netns", "exec", self.name, *words]


@contextlib.contextmanager
def slow_hosts(count: int, megabits: float) -> Iterator[list[Host]]:
    """`count` hosts whose links carry `megabits` a second in each direction; removed at the end.

    Raises:
        UsageError: no right to make namespaces, or no `ip` and `tc` (Debian's iproute2).
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"slow links need {' and '.join(missing)} (Debian's package iproute2)")
    if os.geteuid() != 0:
        raise UsageError("slow links need root: the right to make network namespaces")
    hosts = [Host(f"{_PREFIX}{i}", f"10.77.0.{i + 1}") for i in range(count)]
    try:
        _make(hosts, megabits)
        yield hosts
    finally:
        _remove(hosts)


def _run(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise UsageError(f"slow links cannot be made: {reason[-1] if reason else words}")


def _make(hosts: list[Host], megabits: float) -> None:
    _run("ip", "link", "add", _BRIDGE, "type", "bridge")
    _run("ip", "link", "set", _BRIDGE, "up")
    for host in hosts:
        # Gloo connects to what the machine's own name resolves to, so each host needs a file.
        folder = Path("/etc/netns", host.name)
        folder.mkdir(parents=True, exist_ok=True)
        names = f"127.0.0.1 localhost\n{host.address} {socket.gethostname()}\n"
        (folder / "hosts").write_text(names)
        outside = f"v{host.name}"
        _run("ip", "netns", "add", host.name)
        _run(
            "ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", host.name
        )
        _run("ip", "link", "set", outside, "master", _BRIDGE, "up")
        _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", host.name, "link", "set", "lo", "up")
        _run("ip", "-n", host.name, "link", "set", "eth0", "up")
        # What a link may send at once, its rate in 2 ms, passes a small message unshaped.
        burst = f"{max(round(2e-3 * megabits * 1e6 / 8), 20_000)}b"
        shape = ["root", "tbf", "rate", f"{megabits}mbit", "burst", burst, "latency", "50ms"]
        _run(*host.command("tc", "qdisc", "add", "dev", "eth0", *shape))
        _run("tc", "qdisc", "add", "dev", outside, *shape)


def _remove(hosts: list[Host]) -> None:
    for host in hosts:
        # The kernel removes a namespace's links some time later: the next host would meet them.
        _run("ip", "link", "del", f"v{host.name}", check=False)
        _run("ip", "netns", "del", host.name, check=False)
        shutil.rmtree(Path("/etc/netns", host.name), ignore_errors=True)
    _run("ip", "link", "del", _BRIDGE, check=False)
