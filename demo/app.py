"""A page in the browser: paint with and without DoLa side by side, ask, look inside."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts that the page runs

    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from janus.dola.cli import CommandParser, add_model_arguments, run_command


def build_parser() -> CommandParser:
    parser = CommandParser(description="Serve a page in the browser: paint, ask and look inside, with DoLa beside.")
    add_model_arguments(parser)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 is every one (default: %(default)s)")
    add("--port", type=int, help="port to serve on (default: the first free one from 7860)")
    add("--share", choices=("on", "off"), default="off", help="a public address by gradio.live (default: %(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'janus-dola[web]'")
    if args.port is not None and not 0 < args.port < 1 << 16:
        raise ValueError(f"--port: expected 1 to {(1 << 16) - 1}, got {args.port}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes
    with TemporaryDirectory(prefix="janus-page-", ignore_cleanup_errors=True) as folder:
        for library in ("GRADIO_TEMP_DIR", "MPLCONFIGDIR"):  # read where they are imported
            os.environ[library] = str(Path(folder) / library.lower())
        from demo.serve import serve

        serve(args, Path(folder))


if __name__ == "__main__":
    run_command(main)
