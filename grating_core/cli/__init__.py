"""The ``grating`` command: one module a subject, put together in :mod:`grating_core.cli.commands`."""
