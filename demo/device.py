"""The model, the one thread that runs it, and work that tells of itself while it runs and stops when it is told to."""

import argparse
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
from threading import Event
from typing import Any

from janus.dola.loading import load_pretrained_model
from janus.dola.text_encoder import find_text_encoder

KEPT_FOLDERS = 30
"""Of the runs that were painted: older ones are deleted."""

Emit = Callable[..., None]
"""Work calls it with what it has so far, and with nothing where it has nothing new; it raises Stopped in time."""


class Stopped(Exception):
    """Somebody stopped the work, or went away."""


class Device:
    """A loaded checkpoint. Everything that runs it runs in one thread, one piece of work after the other.

    folder: where the page's files go, a directory of its own.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.thread = ThreadPoolExecutor(max_workers=1)  # CUDA's current device and captured graphs are a thread's own
        self.works: dict[str, tuple[Event, Future]] = {}
        load = self.thread.submit(
            load_pretrained_model, args.model, args.dtype, args.device, args.quantize, args.offload
        )
        self.model: Any
        self.tokenizer, self.processor, self.model = load.result()
        self.num_layers = len(self.model.language_model.model.layers)

    @cached_property
    def text_encoder(self) -> tuple[Any, Any]:
        """The paired SigLIP and its tokenizer. Raises ValueError where the checkpoint has none."""
        return find_text_encoder(self.args.model, None)

    def new_folder(self) -> Path:
        """An empty directory for one run; of those before it the newest stay."""
        parent = self.folder / "painted"
        parent.mkdir(exist_ok=True)
        for old in sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime)[: 1 - KEPT_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
        return Path(mkdtemp(dir=parent))

    def stream(self, session: str, work: Callable[[Emit], None]) -> Iterator[Any]:
        """What `work(emit)` emits in the model's thread, until it ends; whoever leaves early stops it.

        Raises what the work raises, and Stopped after `stop(session)`.
        """
        stop, emitted, end = Event(), SimpleQueue(), object()

        def emit(*items: Any) -> None:
            if stop.is_set():
                raise Stopped
            for item in items:
                emitted.put(item)

        future = self.thread.submit(work, emit)
        self.works[session] = stop, future
        future.add_done_callback(lambda _: emitted.put(end))
        try:
            while (item := emitted.get()) is not end:
                yield item
            future.result()
        finally:
            stop.set()
            wait([future])
            if self.works.get(session, (None,))[0] is stop:
                del self.works[session]

    def stop(self, session: str) -> None:
        """Stop the session's work at its next token, and wait until it has ended; without any, do nothing."""
        if work := self.works.get(session):
            stop, future = work
            stop.set()
            wait([future])

    def close(self) -> None:
        """Stop all work, for good."""
        for stop, _ in list(self.works.values()):
            stop.set()
        self.thread.shutdown(cancel_futures=True)
