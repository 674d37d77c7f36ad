"""From results folders to a decision: what ``hpcl report``, ``compare``, ``best`` and ``suggest`` say.

`hpcl.results.load_search` gives the tables; here they are turned into answers. No module needs a running Ray, and none
reads anything but tables, YAML and JSON (the prototype galleries read a checkpoint besides).

    progress      best so far over the hours spent            replay     other stopping rules on the recorded curves
    audit         which curve to stop on, or that none is     robust     the best by neighbours and seeds, not by luck
    compare       several searches side by side               suggest    the space to search next
    charts/       one file per question that a chart answers  report/    the page
"""
