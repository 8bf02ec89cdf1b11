"""Rows as people have them: read, mapped, split, mixed; and the examples that a task makes of them, kept on disk."""
