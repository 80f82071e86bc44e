"""What the site has beside the pages in docs/: changes, the reference, files linked to, flowcharts as pictures."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from flowchart import with_pictures
from notebooks import notebooks, page_of
from reference import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")
ENTRY = re.compile(r'<h2 id="(fluxloop\.[^"]+)"')
LANGUAGES = {".py": "python", ".sh": "bash"}
PAGES = {
    "changelog.md": ROOT / "CHANGELOG.md",
    **{f"notebooks/{path.stem}.md": path for path in notebooks()},
}
"""Pages of the site whose source is not in docs/."""


def source_of(page: str) -> Path:
    """Return the file that a page is made of."""
    return PAGES.get(page, DOCS / page)


def text_of(page: str) -> str:
    """Return a page that is made of a file."""
    source = source_of(page)
    return page_of(source) if source.suffix == ".ipynb" else source.read_text()


def to_site(page: str, link: str) -> str | None:
    """Return where a link of a page leads on the site, seen from that page; None where it stays as it is."""
    target = (source_of(page).parent / link).resolve()
    known = {source: name for name, source in PAGES.items()}
    if target in known:
        place = known[target]
    elif target.is_relative_to(DOCS) and target.suffix in (".md", ".png", ".svg"):
        place = target.relative_to(DOCS).as_posix()
    elif target.is_file() and target.is_relative_to(ROOT):
        place = shown_at(target)
    else:
        return None
    return posixpath.relpath(place, posixpath.dirname(page) or ".")


def shown_at(file: Path) -> str:
    """Return the page that shows a file of the repository."""
    return f"files/{file.relative_to(ROOT).as_posix().removesuffix('.md')}.md"


def shown(file: Path) -> str:
    """Return a page that shows a file as it is; of one in Markdown the links are left out."""
    text = file.read_text()
    if file.suffix == ".md":
        return LINK.sub("]", text)
    name = file.relative_to(ROOT).as_posix()
    return f"# {name}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    made = dict(reference())
    made |= {page: text_of(page) for page in PAGES}
    for page in [*PAGES, *(file.src_uri for file in files.documentation_pages())]:
        for link, _ in LINK.findall(text_of(page)):
            target = (source_of(page).parent / link).resolve()
            place = to_site(page, link)
            if place is not None and posixpath.normpath(posixpath.join(posixpath.dirname(page), place)) == shown_at(
                target
            ):
                made[shown_at(target)] = shown(target)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to the pages of the site, and draw flowcharts, for which Mermaid's script would be loaded."""
    name = page.file.src_uri
    if not source_of(name).is_file():
        return markdown

    def changed(match: re.Match[str]) -> str:
        place = to_site(name, match[1])
        return match[0] if place is None else f"]({place}{match[2] or ''})"

    return with_pictures(LINK.sub(changed, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> None:
    """Fail where the reference shows a name and says nothing of it.

    Raises:
        PluginError: An entry has no sentence.
    """
    _, *entries = ENTRY.split(html) if page.file.src_uri.startswith("reference/") else [html]
    silent = [name for name, body in zip(entries[::2], entries[1::2], strict=True) if "<p>" not in body]
    if silent:
        raise PluginError(f"{page.file.src_uri} has no docstring of {', '.join(silent)}")
