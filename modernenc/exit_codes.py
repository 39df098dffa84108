"""Exit codes of commands, which schedulers and scripts read."""

MISTAKE = 2
"""An error that one line explains: a mistake of the user's, or something that is missing."""
UNSTABLE = 3
"""A run that stopped by itself, without saving, because training had become unstable."""
STOPPED = 75
"""A run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h."""
