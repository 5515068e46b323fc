"""Links of README, docs and examples are valid, and the pages build as a site."""

import doctest
import re
import subprocess
import sys

import allowed_skips
import pytest

from tests.e2e.laptop import REPOSITORY
from tools.checks import docs_site

PAGES = {
    path.relative_to(REPOSITORY).as_posix()
    for path in [*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("examples/*/README.md")]
}


def test_every_link_leads_to_a_file_of_the_repository_and_one_heading():
    files = docs_site.files_of_git(REPOSITORY)
    assert {"README.md", *PAGES} <= files
    assert docs_site.broken_links(REPOSITORY, files) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[a](other.md#a-heading-with-code)", None),
        ("[a](#here) and ![a](../picture.png)", None),
        ("`[a](absent.md)` and ``a ` [a](absent.md)``", None),
        ("[a](https://example.org/absent.md)", None),
        ("[a](absent.md)", "there is no file docs/absent.md"),
        ("a [link\nover lines](absent.md)", "there is no file docs/absent.md"),
        ("![a](absent.png)", "there is no file docs/absent.png"),
        ('[a](other.md "a title")', "there is no file"),
        ("[a]: absent.md", "there is no file docs/absent.md"),
        ("[a](Other.md)", "there is no file docs/Other.md"),
        ("[a](../ignored.txt)", "there is no file ignored.txt"),
        ("[a](../../outside.md)", "there is no file ../outside.md"),
        ("[a](/picture.png)", "there is no file /picture.png"),
        ("[a](../folder)", "there is no file folder"),
        ("[a](other.md#absent)", "docs/other.md has 0 headings of that anchor"),
        ("[a](#absent)", "docs/page.md has 0 headings of that anchor"),
        ("[a](other.md#twice)", "docs/other.md has 2 headings of that anchor"),
        ("[a](other.md#a-comment)", "docs/other.md has 0 headings of that anchor"),
        ("[a](../picture.png#b)", "picture.png has 0 headings of that anchor"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(line, fault, tmp_path):
    texts = {
        "docs/page.md": f"# Here\n\n{line}\n",
        "docs/other.md": "# A heading, with `code`\n\n```\n# a comment\n```\n" + 2 * "\n## Twice\n",
        "picture.png": "",
        "folder/file.md": "",
    }
    for name, text in (texts | {"ignored.txt": ""}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    faults = docs_site.broken_links(tmp_path, set(texts))
    assert len(faults) == (fault is not None)
    if fault:
        assert faults[0].startswith("docs/page.md: ") and fault in faults[0]


def test_files_that_git_ignores_are_no_targets(tmp_path):
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    for name, text in {".gitignore": "*.txt\n", "a.txt": "", "b.md": ""}.items():
        (tmp_path / name).write_text(text)
    assert docs_site.files_of_git(tmp_path) == {".gitignore", "b.md"}


def test_the_examples_of_the_check_hold():
    assert doctest.testmod(docs_site) == doctest.TestResults(failed=0, attempted=3)


def test_the_index_lists_every_page_once():
    """Pages are in the sections from which the site's navigation is built."""
    listed = [
        page
        for section in docs_site.navigation(REPOSITORY)[2:]
        for entries in section.values()
        for entry in entries
        for page in entry.values()
    ]
    assert sorted(listed) == sorted(PAGES - {docs_site.INDEX})
    assert set(docs_site.reachable(REPOSITORY)) >= PAGES


def test_the_readme_fits_its_120_lines():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def test_pages_that_code_names_exist():
    """Names are `docs/NAME.md` in docstrings, comments, messages and the settings reference."""
    named = {
        (name, page)
        for name in docs_site.files_of_git(REPOSITORY)
        if name.endswith((".py", ".md", ".yaml", ".sh", ".sbatch", "Makefile"))
        and not name.startswith("tests/")
        for page in re.findall(r"\bdocs/\w+\.md", (REPOSITORY / name).read_text())
    }
    assert named and sorted(pair for pair in named if pair[1] not in PAGES) == []


OF_OTHERS = {
    "FILE.py",  # the user's own
    "verl/trainer/ttis/presampling_selector.py",
    "verl/trainer/ppo/ray_trainer.py",
    "recipe/ours/mopps.py",
    "recipe/dps/task_sampler.py",
    "config.py",  # of litgpt
    "mine.py",  # of a user
    "my_task/reward.py",  # written on its page
    "my_reward.py",  # the same
    "tools/convert_torch_dist_to_hf.py",  # of slime
    "megatron_prepo/selection/NAME.py",
}
"""Python files that pages name and that are not in this repository."""


def test_modules_that_pages_name_exist():
    """Modules are named in full or by the end of their path, such as `actor/model.py`."""
    paths = [f"/{file}" for file in docs_site.files_of_git(REPOSITORY)]
    named = {
        (page, name)
        for page in {"README.md", *PAGES}
        for name in re.findall(r"`((?:\w+/)*\w+\.py)[:`]", (REPOSITORY / page).read_text())
        if name not in OF_OTHERS
    }
    found = {(page, name) for page, name in named if any(p.endswith(f"/{name}") for p in paths)}
    assert named and sorted(named - found) == []


@pytest.mark.slow
def test_the_site_builds_and_has_every_page_with_the_diagram(tmp_path):
    """`make docs-site` builds it with mkdocs, whose --strict checks links and anchors, too."""
    if not (REPOSITORY / ".venv-docs/ready").exists() and allowed_skips.no_index():
        pytest.skip("no answer from the package index")
    done = subprocess.run(
        ["make", "docs-site", f"SITE={tmp_path}", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        html = page.removesuffix(".md").replace("/README", "/index") + ".html"
        assert "<article" in (tmp_path / html).read_text(), page
    home = (tmp_path / "index.html").read_text()
    assert '<pre class="mermaid"><code>' in home and 'src="docs/demo.png"' in home
    assert (tmp_path / "docs/demo.png").stat().st_size
    # the anchors are those that the check in this file knows
    for page in ("docs/reliability.md", "docs/selection.md", "docs/models.md"):
        html = (tmp_path / page.replace(".md", ".html")).read_text()
        anchors = docs_site.anchors((REPOSITORY / page).read_text())
        assert set(anchors) <= set(re.findall(r'<h\d id="([^"]+)"', html)), page
