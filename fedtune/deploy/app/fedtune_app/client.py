"""The relay of a site, for a SuperNode that is not fedtune's."""

from fedtune.relay.app import app

__all__ = ["app"]
