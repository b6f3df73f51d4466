"""Puts model_cards/ into what is built. It lies outside src/, where readers look for it; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARDS = Path("model_cards")
PACKAGE = "hivtp_hf"


class BuildWithModelCards(build_py):
    """As setuptools builds, and the files of model_cards/ inside the package.

    Not for editable installs: there the package is src/ itself, and finds the folder beside it. (A mapping of the folder to a
    package would turn their plain path into an import hook, which type checkers and editors cannot follow.)
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._cards().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target, preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._cards()]  # what a source distribution takes along

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        cards = [] if self.editable_mode else self._cards().values()
        return [*super().get_outputs(include_bytecode), *cards]

    def _cards(self) -> dict[str, str]:
        """From every file to where it is built."""
        files = sorted(path for path in CARDS.rglob("*") if path.is_file())
        return {str(path): str(Path(self.build_lib, PACKAGE, path)) for path in files}


setup(cmdclass={"build_py": BuildWithModelCards})
