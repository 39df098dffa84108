"""Exit codes of commands, which schedulers and scripts read, and the signals that ask a run to stop."""

import signal

MISTAKE = 2
"""An error that one line explains: a mistake of the user's, or something that is missing."""
UNSTABLE = 3
"""A run that stopped by itself, without saving, because training had become unstable."""
STOPPED = 75
"""A run that was asked to stop by one of `STOP_SIGNALS`, and can be resumed: EX_TEMPFAIL of sysexits.h."""
KILLED = 128 + signal.SIGTERM
"""A run that was asked twice, or could not end its step in time, and did not save: 143, as shells report a SIGTERM."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop: Ctrl-C, a scheduler's, the cluster's time limit."""
