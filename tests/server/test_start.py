"""Invalid server settings are reported before the model is loaded."""

import socket

import pytest

from ulysses_infer.config import ServerConfig
from ulysses_infer.errors import ConfigError
from ulysses_infer.server.process import bind, check, url_of


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ssl_certfile": "/nowhere.pem"}, "server.ssl_certfile = /nowhere.pem and server.ssl_keyfile = None"),
        ({"ssl_certfile": __file__, "ssl_keyfile": __file__}, "give a certificate and its key, both PEM"),
        ({"ssl_keyfile": __file__}, "server.ssl_certfile = None"),
        ({"chat_template": "/nowhere.jinja"}, "server.chat_template '/nowhere.jinja' cannot be read"),
        ({"tool_call_parser": "hermess"}, "did you mean 'hermes'"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings, words):
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as caught:
        check(ServerConfig(**settings))
    assert words in str(caught.value)


def test_settings_that_work_pass():
    check(ServerConfig(tool_call_parser="hermes", chat_template=__file__))


def test_a_port_that_is_taken_is_named():
    with bind(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"server.port = {port}: Address already in use; choose another"):
            bind(ServerConfig(port=port))
    bind(ServerConfig(port=port)).close()


def test_the_url_shows_the_port_that_was_found():
    with bind(ServerConfig(port=0)) as listener:
        assert url_of(listener, ServerConfig()) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert url_of(listener, ServerConfig(ssl_certfile="c", ssl_keyfile="k")).startswith("https://127.0.0.1:")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_written_as_browsers_want_it():
    try:
        listener = bind(ServerConfig(host="::1", port=0))
    except ConfigError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert url_of(listener, ServerConfig()) == f"http://[::1]:{listener.getsockname()[1]}"
