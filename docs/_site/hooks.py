"""What makes a site of pages that also read well in the repository: pictures from beside docs/ come along, other links go."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s#]+)[^)\s]*\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds the pictures that pages show from elsewhere in the repository."""
    wanted = {
        match[3] for page in files.documentation_pages() for match in _LINK.finditer(page.content_string) if match[1] == "!"
    }
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pictures from their place on the site; other files of the repository, which has no address here, by their names."""

    def replaced(match: re.Match[str]) -> str:
        picture, words, name = match.groups()
        if picture:
            return f"![{words}]({name})"
        return words if name in words else f"{words} (`{name}`)"

    return _LINK.sub(replaced, markdown)
