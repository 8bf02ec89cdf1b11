import os
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onegpu.recipes.data.samples.index import fetch

PAGE = b'<html><a href="/files/tiny%2B1.tar.gz#sha256=00" data-requires-python="&gt;=3.9">tiny+1.tar.gz</a></html>'


class _Index(BaseHTTPRequestHandler):
    """An index with one project; remembers who asked for what."""

    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        known = self.headers.get("Authorization", "").removeprefix("Basic ")
        self.seen.append((self.path, b64decode(known).decode()))
        content = {"/simple/tiny-package/": PAGE, "/files/tiny%2B1.tar.gz": b"content"}.get(self.path)
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of an index."""
    monkeypatch.setattr(_Index, "seen", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_is_found_on_the_page_of_its_project(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@{address}/simple/")
    fetch("Tiny_.Package", "tiny+1.tar.gz", tmp_path)
    assert (tmp_path / "tiny+1.tar.gz").read_bytes() == b"content"
    assert _Index.seen == [("/simple/tiny-package/", "me:p@ss"), ("/files/tiny%2B1.tar.gz", "me:p@ss")]


def test_every_index_that_lacks_the_file_is_named_without_its_password(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@{address}/none")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://{address}/simple not-an-address")
    with pytest.raises(
        OSError, match=r"/none/tiny-package/: HTTP Error 404.*/simple/tiny-package/: no other.*not-an"
    ) as e:
        fetch("tiny-package", "other", tmp_path)
    assert "secret" not in str(e.value)
    assert os.listdir(tmp_path) == []


def test_pip_set_up_for_no_index_is_obeyed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="pip is set up to use no index"):
        fetch("tiny-package", "tiny+1.tar.gz", tmp_path)


def test_settings_for_downloading_come_before_general_ones_and_the_environment_before_both(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = f"http://{address}/simple", f"http://{address}/none"
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {bad}\n[download]\nindex-url = {good}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    fetch("tiny-package", "tiny+1.tar.gz", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", bad)
    with pytest.raises(OSError, match="404"):
        fetch("tiny-package", "tiny+1.tar.gz", tmp_path)
