"""The verbs: one a file, each resumable, none knowing who asked.

Guarantees: a job reports its progress about ten times a second and ends when the report raises.
Does not know: HTTP, the command line, how anything is shown.
"""
