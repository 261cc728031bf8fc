"""Where a SuperLink listens."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from fedtune.errors import ConfigError

__all__ = ["Address"]


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `HOST:PORT` or `[IPV6]:PORT`; raises ConfigError."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        plain = bare == host and ":" in host
        number = int(port) if port.isascii() and port.isdigit() else 0
        if not (colon and bare) or plain or "/" in bare or not 0 < number < 65536:
            raise ConfigError(
                f"--superlink: expected HOST:PORT, received {text}. Example: 127.0.0.1:8000."
            )
        return cls(bare, number)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
