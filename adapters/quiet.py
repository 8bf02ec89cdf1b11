"""Keeps transformers from talking about things that we say better, or that are as they should be."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import logging

__all__ = ["quietly"]


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, and without the report that a fresh head is fresh: we train and save it."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
