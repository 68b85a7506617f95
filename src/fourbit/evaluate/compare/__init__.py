"""From a folder of models to a ranking: answers, judgements, and a page that shows both.

contenders.py finds the models, adapters and answers in a folder. job.py makes what answers are missing, has them
judged, and ranks; report.py and report.html.j2 are the page.
"""

from __future__ import annotations
