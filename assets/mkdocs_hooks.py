"""Pages link to pictures, results and other files of the repository as they lie on disk; the site has copies of them.

Tables are written from the results as they are when the site is built.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from visionfuse.bench.readme import fill_tables

ROOT = Path(__file__).resolve().parents[1]
# Folders of assets/ that pages link to, and what is copied of them.
COPIED = {"images": "*.png", "bench": "*.csv"}
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)\)")
COMMENT = re.compile(r"^<!-- .*? -->\n|<!-- /?value.*?-->", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for folder, pattern in COPIED.items():
        for path in sorted((ROOT / "assets" / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave the pages lead to the copies; where there is none the words stay. Marks of our tools go."""
    markdown = fill_tables(markdown, ROOT / "assets" / "bench")
    return LINK.sub(lambda match: _link(*match.groups()), COMMENT.sub("", markdown))


def _link(text: str, target: str) -> str:
    path = (ROOT / "assets" / "docs" / target).resolve().relative_to(ROOT)
    folder, name = path.parts[-2], path.name
    copied = path == Path("assets", folder, name) and path.match(COPIED.get(folder, " "))
    return f"[{text}]({folder}/{name})" if copied else text
