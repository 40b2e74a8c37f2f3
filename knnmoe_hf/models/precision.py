"""Placeholder until the real module is merged."""


def warn_if_slow(model) -> None:
    """Nothing yet."""
