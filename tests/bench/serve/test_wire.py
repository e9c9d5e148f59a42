"""Responses and events, however the network cuts them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.bench.serve.wire import EventReader, ResponseReader, WireError

pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
cuts = st.lists(st.integers(0, 600), max_size=12)
HEAD = b"HTTP/1.1 200 OK\r\nServer: x\r\n"


def cut_up(data: bytes, where: list[int]) -> list[bytes]:
    places = sorted({min(place, len(data)) for place in where} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


@given(pieces, cuts, st.booleans())
def test_chunked_body_is_the_same_however_it_is_cut(chunks: list[bytes], where: list[int], has_trailer: bool) -> None:
    body = b"".join(f"{len(chunk):X};a=b\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    end = b"0\r\nX-Sum: 1\r\n\r\n" if has_trailer else b"0\r\n\r\n"
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + end

    reader = ResponseReader()
    got = b"".join(reader.feed(part) for part in cut_up(data, where))

    assert got == b"".join(chunks)
    assert reader.is_complete
    assert reader.keeps_connection
    assert reader.headers == {"server": "x", "transfer-encoding": "chunked"}


@given(st.binary(max_size=80), cuts)
def test_body_of_known_length_is_the_same_however_it_is_cut(body: bytes, where: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body

    reader = ResponseReader()
    got = b"".join(reader.feed(part) for part in cut_up(data, where))

    assert (got, reader.status, reader.is_complete) == (body, 200, True)


def test_body_without_a_length_ends_with_the_connection() -> None:
    reader = ResponseReader()

    assert reader.feed(HEAD + b"\r\nabc") == b"abc"
    assert not reader.is_complete
    reader.end()
    assert reader.is_complete
    assert not reader.keeps_connection


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "before any answer"),
        (HEAD, "before any answer"),
        (HEAD + b"content-length: 5\r\n\r\nabc", "in the middle"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "in the middle"),
    ],
)
def test_response_that_is_cut_off_is_an_error(data: bytes, words: str) -> None:
    reader = ResponseReader()
    reader.feed(data)

    with pytest.raises(WireError, match=words):
        reader.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 hello\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
    ],
)
def test_what_is_not_http_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        ResponseReader().feed(data)


@pytest.mark.parametrize("rest", [b"bc", HEAD + b"content-length: 1\r\n\r\nb"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_connection_with_more_than_the_answer_is_not_used_again(rest: bytes, is_cut: bool) -> None:
    reader = ResponseReader()
    answer = HEAD + b"content-length: 1\r\n\r\na"
    body = b"".join(reader.feed(part) for part in ([answer, rest] if is_cut else [answer + rest]))

    assert body == b"a"
    assert reader.has_rest
    assert not reader.keeps_connection


@given(cuts)
def test_informational_responses_are_skipped(where: list[int]) -> None:
    hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    reader = ResponseReader()

    assert reader.feed(hints) == b""
    assert (reader.status, reader.is_complete) == (0, False)

    got = b"".join(reader.feed(part) for part in cut_up(hints + HEAD + b"content-length: 3\r\n\r\nabc", where))

    assert (got, reader.status, reader.is_complete, reader.keeps_connection) == (b"abc", 200, True, True)
    assert reader.headers == {"server": "x", "content-length": "3"}


def test_connection_closed_after_an_informational_response_is_an_error() -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    with pytest.raises(WireError, match="before any answer"):
        reader.end()


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (HEAD, True),
        (HEAD + b"Connection: Close\r\n", False),
        (b"HTTP/1.0 200 OK\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", True),
    ],
)
def test_connection_is_kept_unless_the_server_closes_it(head: bytes, keeps: bool) -> None:
    reader = ResponseReader()
    reader.feed(head + b"content-length: 1\r\n\r\na")

    assert reader.is_complete
    assert reader.keeps_connection == keeps


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_response_without_a_body_ends_with_its_head(status: bytes) -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 " + status + b"\r\n\r\n")

    assert reader.is_complete
    assert reader.keeps_connection


lines = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(lines, max_size=6), st.sampled_from([b"\n", b"\r\n"]), cuts)
def test_events_are_the_same_however_they_are_cut(texts: list[str], newline: bytes, where: list[int]) -> None:
    data = b"".join(b"data: " + text.encode() + newline * 2 for text in texts)

    reader = EventReader()
    got = [event for part in cut_up(data, where) for event in reader.feed(part)]

    assert got == [text.encode() for text in texts]
    assert reader.is_clean


def test_comments_and_other_fields_are_left_out_and_lines_of_data_joined() -> None:
    data = b": ping\n\nevent: message\nid: 7\ndata: one\ndata:two\n\n"

    assert EventReader().feed(data) == [b"one\ntwo"]
