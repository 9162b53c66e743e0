"""The ``capruner`` command. Each subcommand is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``, light to import."""
