"""Texts of user interfaces, in English and in another language.

One row: {"source": "Select all", "target": "Alle auswählen"}
"""

import gettext
import io
from collections.abc import Iterator, Mapping

from .archives import Archive
from .choosing import Row, first_each, mixed

__all__ = ["interface_de", "interface_zh"]

CONTEXT_END = "\x04"  # between the context of a message and the message


def interface_de(django: Archive, jupyterlab: Archive) -> list[Row]:
    """English to German."""
    return _interface((django, "/locale/de/LC_MESSAGES/"), (jupyterlab, "/locale/de_DE/LC_MESSAGES/"))


def interface_zh(django: Archive, jupyterlab: Archive) -> list[Row]:
    """English to simplified Chinese."""
    return _interface((django, "/locale/zh_Hans/LC_MESSAGES/"), (jupyterlab, "/locale/zh_CN/LC_MESSAGES/"))


def _interface(*catalogues: tuple[Archive, str]) -> list[Row]:
    """Messages of all catalogues, mixed; of two translations of one text, the first."""
    pairs = (pair for archive, folder in catalogues for pair in _pairs(archive, folder))
    return mixed(first_each(pairs, lambda row: str(row["source"])))


def _pairs(archive: Archive, folder: str) -> Iterator[Row]:
    members = sorted(name for name in archive.names() if folder in name and name.endswith(".mo"))
    if not members:
        raise ValueError(f"no catalogues in {folder}")
    for member in members:
        for message, translation in _messages(archive.read(member)).items():
            source, target = message.strip(), translation.strip()
            if source and target and source != target:
                yield {"source": source, "target": target}


def _messages(catalogue: bytes) -> dict[str, str]:
    """Messages and translations, without the header, plural forms, and messages that mean something by their context.

    The standard library reads the format but has no public way to list what it read.
    """
    found: Mapping[str | tuple[str, int], str] = vars(gettext.GNUTranslations(io.BytesIO(catalogue)))["_catalog"]
    return {key: text for key, text in found.items() if isinstance(key, str) and key and CONTEXT_END not in key}
