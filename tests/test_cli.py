import sys

import pytest
import torch

from janus.dola.cli import CommandParser, run_command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("x.json: not\n  JSON"), "x.json: not JSON"),
        (OSError(28, "No space left on device", "x"), "[Errno 28] No space left on device: 'x'"),
        (RecursionError("maximum recursion depth exceeded"), "an input is nested too deeply"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "out of memory: CUDA out of memory. Tried to"),
        (RuntimeError("CUDA error: out of memory"), "out of memory: CUDA error: out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory: CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("can't allocate memory: 9 bytes"), "out of memory: can't allocate memory: 9 bytes"),
        (ValueError("x" * 100_000), "x" * 1000 + "…"),
    ],
    ids=repr,
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(capsys, error, line):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


def test_another_error_is_a_defect_and_keeps_its_traceback():
    def main() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_command(main)


def test_an_interrupt_is_one_line_and_exit_code_130(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_an_argument_that_is_no_text_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "caf\udce9"])
    with pytest.raises(SystemExit) as stop:
        CommandParser().parse_args()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: argument 'caf\\udce9' is not UTF-8\n"
