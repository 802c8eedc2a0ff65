"""``python -m producer.cli``: the command line, for processes that start it by command."""

from producer.cli import main

main()
