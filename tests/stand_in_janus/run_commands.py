"""Commands one after the other in one process, each as `python FILE ...` or `python -m MODULE ...` would run it."""

import contextlib
import io
import json
import runpy
import sys
import warnings


def run_commands(commands: dict[str, list[str]]) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of each command; an exception that a command lets through comes through here."""
    results = {}
    for name, (program, *arguments) in commands.items():
        code, out, err = 0, io.StringIO(), io.StringIO()
        sys.argv = [program, *arguments]
        run = runpy.run_path if program.endswith(".py") else runpy.run_module
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that is imported already
            try:
                run(program, run_name="__main__")
            except SystemExit as end:
                code = end.code
        results[name] = (code, out.getvalue(), err.getvalue())
    return results


if __name__ == "__main__":
    print(json.dumps(run_commands(json.load(sys.stdin))))
