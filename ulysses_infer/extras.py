"""Optional dependencies: one line with the pip command instead of a ModuleNotFoundError."""

from __future__ import annotations

import importlib.util

from ulysses_infer.errors import ConfigError

MODULES = {
    "serve": ("fastapi", "uvicorn", "uvloop", "httptools", "msgspec", "prometheus_client", "regex"),
    "bench": ("httptools", "matplotlib"),
    "gguf": ("gguf",),
    "trl": ("trl", "httpx"),
    "ray": ("ray", "aiohttp", "opencensus"),
}
"""The modules of each extra that its commands require."""


def require_extra(purpose: str, extra: str, *modules: str) -> None:
    """Raise `ConfigError` if a module of an extra is not installed. modules: those needed; default: all."""
    missing = [name for name in modules or MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'{purpose} needs {", ".join(missing)}; install: pip install "ulysses_infer[{extra}]"')
