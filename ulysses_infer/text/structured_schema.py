"""JSON schemas as the grammar library is to compile them.

The library differs from the specification: it computes bounds in doubles, refuses annotations and does not resolve
references in `oneOf`. `prepare_schema` rewrites a schema so that all outputs obey it, or refuses it with the name of
the keyword. No rewrite admits a value that the schema excludes. Only `uniqueItems` is not enforced; a warning says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from ulysses_infer.errors import RequestError
from ulysses_infer.text.structured_options import disjoint_options
from ulysses_infer.text.structured_references import resolve, targets

Schema = dict[str, Any]
MAX_MULTIPLE_OF = 10_000  # the automaton has this many states: 1,000,000 take 6 s
MAX_LENGTH = 100_000  # minimum length that an output may be required to have
EXACT = 2**53  # above, doubles skip integers
MAX_INTEGER = 2**63
SMALLEST = 1e-17  # stands for the least number above 0, whose 324 decimals are too many for the library
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLES = ("items", "additionalItems", "additionalProperties")
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf")
# What the library enforces; the specification makes every other format an annotation.
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Look-around is not supported; pydantic writes this one for Decimal.
EQUIVALENT_PATTERNS = {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$"}
CLASS_OPERATORS = ("&&", "--", "~~")  # set operations in the library's dialect, plain characters in the specification's

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def prepare_schema(schema: Schema) -> Schema:
    """`schema`, changed for the library. Raises RequestError that names the keyword."""
    parts = list(_parts(schema))
    _check_multiples(parts)
    for part in parts:
        for keyword in _REWRITES:
            if keyword in part:
                _REWRITES[keyword](part, schema)
    return schema


def refuse(keyword: str, why: str) -> RequestError:
    """The error for a keyword that cannot be obeyed."""
    return RequestError(f"structured_outputs.json: {keyword} {why}")


def _parts(schema: Schema) -> Iterator[Schema]:
    """All subschemas that are objects, and those that references point to."""
    waiting: list[Any] = [schema]
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        waiting += _children(part)
        if "$ref" in part:
            waiting += targets(part["$ref"], schema)
        yield part


def _children(part: Schema) -> Iterator[Any]:
    for name in MAPS:
        if isinstance(part.get(name), dict):
            yield from part[name].values()
    for name in LISTS:
        if isinstance(part.get(name), list):
            yield from part[name]
    for name in SINGLES:
        yield part.get(name)


# --- numbers ---


def _number(part: Schema, keyword: str) -> int | float:
    value = part[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(keyword, f"is {str(value)[:40]!r}; use a number")
    return value


def _integers_only(part: Schema) -> bool:
    types = part.get("type")
    types = types if isinstance(types, list) else [types]
    return "integer" in types and "number" not in types


def _bound(keyword: str) -> Callable[[Schema, Schema], None]:
    def rewrite(part: Schema, _: Schema) -> None:
        if isinstance(part[keyword], bool):
            return  # of draft 4, which the library reads
        value = _number(part, keyword)
        if abs(value) < EXACT or (abs(value) == EXACT and not keyword.startswith("exclusive")):
            part[keyword] = value
        elif not _integers_only(part) or not float(value).is_integer() or abs(value) > MAX_INTEGER:
            raise refuse(keyword, f"is {str(value)[:40]}; use numbers between -2**53 and 2**53, or 2**63 for integers")
        else:
            del part[keyword]
            _tighten(part, keyword, int(value))

    return rewrite


def _strict(keyword: str) -> Callable[[Schema, Schema], None]:
    """An exclusive bound. The library admits a whole number itself if the other bound has the same integer part, so the
    bound becomes the next double."""
    general = _bound(keyword)

    def rewrite(part: Schema, root: Schema) -> None:
        general(part, root)
        value = part.get(keyword)
        if isinstance(value, bool) or value is None or value != int(value) or _integers_only(part):
            return
        lower = keyword == "exclusiveMinimum"
        names = ("maximum", "exclusiveMaximum") if lower else ("minimum", "exclusiveMinimum")
        others = [part[name] for name in names if isinstance(part.get(name), int | float)]
        if any(int(other) == int(value) and other != value for other in others):
            step = math.inf if lower else -math.inf
            nearest = math.nextafter(value, step) if value else math.copysign(SMALLEST, step)
            del part[keyword]
            name = "minimum" if lower else "maximum"
            part[name] = max(part.get(name, nearest), nearest) if lower else min(part.get(name, nearest), nearest)

    return rewrite


def _tighten(part: Schema, keyword: str, value: int) -> None:
    """Set an inclusive bound on integers to the nearest double inside the range of 64 bits."""
    lower = keyword in ("minimum", "exclusiveMinimum")
    if keyword.startswith("exclusive"):
        value += 1 if lower else -1
    nearest = int(float(value))
    if (nearest < value) if lower else (nearest > value):
        nearest = int(math.nextafter(float(value), math.inf if lower else -math.inf))
    if not lower and value == MAX_INTEGER - 1:
        nearest = value  # the library's conversion from doubles saturates here
    if lower and nearest == -MAX_INTEGER:
        nearest = int(math.nextafter(float(nearest), 0))
    if nearest not in (value, int(float(nearest))) or abs(nearest) >= MAX_INTEGER:
        raise refuse(keyword, f"is {value}; use at most 2**63 - 1")
    name = "minimum" if lower else "maximum"
    given = part.get(name, nearest)
    part[name] = max(given, nearest) if lower else min(given, nearest)


def _places(value: int | float) -> int:
    """Decimal places."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _check_multiples(parts: list[Schema]) -> None:
    values = {_number(part, "multipleOf") for part in parts if "multipleOf" in part}
    for value in values:
        if value <= 0 or Decimal(repr(value)).scaleb(_places(value)) > MAX_MULTIPLE_OF:
            raise refuse("multipleOf", f"is {str(value)[:40]}; use at most {MAX_MULTIPLE_OF}, without decimal places")
    if len(values) > 1 and any(map(_intersects, parts)):
        places = max(map(_places, values))
        common = math.lcm(*(int(Decimal(repr(value)).scaleb(places)) for value in values))
        if common > MAX_MULTIPLE_OF:
            raise refuse("multipleOf", f"may be combined to {common}; use at most {MAX_MULTIPLE_OF}")


