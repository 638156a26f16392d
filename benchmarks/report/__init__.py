"""Makes one HTML page and one Markdown file of results: `python -m benchmarks.report FILE [FILE] [--out DIR]`.

facts.py reads results files and knows nothing of layout. tables.py makes tables of text, and charts.py computes the coordinates
of charts. page.py and templates/ write the two forms of the report.
"""
