"""What a browser sees of fourbit: the pages on which people compare answers.

arena.py holds the routes, markdown.py makes text safe to show, guard.py sets limits and headers, run.py listens, and
pages/ is what the browser gets, whole and without anything from elsewhere. The web framework is imported only here.
"""

from __future__ import annotations
