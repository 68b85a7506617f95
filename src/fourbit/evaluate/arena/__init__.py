"""People as judges of pairs of answers: what they are shown, and what they say of it.

pairs.py lays out what is compared and in which turn, ballots.py says what a rater is shown, store.py keeps every vote
in an SQLite file and chooses what comes next, votes.py makes ratings of the votes, survey.py counts for whoever
organises it, and live.py gets answers from models that run. No web framework is imported here; `fourbit.serve` shows it
in a browser.
"""

from __future__ import annotations
