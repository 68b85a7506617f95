"""A language model as the judge of pairs of answers.

requests.py makes of the answers what is asked, each pair in both orders; template.py and prompts/ hold the words.
endpoint.py asks an OpenAI-compatible server once, asking.py until there is an answer, money.py watches the cost and
store.py keeps every reply, so that none is paid for twice. verdicts.py reads the replies, ratings.py makes records of
them, summary.py and length.py count. job.py is all of it.
"""

from __future__ import annotations
