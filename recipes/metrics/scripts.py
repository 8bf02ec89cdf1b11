"""Words of a text in any script, for the metrics that compare words."""

import re
from unicodedata import category, normalize

__all__ = ["split_unspaced", "words"]

# Scripts that are written without spaces between words: a run of them would be one word, right as a whole or wrong.
UNSPACED = re.compile(
    "(["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese: repetition marks, kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "])"
)


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and the marks on them, of any script.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces: there, every character is a word.
    """
    lower = normalize("NFC", text.lower())
    # Python's \w leaves out combining marks, and would cut words of Hindi or Arabic at their vowels.
    kept = (character if category(character)[0] in "LNM" else " " for character in lower)
    return split_unspaced("".join(kept))


def split_unspaced(text: str) -> list[str]:
    """A text cut at its spaces, and around every character of a script that has none."""
    return UNSPACED.sub(r" \1 ", text).split()
