"""Hosts for a test: network namespaces where root may make them, else directories alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.processes.supervisor import free_port

__all__ = ["Host", "hosts"]

ETC = Path("/etc/netns")


@dataclass(frozen=True)
class Host:
    """Where a command runs: its working directory, what stands before it, what is replaced in it.

    Attributes:
        apart: whether the host has a network of its own.
    """

    name: str
    directory: Path
    prefix: Sequence[str] = ()
    replace: tuple[tuple[str, str], ...] = ()

    @property
    def apart(self) -> bool:
        return bool(self.prefix)

    def words(self, code: str) -> list[str]:
        """The command that runs `code` in bash at this host."""
        for old, new in self.replace:
            code = code.replace(old, new)
        return [*self.prefix, "bash", "-e", "-u", "-o", "pipefail", "-c", code]


@contextlib.contextmanager
def hosts(names: Sequence[str], directory: Path, server_name: str) -> Iterator[dict[str, Host]]:
    """A host per name; the first is the server, which all can reach as `server_name`."""
    for name in names:
        (directory / name).mkdir()
    with contextlib.ExitStack() as stack:
        made = _namespaces(names, directory, server_name, stack)
        yield made or _directories(names, directory, server_name)


def _directories(names: Sequence[str], directory: Path, server_name: str) -> dict[str, Host]:
    """One network: the server listens on 127.0.0.2 and a free port."""
    port = str(free_port("127.0.0.2"))
    replace = (
        (server_name, "127.0.0.2"),
        ("--host 0.0.0.0", f"--host 0.0.0.0 --port {port}"),
        (":8000", f":{port}"),
    )
    return {name: Host(name, directory / name, (), replace) for name in names}


def _namespaces(
    names: Sequence[str], directory: Path, server_name: str, stack: contextlib.ExitStack
) -> dict[str, Host]:
    """10.77.0.1 and on, joined by a switch in a namespace of its own; none where not allowed."""
    if os.geteuid() or shutil.which("ip") is None:
        return {}
    tag = f"fedtune-{os.getpid()}"
    spaces = {name: f"{tag}-{name}" for name in ("switch", *names)}
    try:
        for space in spaces.values():
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "del", space)
        switch = ("-n", spaces["switch"])
        _ip(*switch, "link", "add", "br0", "type", "bridge")
        _ip(*switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, start=1):
            space, port = spaces[name], f"port{number}"
            peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "add", port, "netns", spaces["switch"], *peer)
            _ip(*switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")
            (ETC / space).mkdir(parents=True)
            stack.callback(shutil.rmtree, ETC / space)
            lines = ("127.0.0.1 localhost", f"10.77.0.1 {server_name}", "")
            (ETC / space / "hosts").write_text("\n".join(lines))
    except (subprocess.CalledProcessError, OSError):
        stack.close()
        return {}
    return {
        name: Host(name, directory / name, ("ip", "netns", "exec", spaces[name])) for name in names
    }


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
