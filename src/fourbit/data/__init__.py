"""What a model is finetuned on: files and hub datasets as conversations, and which of their tokens carry loss.

records.py reads, recognise.py says what it found and messages.py what a turn is, templates.py and encode.py turn a
conversation into token ids and labels, prepare.py does all of it. survey.py, checks.py, duplicates.py, colours.py and
page.py judge data before it is trained on; lint.py does all of that.
"""

from __future__ import annotations
