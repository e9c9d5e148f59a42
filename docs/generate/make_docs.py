"""Write the generated pages of docs/, or with `--check` fail if one is out of date."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ulysses_infer.config import schema_reference

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ulysses_infer"

RECIPE_REFERENCE = """# Recipe reference

<!-- Generated from ulysses_infer/config/schema.py by docs/generate/make_docs.py; do not edit. -->

All keys of a recipe, by section. A recipe is a YAML file. `include: [other.yaml]` reads other files first, by paths
relative to the recipe; the recipe's own keys override theirs. The command line overrides the recipe and accepts any key
as `section.key=value`, for example `parallel.sp=4`. `ulysses_infer.init_inference` takes the same keys, nested
(`parallel={{"sp": 4}}`) or dotted. A literal `${{` in a string is written `\\${{`.

{sections}"""

MODULE_MAP = """# Module map

<!-- Generated from the first sentence of every file by docs/generate/make_docs.py; do not edit. -->

All folders and files of `ulysses_infer/`, with the first sentence of each file. [architecture.md](architecture.md)
describes the order of the folders and the design.

{folders}"""


def generated_pages() -> dict[Path, str]:
    """The text of each generated page, by path."""
    docs = ROOT / "docs"
    return {
        docs / "recipe-reference.md": RECIPE_REFERENCE.format(sections=schema_reference()),
        docs / "module-map.md": MODULE_MAP.format(folders="\n".join(folder_sections())),
    }


def folder_sections() -> Iterator[str]:
    """One section per folder of the package, in alphabetical order, with one line per file."""
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]
    for folder in folders:
        name = folder.relative_to(PACKAGE.parent)
        files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".c", ".h"))
        lines = [f"- `{path.name}`: {first_sentence(path)}" for path in files if path.name != "__init__.py"]
        yield "\n".join([f"## {name}/", "", first_sentence(folder / "__init__.py"), "", *lines, ""])


def first_sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, or of its opening comment in C, on one line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        described = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"\s*/\*(.*?)\*/", text, re.DOTALL)
        described = re.sub(r"^ \*", "", comment[1], flags=re.MULTILINE) if comment else ""
    return " ".join(described.strip().split("\n\n")[0].split())


def is_current(path: Path, text: str) -> bool:
    """Whether `path` already contains `text`."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> int:
    """Write the pages, or check them; the exit status is 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in generated_pages().items() if not is_current(path, text)}
    for path, text in stale.items():
        if check:
            print(
                f"error: {path.relative_to(ROOT)} is out of date; run: python -m docs.generate.make_docs",
                file=sys.stderr,
            )
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
