"""The HTTP proxy between a site and its SuperLink, where the environment names one.

`http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` are read as Python's urllib reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.request import getproxies, proxy_bypass

from fedtune.deploy.address import Address
from fedtune.proxies import shown

__all__ = ["LOCAL", "Proxy", "environment", "proxy_of"]

LOCAL = "localhost,127.0.0.1,::1"


@dataclass(frozen=True, repr=False)
class Proxy:
    """One that stands in between; as text it is without its password.

    Attributes:
        url: with user name and password, where it has them.
        variable: of the environment.
    """

    url: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {shown(self.url)} ({self.variable})"

    __repr__ = __str__


def proxy_of(address: Address, *, tls: bool) -> Proxy | None:
    """What a connection to `address` goes through, or None."""
    if address.is_loopback or proxy_bypass(str(address)) or proxy_bypass(address.host):
        return None
    proxies = getproxies()
    for scheme in ("https" if tls else "http", "all"):
        if url := proxies.get(scheme):
            return Proxy(url if "://" in url else f"http://{url}", f"{scheme}_proxy")
    return None


def environment(proxy: Proxy | None) -> dict[str, str]:
    """What has a process that calls one SuperLink alone go the same way."""
    if proxy is None:
        return {"no_proxy": "*"}
    through = {f"{scheme}_proxy": proxy.url for scheme in ("http", "https")}
    return {**through, "all_proxy": "", "no_proxy": LOCAL}
