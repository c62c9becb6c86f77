"""One verb a file; each has one `command`. Does not know: how the others work."""
