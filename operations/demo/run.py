"""The demo."""


def demo() -> None:
    """Show it."""
