"""Hooks of mkdocs: pages for what lies outside docs/, and links that lead to them.

Links in the repository are relative to the file, so that they work where it is hosted. The site has a page for the README
(its first), for every Markdown file, file and folder that a page links to, and for the names of `fedspallm_appfl`.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = "fedspallm_appfl"
LINK = re.compile(r"(\]\()(?!#|[a-z]+:)([^)#\s]+)")
CODE = re.compile(r"(^````.*?^````|^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".j2": "yaml", ".sh": "bash", ".txt": "text", ".toml": "toml"}
STYLE = """.md-grid { max-width: 72rem; }
.md-typeset table:not([class]) { font-size: 0.68rem; }
.md-typeset table:not([class]) td, .md-typeset table:not([class]) th { padding: 0.5em 0.8em; min-width: 0; }
.md-typeset td code, .md-typeset th code { word-break: normal; }
.md-typeset pre > code { line-height: 1.25; }
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those of files that any page links to, and so on."""
    made = {"index.md": (ROOT / "README.md").read_text("utf-8"), "api.md": names(), "site.css": STYLE}
    named = [one for one in map(str, config.nav) for one in re.findall(r"'([\w./]+\.md)'", one)]
    waiting = [at for one in named if (at := origin(one)) and at.parent != ROOT / "docs" and one not in made]
    texts = [(ROOT / "docs" / file.src_uri, file.content_string) for file in files.documentation_pages()]
    texts.append((ROOT / "README.md", made["index.md"]))
    while texts or waiting:
        if texts:
            waiting += targets(*texts.pop())
            continue
        path = waiting.pop()
        name = address(path)
        if name in made or files.get_file_from_path(name):
            continue
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
            continue
        made[name] = page(path)
        texts.append((path if path.is_file() else path / "listing", made[name]))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = origin(page.file.src_uri)
    if here is None:
        return markdown

    def turned(match: re.Match) -> str:
        there = posixpath.relpath(address((here.parent / match[2]).resolve()), posixpath.dirname(page.file.src_uri))
        return match[1] + there

    return "".join(part if part.startswith("`") else LINK.sub(turned, part) for part in CODE.split(markdown))


def targets(file: Path, text: str) -> list[Path]:
    """Files and folders outside docs/ that a text links to."""
    found = [(file.parent / match[2]).resolve() for match in LINK.finditer(CODE.sub("", text))]
    return [one for one in found if ROOT / "docs" not in one.parents]


def address(path: Path) -> str:
    """The page of a file or a folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if path.is_dir():
        return f"{name}/README.md" if (path / "README.md").exists() else f"{name}/listing.md"
    if path.suffix in (".md", ".png", ".svg"):
        return name.removeprefix("docs/")
    return f"{name}.md"


def origin(uri: str) -> Path | None:
    """The file of the repository that a page shows; in a listing, a file of its folder. None for a page that is made."""
    if uri in ("index.md", "api.md"):
        return ROOT / "README.md" if uri == "index.md" else None
    if (ROOT / "docs" / uri).exists():
        return ROOT / "docs" / uri
    return ROOT / (uri if (ROOT / uri).exists() else uri.removesuffix(".md"))


def page(path: Path) -> str:
    """A file or folder as Markdown."""
    if path.is_dir() and not (path / "README.md").exists():
        return listing(path)
    if path.is_dir() or path.suffix == ".md":
        return (path / "README.md" if path.is_dir() else path).read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text("utf-8"))["cells"]
        return "\n\n".join(
            fenced("".join(cell["source"]), "python") if cell["cell_type"] == "code" else "".join(cell["source"])
            for cell in cells
        )
    return f"# {path.relative_to(ROOT)}\n\n" + fenced(path.read_text("utf-8"), LANGUAGES.get(path.suffix, "text"))


def fenced(text: str, language: str) -> str:
    """Text between fences that it does not hold."""
    return f"````{language}\n{text.rstrip()}\n````"


def listing(folder: Path) -> str:
    """The files of a folder, with the first line of what each says of itself."""
    rows = [
        f"| [{file.name}]({file.name}) | {about(file)} |"
        for file in sorted(folder.iterdir())
        if file.suffix in LANGUAGES and file.name != "__init__.py"
    ]
    return f"# {folder.relative_to(ROOT)}\n\n" + "\n".join(["| file | |", "| --- | --- |", *rows])


def about(file: Path) -> str:
    """The first line of a docstring, or of the comment that a file begins with."""
    text = file.read_text("utf-8")
    if file.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "")


def names() -> str:
    """The page of the names that the package offers, by the module that has them."""
    tree = ast.parse((ROOT / "src" / PACKAGE / "__init__.py").read_text("utf-8"))
    [table] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_WHERE"
    ]
    parts = [
        f"## {module}\n\n" + "\n\n".join(f"::: {PACKAGE}.{module}.{name}" for name in offered)
        for module, offered in table.items()
    ]
    return "\n\n".join(["# Python\n\n`import fedspallm_appfl as fs`, then `fs.prune` and so on.", *parts])
