"""Pictures: plain data to a matplotlib figure, one picture a file; nothing here reads files or models."""
