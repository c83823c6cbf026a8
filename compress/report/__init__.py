"""Report of a run: the writer of `report.json`, its typed mirror, and the pages made from it."""
