"""What a wheel of the package has."""

from __future__ import annotations

from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_file_that_is_no_module_is_in_the_wheel() -> None:
    """Templates, the style, the script and the like are read at run time."""
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
