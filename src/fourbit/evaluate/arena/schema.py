"""The tables of the votes. That nobody votes twice on a pair is said here, by two UNIQUE: of `shown` and of `votes`."""

from __future__ import annotations

__all__ = ["APPLICATION", "TABLES"]

APPLICATION = 0x34624131  # "4bA1", by which SQLite files are told apart
TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE prompts (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, question TEXT NOT NULL);
CREATE TABLE answers (
    number INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, system TEXT NOT NULL, text TEXT NOT NULL,
    UNIQUE (prompt, system)
);
CREATE TABLE pairs (
    number INTEGER PRIMARY KEY, one INTEGER NOT NULL REFERENCES answers, other INTEGER NOT NULL REFERENCES answers,
    UNIQUE (one, other)
);
CREATE VIEW compared AS
    SELECT pairs.number AS pair, prompts.id AS prompt, question,
        a.system AS one, b.system AS other, a.text AS one_answer, b.text AS other_answer
    FROM pairs JOIN answers AS a ON a.number = one JOIN answers AS b ON b.number = other
        JOIN prompts ON prompts.number = a.prompt;
CREATE TABLE raters (name TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE shown (
    ticket TEXT PRIMARY KEY, rater TEXT NOT NULL REFERENCES raters, pair INTEGER NOT NULL REFERENCES pairs,
    swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)), shown_at REAL NOT NULL,
    UNIQUE (rater, pair)
) WITHOUT ROWID;
CREATE INDEX shown_pairs ON shown (pair);
CREATE TABLE votes (
    number INTEGER PRIMARY KEY, ticket TEXT NOT NULL UNIQUE REFERENCES shown,
    choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'tie', 'both bad')), voted_at REAL NOT NULL
);
CREATE TABLE corrected (
    ticket TEXT NOT NULL REFERENCES shown, choice TEXT NOT NULL, voted_at REAL NOT NULL, corrected_at REAL NOT NULL
);
CREATE INDEX corrected_tickets ON corrected (ticket);
"""
