"""Ctrl-C, which some tests send, is heard also where a shell runs the tests in the background."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited, and handed on to every program
    signal.signal(signal.SIGINT, signal.default_int_handler)
