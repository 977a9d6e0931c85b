"""A run as one page to read: `collect` listens to events in a bounded space, `page` draws what it gathered.

report = Report(spec.input)
run(spec, observers=(report,))
Path("report.html").write_text(render(report.data()))
"""

from __future__ import annotations

from batch_client.report.collect import Report, ReportData
from batch_client.report.page import render

__all__ = ["Report", "ReportData", "render"]
