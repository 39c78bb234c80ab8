"""A reward function that forgets to answer."""


def nothing(sample) -> None:
    """Not a number."""
