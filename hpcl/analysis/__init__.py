"""From results folders to a decision: what ``hpcl report``, ``compare``, ``best`` and ``suggest`` say.

`hpcl.results.load_search` gives the tables; here they are turned into answers. No module needs a running Ray, and none
reads anything but tables, YAML and JSON (prototype galleries read a checkpoint besides). The notebooks in ``analysis/``
call the same functions.

    progress   best so far over the hours spent             audit       which curve to stop on, or that none can be told
    compare    several searches side by side                  signals   its statistics
    robust     the best by seeds and neighbours               verdict   its judgement
      pooled     trials of several searches as one set        replay    the stopping rule on recorded curves
      neighbours what the trials near one say of it         charts/     a function per chart
      notes      differences from the research notes        report/     the page: answer, sections, table, gallery
    suggest    the space to search next
      ranges     what was seen of a field's range
      edges      ranges that are widened or narrowed
"""
