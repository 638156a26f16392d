"""Result files to one HTML page and one Markdown file: `python -m benchmarks.report FILE [FILE] [--out DIR]`.

facts.py: what a results file says, without any layout. charts.py: SVG. page.py, markdown.py: the two forms of the report.
"""
