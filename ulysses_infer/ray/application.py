"""The Ray Serve application of a recipe: an ingress, and replicas of the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ulysses_infer.config import Config, load_config
from ulysses_infer.extras import require_extra


def build_app(recipe: str | os.PathLike[str] | Mapping[str, Any] | Config) -> Any:
    """The application for `serve.run`, or for `import_path: ulysses_infer.ray:build_app` of a Serve config, whose
    `args` are then the recipe.

    recipe: path of a recipe, a mapping with its keys, or a `Config`. Raises `ConfigError`.
    """
    require_extra("Ray Serve", "ray")
    from ulysses_infer.ray.deployments import bind
    from ulysses_infer.ray.recipe import prepared

    return bind(prepared(load_config(recipe)))
