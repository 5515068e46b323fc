"""The documentation as a site, and the check of its links.

    make docs-site                     # the site, in build/docs-site
    python tools/checks/docs_site.py          # the check; needs neither mkdocs nor a network

`mkdocs.yml` names this file as its hook. The site has the layout of the repository (README.md is
its home, then docs/ and examples/), so that a relative link is right in a clone, on a code host and
on the site. The navigation is that of docs/index.md.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
INDEX = "docs/index.md"

CODE = re.compile(r"^ *(```|~~~).*?^ *\1|(`+).+?\2", re.M | re.S)
TARGET = re.compile(r"\]\(([^)]*)\)|^ {0,3}\[[^\]]+\]:(.*)", re.M)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.M)


def links(text: str) -> Iterator[str]:
    """Return the targets of the links of a Markdown text that are not the web's.

    >>> list(links("[a](b.md#c), ![d](e.png), [f](https://g), `[h](i)`"))
    ['b.md#c', 'e.png']
    """
    for found in TARGET.finditer(CODE.sub("", text)):
        target = (found[1] or found[2] or "").strip()
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> Counter:
    """Return how often each heading's anchor occurs, as GitHub and `mkdocs.yml` make them.

    >>> dict(anchors("# `config.json`: all of it"))
    {'configjson-all-of-it': 1}
    """
    fenced = re.compile(r"^ *(```|~~~).*?^ *\1", re.M | re.S)
    titles = (found[1].lower() for found in HEADING.finditer(fenced.sub("", text)))
    return Counter(re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles)


def resolved(page: str, target: str) -> tuple[str, str]:
    """Return path, relative to the repository, and anchor of a link on a page.

    >>> resolved("docs/data.md", "../README.md#use"), resolved("docs/data.md", "#data")
    (('README.md', 'use'), ('docs/data.md', 'data'))
    """
    path, _, anchor = target.partition("#")
    return normpath(join(dirname(page), path)) if path else page, anchor


def files_of_git(root: Path) -> set[str]:
    """Return the files that are in the repository or may be added to it: not those it ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return {name for name in names.split("\0") if name and (root / name).exists()}


def broken_links(root: Path, files: set[str]) -> list[str]:
    """Return one line for each link between `files` that does not lead to one of them."""
    texts = {name: (root / name).read_text() for name in sorted(files) if name.endswith(".md")}
    faults = []
    for page, text in texts.items():
        for target in links(text):
            path, anchor = resolved(page, target)
            if path not in files:
                faults.append(f"{page}: {target}: there is no file {path}")
            elif anchor and (count := anchors(texts.get(path, ""))[anchor]) != 1:
                faults.append(f"{page}: {target}: {path} has {count} headings of that anchor")
    return faults


def reachable(root: Path) -> list[str]:
    """Return the files to which links lead from the home page, itself first."""
    found, waiting = {}, [HOME]
    while waiting:
        if (page := waiting.pop(0)) in found:
            continue
        found[page] = None
        if page.endswith(".md"):
            waiting += (resolved(page, target)[0] for target in links((root / page).read_text()))
    return list(found)


def navigation(root: Path) -> list:
    """Return mkdocs' `nav`: home, index, then the index's sections with their links."""
    sections = re.split(r"^## (.+)\n", (root / INDEX).read_text(), flags=re.M)[1:]
    return [
        {"Home": HOME},
        {"All pages": INDEX},
        *(
            {
                title: [
                    {name: resolved(INDEX, target)[0]}
                    for name, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)
                ]
            }
            for title, text in zip(sections[::2], sections[1::2])
        ),
    ]


def on_config(config):
    """Set the navigation (an event of mkdocs)."""
    config.nav = navigation(ROOT)


def on_files(files, config):
    """Replace the files of docs/ by all that links lead to, under their paths in the repository."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in reachable(ROOT):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    faults = broken_links(ROOT, files_of_git(ROOT))
    print(*faults, sep="\n", end="\n" if faults else "")
    sys.exit(bool(faults))
