"""Build the documentation site, with the pages as Markdown and llms.txt beside them; a broken link is an error.

    python .ci/site.py      # zensical.toml and docs/ -> site/

Runs in an environment of its own: see the target `docs` of the Makefile.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import griffe

ROOT = Path(__file__).parent.parent
DOCS, SITE = ROOT / "docs", ROOT / "site"


def pages(nav: list[Any], section: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (section, title, page) of every page of the navigation."""
    for title, below in (pair for one in nav for pair in one.items()):
        if isinstance(below, str):
            yield section, title, below
        else:
            yield from pages(below, title)


def with_docstrings(text: str, package: griffe.Object | griffe.Alias) -> str:
    """Return a page whose lines `::: maskpack.…` are replaced by signature and docstring."""

    def written(found: re.Match[str]) -> str:
        about = package[found[1].removeprefix("maskpack.")]
        head = "" if about.is_class else f"```python\n{about.signature()}\n```\n\n"
        return head + (about.docstring.value if about.docstring else "") + "\n"

    return re.sub(r"^::: ([\w.]+)\n(?: +\S.*\n)*", written, text, flags=re.MULTILINE)


def check_links() -> list[str]:
    """Return the broken links of the built pages, anchors included."""
    texts = {path: path.read_text(encoding="utf-8") for path in SITE.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    lacking = []
    for path, text in texts.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            name, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:|//", name):
                continue
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in anchors and anchor not in anchors[target]):
                lacking.append(f"{path.relative_to(SITE)}: {link}")
    return sorted(set(lacking))


def main() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    found = list(pages(project["nav"]))
    if lost := {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {page for _, _, page in found}:
        sys.exit(f"the navigation of zensical.toml lacks {', '.join(sorted(lost))}")
    program = [Path(sys.executable).with_name("zensical"), "build", "--clean", "--strict"]
    built = subprocess.run(program, cwd=ROOT, check=False)
    if built.returncode:
        sys.exit(built.returncode)
    package = griffe.load("maskpack", search_paths=[str(ROOT)])
    lines = [f"# {project['site_name']}", "", f"> {project['site_description']}"]
    before = ""
    for section, title, page in found:
        text = with_docstrings((DOCS / page).read_text(encoding="utf-8"), package)
        (SITE / page).write_text(text, encoding="utf-8")
        if section != before or len(lines) == 3:
            lines += ["", f"## {section or 'Start'}", ""]
            before = section
        lines.append(f"- [{title}]({page})")
    (SITE / "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if lacking := check_links():
        sys.exit("broken links:\n" + "\n".join(lacking))
    print(f"{len(found)} pages in {SITE.name}/")


if __name__ == "__main__":
    main()
