"""What the command lines share: one-line errors, parsers, the flags they have in common."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers.utils import logging

from dola_runtime import DEFAULT_ALPHA

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
    """An argument parser whose errors are one line, as every other error of a command is.

    Options are written in full, with underscores or with dashes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        underscored = [re.sub("^--[^=]+", lambda name: f"--{name[0][2:].replace('-', '_')}", arg) for arg in given]
        return super().parse_known_args(underscored, namespace)

    def error(self, message: str) -> NoReturn:
        fail(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(JANUS_TINY), help="checkpoint directory or hub id (default: the embedded janus-tiny)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: CUDA if there is one (default: %(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, or auto: bfloat16 on CUDA (default: %(default)s)")


def add_dola_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags of a contrast; `default` says what is done where none names a layer."""
    group = parser.add_argument_group("DoLa", "flags win over --config")
    add = group.add_argument
    add("--config", metavar="FILE", help="switches as JSON, with the layers and alphas (default: none)")
    add("--domain", metavar="NAME", help="a domain of --config (default: the file's own switches)")
    layers = group.add_mutually_exclusive_group().add_argument
    layers("--layer", type=int, help=f"fixed contrast layer, 1..N; N is no contrast (default: {default})")
    layers("--layer_ratio", type=float, help="fixed contrast layer by depth, 0..1")
    layers("--candidate_layers", type=parse_layers, help="early exit among these, as 22,24,26,28")
    add("--alpha", type=float, help=f"plausibility threshold (APC), 0..1 (default: {DEFAULT_ALPHA:g})")
    weight = group.add_mutually_exclusive_group().add_argument
    weight("--gamma", type=float, default=1.0, help="weight of the contrast, 0 is the mask alone (default: 1)")
    weight("--apc_only", dest="gamma", action="store_const", const=0.0, help="the mask alone: --gamma 0")
    add("--no_norm", action="store_true", help="read contrast layers without the final norm, as the DoLa paper's code")


def run_settings(args: argparse.Namespace, model) -> dict[str, str]:
    """Where a run's numbers come from beside its decoding: the checkpoint, its dtype, the kind of device."""
    weight = model.language_model.get_input_embeddings().weight
    return {
        "model": JANUS_TINY.name if args.model == str(JANUS_TINY) else args.model,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }


def parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers like 22,24,26,28, got {text!r}") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
