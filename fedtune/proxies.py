"""Addresses of HTTP proxies, which may hold passwords, as people may see them."""

from __future__ import annotations

from urllib.parse import urlsplit

__all__ = ["shown"]


def shown(url: str) -> str:
    """A proxy's address without user name and password."""
    scheme, mark, rest = url.rpartition("://")
    try:
        parts = urlsplit(f"{scheme or 'http'}://{rest}")
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not an address)"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"
