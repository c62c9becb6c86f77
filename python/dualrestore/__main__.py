"""`python -m dualrestore` is the command line."""

from dualrestore.cli import main

main()
