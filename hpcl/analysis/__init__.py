"""From results folders to a decision: what ``hpcl report``, ``compare``, ``best`` and ``suggest`` say.

`hpcl.results.load_search` gives the tables; here they are turned into answers. No module needs a running Ray, and none
reads anything but tables, YAML and JSON (prototype galleries read a checkpoint besides). The notebooks in ``analysis/``
call the same functions.

    leading    the trial that the page is about             audit      which curve to stop on, or that none can be told
    progress   best so far over the hours spent               signals  its statistics
    compare    several searches side by side                  verdict  its judgement
    robust     the best by seeds and neighbours               replay   the stopping rule on recorded curves
      pooled     trials of several searches as one set      suggest    the space to search next
      neighbours what the trials near one say of it           ranges   what was seen of a field's range
      notes      differences from the research notes          edges    ranges that are widened or narrowed
    charts/    a function per chart                         report/    the page: answer, sections, table, gallery
    text       counts, tables and names in lines
"""
