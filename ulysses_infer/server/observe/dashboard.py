"""The dashboard: one self-contained page made from the files in `page/`."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

STYLE_MARK, SCRIPT_MARK = "/* style */", "/* script */"
SCRIPTS = ("drawing.js", "band.js", "charts.js", "numbers.js", "admin.js", "main.js")


def _read(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


class Dashboard:
    """The page and the headers to send with it."""

    def __init__(self) -> None:
        style = "\n" + _read("dashboard.css")
        script = '\n"use strict";\n' + "\n".join(_read(name) for name in SCRIPTS)
        self.page = _read("dashboard.html").replace(STYLE_MARK, style).replace(SCRIPT_MARK, script)
        self.headers = {
            "Content-Security-Policy": _policy(style, script),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }


def _policy(style: str, script: str) -> str:
    """Allows only the page's own style and script, and connections to its own server."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
