"""Message framing on a byte stream: a four-byte length, then MessagePack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

LENGTH_BYTES = 4
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytes:
    """One message as bytes on the stream."""
    payload = _encoder.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "little") + payload


class FrameReader(Generic[T]):
    """Collects bytes and returns complete messages. kind: the union of their types."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Add `data`; yields every message that is now complete."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "little")
            end = start + LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            yield self._decoder.decode(memoryview(self._buffer)[start + LENGTH_BYTES : end].tobytes())
            start = end
        del self._buffer[:start]
