"""What the baselines with one scale per input channel share."""

from __future__ import annotations

from qe_edge.methods.base import Method, OptionsType


class ChannelScaling(Method[OptionsType]):
    """A method that moves one scale per input channel from activations to weights."""

    @property
    def stack_siblings(self) -> bool:
        """One scale for all consumers of an input."""
        return True
