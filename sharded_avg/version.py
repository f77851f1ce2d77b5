"""The package's version; CHANGELOG.md is checked against it."""

__version__ = "0.1.0"
