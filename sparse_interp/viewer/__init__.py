"""The circuit page: template, script and style of one self-contained HTML file."""
