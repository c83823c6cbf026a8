"""What a run tells people (`report.html`) and programs (`report.json`)."""
