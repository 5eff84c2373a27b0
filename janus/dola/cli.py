"""What the command lines share: one-line errors, parsers, the flags they have in common."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers.utils import logging

JANUS_TINY = Path(__file__).parents[1] / "checkpoints" / "janus-tiny"


def fail(message: str) -> NoReturn:
    """End the command with one line on standard error and exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main: what the user can mend becomes one line and exit code 2, an interrupt exit code 130.

    transformers' own notes are kept off the terminal.
    """
    logging.set_verbosity_error()
    try:
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as every other error of a command is."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(JANUS_TINY), help="checkpoint directory or hub id (default: the embedded janus-tiny)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: CUDA if there is one (default: %(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, or auto: bfloat16 on CUDA (default: %(default)s)")


def parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers like 22,24,26,28, got {text!r}") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
