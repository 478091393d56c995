"""A real Prometheus for the tests, from the system's packages: no wheel contains it.

If it is not installed, its tests are skipped; with ``SINGLETON_TEST_PROMETHEUS=required`` in the
environment, as in CI, they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.servers import Server
from tests.helpers.waiting import wait_until


def find(name: str) -> str:
    """Return the path of one of Prometheus's programs; skip the test if it is not installed."""
    found = shutil.which(name)
    if found:
        return found
    assert os.environ.get("SINGLETON_TEST_PROMETHEUS") != "required", f"no {name} here"
    pytest.skip(f"no {name} here")


class Prometheus(Server):
    """A server that scrapes one exporter every second.

    :param target: the host and port of the exporter.
    :param rules: the path of a file of rules.
    """

    def __init__(self, target: str, rules: Path) -> None:
        program = find("prometheus")
        super().__init__("prometheus")
        config = {
            "global": {"evaluation_interval": "1s"},
            "scrape_configs": [
                {
                    "job_name": "celery-singletons",
                    "scrape_interval": "1s",
                    "scrape_timeout": "1s",
                    "static_configs": [{"targets": [target]}],
                }
            ],
            "rule_files": [str(rules)],
        }
        # Write the configuration as JSON, which is valid YAML.
        (self.directory / "prometheus.yml").write_text(json.dumps(config))
        self.spawn(
            program,
            f"--config.file={self.directory}/prometheus.yml",
            f"--storage.tsdb.path={self.directory}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        )
        wait_until(self._is_ready, "Prometheus is ready")

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Return a dict that maps the values of the labels, in the order of the labels' names, to
        the present value of an expression.

        :raises AssertionError: Prometheus refuses the expression.
        """
        answer = self._get("/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        assert answer["status"] == "success", answer
        hidden = ("__name__", "instance", "job")
        return {
            tuple(
                value for name, value in sorted(each["metric"].items()) if name not in hidden
            ): float(each["value"][1])
            for each in answer["data"]["result"]
        }

    def rules(self) -> dict[str, str]:
        """Return a dict that maps the name of each rule to the rule's health."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def _get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as found:
                return json.load(found)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)

    def _is_ready(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"Prometheus did not start:\n{self.log.read_text()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5):
                return True
        except OSError:
            return False
