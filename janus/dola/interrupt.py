"""Ctrl-C while a command's imports, which take seconds, are under way: imports nothing slow itself."""

import os
import signal
from typing import NoReturn

INTERRUPTED = "interrupted; the same command resumes where it stopped"


def exit_on_interrupt() -> None:
    """Until `run_command` takes over, an interrupt ends the process with one line and exit code 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_interrupted)


def exit_interrupted(*_) -> NoReturn:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)
