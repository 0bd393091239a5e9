"""Reports: report.html to read, report.md for terminals and reviews, report.json for programs."""
