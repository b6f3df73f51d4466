"""The site of docs/ builds without a warning, with every page and picture, and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there_and_leads_on(site):
    names = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert len(names) > 15
    start = (site / "index.html").read_text(encoding="utf-8")
    for name in names:
        assert (site / name / "index.html").exists()
        assert f'href="{name}/"' in start, f"{name} is not in the menu of mkdocs.yml"


def test_pictures_come_along_and_nothing_comes_from_elsewhere(site):
    pictures = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for source in re.findall(r'(?:<img[^>]*src|<script[^>]*src|<link[^>]*stylesheet[^>]*href)="([^"]*)"', text):
            assert not source.startswith(("http", "//")), f"{page}: {source}"
            assert (page.parent / source.partition("?")[0]).exists() or source.startswith("/"), f"{page}: {source}"
            pictures += source.endswith((".jpg", ".png"))
    assert pictures >= 2


def test_the_api_has_docstrings(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for words in ("retention_ratio", "kept_indices", "from_image_size", "convert_checkpoint"):
        assert words in text
