import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from janus.dola import files
from janus.dola.files import RunLog, is_whole_image, load_image, lock_directory, read_json_file, read_text, write_whole


def not_a_regular_file(path: Path, kind: str) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_text, read_json_file, load_image])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(tmp_path, read, kind):
    path = not_a_regular_file(tmp_path / "input", kind)
    with pytest.raises(ValueError, match="input: not a regular file"):
        read(path)


@pytest.mark.parametrize("read", [read_text, read_json_file, load_image])
def test_a_file_that_is_not_there_or_not_readable_is_named(tmp_path, read):
    with pytest.raises(ValueError, match="none: file not found"):
        read(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"below: not readable \(Not a directory\)"):
        read(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", r"not JSON \(Expecting value, line 1 column 1\)"),
        (b'{"a": 1,\n}', r"not JSON \(.*, line 2 column 1\)"),
        (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'["' + rb"\u0041" + b'", ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds the number 9{20}, which is not finite"),
        (b'{"a": -1e999}', "holds the number -1e999, which is not finite"),
        (b'{"a": NaN}', "holds the number NaN, which is not finite"),
        (b'{"a": [Infinity]}', "holds the number Infinity, which is not finite"),
        (rb'{"a": ["\ud800"]}', "holds half a surrogate pair"),
        (rb'{"\udfff": 1}', "holds half a surrogate pair"),
    ],
)
def test_json_that_is_none_or_holds_what_no_text_or_number_is_is_refused_by_name(tmp_path, content, cause):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {cause}"):
        read_json_file(path)


def test_json_with_whole_surrogate_pairs_and_large_numbers_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(rb'["\ud83d\ude00", "\\ud800", 1000000000000000019884624838656, -1.5e300]')
    assert read_json_file(path) == ["😀", r"\ud800", 1000000000000000019884624838656, -1.5e300]


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that says that it is of this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not an image"),
        (b"some text", "not an image"),
        (png(1, 100_000_000), "too large"),
        (png(100_000, 1_000), "too large"),
        (png(2**31 - 1, 2**31 - 1), "too large"),
        (png(0, 10), "not an image"),
        (png(100, 100), "not an image"),
        (png(10, 10)[:40], "not an image"),
    ],
)
def test_an_image_that_is_none_or_absurdly_large_is_refused_by_name(tmp_path, recwarn, content, cause):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {cause}"):
        load_image(path)
    assert not recwarn.list


