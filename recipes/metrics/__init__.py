"""From what an evaluation collected to scores: pure functions, one library a file, and none of them imported here."""
