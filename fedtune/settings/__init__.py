"""From flags and YAML to `Arguments`."""

from fedtune.settings.parse import parse_arguments

__all__ = ["parse_arguments"]
