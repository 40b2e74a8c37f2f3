"""
A page on a memory itself (`page.py`): from the memory alone (`rows.py`), and from what it does on text (`use.py`
measures it, `texts.py` shows it). `plots.py` draws the same figures for papers.
"""
