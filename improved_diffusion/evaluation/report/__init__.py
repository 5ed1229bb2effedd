"""The report of evaluation directories as one HTML file: `contents` gathers, `page` writes."""
