"""The server as a process: a socket, and an end in good order after a signal."""

import os
import signal
import socket
from types import FrameType

import uvicorn

from performer_lm.serving.app import build_app
from performer_lm.serving.scheduler import Scheduler
from performer_lm.serving.wire import Reader

LINGER = 5  # seconds for answers to be sent after the last token is made


class Server(uvicorn.Server):
    """Serves a model on a socket, until a signal; then `run` returns once all answers are sent.

    After a signal new requests are refused (503) and running answers are ended; a second signal breaks them off.
    """

    def __init__(self, scheduler: Scheduler, reader: Reader, *, max_body_bytes: int) -> None:
        app = build_app(scheduler, reader, max_body_bytes=max_body_bytes)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=LINGER,
            )
        )
        self.scheduler = scheduler
        self.signal: signal.Signals | None = None  # the one that ended it

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end."""
        self.scheduler.start()
        try:
            super().run(sockets)
        finally:
            self.scheduler.close(at_once=True)
            self.scheduler.join()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in good order at the first signal, at once at the second."""
        is_second, self.signal = self.signal is not None, signal.Signals(sig)
        if not is_second:  # not by print: the stream may be at work where the signal came
            os.write(2, b"closing: answers that are being made are ended; Ctrl-C again breaks them off\n")
        self.scheduler.close(self.end, at_once=is_second)

    def end(self) -> None:
        """Stop serving."""
        self.should_exit = True


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes any that is free.

    Raises:
        ValueError: where that is not possible, in one line.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        is_of_system = error.errno is not None and error.errno > 0  # not of the look-up of a name
        reason = os.strerror(error.errno or 0) if is_of_system else error.strerror or str(error)
        raise ValueError(f"host={host} port={port}: {reason.lower()}; port=0 takes any that is free") from error
