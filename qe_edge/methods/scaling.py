"""Base of the methods with one scale per input channel."""

from __future__ import annotations

from qe_edge.methods.base import Method, OptionsType


class ChannelScaling(Method[OptionsType]):
    """A method that moves one scale per input channel from activations to weights.

    Example:
        >>> from qe_edge.methods.awq import AWQ, AWQOptions
        >>> AWQ(AWQOptions()).stack_siblings  # query, key and value read the same input, so they share its scale
        True
    """

    @property
    def stack_siblings(self) -> bool:
        """One scale for all consumers of an input."""
        return True