def test_memory_too_small_for_an_image_is_its_size(tmp_path, monkeypatch):
    Image.new("L", (5, 4)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").mode == "RGB"

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(ValueError, match=r"x\.png: too large"):
        load_image(tmp_path / "x.png")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "x"
    write_whole(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_in_place_of_the_temporary_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x.janus-tmp").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "x", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "x").read_text() == "new"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_is_whole_where_it_has_its_end(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    assert not is_whole_image(path)
    Image.new("RGB", (50, 40), "red").save(path)
    content = path.read_bytes()
    assert is_whole_image(path)
    for torn in (content[:-1], content[:-100], content[:5], b"", content[:-12] + bytes(12)):
        path.write_bytes(torn)
        assert not is_whole_image(path)
    for kind in ("fifo", "directory", "device"):
        assert not is_whole_image(not_a_regular_file(tmp_path / kind, kind))


# --- the log ---------------------------------------------------------------------------------------------------------


def open_log(directory: Path, settings=None, inputs=("a", "b"), **how) -> RunLog:
    return RunLog(directory / "log.jsonl", settings or {"alpha": 0.1}, inputs, **how)


def logged(directory: Path) -> bytes:
    return (directory / "log.jsonl").read_bytes()


def test_the_log_only_grows_and_its_settings_are_written_once(tmp_path):
    with open_log(tmp_path) as log:
        record = (tmp_path / "run.json").stat()
        log.add(0, [{"index": 0, "answer": "é\u2028"}])
        first = logged(tmp_path)
        inode = (tmp_path / "log.jsonl").stat().st_ino
        log.add(1, [{"index": 1}, {"index": 2}])
    assert logged(tmp_path).startswith(first) and (tmp_path / "log.jsonl").stat().st_ino == inode
    assert (tmp_path / "run.json").stat().st_mtime_ns == record.st_mtime_ns
    assert read_json_file(tmp_path / "run.json") == {
        "log": "log.jsonl", "settings": {"alpha": 0.1}, "inputs": ["a", "b"]
    }  # fmt: skip
    with open_log(tmp_path) as log:
        assert log.entries == [{"index": 0, "answer": "é\u2028"}, {"index": 1}, {"index": 2}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json"]


def test_a_torn_last_line_is_cut_off_wherever_it_tears(tmp_path):
    with open_log(tmp_path) as log:
        log.add(0, [{"index": 0, "prompt": "画"}, {"index": 1, "prompt": "画"}])
    whole = logged(tmp_path)
    first = whole.index(b"\n") + 1
    for end in range(len(whole)):
        (tmp_path / "log.jsonl").write_bytes(whole[:end])
        with open_log(tmp_path) as log:
            assert log.entries == [{"index": 0, "prompt": "画"}][: end >= first]
            assert logged(tmp_path) == whole[: first if end >= first else 0]
            log.add(0, [{"index": 0, "prompt": "画"}, {"index": 1, "prompt": "画"}])
        assert logged(tmp_path) == whole


def test_a_line_that_comes_out_otherwise_than_before_is_an_error(tmp_path):
    with open_log(tmp_path) as log:
        log.add(0, [{"index": 0, "sha": "a"}])
        with pytest.raises(ValueError, match=r"log\.jsonl: line 1 comes out otherwise"):
            log.add(0, [{"index": 0, "sha": "b"}, {"index": 1, "sha": "c"}])
    assert logged(tmp_path) == b'{"index": 0, "sha": "a"}\n'


@pytest.mark.parametrize(
    ("settings", "inputs", "cause"),
    [
        ({"alpha": 0.2}, ["a", "b"], r"with other settings \(alpha\)"),
        ({"alpha": 0.1, "gamma": None}, ["a", "b"], r"with other settings \(gamma\)"),
        ({"alpha": 0.1}, ["a", "c"], r"over other inputs \(number 1 is 'b'\)"),
        ({"alpha": 0.1}, ["a"], r"over other inputs \(2, not 1\)"),
        ({"alpha": 0.1}, ["a", "b", "c"], r"over other inputs \(2, not 3\)"),
    ],
)
def test_another_run_is_refused_unless_it_may_be_overwritten(tmp_path, settings, inputs, cause):
    with open_log(tmp_path) as log:
        log.add(0, [{"index": 0}])
    with pytest.raises(ValueError, match=cause):
        open_log(tmp_path, settings, inputs)
    assert logged(tmp_path) == b'{"index": 0}\n'
    with open_log(tmp_path, settings, inputs, overwrite=True) as log:
        assert log.entries == [] and log.run["inputs"] == inputs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_settings_are_compared_as_json_has_them(tmp_path):
    for _ in range(2):
        open_log(tmp_path, {"layers": (2, 4), "tau": 0.1}, [{"images": ("a",)}]).close()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("line", ["3", "[]", "{", '{"a": NaN}', "[" * 100_000, '"\\ud800"', "\udcff", ""])
def test_a_line_that_is_no_entry_is_named(tmp_path, line, overwrite):
    with open_log(tmp_path) as log:
        log.add(0, [{"index": 0}])
    content = logged(tmp_path) + line.encode(errors="surrogateescape") + b"\n"
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2"):
        open_log(tmp_path, overwrite=overwrite)
    assert logged(tmp_path) == content


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
@pytest.mark.parametrize("name", ["log.jsonl", "run.json", ".janus-lock"])
def test_what_is_not_a_regular_file_is_no_log(tmp_path, name, kind, overwrite):
    open_log(tmp_path).close()
    (tmp_path / name).unlink(missing_ok=True)
    not_a_regular_file(tmp_path / name, kind)
    with pytest.raises((ValueError, OSError)):
        open_log(tmp_path, overwrite=overwrite)
    assert os.path.lexists(tmp_path / name)


# --- the lock --------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from janus.dola.files import RunLog
log = RunLog(Path(sys.argv[1]) / "log.jsonl", {"alpha": 0.1}, ["a", "b"])
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(files.fcntl is None, reason="this system has no fcntl")
def test_a_lock_names_its_holder_and_ends_with_the_process_that_held_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"is being written by process {holder.pid} on "):
                open_log(tmp_path)
        finally:
            holder.kill()
    assert (tmp_path / ".janus-lock").exists()
    open_log(tmp_path).close()
    assert not (tmp_path / ".janus-lock").exists()


def test_the_lock_is_released_where_opening_fails_and_where_the_run_does(tmp_path):
    open_log(tmp_path).close()
    with pytest.raises(ValueError, match="other settings"):
        open_log(tmp_path, {"alpha": 1})
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path):
        raise KeyboardInterrupt
    lock_directory(tmp_path).close()


def test_where_the_system_has_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    open_log(tmp_path).close()
    monkeypatch.setattr(files, "fcntl", None)
    open_log(tmp_path).close()


def test_a_run_record_says_what_pandas_or_anybody_needs(tmp_path):
    with open_log(tmp_path) as log:
        log.run["batch_sizes"] = [[0, 4]]
        log.save()
    assert json.loads((tmp_path / "run.json").read_text())["batch_sizes"] == [[0, 4]]
    with open_log(tmp_path) as log:
        assert log.run["batch_sizes"] == [[0, 4]]
