"""What the command lines share: one-line errors, parsers, the flags they have in common."""

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm
from transformers.utils import logging

from dola_runtime import DEFAULT_ALPHA
from janus.dola.interrupt import INTERRUPTED, exit_interrupted
from janus.dola.memory import is_out_of_memory
from janus.dola.quantize import LIBRARIES

JANUS_TINY = Path(__file__).parents[1] / "checkpoints" / "janus-tiny"
DEFAULT_MODEL = str(JANUS_TINY) if JANUS_TINY.is_dir() else "deepseek-ai/Janus-1.3B"  # the original code's own default
LONGEST_MESSAGE = 1000
LARGEST_COUNT = 1_000_000


def fail(message: str) -> NoReturn:
    """End the command with one line on standard error and exit code 2."""
    line = " ".join(message.split())
    print(f"error: {line[:LONGEST_MESSAGE]}{'…' * (len(line) > LONGEST_MESSAGE)}", file=sys.stderr)
    raise SystemExit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main: what the user can mend becomes one line and exit code 2, an interrupt exit code 130.

    transformers' own notes are kept off the terminal.
    """
    try:
        if signal.getsignal(signal.SIGINT) is exit_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.set_verbosity_error()
        main()
    except (ValueError, OSError) as error:
        fail(str(error))
    except RecursionError:
        fail("an input is nested too deeply")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory: {error}".removesuffix(": "))
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as every other error of a command is.

    Options are written in full, with underscores or with dashes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        for argument in given:
            if re.search("[\ud800-\udfff]", argument):  # how Python takes in bytes that are no text
                self.error(f"argument {argument!r} is not UTF-8")
        underscored = [re.sub("^--[^=]+", lambda name: f"--{name[0][2:].replace('-', '_')}", arg) for arg in given]
        return super().parse_known_args(underscored, namespace)

    def error(self, message: str) -> NoReturn:
        fail(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=DEFAULT_MODEL, help=f"checkpoint directory or hub id (default: {Path(DEFAULT_MODEL).name})")
    add("--device", default="auto", help="cpu, cuda, cuda:N, mps, or auto: CUDA if there is one (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16, or auto: bfloat16 but on the CPU (default: %(default)s)",
    )
    help_quantize = "the LLaMA's linear layers in 8 bits (by torchao) or 4 (by bitsandbytes) (default: as --dtype)"
    add("--quantize", choices=tuple(LIBRARIES), help=help_quantize)
    add("--offload", action="store_true", help="of tower and VQ, only the one in use in memory (default: both)")


def add_dola_arguments(parser: argparse.ArgumentParser, default: str, alpha: float = DEFAULT_ALPHA) -> None:
    """The flags of a contrast; `default` says what is done where none names a layer, `alpha` is the usual one."""
    group = parser.add_argument_group("DoLa", "flags win over --config")
    add = group.add_argument
    add("--config", metavar="FILE", help="switches as JSON, with the layers and alphas (default: none)")
    add("--domain", metavar="NAME", help="a domain of --config (default: the file's own switches)")
    layers = group.add_mutually_exclusive_group().add_argument
    layers("--layer", type=int, help=f"fixed contrast layer, 1..N; N is no contrast (default: {default})")
    layers("--layer_ratio", type=float, help="fixed contrast layer by depth, 0..1 (default: by --layer)")
    layers("--candidate_layers", type=parse_layers, help="early exit among these, as 22,24,26,28 (default: one layer)")
    add("--alpha", type=float, help=f"plausibility threshold (APC), 0..1 (default: {alpha:g})")
    weight = group.add_mutually_exclusive_group().add_argument
    weight("--gamma", type=float, help="weight of the contrast, 0 is the mask alone (default: 1)")
    weight(
        "--apc_only",
        dest="gamma",
        action="store_const",
        const=0.0,
        help="the mask alone: --gamma 0 (default: the contrast)",
    )
    add("--no_norm", action="store_true", help="read contrast layers without the final norm (default: with it)")


def run_settings(args: argparse.Namespace, model) -> dict[str, str]:
    """Where a run's numbers come from beside its decoding: checkpoint, dtype, device's kind, quantisation if any."""
    weight = model.language_model.get_input_embeddings().weight
    quantized = getattr(model, "quantized", None)  # the original code's have none
    return {
        "model": JANUS_TINY.name if args.model == str(JANUS_TINY) else args.model,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        **({"quantize": quantized} if quantized else {}),
    }


def parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers like 22,24,26,28, got {text!r}") from None


def positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST_COUNT}, got {text!r}")
    return int(text)


LINE_EVERY = 30.0
"""Seconds between the lines of a progress that is not shown on a terminal."""


class Progress:
    """How much of a run is done and how long the rest will take: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int, unit: str):
        self.total, self.initial, self.done, self.unit = total, done, done, unit
        self.started = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=done, unit=unit, unit_scale=True, smoothing=0.05, disable=not self.terminal
        )

    def add(self, count: int, note: str = "") -> None:
        """Count more as done, or, below 0, as not done after all; a note stands behind the figures."""
        self.done += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        if not self.terminal and now - self.shown >= LINE_EVERY:
            self.shown = now
            elapsed = now - self.started
            print(
                tqdm.format_meter(
                    self.done,
                    self.total,
                    elapsed,
                    unit=self.unit,
                    unit_scale=True,
                    initial=self.initial,
                    ncols=0,
                    postfix=note,
                ),
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
