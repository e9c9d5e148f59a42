"""Replicas on Ray Serve: `serve.run(build_app(recipe))`. Needs the extra `ray`."""

from ulysses_infer.ray.application import build_app

__all__ = ["build_app"]
