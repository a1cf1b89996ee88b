"""Rows of a comparison: each a way to solve a task with a frozen backbone at hand."""
