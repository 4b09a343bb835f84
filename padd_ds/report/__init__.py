"""Runs and results as a table and as a self-contained HTML page."""

from padd_ds.report.page import write_report
from padd_ds.report.tables import TableRow, format_table

__all__ = ["TableRow", "format_table", "write_report"]