def _intersects(part: Schema) -> bool:
    """Whether the library multiplies the constraints of several schemas here."""
    combined = part.get("allOf")
    used = sum(name in part for name in (*IN_PLACE, "multipleOf"))
    return used > 1 or (isinstance(combined, list) and len(combined) > 1)


def _is_double(value: int) -> bool:
    return abs(value) < MAX_INTEGER and int(float(value)) == value


def _value(keyword: str) -> Callable[[Schema, Schema], None]:
    """`const` and `enum`: numbers in them must be exact in the library's doubles."""

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: exact(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [exact(inner) for inner in value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        is_exact = abs(value) <= EXACT or (isinstance(value, int) and _is_double(value))
        if not is_exact:
            raise refuse(keyword, f"has {str(value)[:40]}; use numbers between -2**53 and 2**53")
        return int(value) if value == int(value) else value

    def rewrite(part: Schema, _: Schema) -> None:
        part[keyword] = exact(part[keyword])

    return rewrite


# --- sizes ---


def _count(keyword: str) -> Callable[[Schema, Schema], None]:
    def rewrite(part: Schema, _: Schema) -> None:
        value = _number(part, keyword)
        if value < 0 or value != int(value):
            raise refuse(keyword, f"is {value}; use a whole number from 0")
        part[keyword] = int(value)
        if value <= MAX_LENGTH:
            return
        if keyword.startswith("min"):
            raise refuse(keyword, f"is {str(value)[:40]}; use at most {MAX_LENGTH}")
        if value >= 2**31:
            del part[keyword]  # no output is as long

    return rewrite


def _min_properties(part: Schema, root: Schema) -> None:
    _count("minProperties")(part, root)
    required = part.get("required")
    missing = part["minProperties"] - len(set(required) if isinstance(required, list) else ())
    if missing > 1:
        raise refuse("minProperties", "above 1 cannot be enforced: a key may be written twice; use required")
    if missing <= 0:
        del part["minProperties"]


# --- texts, arrays and objects ---


def _format(part: Schema, _: Schema) -> None:
    if part["format"] not in FORMATS:
        del part["format"]


def _pattern(part: Schema, _: Schema) -> None:
    pattern = part["pattern"]
    if isinstance(pattern, str):
        part["pattern"] = EQUIVALENT_PATTERNS.get(pattern, pattern)
        _check_classes("pattern", pattern)


def _pattern_properties(part: Schema, _: Schema) -> None:
    for pattern in part["patternProperties"] if isinstance(part["patternProperties"], dict) else ():
        _check_classes("patternProperties", pattern)


def _check_classes(keyword: str, pattern: str) -> None:
    """Refuse set operations in character classes."""
    inside = False
    position = 0
    while position < len(pattern):
        if pattern[position] == "\\":
            position += 2
            continue
        if inside and pattern[position : position + 2] in CLASS_OPERATORS:
            raise refuse(keyword, f"has {pattern[position : position + 2]!r} in a class; escape one character")
        inside = pattern[position] != "]" if inside else pattern[position] == "["
        position += 1


def _unique_items(part: Schema, _: Schema) -> None:
    if part.pop("uniqueItems") is True and part.get("maxItems", 2) > 1:
        _warn_once("structured outputs do not enforce uniqueItems; check the items of such arrays")


def _additional_items(part: Schema, _: Schema) -> None:
    if not isinstance(part.get("items"), list):
        del part["additionalItems"]  # has no effect then, but would hide prefixItems from the library


def _property_names(part: Schema, root: Schema) -> None:
    """Names of a map become a pattern or properties, if the map has no others."""
    names = resolve(part["propertyNames"], root)
    if names is True or names == {}:
        del part["propertyNames"]
        return
    if not isinstance(names, dict) or any(part.get(name) for name in ("properties", "patternProperties", "required")):
        raise refuse("propertyNames", "is not supported beside properties; use one of them")
    value = part.get("additionalProperties", True)
    fixed = [names["const"]] if "const" in names else names.get("enum")
    rest = set(names) - {"title", "description", "type", "const", "enum", "minLength", "maxLength", "pattern"}
    if rest or names.get("type", "string") != "string":
        raise refuse("propertyNames", f"has {', '.join(sorted(rest)) or 'another type'}; use enum, pattern or lengths")
    del part["propertyNames"]
    part["additionalProperties"] = False
    if fixed is not None and not {"minLength", "maxLength", "pattern"} & set(names):
        part["properties"] = {name: value for name in fixed if isinstance(name, str)}
    elif fixed is None and not ("pattern" in names and {"minLength", "maxLength"} & set(names)):
        lengths = f"{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}"
        part["patternProperties"] = {names.get("pattern", rf"^[\s\S]{lengths}$"): value}
    else:
        raise refuse("propertyNames", "combines enum, pattern and lengths; use one of them")


def _unevaluated(keyword: str, same: str) -> Callable[[Schema, Schema], None]:
    """`unevaluatedX` equals `additionalX` where no other schema applies to the same value."""

    def rewrite(part: Schema, _: Schema) -> None:
        if part[keyword] is True:
            del part[keyword]
        elif same in part and not isinstance(part[same], list):
            del part[keyword]  # everything is evaluated
        elif not any(name in part for name in (*IN_PLACE, "if", "dependentSchemas", "contains", "$dynamicRef")):
            part[same] = part.pop(keyword)

    return rewrite


def _without_effect(keyword: str, *needs: str) -> Callable[[Schema, Schema], None]:
    """A keyword that means nothing without one of `needs`."""

    def rewrite(part: Schema, _: Schema) -> None:
        if not any(name in part for name in needs):
            del part[keyword]

    return rewrite


def _one_of(part: Schema, root: Schema) -> None:
    """`oneOf` whose options exclude each other is `anyOf`."""
    options = disjoint_options(part, root)
    if options is not None:
        _replace(part, "oneOf", "anyOf" if "anyOf" not in part else "allOf", options)


def _replace(part: Schema, old: str, new: str, options: list[Any]) -> None:
    if new == "allOf":
        options = [*part.pop("allOf", []), {"anyOf": options}]
    entries = [(new, options) if key == old else (key, value) for key, value in part.items()]
    part.clear()
    part.update(entries)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


_REWRITES: Mapping[str, Callable[[Schema, Schema], None]] = {
    **{name: _bound(name) for name in ("minimum", "maximum")},
    **{name: _strict(name) for name in ("exclusiveMinimum", "exclusiveMaximum")},
    **{name: _value(name) for name in ("const", "enum")},
    **{name: _count(name) for name in ("minLength", "maxLength", "minItems", "maxItems", "maxProperties")},
    "minProperties": _min_properties,
    "format": _format,
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "uniqueItems": _unique_items,
    "additionalItems": _additional_items,
    "unevaluatedProperties": _unevaluated("unevaluatedProperties", "additionalProperties"),
    "unevaluatedItems": _unevaluated("unevaluatedItems", "items"),
    "propertyNames": _property_names,
    "if": _without_effect("if", "then", "else"),
    **{name: _without_effect(name, "if") for name in ("then", "else")},
    **{name: _without_effect(name, "contains") for name in ("minContains", "maxContains")},
    "oneOf": _one_of,
}
