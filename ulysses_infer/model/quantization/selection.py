"""Which linear layers a checkpoint's name patterns select."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

Selection = Callable[[str], bool]  # predicate on a module's full name


def everything(name: str) -> bool:
    """Every linear layer."""
    return True


def nothing(name: str) -> bool:
    """No linear layer."""
    return False


def either(first: Selection, second: Selection) -> Selection:
    """What either of two selections contains."""
    return lambda name: first(name) or second(name)


def not_converted(patterns: Sequence[str]) -> Selection:
    """transformers' `modules_to_not_convert`: a prefix or suffix of the name, or a regular expression."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return lambda name: not should_convert_module(name, list(patterns))


def targeted(targets: Sequence[str]) -> Selection:
    """compressed-tensors' `targets` and `ignore`: a class (`Linear` means all), a full name, or `re:` and an
    expression."""
    expressions = [re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")]
    names = {target for target in targets if not target.startswith("re:")}

    def matches(name: str) -> bool:
        return "Linear" in names or name in names or any(expression.match(name) for expression in expressions)

    return matches


def globbed(patterns: Sequence[str]) -> Selection:
    """modelopt's `ignore`: names with wildcards, of the layer or of a module that contains it."""

    def matches(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns)

    return matches
