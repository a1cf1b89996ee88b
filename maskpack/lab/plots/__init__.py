"""Pictures: functions from plain data to a matplotlib figure; nothing here reads files or models."""
