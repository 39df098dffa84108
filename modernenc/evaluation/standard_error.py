"""How sure a validation loss is, given the number of held-out tokens."""

from modernenc.run_folder.tables import FIXED_RATIO

LOSS_DEVIATION = 6.5
"""Standard deviation, in nats, of the loss of one predicted token: 3.1 to 3.7 as measured on small models of six sources, times
1.2 to 1.8, because tokens of one document are alike (from sums over documents). The largest of both are taken."""


def standard_error(tokens: int) -> float:
    """Return the standard error, in nats, of the mean loss over the predicted part of this number of held-out tokens."""
    return LOSS_DEVIATION / (FIXED_RATIO * max(1, tokens)) ** 0.5


def tokens_for(error: float) -> float:
    """Return the number of held-out tokens for a standard error in nats: the inverse of `standard_error`."""
    return (LOSS_DEVIATION / error) ** 2 / FIXED_RATIO
