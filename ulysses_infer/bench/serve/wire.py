"""Incremental parsers for HTTP/1.1 responses and server-sent events.

The client shares its cores with the server under test, so each token must cost little: httptools parses in C, and
events take a few slices.
"""

from __future__ import annotations

from ulysses_infer.extras import require_extra

require_extra("the load generator", "bench", "httptools")
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser  # noqa: E402


class WireError(Exception):
    """The server's response is not HTTP, or ended too early."""


class ResponseReader:
    """Parses one response incrementally and returns its body. Skips informational responses (1xx) before it.

    Raises `WireError` for anything but HTTP/1.x.
    """

    def __init__(self) -> None:
        self.status = 0
        """0 until the head is complete."""
        self.headers: dict[str, str] = {}
        """By lower-case name; the last one if repeated. Without trailers."""
        self.is_complete = False
        self.has_rest = False
        """Whether bytes followed the end of the response; there should be none."""
        self._parser = HttpResponseParser(self)
        self._is_persistent = False
        self._body: list[bytes] = []

    @property
    def keeps_connection(self) -> bool:
        """Whether the connection can be reused."""
        return self.is_complete and self._is_persistent and not self.has_rest

    def feed(self, data: bytes) -> bytes:
        """Parse new data; returns the body bytes in it."""
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.is_complete:
                raise WireError(f"the answer is not HTTP/1.1: {error}: {data[:40]!r}") from error
            self.has_rest = True
        body, self._body = b"".join(self._body), []
        return body

    def end(self) -> None:
        """The connection was closed. Raises `WireError` unless that ends this response."""
        is_chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        if self.status and not is_chunked and "content-length" not in self.headers:
            self.is_complete = True
        if not self.is_complete:
            raise WireError("the connection was closed in the middle of the answer" if self.status else CLOSED)

    def on_message_begin(self) -> None:
        """Of httptools, as the following."""
        if self.is_complete:
            raise WireError("a second response")  # `feed` gets it as an HttpParserError

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body."""
        if not self.status:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        """The head of an informational response is dropped."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers.clear()
        else:
            self.status = status
            self._is_persistent = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """The end of this response or of an informational one."""
        self.is_complete = self.status != 0


CLOSED = "the connection was closed before any answer"


class EventReader:
    """Parses server-sent events incrementally and returns the data of complete events."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def is_clean(self) -> bool:
        """Whether no event is incomplete."""
        return not self._buffer.strip()

    def feed(self, body: bytes) -> list[bytes]:
        """Parse a piece of the body."""
        self._buffer += body
        if b"\r" in self._buffer:
            self._buffer = _newlines(self._buffer)
        *events, self._buffer = self._buffer.split(b"\n\n")
        return [data for event in events if (data := _data_of(event)) is not None]


def _newlines(text: bytes) -> bytes:
    """Normalise line ends; a carriage return at the very end may be half of one."""
    is_half = text.endswith(b"\r")
    whole = text[:-1] if is_half else text
    return whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * is_half


def _data_of(event: bytes) -> bytes | None:
    """The data of one event; None for a comment."""
    if b"\n" not in event and event.startswith(b"data: "):
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
