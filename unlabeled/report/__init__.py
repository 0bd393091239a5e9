"""From evidence to pages: report.html for people, report.md for terminals and reviews, report.json for programs."""
