"""A scale-out engine for MoCo v3."""

__version__ = "0.1.0"
