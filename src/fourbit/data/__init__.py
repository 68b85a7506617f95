"""What a model is finetuned on: files and hub datasets as conversations, and which of their tokens carry loss.

records.py reads, recognise.py says what it found, templates.py and encode.py turn a conversation into token ids and
labels, prepare.py does all of it.
"""

from __future__ import annotations
