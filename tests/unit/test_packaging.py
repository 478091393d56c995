"""The wheel of the package is complete."""

from __future__ import annotations

from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_data_files_are_in_the_wheel() -> None:
    """Templates, the style sheet, the script and other data files are read at run time."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = {
        package: names.replace(",", " ").split()
        for package, names in setup["options.package_data"].items()
    }
    files = [
        file
        for file in (ROOT / "celery_singleton_state").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert {"py.typed", "page.html", "page.css", "page.js"} <= {file.name for file in files}
    for file in files:
        package = ".".join(file.parent.relative_to(ROOT).parts)
        assert any(fnmatch(file.name, each) for each in patterns.get(package, ())), file
