"""Results files to one HTML page and one Markdown file: `python -m benchmarks.report FILE [FILE] [--out DIR]`.

facts.py: what a results file says, without any layout. tables.py, charts.py: tables as text, charts as coordinates.
page.py and templates/: the two forms of the report.
"""
