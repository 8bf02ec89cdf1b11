"""Fetches one file by its name from the package index that pip is set up for, and runs nothing of it.

`pip download` of a source archive runs its build to learn its metadata, and no option of pip keeps it from that. So
pip is asked where its indexes are, and the page of the project there (https://peps.python.org/pep-0503/) for the file.
"""

import ast
import re
import shutil
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urldefrag, urljoin, urlsplit
from urllib.request import Request, urlopen

__all__ = ["fetch"]

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT = 60.0  # seconds without an answer


def fetch(project: str, file: str, folder: Path) -> None:
    """Put a file of a project into a folder. Its content is not checked.

    Raises:
        OSError: no index has it, or none can be reached.
    """
    settings = _pip_settings()
    pages = list(_project_pages(project, settings))
    failures = [] if pages else ["pip is set up to use no index"]
    for page in pages:
        try:
            url = _link(page, file, settings)
            with _opened(url, settings) as answer, (folder / file).open("wb") as target:
                return shutil.copyfileobj(answer, target)
        except (OSError, HTTPException, ValueError) as cause:
            failures.append(f"{_without_password(page)}: {cause}")
    raise OSError("; ".join(failures))


def _pip_settings() -> dict[str, str]:
    """What pip's files and environment set for `pip download`; the environment wins, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    written = [line.partition("=")[::2] for line in done.stdout.splitlines()]
    return {
        key.removeprefix(f"{section}."): str(ast.literal_eval(value))
        for section in ("global", "download", ":env:")
        for key, value in written
        if key.startswith(f"{section}.")
    }


def _project_pages(project: str, settings: Mapping[str, str]) -> Iterator[str]:
    if settings.get("no-index", "0").lower() in ("1", "true", "yes", "on"):
        return
    normalised = re.sub(r"[-_.]+", "-", project).lower()
    for index in (settings.get("index-url", DEFAULT_INDEX), *settings.get("extra-index-url", "").split()):
        page = f"{index.rstrip('/')}/{normalised}/"
        yield f"{page}index.html" if page.startswith("file:") else page


def _link(page: str, file: str, settings: Mapping[str, str]) -> str:
    """The address of a file that a page links to."""
    with _opened(page, settings) as answer:
        links = _Links()
        links.feed(answer.read().decode("utf-8"))
    for link in links.found:
        url = urldefrag(urljoin(page, link)).url
        if unquote(urlsplit(url).path).rpartition("/")[2] == file:
            return url
    raise OSError(f"no {file} there")


def _opened(url: str, settings: Mapping[str, str]) -> Any:
    """An answer, as a binary file. A name and password in the address go to that host only."""
    parts = urlsplit(url)
    request = Request(parts._replace(netloc=_host(parts)).geturl(), headers={"Accept": "text/html, */*;q=0.1"})
    if parts.username:
        known = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {b64encode(known.encode()).decode()}")
    return urlopen(request, timeout=TIMEOUT, context=ssl.create_default_context(cafile=settings.get("cert")))


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=_host(parts)).geturl()


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


class _Links(HTMLParser):
    """The targets of the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if tag == "a" and key == "href" and value]
