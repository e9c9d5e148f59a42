"""Write the generated pages of docs/, or with `--check` fail when one is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ulysses_infer.config import schema_reference

ROOT = Path(__file__).resolve().parents[1]

RECIPE_REFERENCE = """# Recipe reference

<!-- Generated from ulysses_infer/config/schema.py by docs/generate/make_docs.py; do not edit. -->

Every key of a recipe, by section. A recipe is a YAML file; `include: [other.yaml]` puts the keys of other
files, relative to it, before its own. The command line wins over the recipe, the recipe over defaults; any
key can be set there as `section.key=value`, as in `parallel.sp=4`. `ulysses_infer.init_inference` takes the
same keys, nested (`parallel={{"sp": 4}}`) or dotted. A literal `${{` in a text is written `\\${{`.

{sections}"""


def generated_pages() -> dict[Path, str]:
    """The text of every generated page, by path."""
    return {ROOT / "docs" / "recipe-reference.md": RECIPE_REFERENCE.format(sections=schema_reference())}


def is_current(path: Path, text: str) -> bool:
    """Whether `path` holds `text` already."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> int:
    """Write the pages, or check them; the exit status is 1 when one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in generated_pages().items() if not is_current(path, text)}
    for path, text in stale.items():
        if check:
            print(
                f"error: {path.relative_to(ROOT)} is out of date; run: python docs/generate/make_docs.py",
                file=sys.stderr,
            )
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
