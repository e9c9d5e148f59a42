"""Incremental parsers for HTTP/1.1 responses and server-sent events.

Own parsers because the client shares its cores with the server under test: per token they cost a few slices.
"""

from __future__ import annotations

MAX_HEAD_BYTES = 65536
NO_BODY = (204, 304)


class WireError(Exception):
    """The server's response is not HTTP, or ended too early."""


class ResponseReader:
    """Parses one response incrementally and returns its body.

    Raises `WireError` for anything but HTTP/1.x.
    """

    def __init__(self) -> None:
        self.status = 0
        """0 until the head is complete."""
        self.headers: dict[str, str] = {}
        """By lower-case name; the last one if repeated."""
        self.is_complete = False
        self.rest = b""
        """Bytes after the end of the response; there should be none."""
        self._buffer = b""
        self._read = self._read_head
        self._left = 0  # bytes left of a body of known length, or of the current chunk
        self._body: list[bytes] = []

    @property
    def keeps_connection(self) -> bool:
        """Whether the connection can be reused."""
        return self.is_complete and not self.rest and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """Parse new data; returns the body bytes in it."""
        self._buffer = self._buffer + data if self._buffer else data
        while not self.is_complete and self._buffer and self._read():
            pass
        if self.is_complete:
            self.rest, self._buffer = self.rest + self._buffer, b""
        body, self._body = b"".join(self._body), []
        return body

    def end(self) -> None:
        """The connection was closed. Raises `WireError` unless that ends this response."""
        if self._read == self._read_until_close:
            self.is_complete = True
            self.headers["connection"] = "close"
        if not self.is_complete:
            raise WireError("the connection was closed in the middle of the answer" if self.status else CLOSED)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES or not b"HTTP/1.".startswith(self._buffer[:7]):
                raise WireError(f"the answer is not HTTP/1.1: {self._buffer[:40]!r}")
            return False
        head, self._buffer = self._buffer[:end].decode("latin-1"), self._buffer[end + 4 :]
        status_line, *lines = head.split("\r\n")
        version, _, status = status_line.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise WireError(f"the answer is not HTTP/1.1: {status_line[:40]!r}")
        if status[:3] == "100":
            return True  # "100 Continue": the actual response follows
        self.status = int(status[:3])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._choose_body()
        return True

    def _choose_body(self) -> None:
        length = self.headers.get("content-length")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._read = self._read_chunk_size
        elif length is not None and length.isdigit():
            self._left, self._read = int(length), self._read_known_length
            self.is_complete = self._left == 0
        elif self.status in NO_BODY:
            self.is_complete = True
        else:
            self._read = self._read_until_close

    def _read_until_close(self) -> bool:
        self._body.append(self._buffer)
        self._buffer = b""
        return False

    def _read_known_length(self) -> bool:
        self._take(self._left)
        self.is_complete = self._left == 0
        return False

    def _read_chunk_size(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        try:
            self._left = int(self._buffer[:end].partition(b";")[0], 16)
        except ValueError as error:
            raise WireError(f"a chunk of the answer has no size: {self._buffer[:40]!r}") from error
        self._buffer = self._buffer[end + 2 :]
        self._read = self._read_chunk if self._left else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        self._take(self._left)
        if self._left == 0:
            self._read = self._read_chunk_end
        return self._left == 0

    def _read_chunk_end(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise WireError(f"a chunk of the answer is longer than it says: {self._buffer[:40]!r}")
        self._buffer = self._buffer[2:]
        self._read = self._read_chunk_size
        return True

    def _read_trailer(self) -> bool:
        """Trailing headers up to an empty line; they are ignored."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        self.is_complete = end == 0
        self._buffer = self._buffer[end + 2 :]
        return not self.is_complete

    def _take(self, count: int) -> None:
        piece, self._buffer = self._buffer[:count], self._buffer[count:]
        self._left -= len(piece)
        self._body.append(piece)


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
